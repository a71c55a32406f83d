"""The commands: `gptoss-jax NAME ARGS` or `python -m gptoss_jax NAME ARGS`; alone it lists them."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from gptoss_jax.errors import SCRIPT, UserError, run_entry

# A module of each name lies beside this one. None is imported to list them, so that it is instant.
COMMANDS = {
    "train": "train or fine-tune a model; the same command again goes on where it was",
    "sample": "answer one prompt",
    "convert": "write a checkpoint in another layout, or a run's adapters alone",
    "verify": "check the published weights against known log-probabilities",
    "inspect": "show packed batches as text, with what the loss counts",
    "plan": "say whether a run fits on hardware that is not here, and what it costs there",
    "report": "write the page of a run, or compare runs on one page",
}


def main(argv: list[str]) -> None:
    """Run the command that is named first, or list all. Raises UserError for one that is none."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name in COMMANDS:
        importlib.import_module(f"gptoss_jax.{name}").main(rest)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        what = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"{name!r} is no command: {what}")


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {SCRIPT} COMMAND [OPTIONS]   (or python -m gptoss_jax.COMMAND [OPTIONS])",
            "",
            *lines,
            "",
            f"{SCRIPT} COMMAND --help shows the options of one.",
        ]
    )


def run_script() -> None:
    """Run as the console script: with the current folder on the path, as `python -m` has it.

    A config file may import what lies there.
    """
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    run_entry(main)


if __name__ == "__main__":
    run_entry(main)
