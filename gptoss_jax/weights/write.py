"""Write parameters or another checkpoint as a checkpoint folder of either layout, as a stream.

Each file gets its header first, then tensor after tensor, with one piece in memory at a time.
Adapters are merged meanwhile. Each written file is read again and compared. The folder appears
under its name only after all of this has succeeded.
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
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parameters import table
from gptoss_jax.types import Params
from gptoss_jax.weights import config_io, peft
from gptoss_jax.weights.coding import Coder
from gptoss_jax.weights.compare import compare_file, hashed
from gptoss_jax.weights.merged import Report, with_adapters
from gptoss_jax.weights.names import Form, Layout, Tensor, tensors
from gptoss_jax.weights.safetensors_io import Plan, write_file
from gptoss_jax.weights.sources import ParamsSource, Source, check_packable, progress

if TYPE_CHECKING:
    from gptoss_jax.model import Transformer

INDEX = "model.safetensors.index.json"
REPORT = "export_report.json"
SHARD_BYTES = 5_000_000_000


def save(
    folder: str | Path,
    model: Transformer,
    params: Params,
    to: Layout | Literal["peft"] = "hf",
    experts: Form | None = None,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    template: str | None = None,
) -> Report:
    """Write a model as a checkpoint into a folder that does not exist or is empty.

    `to` is "hf" (with generation config and tokenizer files), "openai" (`original/`), or "peft"
    (the adapters alone: see `weights.peft`). `experts` is the form of the experts: "mxfp4" (encoded
    with the scales of least error), "dense", or None to keep the form in `params`. Floats keep
    their dtype, or are written as `dtype`. So parameters that `load` read in the stored dtype are
    written back byte for byte. `template` is the chat template, by default one without a date; that
    of a run is `loading.read_rules(run).template()`.

    Adapters (`params["lora"]`) are merged, one piece at a time. Weights without adapters stay the
    same byte for byte. The function returns the error that merging and encoding cause in each
    weight, and also writes it beside the weights: see `weights.merged.Report`. If less than 0.9 of
    a weight's update survives, it is refused unless `force` is set. Experts of a model with `qat`
    are written with the values that the model computed with, and are not checked.

    A model that a layout can't describe is refused: see `config_io.refuse_inexpressible`. OpenAI's
    own loader reads MXFP4 experts only; dense experts get the names in its model's state dict.

    Raises UserError if the layout can't describe the model, if the folder is not empty, if a weight
    has NaN or infinity, if adapters do not fit the model, or if a file that is read again differs
    from what was written.
    """
    source = ParamsSource(model.config, params)
    if to == "peft":
        write_adapters(folder, source)
        return Report()
    merged = with_adapters(source)
    return write_checkpoint(
        folder,
        merged,
        layout=to,
        form=experts,
        dtype=dtype,
        shard_bytes=shard_bytes,
        force=force,
        template=template,
    )


def write_checkpoint(
    folder: str | Path,
    source: Source,
    *,
    layout: Layout,
    form: Form | None = None,
    dtype: Any = None,
    dense_dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    template: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Report:
    """Write `source` to `folder` in `layout`, with its experts in `form` (None keeps their form).

    `dtype` is for all floats, `dense_dtype` for dense experts; None: as stored. `finish(folder)`
    writes the files beside the tensors, by default from config and `template`. Else as `save`.
    """
    if layout not in ("hf", "openai"):
        raise UserError(f"layout {layout!r}: it is hf or openai")
    if form not in (None, "dense", "mxfp4"):
        raise UserError(f"experts is {form!r}: it is None, 'dense' or 'mxfp4'")
    config = source.config
    form = form or config.experts
    config_io.refuse_inexpressible(config, layout)
    if form == "mxfp4":
        check_packable(config)
    type_of = partial(_dtype, source, dtype=dtype, dense_dtype=dense_dtype)
    coder = Coder(source, form=form, force=force)
    digests: dict[str, Any] = {}
    groups: list[list[Plan]] = []
    for tensor in tensors(config, layout, form):
        kind = np.dtype(np.uint8) if tensor.packed else type_of(tensor)
        each = hashed(tensor.name, partial(coder.pieces, tensor, kind), digests)
        plan = Plan(tensor.name, kind, tensor.shape, each)
        if tensor.parts[0].field == "scales":  # converters pair scales with the last blocks read
            groups[-1].append(plan)
        else:
            groups.append([plan])
    total = sum(plan.num_bytes for group in groups for plan in group)
    cpu = jax.local_devices(backend="cpu")[0]  # re-encoding must not use an accelerator's memory
    with _whole_folder(Path(folder), total) as new, jax.default_device(cpu):
        shards = _shards(groups, shard_bytes)
        weight_map = {}
        with progress(f"writing {Path(folder).name}", 2 * total) as advance:
            for name, shard in zip(_shard_names(len(shards), layout), shards, strict=True):
                write_file(new / name, shard, advance)
                compare_file(new / name, shard, digests, advance)
                weight_map |= {plan.name: name for plan in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(new / INDEX, index)
        if finish is not None:
            finish(new)
        else:
            name = groups[0][0].dtype.name
            write_side_files(new, config, layout=layout, form=form, dtype=name, template=template)
        if coder.report.costs:
            write_json(new / REPORT, coder.report.to_json())
    return coder.report


def write_adapters(folder: str | Path, source: ParamsSource, *, base: str = "") -> None:
    """Write only the adapters of parameters, in PEFT's layout; `base` names their base model.

    Raises UserError if there are no adapters, or some that PEFT's layout has no place for.
    """
    if source.adapters is None:
        raise UserError("there are no adapters to write: this model has no lora")
    tree = jax.tree.map(np.asarray, source.adapters)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    written = peft.tensors_of(source.config, tree)
    with _whole_folder(Path(folder), size) as new:
        digests: dict[str, Any] = {}
        plans = [
            Plan(name, x.dtype, x.shape, hashed(name, lambda x=x: [x], digests))
            for name, x in written.items()
        ]
        file = new / peft.WEIGHTS
        write_file(file, plans, lambda _: None)
        compare_file(file, plans, digests, lambda _: None)
        write_json(new / peft.CONFIG, peft.config_of(source.config, base=base))


def write_side_files(
    folder: Path,
    config: ModelConfig,
    *,
    layout: Layout,
    form: Form,
    dtype: str,
    template: str | None = None,
) -> None:
    """Write config.json and, for Hugging Face, generation_config.json and the tokenizer files.

    `template` is the chat template of a run. OpenAI's layout has none, but keeps it for a later
    conversion. A vocabulary too small for any text (below 288) has no tokenizer, so none of these.
    """
    raw = config_io.to_json(config, layout, form=form, dtype=dtype)
    write_json(folder / "config.json", raw)
    from gptoss_jax.harmony import tokenizer

    has_text = bool(config_io.special_ids(config.vocab_size))
    if layout == "openai" and template is not None and has_text:
        (folder / tokenizer.CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    if layout == "hf":
        write_json(
            folder / "generation_config.json", config_io.generation_config(config.vocab_size)
        )
        if has_text:
            tokenizer.write_tokenizer_files(
                folder, config.vocab_size, context=config.context, template=template
            )


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(source: Source, tensor: Tensor, *, dtype: Any, dense_dtype: Any) -> np.dtype:
    """Return the dtype of a float tensor; if the dtypes of its parts differ, their promotion."""
    if dtype is not None:
        return np.dtype(jnp.dtype(dtype))
    path = tensor.parts[0].path
    if table.row(path).packable and dense_dtype is not None:
        return np.dtype(jnp.dtype(dense_dtype))
    if table.row(path).packable and source.config.experts == "mxfp4":
        return source.dtype("embedding/weight", None)
    found = {source.dtype(part.path, part.layer) for part in tensor.parts}
    return functools.reduce(np.promote_types, found)


def _shards(groups: list[list[Plan]], shard_bytes: int) -> list[list[Plan]]:
    """Fill files in the order of the table; a group larger than a file gets a file of its own."""
    shards: list[list[Plan]] = [[]]
    size = 0
    for group in groups:
        num_bytes = sum(plan.num_bytes for plan in group)
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += group
        size += num_bytes
    return shards


def _shard_names(count: int, layout: Layout) -> list[str]:
    """Name the files as each layout's publisher does: OpenAI's names have a second hyphen."""
    if count == 1:
        return ["model.safetensors"]
    dash = "-" if layout == "hf" else "--"
    return [f"model{dash}{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


@contextmanager
def _whole_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; rename it on success, remove it on an error."""
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
