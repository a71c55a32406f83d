"""The state of a run on disk: orbax checkpoints under `<workdir>/checkpoints/<step>`.

A checkpoint holds the parameters, the optimizer's state, the averaged parameters where there are
any, and a JSON record of the rest: schema version, step, random state, resolved config, position in
the data, the data's fingerprint, what the spike policy remembers, a checksum for each array, and a
hash of all that. So damage to any of it is found when it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax import checksums, config_cli, distributed
from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.orbax_reader import UnreadableError, quiet, read_arrays
from gptoss_jax.train_step import overlay
from gptoss_jax.types import Params, TrainState, nest, path_name

SCHEMA = 2  # 1 had no checksums; it is read as well
FOLDER = "checkpoints"
HELD_OUT = "held_out_loss"

_PADDING = "expert_padding"
_HASH = "sha256"  # the record's field for the hash of the rest of it


class DamagedError(UserError):
    """A checkpoint of which something is missing, cut short or changed."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The part of a checkpoint that is no array."""

    step: int
    config: Config
    data_state: dict[str, Any]
    fingerprint: dict[str, Any]
    spikes: dict[str, Any] = dataclasses.field(default_factory=dict)  # see spikes.SpikeGuard


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    state: TrainState
    record: Record
    damaged: list[str]  # what was wrong with the checkpoints after it, which were set aside


class _Keep:
    """Keeps the newest checkpoints, and the one with the lowest held-out loss."""

    def __init__(self, workdir: str | Path, keep: int) -> None:
        self._keep, self._before = keep, _held_out_losses(workdir)

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
) -> None:
    """Begin to write a checkpoint of `state.step`; it is whole after `wait_until_finished`.

    The arrays are copied before this returns, so the state may be donated at once. The loss is what
    the best checkpoint is chosen by. `expert_padding` is what the mesh added to experts: the record
    says so, and whoever reads it leaves it out, or has as much of it as another mesh needs.
    """
    items: dict[str, Any] = {
        "params": state.params,
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
        _PADDING: expert_padding,
        "checksums": {
            name: checksums.checksums(item, expert_padding=expert_padding)
            for name, item in items.items()
        },
    }
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            record=ocp.args.JsonSave(record | {_HASH: _hash(record)}),
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
        ),
        metrics=None if held_out_loss is None else {HELD_OUT: held_out_loss},
        force=True,
    )


def steps(workdir: str | Path) -> list[int]:
    """Return the steps that have a whole checkpoint, rising; none if there is no such folder."""
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())


def best_step(workdir: str | Path) -> tuple[int, float] | None:
    """Return the kept step with the lowest held-out loss, and that loss; None if none has one."""
    scored = sorted((loss, step) for step, loss in _held_out_losses(workdir).items())
    return (scored[0][1], scored[0][0]) if scored else None


def _held_out_losses(workdir: str | Path) -> dict[int, float]:
    losses: dict[int, float] = {}
    for step in steps(workdir):
        with contextlib.suppress(UserError):
            loss = _read_json(workdir, step)[0].get(HELD_OUT)
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
    return losses


def read_record(workdir: str | Path, step: int | None = None) -> Record:
    """Read the record of a checkpoint, the newest if no step is given.

    Raises:
        DamagedError: a record that is not what was written.
        UserError: no checkpoint there, or another schema version.
    """
    return _parse_record(*_read_json(workdir, step))


def newest_record(workdir: str | Path) -> Record | None:
    """Read the newest record that is whole, on the first process for all; None if there is none.

    Raises:
        UserError: no record is whole, or another schema version.
    """

    def newest() -> Record | None:
        for step in reversed(steps(workdir)):
            with contextlib.suppress(DamagedError):
                return read_record(workdir, step)
        if steps(workdir):
            raise UserError(_none_is_whole(workdir))
        return None

    return distributed.from_first(newest)


