"""Read any checkpoint, a folder of either layout or a workdir, and return (model, params).

Leaves start as zeros on the device. Donated updates fill them in place from pieces that are read as
byte ranges. So a CPU's host holds the parameters and one piece, and an accelerator's host holds one
piece, whatever the size of the checkpoint. A workdir is restored onto the device first. If it is
wanted in another form, each leaf then goes through the host.

The checkpoint of a run with adapters lacks the run's base: the base is found, read, and compared
with the checksums in the run's record.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import assemble
from gptoss_jax.loading.folders import find_folder, read_config
from gptoss_jax.loading.frozen_base import find_base, new_place
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.model.initial import add_missing, init_params
from gptoss_jax.parallel import padding, sharding
from gptoss_jax.parallel.mesh import AXES
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import nest, overlay, path_name, split_layers
from gptoss_jax.runs import checkpoints, frozen_base, model_source, records
from gptoss_jax.runs.frozen_base import RANDOM, Base, Sum
from gptoss_jax.runs.orbax_reader import DamagedError
from gptoss_jax.runs.records import Record
from gptoss_jax.types import Params
from gptoss_jax.weights.config_fields import ignoring
from gptoss_jax.weights.names import Form
from gptoss_jax.weights.read import Stored, open_checkpoint
from gptoss_jax.weights.sources import ParamsSource, progress, read_as, trained_rounded


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
    requantise: bool = False,
    ignore_config: Collection[str] = (),
    make_model: MakeModel = Transformer,
) -> tuple[Transformer, Params]:
    """Read a checkpoint and return (model, params).

    `checkpoint` is a Hugging Face folder, an OpenAI `original/` folder, a name on the hub, or a
    workdir (its latest step, or `step`). The base of a run with adapters is read from `base`, or
    from where the run had it, or from GPTOSS_JAX_BASE. `dtype` (float32, bfloat16, float16) is that
    of float parameters and of compute. `experts`: None keeps them as stored, "dense" decodes,
    "mxfp4" encodes dense ones. Dense experts that MXFP4 does not hold exactly are refused, since
    rounding loses most of a fine-tuning; `requantise` rounds them all the same, by least error.
    `split` returns each stack of layers as a tuple of L arrays. `layout` (a name of
    `ops.mxfp4.layouts`) returns packed experts as `Relaid`, made piece by piece, so that a
    `Sampler` with kernels copies nothing. `ignore_config` names unknown fields of config.json to
    pass over. `make_model` builds a model that is not the package's own, in which a run trained.

    Without a mesh the default device holds all parameters, once. With a mesh of `parallel.mesh`
    each leaf goes straight into its shards, and a host reads only what its devices need. Any other
    mesh gets replicated parameters. A workdir that is wanted in another form than it was trained in
    is first restored onto the default device; its leaves then go through the host.

    Raises UserError, naming the file and the tensor or field, unless this is a complete and finite
    checkpoint of this model.
    """
    name, folder = _check_form(dtype, experts), find_folder(checkpoint)
    spread = mesh is not None and mesh.axis_names == AXES and mesh.size > 1
    with ignoring(ignore_config):
        if mesh is not None and spread and layout is None and records.is_workdir(folder):
            form: dict[str, Any] = {"dtype": name, "experts": experts, "split": split}
            found = _load_over(mesh, folder, step=step, base=base, make_model=make_model, **form)
            if found is not None:
                return found
        source = _open(folder, step=step, base=base, make_model=make_model)
    config = dataclasses.replace(
        source.config, dtype=name, param_dtype=name, experts=experts or source.config.experts
    )
    if spread and layout is not None:
        sharding.check_layout(mesh)
    requantise = requantise or trained_rounded(source.config)
    how: dict[str, Any] = {"split": split, "layout": layout, "requantise": requantise}
    with progress(f"loading {folder.name}", assemble.num_bytes(source, config)) as advance:
        config, params = _assemble(source, config, mesh, spread=spread, advance=advance, **how)
    model = make_model(config)
    if isinstance(source, Stored):  # parameters that the files lack get first values
        with jax.set_mesh(mesh) if mesh is not None and spread else assemble.no_mesh():
            params = add_missing(model, params, split=split)
    if isinstance(source, ParamsSource) and source.adapters is not None:
        params["lora"] = assemble.adapters(source.adapters, config, mesh)
    return model, params


def check_packs(checkpoint: str | Path) -> bool:
    """Refuse dense experts that MXFP4 does not hold exactly, before a folder's weights are loaded.

    It reads one expert of each layer, so that it is quick. `load` compares all of them.

    Returns:
        Whether it looked at all experts' layers: of a workdir with dense experts it looks at none,
        since orbax reads a stack of layers only as a whole. `load` compares these too.

    Raises:
        UserError: as `load` with experts="mxfp4".
    """
    folder = find_folder(checkpoint)
    if records.is_workdir(folder):
        model = records.read_record(folder).config.model
        return model.experts == "mxfp4" or trained_rounded(model)
    source = open_checkpoint(folder)
    with assemble.no_mesh():
        for path in (path for path in source.shapes if table.row(path).packable):
            for layer in range(source.config.num_layers):
                read_as(source, path, layer, form="mxfp4", rows=range(1), dtype="float32")
    return True


def _assemble(
    source: Stored | ParamsSource,
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    spread: bool,
    split: bool,
    layout: str | None,
    requantise: bool,
    advance: Any,
) -> tuple[ModelConfig, Params]:
    """Read all leaves onto the device, or into the shards of a mesh; return the padded config."""
    how: dict[str, Any] = {"layout": layout, "requantise": requantise, "advance": advance}
    if mesh is None or not spread:
        everywhere = None if mesh is None else jax.NamedSharding(mesh, jax.P())
        return config, assemble.on_device(source, config, sharding=everywhere, split=split, **how)
    with jax.set_mesh(mesh):
        config = sharding.padded(config)
    with assemble.no_mesh():
        params = assemble.over_mesh(source, config, mesh, **how)
    if split:
        params["layers"] = split_layers(params["layers"], config.num_layers)
    return config, params


def _check_form(dtype: Any, experts: Form | None) -> str:
    """Return the name of a dtype; raise UserError if it or the form of experts is unknown."""
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {name}: it is float32, bfloat16 or float16")
    if experts not in (None, "dense", "mxfp4"):
        raise UserError(f"experts is {experts!r}: it is None, 'dense' or 'mxfp4'")
    return name


def _open(
    folder: Path, *, step: int | None, base: str | Path | None, make_model: MakeModel
) -> Stored | ParamsSource:
    """Open a folder of either layout, or a workdir; only a workdir has steps and a base."""
    if records.is_workdir(folder):
        return open_workdir(folder, step, base=base, make_model=make_model)
    if step is not None or base is not None:
        what = "base" if step is None else f"step={step}"
        raise UserError(f"{folder}: {what} is for workdirs, and this is none (no checkpoints)")
    return open_checkpoint(folder)


def open_workdir(
    folder: Path,
    step: int | None,
    *,
    base: str | Path | None = None,
    make_model: MakeModel = Transformer,
) -> ParamsSource:
    """Restore the parameters of a run as they were trained, as a source in memory.

    They include its base and its adapters, if it has them: see `load_params`. The capacity factor
    is set to 0 (none), since it is for training only.
    """
    where = None if base is None else str(base)
    config, params = load_params(folder, step=step, base=where, make_model=make_model)
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
    make_model: MakeModel,
) -> tuple[Transformer, Params] | None:
    """Restore a run straight into shards; None if it is wanted in another form than trained."""
    try:
        stored = records.read_record(folder, step).config.model
    except DamagedError:
        return None  # `open_workdir` then raises a fuller error
    if stored.param_dtype != dtype or experts not in (None, stored.experts):
        return None
    where = None if base is None else str(base)
    config, params = load_params(folder, step=step, base=where, mesh=mesh, make_model=make_model)
    if split:
        params["layers"] = split_layers(params["layers"], config.num_layers)
    return make_model(dataclasses.replace(config, dtype=dtype, capacity_factor=0.0)), params


def load_params(
    workdir: str | Path,
    step: int | None = None,
    *,
    ema: bool = True,
    base: str | None = None,
    mesh: Mesh | None = None,
    make_model: MakeModel = Transformer,
) -> tuple[ModelConfig, Params]:
    """Read the config of a run's model, and its parameters as they were trained.

    For a run with `optimizer.ema` these are the averaged parameters, in the parameters' dtype, or
    the last ones with `ema=False`. For a run with adapters they include its base, which `load_base`
    finds, with `base` as `place`. On a mesh of `parallel.mesh` each array goes into its shards, and
    the config has the padding for that mesh.

    Raises:
        UserError: as `restore`; if the checkpoint is damaged, the message names the newest
            undamaged one before it.
    """
    with jax.set_mesh(Mesh(np.empty((), object), ()) if mesh is None else mesh):
        try:
            record, model, params = _load_held(workdir, step, ema=ema, make_model=make_model)
        except DamagedError as error:
            damaged = int(records.read_folder(workdir, step).name)
            for earlier in [s for s in reversed(records.steps(workdir)) if s < damaged]:
                with contextlib.suppress(DamagedError):
                    _load_held(workdir, earlier, ema=ema, make_model=make_model)
                    raise UserError(
                        f"{error}; step {earlier} is whole: ask for it (--step {earlier}, or "
                        f"step={earlier})"
                    ) from None
            raise UserError(f"{error}; no earlier checkpoint is whole") from None
        if record.base is None and base is not None:
            raise UserError(f"{workdir} holds all of its parameters: leave out base")
        if record.base is not None:
            own = record.config.model
            frozen = load_base(record.base, own, place=base, whose=workdir, make_model=make_model)[
                0
            ]
            params = checkpoints.join(params, frozen)
    return model, params


def _load_held(
    workdir: str | Path, step: int | None, *, ema: bool, make_model: MakeModel
) -> tuple[Record, ModelConfig, Params]:
    """Read the parameters that the checkpoint itself holds, over the mesh that is set."""
    raw, folder = records.read_json(workdir, step)
    record, mesh = records.parse(raw, folder), jax.sharding.get_mesh()
    model = sharding.padded(record.config.model)
    model_source.check(record.model_source, make_model, model, whose=workdir)
    shapes = frozen_base.split(make_model(model).abstract_params(), record.base)[0]
    targets: dict[str, Any] = {"params": shapes}
    averaged = raw.get("checksums", {}).get("ema", {}) if ema else {}
    if averaged:
        known = {
            path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        }
        targets["ema"] = nest(
            {name: jax.ShapeDtypeStruct(known[name], jnp.float32) for name in averaged}
        )
    if not mesh.empty:
        targets = {name: sharding.place(tree, mesh) for name, tree in targets.items()}
    items = checkpoints.read_held(raw, folder, targets, expert_padding=model.expert_padding)
    params = items["params"]
    return record, model, overlay(params, items["ema"]) if averaged else params


def load_base(
    base: Base,
    model: ModelConfig,
    *,
    place: str | None = None,
    whose: str | Path = "the run",
    make_model: MakeModel = Transformer,
) -> tuple[Params, Base]:
    """Return a run's frozen parameters, and its base with the folder where it was found.

    The base is looked for at `place`, if given, else where it was, else at the environment variable
    GPTOSS_JAX_BASE. If a mesh is set, each array goes straight into its shards.

    Args:
        base: The base in the run's record.
        model: The config of the run's model, without a mesh's padding.
        place: A folder of either layout, a workdir, or a name on the hub. Random parameters are
            in no folder: they are made again from the seed.
        whose: The owner of the base, for messages.
        make_model: Builds the run's model.

    Raises:
        UserError: the base is not there, or differs; the message names the arrays that differ in
            shape or checksum.
    """
    place = new_place(base, place, whose=whose)
    if base.init == RANDOM:
        found, where = (
            init_params(make_model(sharding.padded(model)), seed=base.seed),
            f"the random model of seed {base.seed}",
        )
        if base.made_by != frozen_base.maker():
            where += f", made by {frozen_base.maker()} (the run used {base.made_by}),"
    else:
        # Headers say most before the large arrays are read.
        folder = check_base(base, model, place, whose=whose, make_model=make_model)
        base, where = dataclasses.replace(base, folder=str(folder.absolute())), str(folder)
        found = _read_base(base, model, folder, make_model)
    frozen = frozen_base.split(found, base)[1]
    here = frozen_base.sums(frozen, expert_padding=sharding.padded(model).expert_padding)
    frozen_base.check(base, here, where=where, whose=whose)
    return frozen, base


def check_base(
    base: Base, model: ModelConfig, place: str | None, *, whose: str | Path, make_model: MakeModel
) -> Path:
    """Find the folder of a base, and refuse it by its headers; `place` is that of `new_place`.

    Raises:
        UserError: the base is not there, or has arrays of other shapes.
    """
    folder = find_base(base, place, whose=whose)
    shapes = _base_shapes(model, folder, make_model)
    frozen_base.check(base, shapes, where=str(folder), whose=whose)
    return folder


def _base_shapes(model: ModelConfig, folder: Path, make_model: MakeModel) -> dict[str, Sum]:
    """Return the shapes and dtypes of a folder's arrays in the run's form, without checksums."""
    form = {"experts": model.experts, "param_dtype": model.param_dtype}
    stored = dataclasses.replace(read_config(folder), **form)
    shapes = jax.tree_util.tree_leaves_with_path(
        model_of(folder, make_model)(stored).abstract_params()
    )
    return {path_name(path): Sum(x.shape, x.dtype.name, None) for path, x in shapes}


def _read_base(base: Base, model: ModelConfig, folder: Path, make_model: MakeModel) -> Params:
    """Read the parameters of the base in the run's form."""
    is_workdir = records.is_workdir(folder)
    mesh = jax.sharding.get_mesh()
    read, params = load(
        folder,
        None if mesh.empty else mesh,
        dtype=model.param_dtype,
        experts=model.experts,
        step=base.step if is_workdir else None,
        requantise=True,  # as the run began; checksums say whether the values are the same
        make_model=model_of(folder, make_model),
    )
    # `model.qat` may need more padding.
    more = sharding.padded(model).expert_padding - read.config.expert_padding
    return padding.resize(params, by=more)


def model_of(folder: Path, make_model: MakeModel) -> MakeModel:
    """Return what builds the model in `folder`, the base of a run with `make_model`.

    A run with its own model may start from published weights, or from a run of the package's model.
    """
    if records.is_workdir(folder) and records.read_record(folder).model_source is not None:
        return make_model
    return Transformer
