"""The record of a checkpoint: the JSON beside its arrays, sealed by a hash of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs.frozen_base import Base
from gptoss_jax.runs.frozen_base import from_json as base_from_json
from gptoss_jax.runs.model_source import ModelSource
from gptoss_jax.runs.orbax_reader import DamagedError

# Versions 1 (without checksums) and 2 (without a base) can still be read. A run whose model is not
# the package's own writes version 4, so that older versions of the package refuse it.
SCHEMA, SCHEMA_OWN_MODEL = 3, 4
FOLDER = "checkpoints"
HELD_OUT = "held_out_loss"
PADDING = "expert_padding"  # the field with the number of columns that the mesh added to experts
HASH = "sha256"  # the field with the hash of all other fields


@dataclasses.dataclass(frozen=True)
class Record:
    """The part of a checkpoint that is not arrays."""

    step: int
    config: Config
    data_state: dict[str, Any]
    fingerprint: dict[str, Any]
    spikes: dict[str, Any] = dataclasses.field(default_factory=dict)  # see spikes.SpikeGuard
    base: Base | None = None  # the frozen parameters of a run with adapters, stored elsewhere
    model_source: ModelSource | None = None  # if a config file defines the model


def is_workdir(folder: str | Path) -> bool:
    """Return whether a folder is a run's workdir: it has a folder `checkpoints`, maybe empty."""
    return (Path(folder) / FOLDER).is_dir()


def steps(workdir: str | Path) -> list[int]:
    """Return the steps with a complete checkpoint, in rising order; [] without such a folder."""
    folder = Path(workdir) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())


def best_step(workdir: str | Path) -> tuple[int, float] | None:
    """Return the kept step with the lowest held-out loss, and that loss; None if none has one."""
    scored = sorted((loss, step) for step, loss in held_out_losses(workdir).items())
    return (scored[0][1], scored[0][0]) if scored else None


def held_out_losses(workdir: str | Path) -> dict[int, float]:
    """Return the held-out loss of each checkpoint that has a finite one, by step."""
    losses: dict[int, float] = {}
    for step in steps(workdir):
        with contextlib.suppress(UserError):
            loss = read_json(workdir, step)[0].get(HELD_OUT)
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
    return losses


def read_record(workdir: str | Path, step: int | None = None) -> Record:
    """Read the record of a checkpoint (the newest if no step is given).

    Raises:
        DamagedError: the record differs from what was written.
        UserError: there is no such checkpoint, or it has an unknown schema version.
    """
    return parse(*read_json(workdir, step))


def newest_record(workdir: str | Path) -> Record | None:
    """Read the newest undamaged record, on the first process for all; None without checkpoints.

    Raises:
        UserError: all records are damaged, or one has an unknown schema version.
    """

    def newest() -> Record | None:
        for step in reversed(steps(workdir)):
            with contextlib.suppress(DamagedError):
                return read_record(workdir, step)
        if steps(workdir):
            raise UserError(none_is_whole(workdir))
        return None

    return processes.from_first(newest)


def read_folder(workdir: str | Path, step: int | None) -> Path:
    """Return the folder of a checkpoint (the newest without a step); UserError if it is missing."""
    there = steps(workdir)
    if not there:
        raise UserError(f"{workdir}: there is no checkpoint in it (no {FOLDER}/<step>)")
    if step is not None and step not in there:
        raise UserError(
            f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, there))}"
        )
    return Path(workdir).absolute() / FOLDER / str(there[-1] if step is None else step)


def read_json(workdir: str | Path, step: int | None) -> tuple[dict[str, Any], Path]:
    """Read a record, and compare it with its own hash; return it and the checkpoint's folder."""
    folder = read_folder(workdir, step)
    try:
        raw = json.loads((folder / "record" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"checkpoint {folder}: its record can't be read ({error})") from None
    sealed = isinstance(raw, dict) and (HASH in raw or raw.get("schema") == 1)
    body = {k: v for k, v in raw.items() if k != HASH} if sealed else {}
    right = sealed and raw.get(HASH, digest(body)) == digest(body)
    if not right or body["step"] != int(folder.name):
        raise DamagedError(f"checkpoint {folder}: its record is not what was written, by its hash")
    return body, folder


def digest(record: dict[str, Any]) -> str:
    """Return the hash of a record that does not hold its own hash."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parse(raw: dict[str, Any], folder: Path) -> Record:
    """Make a `Record` from the result of `read_json`. UserError: an unknown schema version."""
    if raw["schema"] not in range(1, SCHEMA_OWN_MODEL + 1):
        raise UserError(
            f"checkpoint {folder} has schema version {raw['schema']}, and this gptoss_jax reads 1 "
            f"to {SCHEMA_OWN_MODEL}: install a newer one"
        )
    config = command_line.from_json(json.dumps(raw["config"]), where=f"checkpoint {folder}")
    return Record(
        raw["step"],
        config,
        raw["data_state"],
        raw["fingerprint"],
        spikes=raw.get("spikes", {}),
        base=base_from_json(raw["base"]) if raw.get("base") else None,
        model_source=ModelSource(*raw["model_source"]) if raw.get("model_source") else None,
    )


def none_is_whole(workdir: str | Path) -> str:
    """Return the error message for a run whose checkpoints are all damaged."""
    folders = ", ".join(map(str, steps(workdir)))
    return (
        f"{workdir}: no checkpoint is whole (steps {folders}); choose another --workdir, or remove "
        f"its {FOLDER} to start again"
    )
