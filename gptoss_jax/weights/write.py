"""Checkpoints out: parameters, or another checkpoint, to a folder of either layout, in a stream.

Header first, then tensor after tensor; memory is one piece. A folder appears under its name when
it is whole, and not before.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.types import MXFP4, Params
from gptoss_jax.weights import config_io
from gptoss_jax.weights.names import PACKABLE, Form, Layout, Part, Tensor, shapes, tensors
from gptoss_jax.weights.safetensors_io import Plan, write_file
from gptoss_jax.weights.sources import (
    ParamsSource,
    Source,
    check_packable,
    is_finite,
    pieces,
    progress,
    read_as,
)

if TYPE_CHECKING:
    from gptoss_jax.model import Transformer

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def save(
    folder: str | Path,
    model: Transformer,
    params: Params,
    to: Layout = "hf",
    experts: Form | None = None,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a checkpoint folder that did not exist, or was empty.

    `to` is "hf" (with generation config and tokenizer files) or "openai" (`original/`). `experts`:
    None as they are, "mxfp4" (encoded by the OCP rule), "dense". Floats are written as they are in
    `params`, or as `dtype`. So what `load` gave in the stored dtype is written byte for byte.

    What a layout can't say is refused: see `config_io.refuse_inexpressible`. OpenAI's own loader
    reads the packed experts only; dense ones get the names of its model's state dict.

    Raises UserError for that, for a folder with something in it, and for NaN or infinity.
    """
    source = ParamsSource(model.config, params)
    write_checkpoint(folder, source, layout=to, form=experts, dtype=dtype, shard_bytes=shard_bytes)


