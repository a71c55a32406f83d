"""Turn pieces of a source into a file's bytes: merge, encode, round, reorder and check them.

Weights that are not merged and keep their form are copied, so frozen weights stay the same byte for
byte. MXFP4 encoding uses the scales of least error (`mxfp4.encode`), as training with `model.qat`
does, so such a run's files hold exactly the weights that it computed with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from gptoss_jax.errors import UserError
from gptoss_jax.ops import mxfp4
from gptoss_jax.parameters import table
from gptoss_jax.types import MXFP4
from gptoss_jax.weights.merged import Cost, Merged, Report
from gptoss_jax.weights.names import Form, Part, Tensor, shapes
from gptoss_jax.weights.sources import (
    Source,
    decode_piece,
    is_finite,
    pack_exactly,
    pieces,
    read_as,
)

_KEEP_OR_FORCE = (
    "write the experts in bf16 (--experts bf16, experts='dense'), or train with model.qat; "
    "--force (force=True) rounds them all the same"
)


class Coder:
    """Turns a source's pieces into a file's bytes, and records the resulting errors in `report`."""

    def __init__(self, source: Source, *, form: Form, force: bool) -> None:
        """Write experts in `form`; `force` writes weights even if they lose what was tuned."""
        self.source = source
        self.form: Form = form
        self.force = force
        self.report = Report()
        # Scales of the blocks that were just encoded, kept because they are written next.
        self._scales: dict[tuple[str, int | None, int], np.ndarray] = {}

    def pieces(self, tensor: Tensor, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield the pieces of a tensor in file order.

        Raises:
            UserError: the tensor has NaN or infinity, an update does not survive (see
                `Report.check`), or dense experts are to be rounded (see `sources.pack_exactly`).
        """
        for part in tensor.parts:
            cost = Cost(part.path, part.layer, "MXFP4" if tensor.packed else dtype.name)
            for rows in self._cut(part):
                piece = self._piece(part, rows, dtype=dtype, cost=cost)
                if piece.dtype != dtype:
                    with np.errstate(over="ignore"):  # an overflow is found below
                        piece = piece.astype(dtype)
                piece = np.ascontiguousarray(part.to_file(piece))
                if not tensor.packed and not is_finite(piece):
                    name = self.source.describe(part.path, part.layer)
                    raise UserError(f"{name} has NaN or infinity as {dtype}")
                yield piece
            if cost.weight:
                self.report.costs.append(cost)
                trains_packed = self.source.config.qat and table.row(part.path).packable
                if not self.force and not trains_packed:  # a QAT run trained these very values
                    self.report.check(cost)

    def _cut(self, part: Part) -> list[range]:
        """Cut a leaf into pieces, which are smaller if they are converted to float32."""
        config = self.source.config
        form = "dense" if isinstance(self.source, Merged) else self.form
        return pieces(part.path, config, form, shapes(config)[part.path])

    def _piece(self, part: Part, rows: range, *, dtype: np.dtype, cost: Cost) -> np.ndarray:
        """Return rows of a leaf, or of its MXFP4 blocks or scales, in memory order."""
        at = (part.path, part.layer, rows.start)
        if part.field == "scales" and at in self._scales:
            return self._scales.pop(at)
        read = partial(self.source.read, part.path, part.layer, start=rows.start, stop=rows.stop)
        update = None
        if isinstance(self.source, Merged):
            update = self.source.update(part.path, part.layer, start=rows.start, stop=rows.stop)
        config, packs = self.source.config, table.row(part.path).packable
        quantises = packs and config.qat and config.experts == "dense"
        recodes = quantises or (packs and self.form != config.experts)
        if update is None and not recodes:
            return read(part.field)
        if update is None and not quantises and self.form == "dense":
            return np.asarray(
                read_as(self.source, part.path, part.layer, form="dense", rows=rows, dtype=dtype)
            )
        if packs and config.experts == "mxfp4":
            stored = MXFP4(read("blocks"), read("scales"))  # pyright: ignore[reportArgumentType]
        else:
            stored = read("value")
        name = self.source.describe(part.path, part.layer)
        value = self._coded(stored, update, dtype=dtype, cost=cost, packs=packs, name=name)
        if isinstance(value, np.ndarray):
            return value
        self._scales[at] = np.asarray(value.scales)
        return np.asarray(value.blocks)

    def _coded(
        self,
        stored: np.ndarray | MXFP4,
        update: np.ndarray | None,
        *,
        dtype: np.dtype,
        cost: Cost,
        packs: bool,
        name: str,
    ) -> np.ndarray | MXFP4:
        """Return rows with their update, as they are written; rows without one stay as stored."""
        before = _float32(stored)
        exact = before if update is None else before + update
        if not is_finite(exact):  # checked here, because MXFP4 bytes would not show it
            raise UserError(f"{name} has NaN or infinity")
        frozen = np.zeros(len(before), bool)
        if update is not None:
            frozen = ~np.any(update.reshape(len(update), -1), axis=1)
            exact[frozen] = before[frozen]  # adding 0 to -0 would change its sign bit
        # Dense weights are rounded to their dtype before they are encoded, as in training.
        kept = exact if isinstance(stored, MXFP4) else exact.astype(stored.dtype)
        if packs and self.form == "mxfp4":
            packed = None
            if not (isinstance(stored, MXFP4) or self.force or self.source.config.qat):
                packed = pack_exactly(stored, name, otherwise=_KEEP_OR_FORCE)
            if packed is None or update is not None:
                packed = mxfp4.encode(kept, scale_rule="least_error")
            blocks, scales = np.asarray(packed.blocks), np.asarray(packed.scales)
            if isinstance(stored, MXFP4):
                blocks[frozen] = np.asarray(stored.blocks)[frozen]
                scales[frozen] = np.asarray(stored.scales)[frozen]
            written = MXFP4(blocks, scales)  # pyright: ignore[reportArgumentType]
        else:
            value = exact
            if packs and self.source.config.qat:
                value = _float32(mxfp4.encode(kept, scale_rule="least_error"))
            with np.errstate(over="ignore"):
                written = value.astype(dtype)
        cost.add(before, _float32(written), exact=exact, update=update)
        return written


def _float32(value: np.ndarray | MXFP4) -> np.ndarray:
    if isinstance(value, MXFP4):
        return np.asarray(decode_piece(value, "float32"))
    return np.asarray(value, np.float32)
