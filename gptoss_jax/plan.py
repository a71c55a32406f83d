"""Plan a run for hardware that is not here: whether it fits, and what it would cost there.

    python -m gptoss_jax.plan --config configs/120b.py --target v5p:4x4x4

Compiles the real train step, prefill and decode step with the target's own compiler: see
docs/plan.md. Exit code 0: all fit; 1: something does not; 2: it could not be asked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from gptoss_jax.errors import Parser, UserError, command_name, run_entry

HELP = """Plan a run on hardware that is not here: memory, fit, collectives, a bound on its time.

All other options override fields of the config, as in python -m gptoss_jax.train.
"""


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError as `run`, and SystemExit(1) if something does not fit."""
    options, rest = parse(argv)
    _keep_from_devices(options.target)
    if not run(options, rest):
        sys.exit(1)


def run(options: argparse.Namespace, rest: list[str]) -> bool:
    """Plan what the command line asks for, print it, and say whether all of it fits.

    Raises:
        UserError: an unknown target, option or config, a mesh that is not the target's, or a
            compiler that is not there.
    """
    # Not before the arguments are read: JAX takes a second, for which --help need not wait.
    from rich.console import Console

    from gptoss_jax.chips.facts import TARGETS
    from gptoss_jax.config import command_line
    from gptoss_jax.model import Transformer
    from gptoss_jax.planning import cost, plans
    from gptoss_jax.planning.programs import PROGRAMS, Sampling

    if options.target is None:
        raise UserError(f"no --target: v5p:4x4x4, h200:8; chips: {', '.join(TARGETS)}")
    what = options.what.split(",")
    unknown = [name for name in what if name not in PROGRAMS]
    if unknown:
        raise UserError(f"--what {unknown[0]}: there are {', '.join(PROGRAMS)}")
    for name in ("batch", "context", "piece"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be positive")
    config = command_line.load(rest, prog=command_name("plan"))
    length = options.context or min(8192, config.model.context)
    sampling = Sampling(options.batch, length, length, options.piece)
    console = Console(highlight=False)

    def keep(name: str, text: str) -> None:
        folder = Path(options.hlo)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.hlo.txt").write_text(text)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    made, mesh = plans.make(
        config,
        options.target,
        what,
        sampling=sampling,
        say=say,
        keep=keep if options.hlo else None,
        make_model=command_line.load_make_model(rest) or Transformer,
    )
    say("\nassumed: " + " ".join(cost.ASSUMPTIONS))
    if options.json:
        record = plans.as_record(config, options.target, mesh, sampling, made)
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return all(plan.fits for plan in made)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this command, and the rest, which is the config's."""
    parser = Parser(
        command_name("plan"),
        description=HELP,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", metavar="CHIP[:SHAPE]", help="v5e:1x1, v5p:4x4x4, h200:8, ...")
    parser.add_argument("--what", default="train", help="of train,prefill,decode; commas between")
    parser.add_argument("--batch", type=int, default=1, help="rows that are sampled at once")
    parser.add_argument("--context", type=int, help="tokens of each with its prompt (8192)")
    parser.add_argument("--piece", type=int, help="prompt tokens at a time (the sampler's own)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' HLO there")
    return parser.parse_known_args(argv)


def _keep_from_devices(target: str | None) -> None:
    """Keep JAX from looking for devices: programs are compiled for others than are here."""
    import jax

    from gptoss_jax.chips.facts import GPUS
    from gptoss_jax.chips.topologies import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    gpu = (target or "").partition(":")[0] in GPUS
    jax.config.update("jax_platforms", None if gpu else "cpu")


if __name__ == "__main__":
    run_entry(main)
