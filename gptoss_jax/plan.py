"""Whether a run fits on hardware that is not here, and what it would cost there.

    python -m gptoss_jax.plan --config configs/120b.py --target v5p:4x4x4

Compiles the real train step, prefill and decode step with the target's own compiler: see
docs/plan.md. Exit code 0: all fit; 1: something does not; 2: it could not be asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from gptoss_jax import chips
from gptoss_jax.chips import facts as chip_facts
from gptoss_jax.config import Config, MeshConfig, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.planning import cost, programs
from gptoss_jax.planning.cost import Plan
from gptoss_jax.planning.programs import PROGRAMS, Sampling

HELP = """Plan a run on hardware that is not here: memory, fit, collectives, a bound on its time.

All other options override fields of the config, as in python -m gptoss_jax.train.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    console = Console(highlight=False)
    try:
        return run(sys.argv[1:] if argv is None else argv, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(argv: Sequence[str], console: Console) -> int:
    """Plan what the command line asks for, print it, and return the exit code.

    Raises:
        UserError: an unknown target, option or config, a mesh that is not the target's, or a
            compiler that is not there.
    """
    options, rest = _parser().parse_known_args(argv)
    if options.help:
        _parser().print_help()
        return 0
    if options.target is None:
        raise UserError(f"no --target: v5p:4x4x4, h200:8; chips: {', '.join(chip_facts.FACTS)}")
    what = options.what.split(",")
    unknown = [name for name in what if name not in PROGRAMS]
    if unknown:
        raise UserError(f"--what {unknown[0]}: there are {', '.join(PROGRAMS)}")
    for name in ("batch", "context", "piece"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be positive")
    config = command_line.load(rest, prog="python -m gptoss_jax.plan")
    length = options.context or min(8192, config.model.context)
    sampling = Sampling(options.batch, length, length, options.piece)

    def keep(name: str, text: str) -> None:
        folder = Path(options.hlo)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.hlo.txt").write_text(text)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    plans, mesh = make(
        config, options.target, what, sampling=sampling, say=say, keep=keep if options.hlo else None
    )
    say("\nassumed: " + " ".join(cost.ASSUMPTIONS))
    if options.json:
        record = as_record(config, options.target, mesh, sampling, plans)
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(plan.fits for plan in plans) else 1


def make(
    config: Config,
    target: str,
    what: Sequence[str],
    *,
    sampling: Sampling,
    say: Any = lambda _: None,
    keep: Any = None,
) -> tuple[list[Plan], jax.sharding.Mesh]:
    """Compile the programs named in `what` for `target`, and return what each takes.

    Raises:
        UserError: an unknown target, a mesh that is not the target's, or no compiler for it.
    """
    kind, _ = chip_facts.split(target)
    devices = chip_facts.devices(target)
    facts = chip_facts.FACTS[kind]
    config = _with_all_devices(config, len(devices))
    mesh = meshes.make(config.mesh, devices)
    if sampling.batch % _row_shards(mesh):
        sampling = dataclasses.replace(
            sampling, batch=-(-sampling.batch // _row_shards(mesh)) * _row_shards(mesh)
        )
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    say(
        f"{config.name} on {target}: {len(devices)} devices of {facts.nominal}, of which a program "
        f"gets {facts.memory / chip_facts.GiB:.2f} GiB ({facts.source}); mesh: {sizes}"
    )
    plans = []
    with chips.assume(kind), jax.set_mesh(mesh):
        for name in what:
            say(f"\n{name}: tracing ...")
            if name == "train":
                lowered = programs.train(config, mesh)
            elif name == "prefill":
                lowered = programs.prefill(config, mesh, sampling)
            else:
                lowered = programs.decode(config, mesh, sampling)
            say(f"{name}: compiling for {target}, which may take minutes ...")
            plan = cost.measure(lowered, config, mesh, kind=kind, sampling=sampling, keep_hlo=keep)
            for line in cost.lines(plan):
                say(line)
            plans.append(plan)
    return plans, mesh


def as_record(
    config: Config, target: str, mesh: jax.sharding.Mesh, sampling: Sampling, plans: list[Plan]
) -> dict[str, Any]:
    """Return a plan for JSON."""
    return {
        "config": config.name,
        "target": target,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "sampling": dataclasses.asdict(sampling),
        "facts": dataclasses.asdict(chip_facts.FACTS[chip_facts.split(target)[0]]),
        "assumed": " ".join(cost.ASSUMPTIONS),
        "programs": [plan.record() for plan in plans],
    }


def _with_all_devices(config: Config, count: int) -> Config:
    """Let fsdp take all devices where the config says nothing of a mesh."""
    if config.mesh == MeshConfig() and count > 1:
        return dataclasses.replace(config, mesh=MeshConfig(fsdp=-1))
    return config


def _row_shards(mesh: jax.sharding.Mesh) -> int:
    count = 1
    for axis in meshes.ROWS:
        count *= mesh.shape[axis]
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.plan",
        description=HELP,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this")
    parser.add_argument("--target", metavar="CHIP[:SHAPE]", help="v5e:1x1, v5p:4x4x4, h200:8, ...")
    parser.add_argument("--what", default="train", help="of train,prefill,decode; commas between")
    parser.add_argument("--batch", type=int, default=1, help="rows that are sampled at once")
    parser.add_argument("--context", type=int, help="tokens of each with its prompt (8192)")
    parser.add_argument("--piece", type=int, help="prompt tokens at a time (the sampler's own)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' HLO there")
    return parser


def _prepare() -> None:
    """Keep JAX from looking for devices: programs are compiled for others than are here."""
    for name, value in chip_facts.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options, _ = _parser().parse_known_args()
    gpu = (options.target or "").partition(":")[0] in chip_facts.GPUS
    jax.config.update("jax_platforms", None if gpu else "cpu")


if __name__ == "__main__":
    _prepare()
    sys.exit(main())
