"""Merge adapters into weights piece by piece, and measure the error of writing them in few bits.

A layer is never whole in memory. A piece is some rows of the original weight, W, plus the same rows
of the update that its adapter adds, U. The piece is encoded or rounded, and written. For each
weight, `Report` keeps how far the written weight is from W + U, and how much of U it still has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.ops.lora import LowRank, update
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.types import Params
from gptoss_jax.weights.names import Field
from gptoss_jax.weights.sources import ParamsSource, Source, rows_of

LEAST_SHARE = 0.9  # the share of an update that must survive encoding or rounding


class Merged:
    """A source that reads the weights of `base` and gives the updates of adapters separately."""

    def __init__(self, base: Source, model: ModelConfig, adapters: Params) -> None:
        """Take the adapters (`params["lora"]`) that `model.lora` describes.

        Raises:
            UserError: the adapters do not fit `model`, or `model` differs in architecture from the
                base.
        """
        self.base = base
        self.config = dataclasses.replace(base.config, lora=type(model.lora)())
        self.scale = model.lora.scale
        self.leaves = flatten(adapters)
        if model.architecture != base.config.architecture:
            raise UserError("the adapters are of a model of another architecture than the weights")
        wanted = {}
        for path, shape in lora_adapters.shapes(
            dataclasses.replace(model, expert_padding=0)
        ).items():
            wanted |= {f"{path}/a": shape.a, f"{path}/b": shape.b}
        for name in [*wanted, *self.leaves]:
            if name not in self.leaves or name not in wanted:
                what = "lack" if name not in self.leaves else "have the unknown leaf"
                raise UserError(
                    f"the adapters {what} lora/{name}: they are not those of model.lora"
                )
            found = tuple(self.leaves[name].shape)
            if found != wanted[name]:
                raise UserError(
                    f"lora/{name} has shape {list(found)}, and model.lora makes it "
                    f"{list(wanted[name])}: the adapters are of another base or rank"
                )

    def read(
        self, path: str, layer: int | None, field: Field, *, start: int, stop: int
    ) -> np.ndarray:
        """See `sources.Source`."""
        return self.base.read(path, layer, field, start=start, stop=stop)

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """See `sources.Source`."""
        return self.base.dtype(path, layer)

    def describe(self, path: str, layer: int | None) -> str:
        """See `sources.Source`."""
        return self.base.describe(path, layer)

    def update(self, path: str, layer: int | None, *, start: int, stop: int) -> np.ndarray | None:
        """Return the update of rows [start, stop) of a leaf in float32; None if there is none.

        Rows of experts that were not trained are exactly zero, because their B is zero.
        """
        if f"{path}/a" not in self.leaves:
            return None
        row = table.row(path)
        experts = "E" in row.lead
        cut = {"start": start, "size": stop - start}
        a, b = (self.leaves[f"{path}/{part}"] for part in "ab")
        depth = 0 if layer is None else 1
        whole = [{"start": 0, "size": x.shape[depth]} for x in (a, b)]
        # Whether the rows to cut are rows of A, and of B. If not of A, they are B's outputs.
        in_a, in_b = experts or row.lookup, experts
        a = rows_of(a, layer, **(cut if in_a else whole[0]))
        b = rows_of(b, layer, **(cut if in_b else whole[1]))
        if not in_a:
            b = b[:, start:stop]
        if not b.any():
            return None
        adapter = LowRank(a, b).times(self.scale)  # pyright: ignore[reportArgumentType]
        return np.asarray(_update(adapter, experts=experts, lookup=row.lookup))


_update = jax.jit(update, static_argnames=("experts", "lookup"))


def with_adapters(source: ParamsSource) -> Source:
    """Return parameters in memory as the source to write, with their adapters merged if any.

    Raises:
        UserError: the model names adapters and the parameters have none, or the adapters do not fit
            the model.
    """
    config = source.config
    if source.adapters is not None:
        return Merged(source, config, source.adapters)
    if config.lora.targets:
        raise UserError(
            "model.lora names adapters, and these parameters have none (no lora): what was tuned "
            "would be left out. Give the parameters with their adapters, or a model without "
            "model.lora.targets to write the base"
        )
    return source


@dataclass
class Cost:
    """The error of writing one weight of one layer, as sums over its pieces.

    W is the weight, U its update, and Q(W + U) what is written.
    """

    path: str
    layer: int | None
    written: str  # the form it is written in: MXFP4, or a dtype
    kept: float = 0.0  # <Q(W + U) - W, U>
    update: float = 0.0  # <U, U>
    weight: float = 0.0  # <W + U, W + U>
    lost: float = 0.0  # the inner product of Q(W + U) - (W + U) with itself

    @property
    def name(self) -> str:
        """The name of the weight in messages."""
        return self.path + ("" if self.layer is None else f", layer {self.layer}")

    @property
    def error(self) -> float:
        """Return |Q(W + U) - (W + U)| / |W + U|, in the Frobenius norm."""
        return math.sqrt(self.lost / self.weight) if self.weight else 0.0

    @property
    def size(self) -> float:
        """Return |U| / |W + U|: how large the update is."""
        return math.sqrt(self.update / self.weight) if self.weight else 0.0

    @property
    def share(self) -> float | None:
        """Return the share of the update that survives: <Q(W + U) - W, U> / <U, U>.

        None if there is no update.
        """
        return self.kept / self.update if self.update else None

    def add(
        self,
        before: np.ndarray,
        after: np.ndarray,
        *,
        exact: np.ndarray,
        update: np.ndarray | None,
    ) -> None:
        """Add a piece to the sums: W, Q(W + U), W + U and U, all in float32."""
        self.weight += _inner(exact, exact)
        lost = after - exact
        self.lost += _inner(lost, lost)
        if update is not None:
            self.update += _inner(update, update)
            self.kept += _inner(after - before, update)


def _inner(a: np.ndarray, b: np.ndarray) -> float:
    """Return the inner product: sum each row in float32 without a copy, and the sums in float64."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    return float(np.sum(np.einsum("ij,ij->i", a, b), dtype=np.float64))


