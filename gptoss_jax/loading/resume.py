"""A run's newest checkpoint as the state that it goes on from, with what is in its base."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from gptoss_jax.errors import UserError
from gptoss_jax.loading.checkpoint import load_base
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs import checkpoints, records
from gptoss_jax.runs.orbax_reader import DamagedError
from gptoss_jax.runs.records import Record
from gptoss_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    state: TrainState
    record: Record
    damaged: list[str]  # what was wrong with the checkpoints after it, which were set aside


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

    As `checkpoints.restore_held`. What is in the run's base is `frozen`, if given, or else read
    from where the base is: see `checkpoint.load_base`, also for `place`. The record's says where
    that was.

    Raises:
        DamagedError: what is there is not what was written, or arrays of other shapes.
        UserError: as `records.read_record` and `checkpoint.load_base`.
    """
    state, record = checkpoints.restore_held(
        workdir, abstract, step=step, expert_padding=expert_padding
    )
    if record.base is None:
        return state, record
    if frozen is None:
        if place == record.config.init:  # the run's own: where its base is the record knows
            place = None
        own = record.config.model
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
    """Read the newest checkpoint that is whole, for a run to go on from.

    Damaged ones after it are renamed to `<step>.damaged`, so that nothing takes them for
    checkpoints; not before a whole one was read. For whoever holds the workdir (`workdir.Hold`).
    `place` and `frozen` are as in `restore`.

    Raises:
        UserError: none is whole, or as `restore`.
    """
    damaged: list[str] = []
    there = processes.from_first(lambda: records.steps(workdir))
    read = functools.partial(
        restore,
        workdir,
        abstract,
        expert_padding=expert_padding,
        place=place,
        frozen=frozen,
        make_model=make_model,
    )
    for step in reversed(there):
        try:
            state, record = read(step=step)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        bad = [Path(workdir) / records.FOLDER / str(s) for s in there if s > step]
        processes.from_first(functools.partial(checkpoints.set_aside, bad))
        return Restored(state, record, damaged)
    raise UserError("; ".join([*damaged[:1], records.none_is_whole(workdir)]))