def restore(
    workdir: str | Path,
    abstract: TrainState,
    *,
    step: int | None = None,
    expert_padding: int = 0,
) -> tuple[TrainState, Record]:
    """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

    `abstract` is a state of arrays or of `jax.ShapeDtypeStruct`s, spread over any mesh, whatever
    mesh and number of processes wrote it, and with so much of `expert_padding`. The newest if no
    step is given. Several processes do this together: where one finds damage, all raise it.

    Raises:
        DamagedError: what is there is not what was written, or arrays of other shapes.
        UserError: as `read_record`.
    """
    raw, folder = distributed.from_first(lambda: _read_json(workdir, step))
    record = _parse_record(raw, folder)
    targets = {
        "params": abstract.params,
        "opt_state": {"state": abstract.opt_state, "step": abstract.step},
    }
    if abstract.ema is not None:
        targets["ema"] = abstract.ema
    items = _restore_items(raw, folder, targets, expert_padding=expert_padding)
    state = TrainState(
        step=items["opt_state"]["step"],
        params=items["params"],
        opt_state=items["opt_state"]["state"],
        rng=_place_key(np.asarray(raw["rng"], np.uint32), abstract.rng),
        ema=items.get("ema"),
    )
    return state, record


def _place_key(data: np.ndarray, like: Any) -> Any:
    where, placed = getattr(like, "sharding", None), jnp.asarray(data)
    if isinstance(where, NamedSharding):
        whole = NamedSharding(where.mesh, PartitionSpec())
        placed = jax.make_array_from_callback(data.shape, whole, lambda _: data)
    return jax.random.wrap_key_data(placed)


def restore_newest(
    workdir: str | Path, abstract: TrainState, *, expert_padding: int = 0
) -> Restored:
    """Read the newest checkpoint that is whole, for a run to go on from.

    Damaged ones after it are renamed to `<step>.damaged`, so that nothing takes them for
    checkpoints; not before a whole one was read. For whoever holds the workdir (`workdir.Hold`).

    Raises:
        UserError: none is whole, or as `restore`.
    """
    damaged: list[str] = []
    there = distributed.from_first(lambda: steps(workdir))
    for step in reversed(there):
        try:
            state, record = restore(workdir, abstract, step=step, expert_padding=expert_padding)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        bad = [Path(workdir) / FOLDER / str(s) for s in there if s > step]
        distributed.from_first(functools.partial(_set_aside, bad))
        return Restored(state, record, damaged)
    raise UserError("; ".join([*damaged[:1], _none_is_whole(workdir)]))


def load_params(
    workdir: str | Path, step: int | None = None, *, ema: bool = True
) -> tuple[ModelConfig, Params]:
    """Read the model of a run, and its parameters as they were trained.

    Of a run with `optimizer.ema` these are the averaged parameters, in the parameters' dtype; with
    `ema=False` the last ones.

    Raises:
        UserError: as `restore`; for a damaged checkpoint it names the last whole one before it.
    """
    try:
        return _load_params(workdir, step, ema=ema)
    except DamagedError as error:
        damaged = int(_read_folder(workdir, step).name)
        for earlier in [s for s in reversed(steps(workdir)) if s < damaged]:
            with contextlib.suppress(DamagedError):
                _load_params(workdir, earlier, ema=ema)
                raise UserError(
                    f"{error}; step {earlier} is whole: ask for it (--step {earlier}, or "
                    f"step={earlier})"
                ) from None
        raise UserError(f"{error}; no earlier checkpoint is whole") from None


def _load_params(workdir: str | Path, step: int | None, *, ema: bool) -> tuple[ModelConfig, Params]:
    from gptoss_jax.model import Transformer

    raw, folder = _read_json(workdir, step)
    config = _parse_record(raw, folder).config.model
    targets: dict[str, Any] = {"params": Transformer(config).abstract_params()}
    averaged = raw.get("checksums", {}).get("ema", {}) if ema else {}
    if averaged:
        flat = jax.tree_util.tree_flatten_with_path(targets["params"])[0]
        shapes = {path_name(path): leaf.shape for path, leaf in flat}
        targets["ema"] = nest(
            {name: jax.ShapeDtypeStruct(shapes[name], jnp.float32) for name in averaged}
        )
    items = _restore_items(raw, folder, targets)
    params = items["params"]
    return config, overlay(params, items["ema"]) if averaged else params