def write_checkpoint(
    folder: str | Path,
    source: Source,
    *,
    layout: Layout,
    form: Form | None = None,
    dtype: Any = None,
    dense_dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write `source` to `folder` in `layout`, its experts in `form` (None: as they are).

    `dtype` is that of all floats and `dense_dtype` that of dense experts; None is the source's.
    `finish(folder)` writes what belongs beside the tensors, in the place of config.json and the
    others made here from the config. Raises UserError as `save` does.
    """
    if layout not in ("hf", "openai"):
        raise UserError(f"layout {layout!r}: it is hf or openai")
    if form not in (None, "dense", "mxfp4"):
        raise UserError(f"experts is {form!r}: it is None, 'dense' or 'mxfp4'")
    if getattr(source, "adapters", None) is not None:
        raise UserError(
            "the model has adapters (lora), which no layout holds: fold them into its weights "
            "first, with gptoss_jax.adapters.merge"
        )
    config = source.config
    form = form or config.experts
    config_io.refuse_inexpressible(config, layout)
    if form == "mxfp4":
        check_packable(config)
    type_of = partial(_dtype, source, dtype=dtype, dense_dtype=dense_dtype)
    encoded: dict[tuple[str, int | None, int], np.ndarray] = {}
    plans = []
    for tensor in tensors(config, layout, form):
        kind = np.dtype(np.uint8) if tensor.packed else type_of(tensor)
        each = partial(_pieces, source, tensor, form=form, dtype=kind, encoded=encoded)
        plans.append(Plan(tensor.name, kind, tensor.shape, each))
    total = sum(plan.num_bytes for plan in plans)
    cpu = jax.local_devices(backend="cpu")[0]  # re-coding must not take an accelerator's memory
    with _whole_folder(Path(folder), total) as new, jax.default_device(cpu):
        shards = _shards(plans, shard_bytes)
        weight_map = {}
        with progress(f"writing {Path(folder).name}", total) as advance:
            for name, shard in zip(_shard_names(len(shards), layout), shards, strict=True):
                write_file(new / name, shard, advance)
                weight_map |= {plan.name: name for plan in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(new / INDEX, index)
        if finish is not None:
            finish(new)
        else:
            write_side_files(new, config, layout=layout, form=form, dtype=plans[0].dtype.name)


def write_side_files(
    folder: Path, config: ModelConfig, *, layout: Layout, form: Form, dtype: str
) -> None:
    """Write config.json and, for Hugging Face, generation_config.json and the tokenizer's files.

    A vocabulary too small for any text (below 288) has no tokenizer, and gets no files of one.
    """
    raw = config_io.to_json(config, layout, form=form, dtype=dtype)
    write_json(folder / "config.json", raw)
    if layout == "hf":
        write_json(
            folder / "generation_config.json", config_io.generation_config(config.vocab_size)
        )
        if config_io.special_ids(config.vocab_size):
            from gptoss_jax import tokenizer

            tokenizer.write_tokenizer_files(folder, config.vocab_size, context=config.context)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(source: Source, tensor: Tensor, *, dtype: Any, dense_dtype: Any) -> np.dtype:
    """Return the dtype of a float tensor; parts that differ are joined in the wider one."""
    if dtype is not None:
        return np.dtype(jnp.dtype(dtype))
    path = tensor.parts[0].path
    if path in PACKABLE and dense_dtype is not None:
        return np.dtype(jnp.dtype(dense_dtype))
    if path in PACKABLE and source.config.experts == "mxfp4":
        return source.dtype("embedding/weight", None)
    found = {source.dtype(part.path, part.layer) for part in tensor.parts}
    return functools.reduce(np.promote_types, found)


def _pieces(
    source: Source,
    tensor: Tensor,
    *,
    form: Form,
    dtype: np.dtype,
    encoded: dict[tuple[str, int | None, int], np.ndarray],
) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor in the order of the file, checked.

    `encoded` keeps the scales of blocks that were just encoded, since they are written next.
    """
    for part in tensor.parts:
        shape = shapes(source.config)[part.path]
        for rows in pieces(part.path, source.config, form, shape):
            piece = _piece(source, part, rows, form=form, dtype=dtype, encoded=encoded)
            if piece.dtype != dtype:
                with np.errstate(over="ignore"):  # an overflow is found below
                    piece = piece.astype(dtype)
            piece = np.ascontiguousarray(part.to_file(piece))
            if not tensor.packed and not is_finite(piece):
                name = source.describe(part.path, part.layer)
                raise UserError(f"{name} has NaN or infinity as {dtype}")
            yield piece


def _piece(
    source: Source,
    part: Part,
    rows: range,
    *,
    form: Form,
    dtype: np.dtype,
    encoded: dict[tuple[str, int | None, int], np.ndarray],
) -> np.ndarray:
    if part.path not in PACKABLE or form == source.config.experts:
        return source.read(part.path, part.layer, part.field, start=rows.start, stop=rows.stop)
    at = (part.path, part.layer, rows.start)
    if part.field == "scales" and at in encoded:
        return encoded.pop(at)
    value = read_as(source, part.path, part.layer, form=form, rows=rows, dtype=dtype)
    if not isinstance(value, MXFP4):
        return np.asarray(value)
    if part.field == "scales":
        return np.asarray(value.scales)
    encoded[at] = np.asarray(value.scales)
    return np.asarray(value.blocks)


def _shards(plans: list[Plan], shard_bytes: int) -> list[list[Plan]]:
    """Fill files in the order of the table; a tensor larger than a file has one of its own."""
    shards: list[list[Plan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    return shards


def _shard_names(count: int, layout: Layout) -> list[str]:
    """Name the files as the two publish them: OpenAI's have a second hyphen."""
    if count == 1:
        return ["model.safetensors"]
    dash = "-" if layout == "hf" else "--"
    return [f"model{dash}{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


@contextmanager
def _whole_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `folder` when all went well, and else is removed."""
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; give another name")
    missing = [parent for parent in folder.parents if not parent.exists()]
    free = shutil.disk_usage(folder.parents[len(missing)]).free
    if free < num_bytes:
        raise UserError(
            f"{folder}: needs {num_bytes / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free"
        )
    new = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield new
        new.chmod(0o777 & ~_umask())
        os.rename(new, folder)
    except BaseException as error:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        for parent in missing:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{folder}: can't be written: {error.strerror}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
