"""The state of a run on disk: orbax checkpoints under `<workdir>/checkpoints/<step>`.

A checkpoint holds the parameters, the optimizer state, the averaged parameters if the run has them,
and a JSON record of the rest: schema version, step, random state, resolved config, position in the
data, fingerprint of the data, state of the spike policy, a checksum for each array, and a hash of
the record itself. So reading finds any damage. The checkpoint of a run with adapters holds only the
trained parameters; the frozen ones are the base, which the record names (`frozen_base.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.config import Config, command_line
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.runs import checksums
from gptoss_jax.runs.frozen_base import Base
from gptoss_jax.runs.frozen_base import split as split_held
from gptoss_jax.runs.model_source import ModelSource
from gptoss_jax.runs.orbax_reader import quiet, read_items
from gptoss_jax.runs.records import (
    FOLDER,
    HASH,
    HELD_OUT,
    PADDING,
    SCHEMA,
    SCHEMA_OWN_MODEL,
    Record,
    digest,
    held_out_losses,
    parse,
    read_json,
)
from gptoss_jax.types import Params, TrainState

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import, like jax: only functions that write do it


class _Keep:
    """A policy that keeps the newest checkpoints and the one with the lowest held-out loss."""

    def __init__(self, workdir: str | Path, keep: int) -> None:
        self._keep, self._before = keep, held_out_losses(workdir)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Return for each checkpoint, oldest first, whether to keep it."""
        losses = dict(self._before)  # orbax knows only the losses that this process saved
        losses |= {c.step: c.metrics[HELD_OUT] for c in checkpoints if c.metrics}
        saved = [c.step for c in checkpoints]
        scored = sorted((losses[step], step) for step in saved if step in losses)
        kept = {*saved[-self._keep :], *(step for _, step in scored[:1])}
        return [step in kept for step in saved]


def open_manager(workdir: str | Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Open the checkpoints of a run for writing, and make the folder if needed.

    The manager keeps the `keep` newest checkpoints and the one with the lowest held-out loss. It
    removes checkpoints that a killed run left half-written.
    """
    import orbax.checkpoint as ocp

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
    model_source: ModelSource | None = None,
) -> None:
    """Start to write a checkpoint of `state.step`; it is complete after `wait_until_finished`.

    The arrays are copied before this returns, so the state may be donated at once. `held_out_loss`
    decides which checkpoint is the best. `expert_padding` is the number of columns that the mesh
    added to experts: the record holds it, so that a reader can drop them or pad for another mesh.
    Parameters of the `base` are not written.
    """
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {
        "params": split_held(state.params, base)[0],
        # The step is stored with it because orbax refuses an empty state, which some optimizers
        # have.
        "opt_state": {"state": state.opt_state, "step": state.step},
    }
    if state.ema is not None:
        items["ema"] = state.ema
    record = {
        "schema": SCHEMA if model_source is None else SCHEMA_OWN_MODEL,
        "step": int(state.step),
        "config": json.loads(command_line.to_json(config)),
        "data_state": data_state,
        "fingerprint": fingerprint,
        "spikes": spikes or {},
        HELD_OUT: held_out_loss,
        "rng": np.asarray(jax.random.key_data(state.rng)).tolist(),
        PADDING: expert_padding,
        "base": None if base is None else base.to_json(),
        **({"model_source": list(model_source)} if model_source else {}),
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


def restore_held(
    workdir: str | Path,
    abstract: TrainState,
    *,
    step: int | None = None,
    expert_padding: int = 0,
) -> tuple[TrainState, Record]:
    """Read the arrays of a checkpoint into the shapes, dtypes and shardings of `abstract`.

    `abstract` is a state of arrays or of `jax.ShapeDtypeStruct`s, padded by `expert_padding`. Its
    mesh and the number of processes may differ from those that wrote the checkpoint. Without `step`
    this reads the newest checkpoint. All processes of a run call it together: if one finds damage,
    all raise the error. The result lacks the parameters of the record's base; `loading.resume`
    reads them.

    Raises:
        DamagedError: the content differs from what was written, or arrays have other shapes.
        UserError: as `records.read_record`.
    """
    raw, folder = processes.from_first(lambda: read_json(workdir, step))
    record = parse(raw, folder)
    targets = {
        "params": split_held(abstract.params, record.base)[0],
        "opt_state": {"state": abstract.opt_state, "step": abstract.step},
    }
    if abstract.ema is not None:
        targets["ema"] = abstract.ema
    items = read_held(raw, folder, targets, expert_padding=expert_padding)
    state = TrainState(
        step=items["opt_state"]["step"],
        params=items["params"],
        opt_state=items["opt_state"]["state"],
        rng=_place_key(np.asarray(raw["rng"], np.uint32), abstract.rng),
        ema=items.get("ema"),
    )
    return state, record


def place(x: jax.Array, like: Any) -> jax.Array:
    """Move an array to the sharding of `like`, if `like` has one."""
    where = getattr(like, "sharding", None)
    return x if where is None else jax.device_put(x, where)


def join(held: Params, frozen: Params) -> Params:
    """Join the parameters that a checkpoint holds with those of its base."""
    return nest(flatten(held) | flatten(frozen))


def read_held(
    raw: dict[str, Any], folder: Path, targets: dict[str, Any], *, expert_padding: int
) -> dict[str, Any]:
    """Read items of a checkpoint into `targets`; `raw` is its record, with the checksums."""
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


def set_aside(folders: list[Path]) -> None:
    """Rename the folders of damaged checkpoints, so that none has the name of a step."""
    for folder in folders:
        name, n = f"{folder.name}.damaged", 1
        while (folder.parent / name).exists():
            n += 1
            name = f"{folder.name}.damaged-{n}"
        folder.rename(folder.parent / name)
