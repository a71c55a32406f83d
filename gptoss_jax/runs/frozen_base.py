"""The base of a LoRA run: its frozen parameters, which checkpoints name but do not hold.

A checkpoint of such a run holds the adapters and all other trained parameters. Its record names the
base, with the shape, dtype and checksum of each base array. These describe the parameters in
memory, so they depend neither on the mesh nor on the layout of files: a user may move a base, or
convert it from one layout to the other. `loading` finds and reads a base.
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
PLACE = "GPTOSS_JAX_BASE"  # the environment variable with the folder of a base that has moved
WAY = f"by --init when training, else by base= or the variable {PLACE}"


class Sum(NamedTuple):
    """The shape, dtype and checksum of an array."""

    shape: tuple[int, ...]
    dtype: str
    checksum: int | None  # None: not computed


@dataclasses.dataclass(frozen=True)
class Base:
    """Where a run's frozen parameters come from, and the checksums of their arrays."""

    init: str  # as the user gave it: "random", a folder, or a name on the hub
    folder: str | None = None  # its absolute path; None: random parameters
    step: int | None = None  # the checkpoint's step, if the folder is a workdir
    # The seed of random parameters. They depend on the kind of device and the version of JAX too.
    seed: int = 0
    made_by: str = ""  # that kind of device and version of JAX: see `maker`
    arrays: dict[str, Sum] = dataclasses.field(default_factory=dict)  # by path

    @property
    def digest(self) -> str:
        """Return a short hash of the arrays' shapes, dtypes and checksums, wherever they lie."""
        text = json.dumps(self.to_json()["arrays"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe(self) -> str:
        """Return the folder or seed, and the hash, as text."""
        return f"{self.folder or f'random, seed {self.seed}'}, hash {self.digest}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON data that `from_json` reads."""
        return dataclasses.asdict(self) | {"arrays": {k: list(v) for k, v in self.arrays.items()}}


def from_json(raw: dict[str, Any]) -> Base:
    """Make a `Base` from its JSON data in a checkpoint's record."""
    arrays = {k: Sum(tuple(shape), dtype, n) for k, (shape, dtype, n) in raw["arrays"].items()}
    fields: dict[str, Any] = raw | {"arrays": arrays}
    return Base(**fields)


def sums(params: Params, *, expert_padding: int = 0) -> dict[str, Sum]:
    """Return path -> shape, dtype and checksum of each array, without a mesh's padding."""
    found = checksums.checksums(params, expert_padding=expert_padding)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    leaves = jax.tree_util.tree_leaves_with_path(padding.resize(shapes, by=-expert_padding))
    return {
        (name := path_name(path)): Sum(tuple(x.shape), x.dtype.name, found[name])
        for path, x in leaves
    }


def split(params: Params, base: Base | None) -> tuple[Params, Params]:
    """Split parameters, or their shapes, into (those in the checkpoint, those in the base)."""
    if base is None:
        return params, {}
    kept: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        is_base = path in base.arrays or f"{path}/blocks" in base.arrays
        (frozen if is_base else kept)[path] = leaf
    return nest(kept), nest(frozen)


def check(base: Base, found: Mapping[str, Sum], *, where: str, whose: str | Path) -> None:
    """Raise UserError if the arrays in `found` are not the base's."""
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
            way = "random parameters need the same version of JAX and the same kind of device"
        raise UserError(f"{where} is not the base of {whose}: {', '.join(wrong[:3])}{more}; {way}")


def maker() -> str:
    """Return the version of JAX and the kind of device; random parameters depend on both."""
    device = jax.devices()[0]
    return f"JAX {jax.__version__} on {device.device_kind if device.platform != 'cpu' else 'cpu'}"
