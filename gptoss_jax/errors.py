"""Errors for the user: one line that names what is wrong, and exit code 2."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

SCRIPT = "gptoss-jax"  # the console script


class UserError(Exception):
    """The user's input is wrong; the message says what, where, and what to do about it."""


def command_name(name: str) -> str:
    """Return how a command was started: "gptoss-jax sample", or "python -m gptoss_jax.sample"."""
    script = Path(sys.argv[0]).stem == SCRIPT
    return f"{SCRIPT} {name}" if script else f"python -m gptoss_jax.{name}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError, instead of printing the usage as argparse does."""
        raise UserError(f"{message} (see --help)")

    def add_ignore_config(self) -> None:
        """Add the option that every command has which reads a checkpoint's config.json."""
        self.add_argument(
            "--ignore-config",
            metavar="FIELD",
            action="append",
            default=[],
            help="unknown field of config.json to pass over; may be repeated",
        )


def run_entry(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command's `main(argv)`; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        # As it exits, Python would warn of what the error cut short, such as Orbax's save on a full
        # disk. The error's line must be the last one.
        warnings.simplefilter("ignore")
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
