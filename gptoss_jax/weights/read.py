"""Open a checkpoint folder of either layout: read its headers and check them with config.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from gptoss_jax.config import DType, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parameters import table
from gptoss_jax.weights import config_io, safetensors_io
from gptoss_jax.weights.names import Field, Form, Layout, Part, Tensor, shapes, tensors
from gptoss_jax.weights.safetensors_io import Entry
from gptoss_jax.weights.sources import check_packable, check_scales

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """An open folder of either layout, whose headers agree with its config.json."""

    folder: Path
    layout: Layout
    config: ModelConfig  # `dtype` is the embedding's, `experts` is the stored form
    entries: dict[str, Entry]  # by tensor name
    # By `Part.key`: the part, the tensor that holds it, and its first row in that tensor.
    where: dict[tuple[str, int | None, Field], tuple[Part, Entry, int]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each leaf; under `layers/`, of one layer."""
        return shapes(self.config)

    def read(
        self, path: str, layer: int | None, field: Field, *, start: int, stop: int
    ) -> np.ndarray:
        """See `sources.Source`."""
        part, entry, first = self.where[path, layer, field]
        rows = entry.read_rows(first + start * part.file_rows, first + stop * part.file_rows)
        if field == "scales":
            check_scales(rows, self.describe(path, layer, field))
        return part.to_memory(rows)

    def dtype(self, path: str, layer: int | None) -> np.dtype:
        """See `sources.Source`."""
        return self._entry(path, layer).dtype

    def describe(self, path: str, layer: int | None, field: Field | None = None) -> str:
        """See `sources.Source`."""
        entry = self._entry(path, layer, field)
        return f"{entry.file}: tensor {entry.name!r}"

    def _entry(self, path: str, layer: int | None, field: Field | None = None) -> Entry:
        packed = table.row(path).packable and self.config.experts == "mxfp4"
        return self.where[path, layer, field or ("blocks" if packed else "value")][1]


def open_checkpoint(folder: Path) -> Stored:
    """Read the headers of a checkpoint and compare them with its config.json.

    Raises UserError that names file and tensor if a tensor is missing, extra or cut short, if it
    has a wrong shape or dtype, or if config.json does not describe the tensors.
    """
    file = folder / "config.json"
    if not file.is_file():
        inner = folder / "original" / "config.json"
        hint = f"; give {inner.parent}" if inner.is_file() else ""
        raise UserError(f"{folder}: no config.json in it{hint}")
    raw = config_io.read_json(file)
    layout = config_io.layout_of(file, raw)
    config, claimed = config_io.from_json(file, raw)
    entries = _read_headers(folder)
    ends = {"hf": "_blocks", "openai": ".blocks"}[layout]
    stored: Form = "mxfp4" if any(name.endswith(ends) for name in entries) else "dense"
    if claimed is not None and claimed != stored:
        claim = "has no quantization_config" if claimed == "dense" else "says MXFP4"
        raise UserError(f"{file}: {claim}, but the experts' tensors are stored {stored}")
    if stored == "mxfp4":
        try:
            check_packable(config)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    wanted = tensors(config, layout, stored)
    _check(folder, wanted, entries, config)
    where = {}
    for tensor in wanted:
        row = 0
        for part in tensor.parts:
            where[part.key] = (part, entries[tensor.name], row)
            row += part.file_shape[0]
    name = cast(DType, entries[wanted[0].name].dtype.name)
    config = dataclasses.replace(config, experts=stored, dtype=name, param_dtype=name)
    return Stored(folder, layout, config, entries, where)


def _read_headers(folder: Path) -> dict[str, Entry]:
    """Return all tensors of a folder: from the files in its index, or without one, all files."""
    index = folder / INDEX
    weight_map: dict[str, str] | None = None
    if index.is_file():
        weight_map = config_io.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index}: weight_map is missing")
        files = sorted({folder / str(name) for name in weight_map.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file in it")
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is missing, and {index.name} names it")
        for name, entry in safetensors_io.read_header(file).items():
            if name in entries:
                raise UserError(f"{file}: tensor {name!r} is in {entries[name].file.name} too")
            entries[name] = entry
    for name in weight_map or {}:
        if name not in entries:
            raise UserError(f"{index}: tensor {name!r} is in none of its files")
    return entries


def _check(
    folder: Path, wanted: list[Tensor], entries: dict[str, Entry], config: ModelConfig
) -> None:
    """Compare the tensors in the folder with the tensors that config.json asks for."""
    says = f"config.json says {config.num_layers} layers"

    def more(names: list[str]) -> str:
        return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

    missing = [tensor.name for tensor in wanted if tensor.name not in entries]
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]!r} is missing{more(missing)}; {says}")
    names = {tensor.name for tensor in wanted}
    extra = [name for name in entries if name not in names]
    if extra:
        file = entries[extra[0]].file
        raise UserError(f"{file}: tensor {extra[0]!r} is extra{more(extra)}; {says}")
    for tensor in wanted:
        entry = entries[tensor.name]
        if entry.shape != tensor.shape:
            raise UserError(
                f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, and "
                f"config.json makes it {list(tensor.shape)}"
            )
        if tensor.packed != (entry.dtype == np.uint8):
            kind = "U8" if tensor.packed else "a float dtype"
            raise UserError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}, not {kind}")
