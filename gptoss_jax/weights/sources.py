"""Sources of weights, which are read piece by piece: a folder of files, or parameters in memory.

A piece is consecutive rows (first axis) of one leaf of one layer, in memory order. It is so small
that reordering, casting or re-encoding it needs little memory compared with the leaf.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.ops import moe, mxfp4
from gptoss_jax.parallel import padding
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.types import MXFP4, MXFP4_BLOCK, Params, Relaid
from gptoss_jax.weights.names import SINKS, Field, Form, packed_shape

_PIECE = 1 << 24  # bytes of a piece; floats are counted as float32
_PROGRESS_FROM = 1 << 30  # bytes; less work shows no progress bar


class Source(Protocol):
    """Weights that can be read piece by piece."""

    @property
    def config(self) -> ModelConfig:
        """The model; `config.experts` is the form in which this source holds the experts."""
        ...

    def read(
        self, path: str, layer: int | None, field: Field, *, start: int, stop: int
    ) -> np.ndarray:
        """Return rows [start, stop) of a leaf. Raises UserError as `check_scales` does."""
        ...

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """Return the dtype in which this source holds a leaf."""
        ...

    def describe(self, path: str, layer: int | None) -> str:
        """Return a leaf's name for messages."""
        ...


def pieces(path: str, config: ModelConfig, form: Form, shape: tuple[int, ...]) -> list[range]:
    """Cut the rows of a leaf of `config`'s model into pieces; experts will be read in `form`."""
    stays_packed = table.row(path).packable and config.experts == form == "mxfp4"
    values = _PIECE * 2 if stays_packed else _PIECE // 4
    rows = max(1, values // math.prod(shape[1:]))
    return [range(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def read_as(
    source: Source,
    path: str,
    layer: int | None,
    *,
    form: Form,
    rows: range,
    dtype: Any,
    requantise: bool = False,
) -> Any:
    """Return rows of a leaf with the experts in `form`: an array, or an MXFP4 of arrays.

    Experts that are stored as MXFP4 and wanted dense are decoded to `dtype`. In all other cases the
    dtype is the source's. Raises UserError if dense experts are wanted as MXFP4 and it does not
    hold their values exactly, unless `requantise` is set: see `pack_exactly`.
    """
    read = partial(source.read, path, layer, start=rows.start, stop=rows.stop)
    if not table.row(path).packable:
        return read("value")
    if source.config.experts == "mxfp4":
        value = MXFP4(read("blocks"), read("scales"))  # pyright: ignore[reportArgumentType]
        return value if form == "mxfp4" else decode_piece(value, jnp.dtype(dtype).name)
    array = read("value")
    if form == "dense":
        return array
    name = source.describe(path, layer)
    if not is_finite(array):  # checked here, because MXFP4 bytes would not show it
        raise UserError(f"{name} has NaN or infinity")
    return _encode(array) if requantise else pack_exactly(array, name, otherwise=_KEEP_OR_MEAN_IT)


@partial(jax.jit, static_argnums=1)
def decode_piece(packed: MXFP4, dtype: str) -> Any:
    """Decode rows of an MXFP4 weight in a compiled function."""
    return mxfp4.decode(packed, jnp.dtype(dtype))


@jax.jit
def _encode(array: Any) -> MXFP4:
    return mxfp4.encode(array, scale_rule="least_error")


def trained_rounded(config: ModelConfig) -> bool:
    """Say whether a run computed with its experts' weights rounded to MXFP4, as they are stored.

    It trained with `qat`, and the experts have no adapters (those are added before rounding).
    """
    paths = lora_adapters.adapted(config) if config.lora.targets else []
    return config.qat and not any(table.row(path).packable for path in paths)


_KEEP_OR_MEAN_IT = (
    "keep the experts dense (--model.experts dense, or experts='dense' in Python), or round them "
    "all the same with --model.requantise (requantise=True)"
)


def pack_exactly(array: Any, name: str, *, otherwise: str) -> MXFP4:
    """Encode rows of dense experts that MXFP4 holds exactly, such as decoded MXFP4 weights.

    Tuned experts are not of this kind: rounded, most of their small updates would be lost.

    Args:
        array: The rows, all finite.
        name: Their name, for the error.
        otherwise: What a user can do instead, for the error.

    Raises:
        UserError: rounding changes values. The message says how many, and by how much.
    """
    array = jnp.asarray(array)  # on the device once, for two programs
    packed = _encode(array)
    if not _differs(packed, array):
        return packed
    changed, lost, weight = _count_changes(packed, array)
    raise UserError(
        f"{name} is dense, and rounding it to MXFP4 loses what its values have beyond 4 bits: it "
        f"changes {_percent(int(changed) / array.size)} of them (counted in its first rows), by "
        f"{_percent(float(lost / weight) ** 0.5)} of their norm; most of a fine-tuning is in that: "
        f"{otherwise}"
    )


@jax.jit
def _differs(packed: MXFP4, array: Any) -> Any:
    """Return whether an array in MXFP4 has other values: in a program of its own, not `_encode`'s.

    Joined with encoding, XLA would compute the codes again for each use, at four times the cost.
    """
    return jnp.any(mxfp4.decode(packed) != jnp.asarray(array, jnp.float32))


@jax.jit
def _count_changes(packed: MXFP4, array: Any) -> tuple[Any, Any, Any]:
    """Return how many values MXFP4 changes, and sums of squares of the changes and the values."""
    value = jnp.asarray(array, jnp.float32)
    change = mxfp4.decode(packed) - value
    return jnp.count_nonzero(change), jnp.sum(change**2), jnp.sum(value**2)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1g}%"


def check_packable(config: ModelConfig) -> None:
    """Refuse sizes that MXFP4 can't hold."""
    for name in ("d_model", "d_expert"):
        size = getattr(config, name)
        if size % MXFP4_BLOCK:
            raise UserError(f"model.{name} is {size}: experts=mxfp4 needs a multiple of 32")


def is_finite(array: np.ndarray) -> bool:
    """Say whether an array has no NaN and no infinity, in one pass over its bits."""
    if array.dtype == np.float32:
        bits, exponent = array.view(np.uint32), 0x7F800000
    else:
        bits = array.view(np.uint16)
        exponent = 0x7C00 if array.dtype == np.float16 else 0x7F80
    return not bool(np.any((bits & bits.dtype.type(exponent)) == exponent))


class ParamsSource:
    """Parameters in memory, stacks [L, ...] or tuples of L arrays, on any device."""

    def __init__(self, config: ModelConfig, params: Params) -> None:
        """Take the parameters of a model, without the zero columns that pad experts for a mesh.

        Adapters are kept separately, as `adapters`. Raises UserError if the parameters do not fit
        `config`.
        """
        params = dict(padding.resize(params, by=-config.expert_padding))
        self.adapters: Params | None = params.pop("lora", None)
        config = dataclasses.replace(config, expert_padding=0)
        self.config = config
        self.leaves = {
            path: mxfp4.restore(leaf) if isinstance(leaf, Relaid) else leaf
            for path, leaf in flatten(params).items()
        }
        check_params(config, self.leaves)

    def read(
        self, path: str, layer: int | None, field: Field, *, start: int, stop: int
    ) -> np.ndarray:
        """See `Source`."""
        if path == SINKS and self.config.sinks == "zero":
            return np.zeros(stop - start, self.dtype(path, layer))
        leaf = self.leaves[path]
        if isinstance(leaf, tuple):
            leaf, layer = leaf[layer or 0], None
        array = leaf if field == "value" else getattr(leaf, field)
        piece = rows_of(array, layer, start=start, size=stop - start)
        if field == "scales":
            check_scales(piece, self.describe(path, layer))
        return piece

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """See `Source`."""
        leaf = self.leaves.get(path, self.leaves["embedding/weight"])
        leaf = leaf[0] if isinstance(leaf, tuple) else leaf
        return np.dtype(np.uint8 if isinstance(leaf, MXFP4) else leaf.dtype)

    def describe(self, path: str, layer: int | None) -> str:
        """See `Source`."""
        return f"params: {path}" + ("" if layer is None else f", layer {layer}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each leaf; under `layers/`, of one layer."""
        found = {}
        for path, leaf in self.leaves.items():
            one = leaf[0] if isinstance(leaf, tuple) else leaf
            stacked = path.startswith("layers/") and not isinstance(leaf, tuple)
            found[path] = tuple(one.shape[1:] if stacked else one.shape)
        return found


def rows_of(array: Any, layer: int | None, *, start: int, size: int) -> np.ndarray:
    """Copy rows of an array, or of one layer of a stack, to the host, and no other rows."""
    on_host = isinstance(array, np.ndarray) or (
        array.is_fully_addressable
        and {d.platform for d in array.devices()} == {"cpu"}
        and len(array.devices()) == 1
    )
    if on_host:  # a view without a copy
        whole = np.asarray(array)
        return (whole if layer is None else whole[layer])[start : start + size]
    lead = () if layer is None else (layer,)
    return np.asarray(_slice(array, lead, start, size))


@partial(jax.jit, static_argnums=3)
def _slice(array: Any, lead: tuple[int, ...], start: int, size: int) -> Any:
    depth = len(lead)
    zeros = (0,) * (array.ndim - depth - 1)
    sizes = (*((1,) * depth), size, *array.shape[depth + 1 :])
    rows = lax.dynamic_slice(array, (*lead, start, *zeros), sizes)
    return rows.reshape(sizes[depth:])


def check_scales(piece: np.ndarray, name: str) -> None:
    """Raise UserError if a scale byte of MXFP4 is 255, which is not a number."""
    if piece.size and piece.max() == 255:
        raise UserError(f"{name} has scale byte 255, which is no number in MXFP4")


def zeros(
    config: ModelConfig,
    path: str,
    shape: tuple[int, ...],
    *,
    sharding: jax.NamedSharding | None,
    layout: str | None,
) -> Any:
    """Return a leaf of zeros of the given shape, which is that of a layer or of a stack."""
    make = partial(jnp.zeros, device=sharding)
    if table.row(path).packable and config.experts == "mxfp4":
        blocks, scales = (packed_shape(shape, field) for field in ("blocks", "scales"))
        if layout is None:
            return MXFP4(make(blocks, jnp.uint8), make(scales, jnp.uint8))
        bytes_: list[Any] = [jax.ShapeDtypeStruct(s, jnp.uint8) for s in (blocks, scales)]
        like = jax.eval_shape(partial(moe.relay, path, layout=layout), MXFP4(*bytes_))
        return jax.tree.map(lambda leaf: make(leaf.shape, leaf.dtype), like)
    return make(shape, jnp.dtype(config.param_dtype))


def check_params(config: ModelConfig, leaves: dict[str, Any]) -> None:
    """Raise UserError that names the leaf unless the leaves are those in the model's table."""
    expected = {row.path: row.shape(config) for row in table.rows(config)}
    for path in [*expected, *leaves]:
        if path not in leaves or path not in expected:
            what = "lacks" if path not in leaves else "has the unknown leaf"
            raise UserError(f"params: the tree {what} {path}: it is not that of model.config")
        leaf, shape = leaves[path], expected[path]
        in_layers = path.startswith("layers/")
        copies = leaf if isinstance(leaf, tuple) else (leaf,)
        packed = table.row(path).packable and config.experts == "mxfp4"
        if isinstance(leaf, tuple):
            wrong = len(leaf) != config.num_layers or not in_layers
        else:
            wrong, shape = False, ((config.num_layers, *shape) if in_layers else shape)
        for one in copies:
            wrong |= tuple(one.shape) != shape or isinstance(one, MXFP4) != packed
            if packed and not wrong:
                wrong |= tuple(one.blocks.shape) != packed_shape(shape, "blocks")
        if wrong:
            raise UserError(f"params: {path} has not the shape or form that model.config gives it")


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """Show a bar on stderr for work of over 1 GiB; yield `advance(num_bytes)`.

    Where stderr is no terminal, such as in a log or a notebook, a line says what is done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    quiet = total < _PROGRESS_FROM or not sys.stderr.isatty()
    if quiet and total >= _PROGRESS_FROM:
        print(f"{what}: {total / 1e9:,.2f} GB", file=sys.stderr)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