def _restore_items(
    raw: dict[str, Any], folder: Path, targets: dict[str, Any], *, expert_padding: int = 0
) -> dict[str, Any]:
    """Restore arrays and hold them against the record's checksums.

    Whatever goes wrong within becomes one line that names the checkpoint.
    """
    restored: dict[str, Any] = {}
    resize = raw.get(_PADDING, 0) != expert_padding
    for name, target in targets.items():
        if not distributed.from_first((folder / name).is_dir):
            raise DamagedError(f"checkpoint {folder} has no {name}: it is not whole")
        read = functools.partial(_read_item, folder, name, target, resize=resize)
        restored[name] = distributed.together(read)
        if "checksums" in raw:
            found = checksums.checksums(restored[name], expert_padding=expert_padding)
            wrong = checksums.differences(raw["checksums"].get(name, {}), found)
            if wrong:
                more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
                raise DamagedError(
                    f"checkpoint {folder}: its {name} is damaged: {wrong[0]}{more} is not what was "
                    "written, by its checksum"
                )
    return restored


def _read_item(folder: Path, name: str, target: Any, *, resize: bool) -> Any:
    try:
        return read_arrays(folder / name, target, resize=resize)
    except UnreadableError as error:
        where = f"checkpoint {folder}: its {name}"
        if error.is_damage:
            raise DamagedError(f"{where} is cut short or damaged ({error})") from None
        raise UserError(f"{where} can't be read ({error})") from None


def _none_is_whole(workdir: str | Path) -> str:
    folders = ", ".join(map(str, steps(workdir)))
    return (
        f"{workdir}: no checkpoint is whole (steps {folders}); choose another --workdir, or remove "
        f"its {FOLDER} to start again"
    )


def _set_aside(folders: list[Path]) -> None:
    """Rename damaged checkpoints to names that are no step's."""
    for folder in folders:
        name, n = f"{folder.name}.damaged", 1
        while (folder.parent / name).exists():
            n += 1
            name = f"{folder.name}.damaged-{n}"
        folder.rename(folder.parent / name)


def _read_folder(workdir: str | Path, step: int | None) -> Path:
    there = steps(workdir)
    if not there:
        raise UserError(f"{workdir}: there is no checkpoint in it (no {FOLDER}/<step>)")
    if step is not None and step not in there:
        raise UserError(
            f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, there))}"
        )
    return Path(workdir).absolute() / FOLDER / str(there[-1] if step is None else step)


def _read_json(workdir: str | Path, step: int | None) -> tuple[dict[str, Any], Path]:
    """Read a record, and hold it against its own hash."""
    folder = _read_folder(workdir, step)
    try:
        raw = json.loads((folder / "record" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"checkpoint {folder}: its record can't be read ({error})") from None
    sealed = isinstance(raw, dict) and (_HASH in raw or raw.get("schema") == 1)
    body = {k: v for k, v in raw.items() if k != _HASH} if sealed else {}
    if not sealed or raw.get(_HASH, _hash(body)) != _hash(body) or body["step"] != int(folder.name):
        raise DamagedError(f"checkpoint {folder}: its record is not what was written, by its hash")
    return body, folder


def _hash(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse_record(raw: dict[str, Any], folder: Path) -> Record:
    if raw["schema"] not in (1, SCHEMA):
        raise UserError(
            f"checkpoint {folder} is of schema {raw['schema']}, this version reads 1 and {SCHEMA}"
        )
    config = config_cli.from_json(json.dumps(raw["config"]), where=f"checkpoint {folder}")
    spikes = raw.get("spikes", {})
    return Record(raw["step"], config, raw["data_state"], raw["fingerprint"], spikes)
