"""Check that a config describes the run in a workdir, so that the run can continue."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config, ModelConfig, ObjectiveConfig
from gptoss_jax.errors import UserError
from gptoss_jax.runs.checkpoints import Record

# The fields of TrainConfig that change the results. The others set the length of the run, and what
# it logs, evaluates and keeps.
_FIXED = ("seed", "balance_loss", "z_loss", "balance_bias")
# The fields of ObjectiveConfig that are files or folders: these may move, but must keep their name.
_PLACES = ("distill.teacher", "grpo.reward")


def check_same_run(
    record: Record, config: Config, *, data_changes: list[str], workdir: str | Path
) -> None:
    """Refuse to continue a run whose model, data, objective or optimizer differ from the config's.

    `data_changes` lists the differences of the data (`data.differences` of the fingerprints).
    These may change: steps, logging, evaluation, which checkpoints are kept, remat, and the folders
    of a teacher and of a reward function. The base of a run with adapters is compared with its hash
    when it is read (`checkpoint.load_base`).

    Raises:
        UserError: a field differs; the message lists such fields as old -> new.
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
    """List the fields that make two models different functions, as old -> new."""
    return _changes("model", old.architecture, new.architecture)


def adapter_changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """List the fields of `lora` in which two models differ, as old -> new."""
    return _changes("model", _lora(old), _lora(new))


def _model_fields(config: ModelConfig) -> dict[str, Any]:
    fixed = ("experts", "dtype", "param_dtype", "capacity_factor", "qat")
    return config.architecture | {name: getattr(config, name) for name in fixed} | _lora(config)


def _lora(config: ModelConfig) -> dict[str, Any]:
    return {f"lora.{name}": value for name, value in dataclasses.asdict(config.lora).items()}


def _objective_fields(config: ObjectiveConfig) -> dict[str, Any]:
    """Return the objective's name and the fields of that objective alone."""
    own = dataclasses.asdict(config).get(config.name, {})
    fields = {f"{config.name}.{name}": value for name, value in own.items()}
    for place in _PLACES:
        if fields.get(place) is not None:
            fields[place] = Path(fields[place]).name
    return {"name": config.name} | fields


def _changes(section: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{section}.{n} {old[n]} -> {new[n]}" for n in new if n in old and old[n] != new[n]]
