"""The state of a run on disk: orbax checkpoints under `<workdir>/checkpoints/<step>`.

A checkpoint holds the parameters, the optimizer's state, and a JSON record of the rest: schema
version, step, random state, resolved config, position in the data and the data's fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gptoss_jax import config_cli
from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.types import Params, TrainState

SCHEMA = 1
FOLDER = "checkpoints"
HELD_OUT = "held_out_loss"

# Of TrainConfig: what decides the numbers. The rest is how long, how it logs, evaluates and keeps.
_FIXED = ("seed", "balance_loss", "z_loss", "balance_bias")


@dataclasses.dataclass(frozen=True)
class Record:
    """The part of a checkpoint that is no array."""

    step: int
    config: Config
    data_state: dict[str, Any]
    fingerprint: dict[str, Any]


def open_manager(workdir: str | Path, *, keep: int = 3) -> ocp.CheckpointManager:
    """Open the checkpoints of a run for writing, making the folder.

    Keeps the `keep` newest and, beside them, the one with the lowest held-out loss. What a killed
    run left half-written is removed.
    """
    _quiet()
    policies = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[HELD_OUT],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
    )
    return ocp.CheckpointManager(Path(workdir).absolute() / FOLDER, options=options)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    *,
    config: Config,
    data_state: dict[str, Any],
    fingerprint: dict[str, Any],
    held_out_loss: float | None = None,
) -> None:
    """Begin to write a checkpoint of `state.step`; it is whole after `wait_until_finished`.

    The arrays are copied before this returns, so the state may be donated at once. The loss is what
    the best checkpoint is chosen by.
    """
    record = {
        "schema": SCHEMA,
        "step": int(state.step),
        "config": json.loads(config_cli.to_json(config)),
        "data_state": data_state,
        "fingerprint": fingerprint,
        HELD_OUT: held_out_loss,
        "rng": np.asarray(jax.random.key_data(state.rng)).tolist(),
    }
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            # With the step, since orbax refuses the empty state that some optimizers have.
            opt_state=ocp.args.StandardSave({"state": state.opt_state, "step": state.step}),
            record=ocp.args.JsonSave(record),
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
    scored = [(_read_json(workdir, step)[0].get(HELD_OUT), step) for step in steps(workdir)]
    known = [(loss, step) for loss, step in scored if loss is not None]
    return (min(known)[1], min(known)[0]) if known else None


def read_record(workdir: str | Path, step: int | None = None) -> Record:
    """Read the record of a checkpoint, the newest if no step is given.

    Raises:
        UserError: no checkpoint there, an unreadable record, or another schema version.
    """
    return _parse_record(_read_json(workdir, step))[0]


def restore(
    workdir: str | Path, abstract: TrainState, *, step: int | None = None
) -> tuple[TrainState, Record]:
    """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

    `abstract` is a state of arrays or of `jax.ShapeDtypeStruct`s. The newest if no step is given.

    Raises:
        UserError: as `read_record`, or arrays that are cut short, missing or of other shapes.
    """
    record, key = _parse_record(_read_json(workdir, step))
    targets = {
        "params": abstract.params,
        "opt_state": {"state": abstract.opt_state, "step": abstract.step},
    }
    items = _restore_items(workdir, record.step, targets)
    state = TrainState(
        step=items["opt_state"]["step"],
        params=items["params"],
        opt_state=items["opt_state"]["state"],
        rng=jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32)),  # pyright: ignore[reportArgumentType]
    )
    return state, record


def load_params(workdir: str | Path, step: int | None = None) -> tuple[ModelConfig, Params]:
    """Read the model of a run, and its parameters as they were trained.

    Raises:
        UserError: as `restore`.
    """
    from gptoss_jax.model import Transformer

    record = read_record(workdir, step)
    model = Transformer(record.config.model)
    items = _restore_items(workdir, record.step, {"params": model.abstract_params()})
    return record.config.model, items["params"]


def check_same_run(
    record: Record, config: Config, *, data_changes: list[str], workdir: str | Path
) -> None:
    """Refuse to go on with a run whose model, data or optimizer are not these.

    `data_changes` says in what the data differ (`data.differences` of the fingerprints). Steps,
    logging, evaluation, what is kept and remat may change.

    Raises:
        UserError: with each field that differs, old -> new.
    """
    old, new = record.config, config
    changed = {
        "model": _changes("model", _model_fields(old.model), _model_fields(new.model)),
        "optimizer": _changes(
            "optimizer", dataclasses.asdict(old.optimizer), dataclasses.asdict(new.optimizer)
        )
        + _changes(
            "train",
            {name: getattr(old.train, name) for name in _FIXED},
            {name: getattr(new.train, name) for name in _FIXED},
        ),
        "data": data_changes,
    }
    what = [name for name, found in changed.items() if found]
    if what:
        found = [line for lines in changed.values() for line in lines]
        shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise UserError(
            f"{workdir} holds a run of another {' and '.join(what)}: {shown}; "
            "choose another --workdir, or go back to the old values"
        )


def architecture_changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Name the fields in which two models are different functions, old -> new."""
    return _changes("model", old.architecture, new.architecture)


