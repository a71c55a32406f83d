"""Refuse a run that can't begin or go on, before anything is loaded: `train` and its dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoss_jax import data, loading
from gptoss_jax.config import Config, LoRAConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import start_adapters
from gptoss_jax.model import MakeModel
from gptoss_jax.objectives import check_start
from gptoss_jax.optimizer import make_schedule
from gptoss_jax.runs import model_source
from gptoss_jax.runs.records import Record
from gptoss_jax.runs.same_config import adapter_changes, architecture_changes, check_same_run
from gptoss_jax.types import Params

JUMP = 0.05  # the change of the learning rate that is said, as a share of it


def check_data_given(config: Config) -> None:
    """Refuse a run without training data. Raises UserError."""
    if not config.data.train:
        raise UserError(
            "there is no training data: give --data.train FILE (.jsonl, .parquet, .txt) or hf:NAME"
        )


def check_init_given(config: Config) -> None:
    """Refuse a new run without weights. Raises UserError."""
    if config.init is None:
        raise UserError(
            "no weights to start from: give --init DIR (a checkpoint), or --init random"
        )


def check_new(config: Config) -> tuple[LoRAConfig, Params] | None:
    """Refuse what a new run can't start from; return the adapters of `init_adapters`, if any.

    Raises:
        UserError: as `start_adapters.read` and `objectives.check_start`.
    """
    given = start_adapters.read(config)
    check_start(config, None)
    return given


def check_init(config: Config) -> None:
    """Refuse an --init whose model is another one than the config's. It reads headers alone.

    Raises:
        UserError: the fields that differ; or as `loading.read_config` and `check_start`.
    """
    if config.init in (None, "random"):
        return
    stored = loading.read_config(config.init)
    changes = architecture_changes(stored, config.model)
    if stored.lora.targets:  # the run continues with these adapters
        changes += adapter_changes(stored, config.model)
    if changes:
        raise UserError(
            f"--init {config.init} is another model than the config's: {', '.join(changes)}"
        )
    check_start(config, stored)


def check_resumed(
    config: Config, record: Record, *, fingerprint: dict[str, Any], make_model: MakeModel
) -> None:
    """Refuse to continue a run as another one. Raises UserError with what differs."""
    workdir = Path(config.run_folder)
    changes = data.changes(config, record.fingerprint, fingerprint)
    check_same_run(record, config, data_changes=changes, workdir=workdir)
    model_source.check(record.model_source, make_model, config.model, whose=workdir)


def describe_jump(config: Config, record: Record | None) -> list[str]:
    """Return a line if a run that resumes with other steps changes its learning rate at once.

    A cosine, and the end of wsd, depend on how many steps there are.
    """
    if record is None or record.step == 0 or record.step >= config.train.steps:
        return []
    optimizer, step, steps = config.optimizer, record.step, config.train.steps
    before = float(make_schedule(optimizer, record.config.train.steps)(step - 1))
    # As it would be without a change: a warm-up or a steep schedule makes large steps by itself.
    same = float(make_schedule(optimizer, record.config.train.steps)(step))
    after = float(make_schedule(optimizer, steps)(step))
    if abs(after - same) <= JUMP * max(same, before):
        return []
    return [
        f"note: with train.steps {steps:,} in place of {record.config.train.steps:,}, the learning "
        f"rate jumps from {before:.3g} at step {step:,} to {after:.3g} at step {step + 1:,} "
        f"(optimizer.schedule {optimizer.schedule}). To avoid that, start a new run from this one, "
        f"with a warm-up of its own: --init {config.run_folder} --workdir NEW. A run that may be "
        "made longer takes --optimizer.schedule constant, or wsd if it resumes before wsd's decay"
    ]
