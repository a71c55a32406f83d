"""Refuse a run that can't begin or go on, before anything is loaded: `train` and its dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoss_jax import data, loading
from gptoss_jax.config import Config, LoRAConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import resume, start_adapters
from gptoss_jax.loading.checkpoint import check_packs
from gptoss_jax.loading.folders import is_away
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.objectives import check_start
from gptoss_jax.optimizer import make_schedule
from gptoss_jax.runs import model_source, records
from gptoss_jax.runs.records import Record
from gptoss_jax.runs.same_config import adapter_changes, architecture_changes, check_same_run
from gptoss_jax.types import Params

JUMP = 0.05  # the change of the learning rate that is said, as a share of it


def check_data_given(config: Config) -> None:
    """Refuse a run without training data. Raises UserError."""
    if not config.data.train:
        raise UserError(
            "there is no training data: give --data.train FILE (.jsonl, .json, .parquet, .txt) or "
            "hf:NAME"
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


def check_init(
    config: Config, *, make_model: MakeModel = Transformer, fetch: bool = True
) -> list[str]:
    """Refuse an --init from which this run can't begin. It reads headers, and a few experts.

    Args:
        config: The config of a new run.
        make_model: Builds the run's model.
        fetch: Whether to fetch what is on the hub.

    Returns:
        What was not checked, in a line each: it is on the hub, or only `load` can compare it.

    Raises:
        UserError: the fields in which its model is another one than the config's; it has adapters,
            and so has --init-adapters; or as `loading.read_config`, `check_start`, `check_packs`
            and `resume.check_base_is_there`.
    """
    init = config.init
    if init in (None, "random"):
        return []
    if not fetch and is_away(init):
        return [f"not checked: --init {init} is no folder here"]
    stored = loading.read_config(init)
    if stored.lora.targets and config.init_adapters is not None:
        raise start_adapters.two_given(config)
    changes = architecture_changes(stored, config.model)
    if stored.lora.targets:  # the run continues with these adapters
        changes += adapter_changes(stored, config.model)
    if changes:
        raise UserError(f"--init {init} is another model than the config's: {', '.join(changes)}")
    check_start(config, stored)
    unchecked, folder = [], loading.find_folder(init)
    if records.is_workdir(folder):
        record = records.read_record(folder)
        unchecked = _check_base(record, None, whose=init, make_model=make_model, fetch=fetch)
    packs = config.model.experts == "mxfp4" and not config.model.requantise
    if packs and not check_packs(folder):
        unchecked.append(
            f"not checked: whether MXFP4 holds the dense experts of --init {init} exactly; train "
            "compares them while it packs them"
        )
    return unchecked


def check_resumed(
    config: Config,
    record: Record,
    *,
    fingerprint: dict[str, Any],
    make_model: MakeModel,
    fetch: bool = True,
) -> list[str]:
    """Refuse to continue a run as another one, or without its base; return what was not checked.

    A run that is complete needs its base no more. `fetch` is that of `check_init`.

    Raises:
        UserError: with what differs, or as `resume.check_base_is_there`.
    """
    workdir = Path(config.run_folder)
    changes = data.changes(config, record.fingerprint, fingerprint)
    check_same_run(record, config, data_changes=changes, workdir=workdir)
    model_source.check(record.model_source, make_model, config.model, whose=workdir)
    if record.step >= config.train.steps:
        return []
    return _check_base(record, config.init, whose=workdir, make_model=make_model, fetch=fetch)


def _check_base(record: Record, place: str | None, *, whose: str | Path, **how: Any) -> list[str]:
    away = resume.check_base_is_there(record, place, whose=whose, **how)
    if away is None:
        return []
    return [f"not checked: {away}, the base of {whose}, is no folder here"]


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
