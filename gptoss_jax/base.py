"""The base of a LoRA run: its frozen parameters, which checkpoints name and do not hold.

A checkpoint of such a run has the adapters and whatever else is trained. The rest is taken again
from where it was taken at first, the folder of `--init` or the seed, and held against what the
record says of each array: shape, dtype, checksum. These are of the parameters in memory, so they
depend neither on the mesh nor on the layout of files: a base may be moved, or converted from one
layout to the other. They are computed once, where the arrays lie: at the pace of an accelerator's
memory, and on two cores of a CPU at about 1 GiB of packed experts a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptoss_jax import checksums
from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parallel import padding, sharding
from gptoss_jax.types import Params, flatten, nest, path_name

RANDOM = "random"
PLACE = "GPTOSS_JAX_BASE"  # the variable that says where a base is that is no longer where it was
_WAY = f"by --init when training, else by base= or the variable {PLACE}"
_ADAPTERS = "lora/"


class Sum(NamedTuple):
    """What is known of an array."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int | None  # None: not computed


@dataclasses.dataclass(frozen=True)
class Base:
    """Where a run's frozen parameters come from, and what they are."""

    init: str  # as it was given: "random", a folder, a name on the hub
    folder: str | None = None  # the folder that this was, from the root; None: random
    step: int | None = None  # where that is a workdir
    seed: int = 0  # of random ones, which are alike on one kind of device and version of JAX
    made_by: str = ""  # that kind and version
    arrays: dict[str, Sum] = dataclasses.field(default_factory=dict)  # path -> what it is

    @property
    def digest(self) -> str:
        """Return a short name of what the arrays are, wherever they lie."""
        text = json.dumps(self.to_json()["arrays"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Return a line that says what it is."""
        return f"{self.folder or f'random, seed {self.seed}'}, hash {self.digest}"

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return dataclasses.asdict(self) | {"arrays": {k: list(v) for k, v in self.arrays.items()}}


def from_json(raw: dict[str, Any]) -> Base:
    """Read a base out of a checkpoint's record."""
    arrays = {k: Sum(tuple(shape), dtype, n) for k, (shape, dtype, n) in raw["arrays"].items()}
    fields: dict[str, Any] = raw | {"arrays": arrays}
    return Base(**fields)


# --- A run's beginning ---------------------------------------------------------------------------


def begin(config: Config) -> Base | None:
    """Say where the base of a new run is; None for a run without adapters, which has none.

    Of a workdir it is the checkpoint that is the newest now.

    Raises:
        UserError: there is no such folder.
    """
    if not config.model.lora.targets or config.init is None:
        return None
    if config.init == RANDOM:
        return Base(RANDOM, seed=config.train.seed, made_by=_maker())
    from gptoss_jax import distributed, records
    from gptoss_jax.weights.read import find_folder

    folder = find_folder(config.init).absolute()
    there = distributed.from_first(lambda: records.steps(folder))
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
        from gptoss_jax import distributed, records

        read = partial(records.read_record, str(base.folder), base.step)
        before = distributed.from_first(read).base
        if before is not None and all(before.arrays.get(k) == v for k, v in arrays.items()):
            base = before
    return dataclasses.replace(base, arrays=arrays)


def sums(params: Params, *, expert_padding: int = 0) -> dict[str, Sum]:
    """Return path -> shape, dtype and checksum of each array, without what a mesh added."""
    found = checksums.checksums(params, expert_padding=expert_padding)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    leaves = jax.tree_util.tree_leaves_with_path(padding.resize(shapes, by=-expert_padding))
    return {
        (name := path_name(path)): Sum(tuple(x.shape), x.dtype.name, found[name])
        for path, x in leaves
    }


def split(params: Params, base: Base | None) -> tuple[Params, Params]:
    """Split parameters, or their shapes, into what a checkpoint holds and what is in the base."""
    if base is None:
        return params, {}
    kept: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        is_base = path in base.arrays or f"{path}/blocks" in base.arrays
        (frozen if is_base else kept)[path] = leaf
    return nest(kept), nest(frozen)


# --- Read again ----------------------------------------------------------------------------------


def load(
    base: Base, model: ModelConfig, *, place: str | None = None, whose: str | Path = "the run"
) -> tuple[Params, Base]:
    """Return the frozen parameters of a run of `model`, and the base with where it was found.

    It is looked for at `place`, if given, or else where it was, or else where the environment's
    GPTOSS_JAX_BASE says. Over the mesh that is set each array goes straight into its shards.

    Args:
        base: As the run's record says.
        model: The run's, without a mesh's padding.
        place: A folder of either layout, a workdir, or a name on the hub; the base of a run that
            began with random parameters is nowhere, but made again.
        whose: What is said to have this base, in messages.

    Raises:
        UserError: it is not there, or another; with the arrays that differ in shape or by checksum.
    """
    if base.init == RANDOM:
        if place not in (None, RANDOM):
            raise UserError(
                f"the base of {whose} is random, of seed {base.seed}, and not {place}: leave "
                "--init out, or choose another --workdir"
            )
        found, where = _random(base, model), f"what seed {base.seed} gives"
        if base.made_by != _maker():
            where += f" by {_maker()}, where the run had {base.made_by},"
    else:
        is_new = place not in (None, RANDOM, base.init)  # a config's "random" says nothing here
        folder = _find(base, place if is_new else None, whose=whose)
        base, where = dataclasses.replace(base, folder=str(folder.absolute())), str(folder)
        _check(base, _shapes(model, folder), where=where, whose=whose)  # before much is read
        found = _read(base, model, folder)
    frozen = split(found, base)[1]
    here = sums(frozen, expert_padding=sharding.padded(model).expert_padding)
    _check(base, here, where=where, whose=whose)
    return frozen, base


def _check(base: Base, found: Mapping[str, Sum], *, where: str, whose: str | Path) -> None:
    """Refuse arrays that are not the base's."""
    wrong = []
    for path, want in base.arrays.items():
        got = found.get(path)
        if got is None:
            wrong.append(f"{path} is not in it")
        elif got[:2] != want[:2]:
            forms = [f"{x.dtype}{list(x.shape)}".replace(" ", "") for x in (got, want)]
            wrong.append(f"{path} is {forms[0]} and was {forms[1]}")
        elif got.checksum not in (None, want.checksum):
            wrong.append(f"{path} has other values, by its checksum")
    if wrong:
        more = f", and {len(wrong) - 3} more" if wrong[3:] else ""
        way = f"give the one that it was trained on: {_WAY}"
        if base.init == RANDOM:
            way = "random parameters are alike on one version of JAX and one kind of device alone"
        raise UserError(f"{where} is not the base of {whose}: {', '.join(wrong[:3])}{more}; {way}")


def _find(base: Base, place: str | None, *, whose: str | Path) -> Path:
    """Return the folder of a base."""
    from gptoss_jax.weights.read import find_folder

    if place is not None:
        return find_folder(place)
    if Path(str(base.folder)).is_dir():
        return Path(str(base.folder))
    if os.environ.get(PLACE):
        return find_folder(os.environ[PLACE])
    try:
        return find_folder(base.init)  # from another current folder, or the hub
    except UserError:
        raise UserError(
            f"{base.folder}, the base of {whose}, is not there: say where it is now, {_WAY}"
        ) from None


def _shapes(model: ModelConfig, folder: Path) -> dict[str, Sum]:
    """Return what a folder's arrays will be in the run's form, without checksums."""
    from gptoss_jax import weights
    from gptoss_jax.model import Transformer

    form = {"experts": model.experts, "param_dtype": model.param_dtype}
    stored = dataclasses.replace(weights.read_config(folder), **form)
    shapes = jax.tree_util.tree_leaves_with_path(Transformer(stored).abstract_params())
    return {path_name(path): Sum(x.shape, x.dtype.name, None) for path, x in shapes}


def _read(base: Base, model: ModelConfig, folder: Path) -> Params:
    """Read a model's parameters in the form that the run has them in."""
    from gptoss_jax import weights

    is_workdir = (folder / "checkpoints").is_dir()
    mesh = jax.sharding.get_mesh()
    read, params = weights.load(
        folder,
        None if mesh.empty else mesh,
        dtype=model.param_dtype,
        experts=model.experts,
        step=base.step if is_workdir else None,
    )
    more = sharding.padded(model).expert_padding - read.config.expert_padding  # of `model.qat`
    return padding.resize(params, by=more)


def _random(base: Base, model: ModelConfig) -> Params:
    from gptoss_jax.model import Transformer
    from gptoss_jax.train_step import init_params

    return init_params(Transformer(sharding.padded(model)), seed=base.seed)


def _maker() -> str:
    device = jax.devices()[0]
    return f"JAX {jax.__version__} on {device.device_kind if device.platform != 'cpu' else 'cpu'}"
