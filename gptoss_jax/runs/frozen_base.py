"""The base of a LoRA run: its frozen parameters, which checkpoints name and do not hold.

A checkpoint of such a run holds the adapters and whatever else is trained. Its record names the
base, and has shape, dtype and checksum of each of its arrays. These are of the parameters in
memory, so they depend neither on the mesh nor on the layout of files: a base may be moved, or
converted from one layout to the other. `loading` finds a base and reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptoss_jax.errors import UserError
from gptoss_jax.parallel import padding
from gptoss_jax.parameters.tree import flatten, nest, path_name
from gptoss_jax.runs import checksums
from gptoss_jax.types import Params

RANDOM = "random"
PLACE = "GPTOSS_JAX_BASE"  # the variable that says where a base is that is no longer where it was
WAY = f"by --init when training, else by base= or the variable {PLACE}"


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


def check(base: Base, found: Mapping[str, Sum], *, where: str, whose: str | Path) -> None:
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
        way = f"give the one that it was trained on: {WAY}"
        if base.init == RANDOM:
            way = "random parameters are alike on one version of JAX and one kind of device alone"
        raise UserError(f"{where} is not the base of {whose}: {', '.join(wrong[:3])}{more}; {way}")


def maker() -> str:
    """Return the version of JAX and the kind of device, on which random parameters depend."""
    device = jax.devices()[0]
    return f"JAX {jax.__version__} on {device.device_kind if device.platform != 'cpu' else 'cpu'}"