def _model_fields(config: ModelConfig) -> dict[str, Any]:
    fixed = ("experts", "dtype", "param_dtype", "capacity_factor")
    return config.architecture | {name: getattr(config, name) for name in fixed}


def _changes(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{section}.{n} {old[n]} -> {new[n]}" for n in new if old[n] != new[n]]


def _restore_items(workdir: str | Path, step: int, targets: dict[str, Any]) -> dict[str, Any]:
    """Restore arrays; whatever goes wrong within becomes one line that names the checkpoint."""
    folder = Path(workdir).absolute() / FOLDER / str(step)
    restored: dict[str, Any] = {}
    for name, target in targets.items():
        if not (folder / name).is_dir():
            raise UserError(
                f"checkpoint {folder} has no {name}: it is not whole; {_advice(folder)}"
            )
        try:
            with ocp.StandardCheckpointer() as reader:
                restored[name] = reader.restore(folder / name, jax.tree.map(_abstract, target))
        except Exception as error:
            # What orbax says runs over many lines; the cause is kept for a debugger.
            said = (str(error).strip().splitlines() or [""])[0].split(" See full")[0][:160]
            raise UserError(
                f"checkpoint {folder}: its {name} is cut short or damaged "
                f"({type(error).__name__}: {said}); {_advice(folder)}"
            ) from error
    return restored


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _advice(folder: Path) -> str:
    earlier = [s for s in steps(folder.parent.parent) if s < int(folder.name)]
    if earlier:
        return f"remove that folder to go on from step {earlier[-1]}"
    return "remove that folder to start again"


def _read_json(workdir: str | Path, step: int | None) -> tuple[dict[str, Any], Path]:
    there = steps(workdir)
    if not there:
        raise UserError(f"{workdir}: there is no checkpoint in it (no {FOLDER}/<step>)")
    if step is not None and step not in there:
        raise UserError(
            f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, there))}"
        )
    folder = Path(workdir).absolute() / FOLDER / str(there[-1] if step is None else step)
    path = folder / "record" / "metadata"
    try:
        return json.loads(path.read_text()), folder
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {folder}: its record can't be read ({error}); {_advice(folder)}"
        ) from None


def _parse_record(read: tuple[dict[str, Any], Path]) -> tuple[Record, list[int]]:
    raw, folder = read
    if raw.get("schema") != SCHEMA:
        raise UserError(
            f"checkpoint {folder} is of schema {raw.get('schema')}, this version reads {SCHEMA}"
        )
    config = config_cli.from_json(json.dumps(raw["config"]), where=f"checkpoint {folder}")
    return Record(raw["step"], config, raw["data_state"], raw["fingerprint"]), raw["rng"]


def _quiet() -> None:
    """Keep orbax's own log lines off the terminal; errors still show."""
    logging.getLogger("absl").setLevel(logging.ERROR)
