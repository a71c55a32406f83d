"""Train until the last step: `python -m launch.whole_run OPTIONS`, with the options of `train`.

A run that gets SIGTERM saves a checkpoint and exits with 0. Kubernetes and SkyPilot also send
SIGTERM when they take a machine away, and to them 0 means that the job is complete. So this command
exits with 75 ("try again", EX_TEMPFAIL of sysexits.h) if steps are left, and they start it again.
"""

from __future__ import annotations

import sys

from gptoss_jax import train
from gptoss_jax.config import command_line
from gptoss_jax.errors import run_entry
from gptoss_jax.runs import records

TRY_AGAIN = 75


def main(argv: list[str]) -> None:
    """Train, and exit with `TRY_AGAIN` if the run stopped early. Raises what `train.main` does."""
    train.main(argv)
    record = records.newest_record(command_line.load(argv).run_folder)
    if record is None or record.step < record.config.train.steps:
        sys.exit(TRY_AGAIN)


if __name__ == "__main__":
    run_entry(main)
