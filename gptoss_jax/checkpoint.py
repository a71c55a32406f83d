"""The state of a run on disk: orbax checkpoints under `<workdir>/checkpoints/<step>`.

A checkpoint holds the parameters, the optimizer's state, the averaged parameters where there are
any, and a JSON record of the rest: schema version, step, random state, resolved config, position in
the data, the data's fingerprint, what the spike policy remembers, a checksum for each array, and a
hash of all that. So damage to any of it is found when it is read. Of a run with adapters it holds
what is trained; what is frozen is the base, which the record names (`base.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax import base as bases
from gptoss_jax import checksums, config_cli, distributed
from gptoss_jax.base import Base
from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.orbax_reader import DamagedError, quiet, read_items
from gptoss_jax.parallel import sharding
from gptoss_jax.records import (
    FOLDER,
    HASH,
    HELD_OUT,
    PADDING,
    SCHEMA,
    Record,
    best_step,
    digest,
    held_out_losses,
    newest_record,
    none_is_whole,
    parse,
    read_folder,
    read_json,
    read_record,
    steps,
)
from gptoss_jax.train_step import overlay
from gptoss_jax.types import Params, TrainState, flatten, nest, path_name

__all__ = [
    "FOLDER",
    "HELD_OUT",
    "DamagedError",
    "Record",
    "Restored",
    "best_step",
    "load_params",
    "newest_record",
    "open_manager",
    "read_record",
    "restore",
    "restore_newest",
    "save",
    "steps",
]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    state: TrainState
    record: Record
    damaged: list[str]  # what was wrong with the checkpoints after it, which were set aside


class _Keep:
    """Keeps the newest checkpoints, and the one with the lowest held-out loss."""

    def __init__(self, workdir: str | Path, keep: int) -> None:
        self._keep, self._before = keep, held_out_losses(workdir)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Say for each checkpoint, oldest first, whether it stays."""
        losses = dict(self._before)  # orbax knows of those of this process alone
        losses |= {c.step: c.metrics[HELD_OUT] for c in checkpoints if c.metrics}
        there = [c.step for c in checkpoints]
        scored = sorted((losses[step], step) for step in there if step in losses)
        kept = {*there[-self._keep :], *(step for _, step in scored[:1])}
        return [step in kept for step in there]


