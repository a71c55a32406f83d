"""Whether a workdir's run is the one that a config describes, so that it can go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config, ModelConfig, ObjectiveConfig
from gptoss_jax.errors import UserError
from gptoss_jax.runs.checkpoints import Record

# Of TrainConfig: what decides the numbers. The rest is how long, how it logs, evaluates and keeps.
_FIXED = ("seed", "balance_loss", "z_loss", "balance_bias")
# Of ObjectiveConfig: files and folders, which may be moved, but keep their names.
_PLACES = ("distill.teacher", "grpo.reward")


def check_same_run(
    record: Record, config: Config, *, data_changes: list[str], workdir: str | Path
) -> None:
    """Refuse to go on with a run whose model, data, objective or optimizer are not these.

    `data_changes` says in what the data differ (`data.differences` of the fingerprints). Steps,
    logging, evaluation, what is kept and remat may change, and the folders of a teacher and of a
    reward function. The base of a run with adapters is held against its hash when it is read
    (`checkpoint.load_base`).

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
        "objective": _changes(
            "objective", _objective_fields(old.objective), _objective_fields(new.objective)
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


def adapter_changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Name the fields of `lora` in which two models differ, old -> new."""
    return _changes("model", _lora(old), _lora(new))


def _model_fields(config: ModelConfig) -> dict[str, Any]:
    fixed = ("experts", "dtype", "param_dtype", "capacity_factor", "qat")
    return config.architecture | {name: getattr(config, name) for name in fixed} | _lora(config)


def _lora(config: ModelConfig) -> dict[str, Any]:
    return {f"lora.{name}": value for name, value in dataclasses.asdict(config.lora).items()}


def _objective_fields(config: ObjectiveConfig) -> dict[str, Any]:
    """Return the name, and the fields of the objective that has it."""
    own = dataclasses.asdict(config).get(config.name, {})
    fields = {f"{config.name}.{name}": value for name, value in own.items()}
    for place in _PLACES:
        if fields.get(place) is not None:
            fields[place] = Path(fields[place]).name
    return {"name": config.name} | fields


def _changes(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{section}.{n} {old[n]} -> {new[n]}" for n in new if n in old and old[n] != new[n]]
