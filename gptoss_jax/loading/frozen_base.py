"""Find the base of a new run, and compute the checksums of its arrays.

The device that holds an array computes its checksum, once: at the speed of an accelerator's memory,
and at about 1 GiB of packed experts a second on two CPU cores.
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
    """Return where the base of a new run is; None for a run without adapters, which has no base.

    If the base is a workdir, its newest checkpoint at this moment is the base.

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
    """Return the base with the shapes, dtypes and checksums of the arrays at `frozen_paths`.

    Frozen adapters are left out: no file but the run's own checkpoints holds them. If `base` is a
    LoRA run, and that run's base holds all these arrays, then that base is returned instead of the
    run: so the other run may continue, or be deleted.
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
