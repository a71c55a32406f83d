"""Run a command: `gptoss-jax NAME ARGS`, or `python -m gptoss_jax NAME ARGS`; no NAME lists all."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from gptoss_jax.errors import COMMON_OPTIONS, SCRIPT, UserError, run_entry

# Each name is a module of this package. Listing the commands imports none of them, to be instant.
COMMANDS = {
    "train": "train or fine-tune a model; run the same command again to resume",
    "sample": "answer one prompt",
    "convert": "write a checkpoint in another layout, or a run's adapters alone",
    "verify": "check the published weights against known log-probabilities",
    "inspect": "show packed batches as text, and which tokens count in the loss",
    "plan": "say whether a run fits on other hardware, and what it costs there",
    "report": "write a page about a run, or compare runs on one page",
}


def main(argv: list[str]) -> None:
    """Run the command that `argv` names first, or list all. Raises UserError if it is unknown."""
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
            f"{SCRIPT} COMMAND --help shows the options of a command.",
            COMMON_OPTIONS.strip(),
        ]
    )


def run_script() -> None:
    """Run as the console script, with the current folder on the path, as `python -m` does.

    A config file may import modules from that folder.
    """
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    run_entry(main)


if __name__ == "__main__":
    run_entry(main)