@dataclass
class Report:
    """The errors of an export: one `Cost` for each merged or newly encoded weight of each layer."""

    costs: list[Cost] = field(default_factory=list)

    def check(self, cost: Cost) -> None:
        """Refuse a weight that has lost more of its update than a tuned model can afford.

        Raises:
            UserError: less than `LEAST_SHARE` of the update survives.
        """
        if cost.share is None or cost.share >= LEAST_SHARE:
            return
        if cost.written == "MXFP4":
            instead = (
                "write the experts in bf16 (--experts bf16, experts='dense'), keep the adapters "
                "beside the model (--to peft), tune attention and router instead, or tune with "
                "model.qat"
            )
        else:
            instead = (
                "keep the adapters beside the model (--to peft), or write float32 (--dtype float32)"
            )
        raise UserError(
            f"{cost.name}: only {cost.share:.2f} of its update survives as {cost.written} (the "
            f"update is {cost.size:.2%} of the weight, at least {LEAST_SHARE} of it has to "
            f"survive): {instead}; --force (force=True) writes it anyway"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report in the form of the file beside the weights."""
        tensors = [
            {
                "weight": c.path,
                "layer": c.layer,
                "written": c.written,
                "update": c.size,
                "error": c.error,
                "share": c.share,
            }
            for c in self.costs
        ]
        meaning = {
            "update": "|U| / |W + U|, U what adapters add to the weight W",
            "error": "|Q(W + U) - (W + U)| / |W + U|, Q what is written",
            "share": "<Q(W + U) - W, U> / <U, U>: what survives of the update",
        }
        return {"meaning": meaning, "tensors": tensors}

    def table(self) -> Any:
        """Return a table for people: a row for each kind of weight, with its worst layers."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("merged weight", no_wrap=True)
        for name in ("as", "update", "error", "worst (layer)", "kept", "least (layer)"):
            table.add_column(name, justify="right", no_wrap=True)
        kinds: dict[tuple[str, str], list[Cost]] = {}
        for cost in self.costs:
            kinds.setdefault((cost.path, cost.written), []).append(cost)
        for (path, written), costs in kinds.items():
            worst = max(costs, key=lambda c: c.error)
            row = [f"{_mean(c.error for c in costs):.2%}", _at(f"{worst.error:.2%}", worst), "", ""]
            size = ""
            if adapted := [c for c in costs if c.share is not None]:
                size = f"{_mean(c.size for c in adapted):.2%}"
                low = min(adapted, key=lambda c: c.share or 0.0)
                row[2:] = [f"{_mean(c.share or 0.0 for c in adapted):.3f}"]
                row.append(_at(f"{low.share:.3f}", low))
            table.add_row(path.removeprefix("layers/"), written, size, *row)
        table.caption = "update and error: of the weight; kept: what is left of the update"
        return table


def _at(text: str, cost: Cost) -> str:
    return text if cost.layer is None else f"{text} ({cost.layer})"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
