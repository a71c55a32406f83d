"""Find the base of a run, and compute the checksums of its arrays.

The device that holds an array computes its checksum, once: at the speed of an accelerator's memory,
and at about 1 GiB of packed experts a second on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from functools import partial
from pathlib import Path

from gptoss_jax.config import Config
from gptoss_jax.errors import UserError
from gptoss_jax.loading.folders import find_folder
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.runs import records
from gptoss_jax.runs.frozen_base import PLACE, RANDOM, WAY, Base, maker, sums
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


def new_place(base: Base, place: str | None, *, whose: str | Path) -> str | None:
    """Return where `place` (--init of a run that resumes) says the base is now, if it says so.

    "random" may come from the config file: it says nothing about a base in a folder.

    Raises:
        UserError: the base is random, so that it can't be in `place`.
    """
    if base.init == RANDOM and place not in (None, RANDOM):
        raise UserError(
            f"the base of {whose} is random, of seed {base.seed}, and not {place}: leave "
            "--init out, or choose another --workdir"
        )
    return None if place in (None, RANDOM, base.init) else place


def where(base: Base, place: str | None) -> str:
    """Return the folder, or the name on the hub, at which a base in a folder is looked for.

    That is `place`, if given, else where it was, else the environment variable GPTOSS_JAX_BASE,
    else `base.init`: relative to another current folder, or on the hub.
    """
    if place is not None:
        return place
    if Path(str(base.folder)).is_dir():
        return str(base.folder)
    return os.environ.get(PLACE) or base.init


def find_base(base: Base, place: str | None, *, whose: str | Path) -> Path:
    """Return the folder of a base that is in a folder: see `where`. Raises UserError."""
    try:
        return find_folder(where(base, place))
    except UserError:
        if place is not None or os.environ.get(PLACE):
            raise
        raise UserError(
            f"{base.folder}, the base of {whose}, is not there: say where it is now, {WAY}"
        ) from None
