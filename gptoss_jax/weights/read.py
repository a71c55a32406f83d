"""Checkpoints in: a folder of either layout, or a workdir, to parameters on a device.

Leaves are made on the device as zeros and filled by donated updates, in place, from pieces that
are read as byte ranges. So the host of a CPU holds the parameters and one piece, and the host of
an accelerator one piece, whatever the checkpoint's size. A workdir is restored onto the device
first: what is wanted of it in another form goes by the host, leaf by leaf.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import DType, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parallel import sharding
from gptoss_jax.parallel.mesh import AXES
from gptoss_jax.types import Params, split_layers
from gptoss_jax.weights import assemble, config_io, safetensors_io
from gptoss_jax.weights.names import (
    PACKABLE,
    Field,
    Form,
    Layout,
    Part,
    Tensor,
    shapes,
    tensors,
)
from gptoss_jax.weights.safetensors_io import Entry
from gptoss_jax.weights.sources import (
    ParamsSource,
    check_packable,
    check_scales,
    progress,
)

if TYPE_CHECKING:
    from gptoss_jax.model import Transformer

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A folder of either layout whose headers are read and agree with its config.json."""

    folder: Path
    layout: Layout
    config: ModelConfig  # dtype is the embedding's, experts the form that is stored
    entries: dict[str, Entry]  # by tensor name
    where: dict[tuple[str, int | None, Field], tuple[Part, Entry, int]]  # and the first row there

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each leaf, of one layer under `layers/`."""
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
        packed = path in PACKABLE and self.config.experts == "mxfp4"
        return self.where[path, layer, field or ("blocks" if packed else "value")][1]


def find_folder(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint: itself, or fetched if it is a name on the hub.

    Raises UserError if there is no such folder, and no such thing on the hub or no network.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
        raise UserError(f"{checkpoint}: there is no such folder")
    import huggingface_hub

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        other = ["original/*", "metal/*"]
        return Path(
            huggingface_hub.snapshot_download(
                str(checkpoint), allow_patterns=wanted, ignore_patterns=other
            )
        )
    except Exception as error:  # the hub's own, and those of its HTTP client
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{checkpoint}: there is no such folder, and the hub did not give it: {why}"
        ) from error


def open_checkpoint(folder: Path) -> Stored:
    """Read the headers of a checkpoint and hold them against its config.json.

    Raises UserError, naming file and tensor, for what is missing, extra, of a wrong shape or dtype,
    or cut short, and for a config.json that is not that of the tensors.
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
        said = "has no quantization_config" if claimed == "dense" else "says MXFP4"
        raise UserError(f"{file}: {said}, but the experts' tensors are stored {stored}")
    if stored == "mxfp4":
        try:
            check_packable(config)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    table = tensors(config, layout, stored)
    _check(folder, table, entries, config)
    where = {}
    for tensor in table:
        row = 0
        for part in tensor.parts:
            where[part.key] = (part, entries[tensor.name], row)
            row += part.file_shape[0]
    name = cast(DType, entries[table[0].name].dtype.name)
    config = dataclasses.replace(config, experts=stored, dtype=name, param_dtype=name)
    return Stored(folder, layout, config, entries, where)


def _read_headers(folder: Path) -> dict[str, Entry]:
    """Return all tensors of a folder: of the files of its index, or else of all its files."""
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
    folder: Path, table: list[Tensor], entries: dict[str, Entry], config: ModelConfig
) -> None:
    """Hold the tensors that are there against those that config.json asks for."""
    says = f"config.json says {config.num_layers} layers"

    def more(names: list[str]) -> str:
        return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

    missing = [tensor.name for tensor in table if tensor.name not in entries]
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]!r} is missing{more(missing)}; {says}")
    names = {tensor.name for tensor in table}
    extra = [name for name in entries if name not in names]
    if extra:
        file = entries[extra[0]].file
        raise UserError(f"{file}: tensor {extra[0]!r} is extra{more(extra)}; {says}")
    for tensor in table:
        entry = entries[tensor.name]
        if entry.shape != tensor.shape:
            raise UserError(
                f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, and "
                f"config.json makes it {list(tensor.shape)}"
            )
        if tensor.packed != (entry.dtype == np.uint8):
            wanted = "U8" if tensor.packed else "a float dtype"
            raise UserError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}, not {wanted}")


