"""Map the leaves of our parameter tree to the tensors of both layouts, by the parameter table.

Both layouts hold the same numbers. `original/` joins q, k and v into one tensor. Both layouts
interleave the rows of gate and up (0::2 gate, 1::2 up). Dense experts in the Hugging Face layout
are also transposed. All transforms here are permutations: nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.parameters import table
from gptoss_jax.types import MXFP4_BLOCK

Layout = Literal["hf", "openai"]
Form = Literal["dense", "mxfp4"]  # of the experts' projections
Field = Literal["value", "blocks", "scales"]
Order = Literal["plain", "interleaved", "transposed", "transposed_interleaved"]

_SUFFIX = {"hf": {"blocks": "_blocks", "scales": "_scales", "value": ""}} | {
    "openai": {"blocks": ".blocks", "scales": ".scales", "value": ""}
}
SINKS = "layers/attention/sinks"


def rows(config: ModelConfig) -> list[table.Parameter]:
    """Return the table rows of the parameters in files; sinks fixed at zero are written too."""
    there = [row for row in table.rows() if row.exists(config) or row.path == SINKS]
    return [row for row in there if any(row.files)]


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each leaf that a file holds; under `layers/`, of one layer (no L)."""
    return {row.path: row.shape(config) for row in rows(config)}


def packed_shape(shape: tuple[int, ...], field: Field) -> tuple[int, ...]:
    """Return the shape of an MXFP4 weight's blocks or scales; for "value", the weight's shape."""
    if field == "value":
        return shape
    scales = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
    return scales if field == "scales" else (*scales, MXFP4_BLOCK // 2)


@dataclass(frozen=True)
class Part:
    """One leaf (or its blocks or scales) of one layer, as consecutive rows of a file's tensor."""

    path: str
    layer: int | None  # None outside `layers/`
    field: Field
    shape: tuple[int, ...]  # in memory, without L
    order: Order

    @property
    def key(self) -> tuple[str, int | None, Field]:
        """The part's identity, the same in every layout."""
        return self.path, self.layer, self.field

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the part in the file."""
        s = self.shape
        if self.order == "interleaved":
            return (s[0], 2 * s[2], *s[3:])
        if self.order == "transposed":
            return (s[0], s[2], s[1])
        if self.order == "transposed_interleaved":
            return (s[0], s[3], 2 * s[2])
        stack, rows, columns = (len(group) for group in table.row(self.path).groups)
        first = stack - (self.layer is not None)  # first of the row axes, which files join into one
        last = first + rows
        rest = (math.prod(s[last:]),) if columns > 1 else s[last:]
        return (*s[:first], math.prod(s[first:last]), *rest)

    @property
    def file_rows(self) -> int:
        """Number of rows of the file's tensor that hold one row in memory."""
        return self.file_shape[0] // self.shape[0]

    def to_memory(self, rows: np.ndarray) -> np.ndarray:
        """Reorder whole rows from the file, [rows, ...], into memory order."""
        if self.order == "interleaved":
            rows = rows.reshape(len(rows), self.shape[2], 2, *self.shape[3:])
            return rows.swapaxes(1, 2)
        if self.order == "transposed":
            return rows.swapaxes(1, 2)
        if self.order == "transposed_interleaved":
            return rows.reshape(*rows.shape[:2], self.shape[2], 2).transpose(0, 3, 2, 1)
        return rows.reshape(-1, *self.shape[1:])

    def to_file(self, rows: np.ndarray) -> np.ndarray:
        """Reorder rows in memory order into file order: the inverse of `to_memory`."""
        if self.order in ("interleaved", "transposed"):
            rows = rows.swapaxes(1, 2)
        elif self.order == "transposed_interleaved":
            rows = rows.transpose(0, 3, 2, 1)
        return rows.reshape(-1, *self.file_shape[1:])


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint's files: its parts are concatenated along the first axis."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        rows = sum(part.file_shape[0] for part in self.parts)
        return (rows, *self.parts[0].file_shape[1:])

    @property
    def packed(self) -> bool:
        """Whether its bytes are MXFP4 blocks or scales."""
        return self.parts[0].field != "value"


def _order(row: table.Parameter, layout: Layout, form: Form) -> Order:
    interleaved = "C" in row.letters
    if row.packable and layout == "hf" and form == "dense":
        return "transposed_interleaved" if interleaved else "transposed"
    return "interleaved" if interleaved else "plain"


def _parts(config: ModelConfig, layout: Layout, form: Form) -> Iterator[tuple[str, Part]]:
    """Yield (tensor name, part) in the order of the table, layer by layer."""

    def parts(row: table.Parameter, layer: int | None) -> Iterator[tuple[str, Part]]:
        name = row.tensor(layout)
        assert name is not None, row.path  # `config_io.refuse_inexpressible` checked this
        fields: tuple[Field, ...] = ("value",)
        if form == "mxfp4" and row.packable:
            fields = ("blocks", "scales")
        for field in fields:
            shape = packed_shape(row.shape(config), field)
            part = Part(row.path, layer, field, shape, _order(row, layout, form))
            yield name.format(n=layer) + _SUFFIX[layout][field], part

    every = rows(config)
    in_layers = [row for row in every if row.in_layers]
    first = every.index(in_layers[0])
    for row in every[:first]:
        yield from parts(row, None)
    for n in range(config.num_layers):
        for row in in_layers:
            yield from parts(row, n)
    for row in every[first:]:
        if not row.in_layers:
            yield from parts(row, None)


def tensors(config: ModelConfig, layout: Layout, form: Form) -> list[Tensor]:
    """Return the tensors of a whole checkpoint in `layout`, with the experts stored in `form`."""
    by_name: dict[str, list[Part]] = {}
    for name, part in _parts(config, layout, form):
        by_name.setdefault(name, []).append(part)
    return [Tensor(name, tuple(parts)) for name, parts in by_name.items()]
