"""Plan a run for other hardware: say whether it fits there, and what it would cost.

    python -m gptoss_jax.plan --config configs/120b.py --target v5p:4x4x4

It compiles the real training step, prefill and decode step with the compiler of the target
hardware, which need not be here: see docs/plan.md. Exit code 0: all programs fit; 1: one does not;
2: an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from gptoss_jax.errors import Parser, UserError, command_name, run_entry

HELP = """Plan a run for other hardware: memory, fit, collectives, and a bound on the time.

All other options override fields of the config, as in python -m gptoss_jax.train.
"""


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError as `run`, and SystemExit(1) if a program does not fit."""
    options, rest = parse(argv)
    _keep_from_devices(options.target)
    if not run(options, rest):
        sys.exit(1)


def run(options: argparse.Namespace, rest: list[str]) -> bool:
    """Plan the programs that the command line names, print the plans, and say whether all fit.

    Raises:
        UserError: an unknown target, option or config, a mesh that does not fit the target, or a
            compiler that is not installed.
    """
    # Imported after the arguments are read: JAX takes a second, and --help need not wait for it.
    from rich.console import Console

    from gptoss_jax.chips.facts import TARGETS
    from gptoss_jax.config import command_line
    from gptoss_jax.loading import ignoring
    from gptoss_jax.model import Transformer
    from gptoss_jax.planning import cost, plans
    from gptoss_jax.planning.programs import PROGRAMS, Sampling

    if options.target is None:
        raise UserError(
            f"no --target: give one, such as v5p:4x4x4 or h200:8; chips: {', '.join(TARGETS)}"
        )
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

    with ignoring(config.ignore_config):
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
    """Return the options of this command, and the other arguments, which set the config."""
    parser = Parser(
        command_name("plan"),
        description=HELP,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target", metavar="CHIP[:SHAPE]", help="hardware: v5p:4x4x4, v6e-8, h200:8, ..."
    )
    parser.add_argument(
        "--what", default="train", help="programs to plan, of train,prefill,decode (train)"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences sampled at once (1)")
    parser.add_argument("--context", type=int, help="tokens of a sequence, prompt included (8192)")
    parser.add_argument(
        "--piece", type=int, help="prompt tokens per prefill call (the sampler's default)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the plans to FILE")
    parser.add_argument("--hlo", metavar="DIR", help="keep the compiled programs' HLO in DIR")
    return parser.parse_known_args(argv)


def _keep_from_devices(target: str | None) -> None:
    """Keep JAX from looking for local devices: the programs are compiled for other hardware.

    XLA's log is silenced, unless `--log-level` or the environment asks for it. The compiler's
    errors are exceptions, and what ends the process is still written.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA reads it when JAX is imported
    import jax

    from gptoss_jax.chips.facts import GPUS
    from gptoss_jax.chips.topologies import ENVIRONMENT, split

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        gpu = target is not None and split(target)[0] in GPUS
    except UserError:
        gpu = False  # `run` refuses the target
    jax.config.update("jax_platforms", None if gpu else "cpu")


if __name__ == "__main__":
    run_entry(main)
