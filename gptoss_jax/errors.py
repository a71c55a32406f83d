"""How each command starts and ends: the options of all commands, and errors for the user.

An error for the user is one line that names what is wrong, and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

SCRIPT = "gptoss-jax"  # the console script
LOG_LEVELS = {"debug": "0", "info": "0", "warning": "1", "error": "2"}  # and XLA's for each
COMMON_OPTIONS = """every command also takes:
  --version             print the versions of gptoss-jax, jax and Python, and stop
  --log-level LEVEL     debug, info, warning or error: what libraries (JAX, Orbax) write to stderr;
                        by `gptoss-jax COMMAND` and for plans XLA, too
"""


class UserError(Exception):
    """The user's input is wrong; the message says what, where, and what to do about it."""


def command_name(name: str) -> str:
    """Return how a command was started: "gptoss-jax sample", or "python -m gptoss_jax.sample"."""
    script = Path(sys.argv[0]).stem == SCRIPT
    return f"{SCRIPT} {name}" if script else f"python -m gptoss_jax.{name}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s, and whose help has `COMMON_OPTIONS`."""

    def __init__(self, *args: Any, epilog: str = "", **options: Any) -> None:
        epilog = f"{epilog}\n{COMMON_OPTIONS}" if epilog else COMMON_OPTIONS
        form = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, epilog=epilog, **{**form, **options})

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


def version() -> str:
    """Return the versions that a report of a fault needs, in one line."""
    from gptoss_jax import __version__

    jax = importlib.metadata.version("jax")
    return f"{SCRIPT} {__version__} (jax {jax}, Python {platform.python_version()})"


def take_common_options(argv: list[str]) -> list[str]:
    """Return a command line without the options that all commands have, after obeying them.

    `--version` prints the versions and exits. `--log-level` sets what Python's loggers write to
    stderr, and XLA's log if JAX is not imported yet: by `gptoss-jax COMMAND` it is not, and by
    `python -m gptoss_jax.COMMAND` most commands have imported it.

    Raises:
        UserError: the level is none of `LOG_LEVELS`, in small letters or capitals.
    """
    if "--version" in argv:
        print(version())
        sys.exit(0)
    rest, left = [], iter(argv)
    for argument in left:
        name, equals, level = argument.partition("=")
        if name.replace("_", "-") != "--log-level":
            rest.append(argument)
            continue
        given = level if equals else next(left, "")
        level = given.lower()
        if level not in LOG_LEVELS:
            raise UserError(f"--log-level is {given!r}: it is one of {', '.join(LOG_LEVELS)}")
        from absl import logging as absl_logging  # Orbax's logger, with a level of its own

        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(level=level.upper(), format=form)
        absl_logging.set_verbosity(level)
        # XLA reads this once, when JAX is imported.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = LOG_LEVELS[level]
    return rest


def run_entry(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command's `main(argv)`; a `UserError` becomes one line on stderr and exit code 2.

    The options that all commands have are obeyed here, and left out of `argv`.
    """
    try:
        main(take_common_options(sys.argv[1:]))
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