def load(
    checkpoint: str | Path,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = jnp.bfloat16,
    experts: Form | None = None,
    *,
    step: int | None = None,
    split: bool = False,
    layout: str | None = None,
    base: str | Path | None = None,
) -> tuple[Transformer, Params]:
    """Read a checkpoint and return (model, params).

    `checkpoint` is a Hugging Face folder, an OpenAI `original/` folder, a name on the hub, or a
    workdir (its latest step, or `step`; that of a run with adapters has its base elsewhere: where
    the run had it, or at `base`, or where the variable GPTOSS_JAX_BASE says). `dtype` (float32,
    bfloat16, float16) is that of float parameters and of compute. `experts`: None as stored,
    "mxfp4" (encoded, by least error, if stored dense), "dense" (decoded). `split` gives stacks as
    tuples of L arrays. `layout` (a name of `ops.mxfp4.layouts`) gives packed experts as `Relaid`,
    piece by piece: for sampling by kernels, so that a `Sampler` copies nothing. Without a mesh all
    goes to the default device, which holds it once; a workdir, restored there as it was trained, by
    the host where it is wanted otherwise. With a mesh of `parallel.mesh` every leaf goes straight
    into its shards, and a host reads no more than those of its devices need (a workdir's, where
    they are wanted as they were trained); over another mesh it is replicated.

    Raises UserError, naming the file and the tensor or field, for anything that is not a whole,
    finite checkpoint of this model.
    """
    from gptoss_jax.model import Transformer

    name, folder = _check_form(dtype, experts), find_folder(checkpoint)
    spread = mesh is not None and mesh.axis_names == AXES and mesh.size > 1
    if mesh is not None and spread and layout is None and (folder / "checkpoints").is_dir():
        found = _load_over(
            mesh, folder, step=step, base=base, split=split, dtype=name, experts=experts
        )
        if found is not None:
            return found
    source = _open(folder, step=step, base=base)
    config = dataclasses.replace(
        source.config, dtype=name, param_dtype=name, experts=experts or source.config.experts
    )
    if spread and layout is not None:
        sharding.check_layout(mesh)
    with progress(f"loading {folder.name}", assemble.num_bytes(source, config)) as advance:
        if mesh is not None and spread:
            with jax.set_mesh(mesh):
                config = sharding.padded(config)
            with assemble.no_mesh():
                params = assemble.over_mesh(source, config, mesh, layout=layout, advance=advance)
            if split:
                params["layers"] = split_layers(params["layers"], config.num_layers)
        else:
            everywhere = None if mesh is None else jax.NamedSharding(mesh, jax.P())
            params = assemble.on_device(
                source, config, sharding=everywhere, split=split, layout=layout, advance=advance
            )
    if isinstance(source, ParamsSource) and source.adapters is not None:
        params["lora"] = assemble.adapters(source.adapters, config, mesh)
    return Transformer(config), params


def _check_form(dtype: Any, experts: Form | None) -> str:
    """Return the name of a dtype, if it and the form of experts are known."""
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {name}: it is float32, bfloat16 or float16")
    if experts not in (None, "dense", "mxfp4"):
        raise UserError(f"experts is {experts!r}: it is None, 'dense' or 'mxfp4'")
    return name


def _open(folder: Path, *, step: int | None, base: str | Path | None) -> Stored | ParamsSource:
    """Open a folder of either layout, or a workdir, which alone has steps and a base."""
    if (folder / "checkpoints").is_dir():
        return open_workdir(folder, step, base=base)
    if step is not None or base is not None:
        what = "base" if step is None else f"step={step}"
        raise UserError(f"{folder}: {what} is for workdirs, and this is none (no checkpoints)")
    return open_checkpoint(folder)


def read_config(checkpoint: str | Path) -> ModelConfig:
    """Read what model a checkpoint holds, from its headers alone: no weights are read.

    Raises UserError as `load`, apart from what is wrong with values.
    """
    folder = find_folder(checkpoint)
    if (folder / "checkpoints").is_dir():
        from gptoss_jax import checkpoint as training

        return training.read_record(folder).config.model
    return open_checkpoint(folder).config


def open_workdir(folder: Path, step: int | None, *, base: str | Path | None = None) -> ParamsSource:
    """Restore the parameters of a run, as they were trained, to be read from memory.

    With those of its base and its adapters, if it has these: see `checkpoint.load_params`. A
    capacity factor belongs to training: the model that is read has none.
    """
    from gptoss_jax import checkpoint as training

    where = None if base is None else str(base)
    config, params = training.load_params(folder, step=step, base=where)
    return ParamsSource(dataclasses.replace(config, capacity_factor=0.0), params)


def _load_over(
    mesh: jax.sharding.Mesh,
    folder: Path,
    *,
    step: int | None,
    base: str | Path | None,
    split: bool,
    dtype: str,
    experts: Form | None,
) -> tuple[Transformer, Params] | None:
    """Restore a run straight into shards; None where it is wanted in another form than trained."""
    from gptoss_jax import checkpoint as training
    from gptoss_jax.model import Transformer

    try:
        stored = training.read_record(folder, step).config.model
    except training.DamagedError:
        return None  # which `open_workdir` says more of
    if stored.param_dtype != dtype or experts not in (None, stored.experts):
        return None
    where = None if base is None else str(base)
    config, params = training.load_params(folder, step=step, base=where, mesh=mesh)
    if split:
        params["layers"] = split_layers(params["layers"], config.num_layers)
    return Transformer(dataclasses.replace(config, dtype=dtype, capacity_factor=0.0)), params
