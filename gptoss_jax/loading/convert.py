"""Convert any checkpoint to a folder of any layout, streaming from file to file.

The model is never in memory as a whole (except that a workdir's parameters are restored first).
Adapters, from the workdir or from a PEFT folder, are merged on the way. By default all other values
stay as stored: each tensor keeps its bytes, reordered if the layouts differ. Converting to the same
layout rewrites the folder into shards of 5 GB and copies config.json as it is; a checkpoint that
the safetensors library wrote as one file comes out identical.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from gptoss_jax.config import DType
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import CHAT_TEMPLATE, TOKENIZER_FILES
from gptoss_jax.loading.checkpoint import open_workdir
from gptoss_jax.loading.folders import find_folder, is_hub_name
from gptoss_jax.loading.frozen_base import find_base
from gptoss_jax.loading.rules import UNRECORDED, read_rules
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.runs import model_source, records
from gptoss_jax.runs.records import Record
from gptoss_jax.weights import config_fields, config_io, peft
from gptoss_jax.weights.merged import Merged, Report, with_adapters
from gptoss_jax.weights.names import Form, Layout
from gptoss_jax.weights.read import Stored, open_checkpoint
from gptoss_jax.weights.sources import ParamsSource, Source
from gptoss_jax.weights.write import (
    SHARD_BYTES,
    write_adapters,
    write_checkpoint,
    write_json,
    write_side_files,
)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Layout | Literal["peft"],
    experts: Form | None = None,
    dtype: DType | None = None,
    step: int | None = None,
    base: str | Path | None = None,
    adapters: str | Path | None = None,
    force: bool = False,
    ignore_config: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
    make_model: MakeModel = Transformer,
) -> Report:
    """Write the checkpoint `source` (see `loading.load`) to the new folder `destination`.

    `experts`: None keeps them as stored, "mxfp4" encodes them with the scales of least error,
    "dense" decodes or casts them to bfloat16. `dtype` is the dtype of all floats; None keeps it.
    `adapters` is a PEFT folder to merge into the source. `base` (of a LoRA run, if it has moved)
    and `ignore_config` are as in `loading.load`. Tokenizer files are copied from a Hugging Face
    source and made for any other. The chat template is the one of training: see `_template`.
    `to="peft"` writes only the adapters of a workdir. `make_model` builds the model of a run if it
    is not the package's own; a copy of its source is put beside the weights, where other programs
    ignore it. Returns the errors of merging and encoding, as `weights.save` does.

    Raises UserError, with nothing written, as `loading.load`, `weights.save` and `peft.read` do.
    """
    folder = find_folder(source)
    with config_fields.ignoring(ignore_config):
        weights = _open(folder, step=step, base=base, make_model=make_model)
    if to == "peft":
        options = {"experts": experts, "dtype": dtype, "adapters": adapters}.items()
        given = [n for n, x in options if x]
        _write_peft(folder, destination, weights, step=step, base=base, given=given)
        model_source.keep_copy(make_model, weights.config, Path(destination))
        return Report()
    form = experts or weights.config.experts
    template = _template(folder, weights, to=to, step=step, adapters=adapters)

    def finish(new: Path) -> None:
        name = dtype or weights.config.param_dtype
        model_source.keep_copy(make_model, weights.config, new)
        if isinstance(weights, Stored) and weights.layout == to:
            _copy_side_files(folder, new, weights=weights, form=form, dtype=dtype)
            return _replace_template(new, template)
        options: dict[str, Any] = {"layout": to, "form": form, "dtype": name}
        return write_side_files(new, weights.config, template=template, **options)

    return write_checkpoint(
        destination,
        _merged(folder, weights, adapters),
        layout=to,
        form=form,
        dtype=dtype,
        dense_dtype="bfloat16" if experts == "dense" else None,
        shard_bytes=shard_bytes,
        force=force,
        finish=finish,
    )


def _template(
    folder: Path,
    weights: Stored | ParamsSource,
    *,
    to: Layout,
    step: int | None,
    adapters: str | Path | None,
) -> str | None:
    """Return the chat template to write, or None to keep that of the source.

    A run's follows its record (`data.history`, `data.date`). `adapters` may bring the template that
    they were trained with. Any other source keeps its own. If it has none, it gets ours, which
    names today's date.
    """
    if isinstance(weights, ParamsSource):
        return read_rules(folder, step=step).template()
    for place in ([Path(adapters)] if adapters is not None else []) + [folder]:
        file = place / CHAT_TEMPLATE
        if file.is_file() and (place != folder or weights.layout != to):
            return file.read_text(encoding="utf-8")
    return UNRECORDED.template() if weights.layout != to == "hf" else None


def _replace_template(folder: Path, template: str | None) -> None:
    """Put a chat template in place of a copied one, which may be in tokenizer_config.json."""
    if template is None:
        return
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if file.is_file():
        raw = config_io.read_json(file)
        if raw.pop("chat_template", None) is not None:
            write_json(file, raw)


def _open(
    folder: Path, *, step: int | None, base: str | Path | None, make_model: MakeModel
) -> Stored | ParamsSource:
    """Open the source; refuse options for workdirs if it is none."""
    if records.is_workdir(folder):
        return open_workdir(folder, step, base=base, make_model=make_model)
    if step is not None or base is not None or make_model is not Transformer:
        name = "--step" if step is not None else "--base" if base is not None else "--config"
        raise UserError(f"{folder}: {name} is for workdirs, and this is none (no checkpoints)")
    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: holds PEFT's adapters alone: give their base model as SRC, and this "
            "folder with --adapters"
        )
    return open_checkpoint(folder)


def _merged(folder: Path, weights: Stored | ParamsSource, adapters: str | Path | None) -> Source:
    """Return the source merged with its own adapters, or with those of the folder `adapters`."""
    if adapters is None:
        return with_adapters(weights) if isinstance(weights, ParamsSource) else weights
    if isinstance(weights, ParamsSource) and weights.adapters is not None:
        raise UserError(f"{folder}: has adapters of its own: convert it first, then add --adapters")
    lora, tree = peft.read(adapters, weights.config)
    return Merged(weights, dataclasses.replace(weights.config, lora=lora), tree)


def _write_peft(
    folder: Path,
    destination: str | Path,
    weights: Stored | ParamsSource,
    *,
    step: int | None,
    base: str | Path | None,
    given: list[str],
) -> None:
    """Write a workdir's adapters, with the name of their base: the model that the run started from.

    The run's chat template is written too. `base` is where that model is now, if it has moved.
    `given` are the options that `--to peft` does not take.
    """
    if given:
        raise UserError(f"--to peft writes a run's adapters as they are: leave out --{given[0]}")
    if not isinstance(weights, ParamsSource):
        raise UserError(f"{folder}: is a whole model without adapters; --to peft is for LoRA runs")
    record = records.read_record(folder, step)
    beside = [name for name in record.config.optimizer.only if not name.startswith("lora/")]
    if beside:
        raise UserError(
            f"{folder}: trained {' '.join(beside)} besides its adapters, which PEFT's layout has "
            "no place for: --to hf writes all of it"
        )
    write_adapters(destination, weights, base=_base_name(record, base, whose=folder))
    template = read_rules(folder, step=step).template()
    (Path(destination) / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _base_name(record: Record, given: str | Path | None, *, whose: Path) -> str:
    """Return the base of a run's adapters as other programs find it: "" if it is random.

    It is a name on the hub, or the absolute path of the folder that was read: a path as it was
    given in training is relative to a folder that they do not know.
    """
    init = str(given or (record.base.init if record.base else record.config.init) or "random")
    if init == "random":
        return ""
    if given is None and record.base is not None:
        parts = Path(init).parts
        if is_hub_name(init) and Path(str(record.base.folder)).parts[-2:] != parts:
            return init  # the folder is the hub's copy in the cache
        return os.path.abspath(find_base(record.base, None, whose=whose))
    return os.path.abspath(init) if Path(init).is_dir() else init


def _copy_side_files(
    folder: Path, new: Path, *, weights: Stored, form: Form, dtype: DType | None
) -> None:
    """Copy the files beside the tensors, for a source and a destination of the same layout."""
    same = form == weights.config.experts and dtype is None
    names = ["config.json"]
    if weights.layout == "hf":
        names += ["generation_config.json", *TOKENIZER_FILES]
    elif same:
        names += ["dtypes.json"]
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, new / name)
    if weights.layout == "hf" and not same:
        raw = config_io.read_json(folder / "config.json")
        if dtype is not None:  # transformers 5 calls it dtype
            raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
        if form != weights.config.experts:
            raw = config_io.with_form(raw, form)
        write_json(new / "config.json", raw)
