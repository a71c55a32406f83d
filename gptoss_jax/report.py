"""Write a page about a run, or compare runs: `python -m gptoss_jax.report WORKDIR ...`."""

from __future__ import annotations

import argparse

from gptoss_jax.errors import Parser, command_name, run_entry
from gptoss_jax.runs import report


def main(argv: list[str]) -> None:
    """Write a page, and print its path.

    Raises:
        UserError: see `report.write`.
    """
    args = parse(argv)
    print(report.write(args.workdirs, out=args.out))


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command's arguments."""
    parser = Parser(
        command_name("report"),
        description="Write a page about a run (report.html in its workdir), or compare runs.",
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="workdir of a run")
    parser.add_argument("--out", metavar="FILE", help="file to write; needed for several workdirs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_entry(main)
