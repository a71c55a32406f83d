"""Restore the state of a run from its newest checkpoint and its base, so that it continues."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from gptoss_jax.errors import UserError
from gptoss_jax.loading.checkpoint import check_base, load_base
from gptoss_jax.loading.folders import is_away
from gptoss_jax.loading.frozen_base import new_place, where
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs import checkpoints, records
from gptoss_jax.runs.frozen_base import RANDOM
from gptoss_jax.runs.orbax_reader import DamagedError
from gptoss_jax.runs.records import Record
from gptoss_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Restored:
    """The checkpoint from which a run continues."""

    state: TrainState
    record: Record
    damaged: list[str]  # one error for each newer checkpoint; these were damaged and set aside


def restore(
    workdir: str | Path,
    abstract: TrainState,
    *,
    step: int | None = None,
    expert_padding: int = 0,
    place: str | None = None,
    frozen: Params | None = None,
    make_model: MakeModel = Transformer,
) -> tuple[TrainState, Record]:
    """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

    This is `checkpoints.restore_held` with the parameters of the run's base: `frozen`, if given, or
    else those that `checkpoint.load_base` reads (see there for `place`). The base in the returned
    record then says where it was found.

    Raises:
        DamagedError: the content differs from what was written, or arrays have other shapes.
        UserError: as `records.read_record` and `checkpoint.load_base`.
    """
    state, record = checkpoints.restore_held(
        workdir, abstract, step=step, expert_padding=expert_padding
    )
    if record.base is None:
        return state, record
    if frozen is None:
        own, place = record.config.model, _moved_to(record, place)
        frozen, base = load_base(
            record.base, own, place=place, whose=workdir, make_model=make_model
        )
        record = dataclasses.replace(record, base=base)
    rest = checkpoints.split_held(abstract.params, record.base)[1]
    params = checkpoints.join(state.params, jax.tree.map(checkpoints.place, frozen, rest))
    return dataclasses.replace(state, params=params), record


def restore_newest(
    workdir: str | Path,
    abstract: TrainState,
    *,
    expert_padding: int = 0,
    place: str | None = None,
    frozen: Params | None = None,
    make_model: MakeModel = Transformer,
) -> Restored:
    """Read the newest undamaged checkpoint, so that a run continues from it.

    Newer, damaged checkpoints are then renamed to `<step>.damaged`, so that nothing takes them for
    checkpoints. The caller must hold the lock of the workdir (`workdir.Hold`). `place` and `frozen`
    are as in `restore`.

    Raises:
        UserError: all checkpoints are damaged, or as `restore`.
    """
    damaged: list[str] = []
    steps = processes.from_first(lambda: records.steps(workdir))
    read = functools.partial(
        restore,
        workdir,
        abstract,
        expert_padding=expert_padding,
        place=place,
        frozen=frozen,
        make_model=make_model,
    )
    for step in reversed(steps):
        try:
            state, record = read(step=step)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        bad = [Path(workdir) / records.FOLDER / str(s) for s in steps if s > step]
        processes.from_first(functools.partial(checkpoints.set_aside, bad))
        return Restored(state, record, damaged)
    raise UserError("; ".join([*damaged[:1], records.none_is_whole(workdir)]))


def check_base_is_there(
    record: Record,
    place: str | None,
    *,
    whose: str | Path,
    fetch: bool = True,
    make_model: MakeModel = Transformer,
) -> str | None:
    """Refuse a base that `restore` would not find, or would refuse by its headers.

    Args:
        record: The record of the run that resumes; a run without a base passes.
        place: As in `restore`.
        whose: The run's folder, for messages.
        fetch: Whether to fetch a base that is on the hub.
        make_model: Builds the run's model.

    Returns:
        The base's name on the hub, if it is not here and was not fetched, so that nothing is known.

    Raises:
        UserError: as `checkpoint.check_base`.
    """
    base = record.base
    if base is None:
        return None
    place = new_place(base, _moved_to(record, place), whose=whose)
    if base.init == RANDOM:
        return None
    name = where(base, place)
    if not fetch and is_away(name):
        return name
    check_base(base, record.config.model, place, whose=whose, make_model=make_model)
    return None


def _moved_to(record: Record, place: str | None) -> str | None:
    """Return `place`, or None if it is the run's own init: its record knows where the base is."""
    return None if place == record.config.init else place
