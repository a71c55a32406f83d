"""The base of a run that begins: where it is, and what its arrays are.

Checksums are computed once, where the arrays lie: at the pace of an accelerator's memory, and on
two cores of a CPU at about 1 GiB of packed experts a second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import partial

from gptoss_jax.config import Config
from gptoss_jax.loading.folders import find_folder
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.runs import records
from gptoss_jax.runs.frozen_base import RANDOM, Base, maker, sums
from gptoss_jax.types import Params

_ADAPTERS = "lora/"


def begin(config: Config) -> Base | None:
    """Say where the base of a new run is; None for a run without adapters, which has none.

    Of a workdir it is the checkpoint that is the newest now.

    Raises:
        UserError: there is no such folder.
    """
    if not config.model.lora.targets or config.init is None:
        return None
    if config.init == RANDOM:
        return Base(RANDOM, seed=config.train.seed, made_by=maker())
    folder = find_folder(config.init).absolute()
    there = processes.from_first(lambda: records.steps(folder))
    return Base(config.init, folder=str(folder), step=there[-1] if there else None)


def measure(
    base: Base, params: Params, *, frozen_paths: Collection[str], expert_padding: int = 0
) -> Base:
    """Add what the arrays are: those at `frozen_paths`, but for adapters, which have no other home.

    Where the run goes on with the adapters of another, in whose base all of these are, that base is
    this run's: the other run may go on, or be deleted.
    """
    frozen = [path for path in frozen_paths if not path.startswith(_ADAPTERS)]
    flat = flatten(params)
    arrays = sums(nest({path: flat[path] for path in frozen}), expert_padding=expert_padding)
    if base.step is not None:
        read = partial(records.read_record, str(base.folder), base.step)
        before = processes.from_first(read).base
        if before is not None and all(before.arrays.get(k) == v for k, v in arrays.items()):
            base = before
    return dataclasses.replace(base, arrays=arrays)