def open_manager(workdir: str | Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Open the checkpoints of a run for writing, making the folder.

    Keeps the `keep` newest and, beside them, the one with the lowest held-out loss. What a killed
    run left half-written is removed.
    """
    quiet()
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=_Keep(workdir, keep)
    )
    return ocp.CheckpointManager(Path(workdir).absolute() / FOLDER, options=options)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    *,
    config: Config,
    data_state: dict[str, Any],
    fingerprint: dict[str, Any],
    spikes: dict[str, Any] | None = None,
    held_out_loss: float | None = None,
    expert_padding: int = 0,
    base: Base | None = None,
) -> None:
    """Begin to write a checkpoint of `state.step`; it is whole after `wait_until_finished`.

    The arrays are copied before this returns, so the state may be donated at once. The loss is what
    the best checkpoint is chosen by. `expert_padding` is what the mesh added to experts: the record
    says so, and whoever reads it leaves it out, or has as much of it as another mesh needs. What is
    in the `base` is not written.
    """
    items: dict[str, Any] = {
        "params": bases.split(state.params, base)[0],
        # With the step, since orbax refuses the empty state that some optimizers have.
        "opt_state": {"state": state.opt_state, "step": state.step},
    }
    if state.ema is not None:
        items["ema"] = state.ema
    record = {
        "schema": SCHEMA,
        "step": int(state.step),
        "config": json.loads(config_cli.to_json(config)),
        "data_state": data_state,
        "fingerprint": fingerprint,
        "spikes": spikes or {},
        HELD_OUT: held_out_loss,
        "rng": np.asarray(jax.random.key_data(state.rng)).tolist(),
        PADDING: expert_padding,
        "base": None if base is None else base.to_json(),
        "checksums": {
            name: checksums.checksums(item, expert_padding=expert_padding)
            for name, item in items.items()
        },
    }
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            record=ocp.args.JsonSave(record | {HASH: digest(record)}),
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
        ),
        metrics=None if held_out_loss is None else {HELD_OUT: held_out_loss},
        force=True,
    )


def restore(
    workdir: str | Path,
    abstract: TrainState,
    *,
    step: int | None = None,
    expert_padding: int = 0,
    place: str | None = None,
    frozen: Params | None = None,
) -> tuple[TrainState, Record]:
    """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

    `abstract` is a state of arrays or of `jax.ShapeDtypeStruct`s, spread over any mesh, whatever
    mesh and number of processes wrote it, and with so much of `expert_padding`. The newest if no
    step is given. Several processes do this together: where one finds damage, all raise it.

    What is in the run's base is `frozen`, if given, or else read from where the base is: see
    `base.load`, also for `place`. The record's says where that was.

    Raises:
        DamagedError: what is there is not what was written, or arrays of other shapes.
        UserError: as `read_record` and `base.load`.
    """
    raw, folder = distributed.from_first(lambda: read_json(workdir, step))
    record = parse(raw, folder)
    held, rest = bases.split(abstract.params, record.base)
    targets = {
        "params": held,
        "opt_state": {"state": abstract.opt_state, "step": abstract.step},
    }
    if abstract.ema is not None:
        targets["ema"] = abstract.ema
    items = _read_items(raw, folder, targets, expert_padding=expert_padding)
    if record.base is not None:
        if frozen is None:
            model = record.config.model
            if place == record.config.init:  # the run's own: where its base is the record knows
                place = None
            frozen, base = bases.load(record.base, model, place=place, whose=workdir)
            record = dataclasses.replace(record, base=base)
        items["params"] = _join(items["params"], jax.tree.map(_place, frozen, rest))
    state = TrainState(
        step=items["opt_state"]["step"],
        params=items["params"],
        opt_state=items["opt_state"]["state"],
        rng=_place_key(np.asarray(raw["rng"], np.uint32), abstract.rng),
        ema=items.get("ema"),
    )
    return state, record


def _place(x: jax.Array, like: Any) -> jax.Array:
    where = getattr(like, "sharding", None)
    return x if where is None else jax.device_put(x, where)


def _join(held: Params, frozen: Params) -> Params:
    return nest(flatten(held) | flatten(frozen))


def _read_items(
    raw: dict[str, Any], folder: Path, targets: dict[str, Any], *, expert_padding: int
) -> dict[str, Any]:
    return read_items(
        folder,
        targets,
        sums=raw.get("checksums"),
        resize=raw.get(PADDING, 0) != expert_padding,
        expert_padding=expert_padding,
    )


def _place_key(data: np.ndarray, like: Any) -> Any:
    where, placed = getattr(like, "sharding", None), jnp.asarray(data)
    if isinstance(where, NamedSharding):
        whole = NamedSharding(where.mesh, PartitionSpec())
        placed = jax.make_array_from_callback(data.shape, whole, lambda _: data)
    return jax.random.wrap_key_data(placed)


def restore_newest(
    workdir: str | Path,
    abstract: TrainState,
    *,
    expert_padding: int = 0,
    place: str | None = None,
    frozen: Params | None = None,
) -> Restored:
    """Read the newest checkpoint that is whole, for a run to go on from.

    Damaged ones after it are renamed to `<step>.damaged`, so that nothing takes them for
    checkpoints; not before a whole one was read. For whoever holds the workdir (`workdir.Hold`).
    `place` and `frozen` are as in `restore`.

    Raises:
        UserError: none is whole, or as `restore`.
    """
    damaged: list[str] = []
    there = distributed.from_first(lambda: steps(workdir))
    read = functools.partial(
        restore, workdir, abstract, expert_padding=expert_padding, place=place, frozen=frozen
    )
    for step in reversed(there):
        try:
            state, record = read(step=step)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        bad = [Path(workdir) / FOLDER / str(s) for s in there if s > step]
        distributed.from_first(functools.partial(_set_aside, bad))
        return Restored(state, record, damaged)
    raise UserError("; ".join([*damaged[:1], none_is_whole(workdir)]))


def load_params(
    workdir: str | Path,
    step: int | None = None,
    *,
    ema: bool = True,
    base: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, Params]:
    """Read the model of a run, and its parameters as they were trained.

    Of a run with `optimizer.ema` these are the averaged parameters, in the parameters' dtype; with
    `ema=False` the last ones. Of a run with adapters they are those of its base, too, which is
    looked for as `base.load` says, `base` being its `place`. Over a mesh of `parallel.mesh` each
    array goes into its shards, and the config has the padding that this takes.

    Raises:
        UserError: as `restore`; for a damaged checkpoint it names the last whole one before it.
    """
    with jax.set_mesh(Mesh(np.empty((), object), ()) if mesh is None else mesh):
        try:
            record, model, params = _load_held(workdir, step, ema=ema)
        except DamagedError as error:
            damaged = int(read_folder(workdir, step).name)
            for earlier in [s for s in reversed(steps(workdir)) if s < damaged]:
                with contextlib.suppress(DamagedError):
                    _load_held(workdir, earlier, ema=ema)
                    raise UserError(
                        f"{error}; step {earlier} is whole: ask for it (--step {earlier}, or "
                        f"step={earlier})"
                    ) from None
            raise UserError(f"{error}; no earlier checkpoint is whole") from None
        if record.base is None and base is not None:
            raise UserError(f"{workdir} holds all of its parameters: leave out base")
        if record.base is not None:
            own = record.config.model
            frozen = bases.load(record.base, own, place=base, whose=workdir)[0]
            params = _join(params, frozen)
    return model, params


def _load_held(
    workdir: str | Path, step: int | None, *, ema: bool
) -> tuple[Record, ModelConfig, Params]:
    """Read what a checkpoint holds of the parameters, over the mesh that is set."""
    from gptoss_jax.model import Transformer

    raw, folder = read_json(workdir, step)
    record, mesh = parse(raw, folder), jax.sharding.get_mesh()
    model = sharding.padded(record.config.model)
    shapes = bases.split(Transformer(model).abstract_params(), record.base)[0]
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
    items = _read_items(raw, folder, targets, expert_padding=model.expert_padding)
    params = items["params"]
    return record, model, overlay(params, items["ema"]) if averaged else params


def _set_aside(folders: list[Path]) -> None:
    """Rename damaged checkpoints to names that are no step's."""
    for folder in folders:
        name, n = f"{folder.name}.damaged", 1
        while (folder.parent / name).exists():
            n += 1
            name = f"{folder.name}.damaged-{n}"
        folder.rename(folder.parent / name)
