"""Make a plan: compile the programs of a run for an absent target, and measure them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from gptoss_jax import chips
from gptoss_jax.chips import topologies
from gptoss_jax.chips.facts import TARGETS, GiB
from gptoss_jax.config import Config, MeshConfig
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.planning import cost, programs
from gptoss_jax.planning.cost import Plan
from gptoss_jax.planning.programs import Sampling


def make(
    config: Config,
    target: str,
    what: Sequence[str],
    *,
    sampling: Sampling,
    say: Any = lambda _: None,
    keep: Any = None,
    make_model: MakeModel = Transformer,
) -> tuple[list[Plan], jax.sharding.Mesh]:
    """Compile the programs named in `what` for `target`, and return the cost of each, and the mesh.

    Raises:
        UserError: the target is unknown, the mesh does not fit it, or its compiler is missing.
    """
    kind, _ = topologies.split(target)
    devices = topologies.devices(target)
    facts = TARGETS[kind]
    config = _with_all_devices(config, len(devices))
    mesh = meshes.make(config.mesh, devices)
    if sampling.batch % _row_shards(mesh):
        sampling = dataclasses.replace(
            sampling, batch=-(-sampling.batch // _row_shards(mesh)) * _row_shards(mesh)
        )
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    say(
        f"{config.name} on {target}: {len(devices)} devices of {facts.nominal}, of which a program "
        f"gets {facts.memory / GiB:.2f} GiB ({facts.source}); mesh: {sizes}"
    )
    plans = []
    with chips.assume(kind), jax.set_mesh(mesh):
        for name in what:
            say(f"\n{name}: tracing ...")
            if name == "train":
                lowered = programs.train(config, mesh, make_model)
            elif name == "prefill":
                lowered = programs.prefill(config, mesh, sampling, make_model)
            else:
                lowered = programs.decode(config, mesh, sampling, make_model)
            say(f"{name}: compiling for {target}, which may take minutes ...")
            plan = cost.measure(lowered, config, mesh, kind=kind, sampling=sampling, keep_hlo=keep)
            for line in cost.lines(plan):
                say(line)
            plans.append(plan)
    return plans, mesh


def as_record(
    config: Config, target: str, mesh: jax.sharding.Mesh, sampling: Sampling, plans: list[Plan]
) -> dict[str, Any]:
    """Return a plan as JSON data."""
    return {
        "config": config.name,
        "target": target,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "sampling": dataclasses.asdict(sampling),
        "facts": dataclasses.asdict(TARGETS[topologies.split(target)[0]]),
        "assumed": " ".join(cost.ASSUMPTIONS),
        "programs": [plan.record() for plan in plans],
    }


def _with_all_devices(config: Config, count: int) -> Config:
    """Give all devices to `fsdp` if the config sets no mesh."""
    if config.mesh == MeshConfig() and count > 1:
        return dataclasses.replace(config, mesh=MeshConfig(fsdp=-1))
    return config


def _row_shards(mesh: jax.sharding.Mesh) -> int:
    count = 1
    for axis in meshes.ROWS:
        count *= mesh.shape[axis]
    return count
