"""Weights & Biases: the numbers of a run, sent to a project there beside the files of the workdir.

It needs the package `wandb` (`pip install 'gptoss-jax[wandb]'`), which nothing else imports. wandb
reads its own environment variables: WANDB_API_KEY, WANDB_ENTITY, and WANDB_MODE=offline, which
writes into `<workdir>/wandb` for a later `wandb sync`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError

ID = "wandb_id"  # file of the workdir, by which a run that goes on finds its page again


def check(project: str | None) -> None:
    """Refuse a project (None: there is none) if wandb is not installed, or no one is logged in.

    Raises:
        UserError: nothing could be sent.
    """
    if project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"train.wandb is {project}, and the package wandb is not installed: pip install "
            "'gptoss-jax[wandb]', or leave out train.wandb"
        )
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        known = _wandb().login()
    except Exception as error:  # wandb's own errors, and those of its HTTP client
        raise _unreachable(project, error) from None
    if not known:
        raise _unreachable(project, "no one is logged in")


class Tracker:
    """Sends the records of a run to its page at Weights & Biases."""

    def __init__(
        self, project: str, *, workdir: str | Path, config: dict[str, Any], fresh: bool
    ) -> None:
        """Open the page of the run in `workdir`; a `fresh` run gets a new one.

        Raises:
            UserError: wandb refuses, or can't be reached.
        """
        wandb = _wandb()
        folder = Path(workdir)
        file = folder / ID
        if fresh or not file.is_file():
            file.write_text(uuid.uuid4().hex[:12] + "\n")
        try:
            self._run = wandb.init(
                project=project,
                id=file.read_text().strip(),
                name=folder.absolute().name,
                dir=str(folder),
                config=config,
                resume="allow",
                settings=wandb.Settings(console="off", quiet=True),
            )
        except Exception as error:  # wandb's own errors, and those of its HTTP client
            raise _unreachable(project, error) from None
        # wandb's own step only rises, but a run that was killed or rewound writes a step again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Send the numbers of a record."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Wait until all is sent, or written in offline mode."""
        self._run.finish()


def _wandb() -> Any:
    return importlib.import_module("wandb")  # it is optional, so nothing else may import it


def _unreachable(project: str, why: object) -> UserError:
    first = (str(why).strip().splitlines() or [type(why).__name__])[0]
    return UserError(
        f"train.wandb is {project}, and Weights & Biases can't be used: {first}; log in with "
        "`wandb login`, set WANDB_MODE=offline to send the run later, or leave out train.wandb"
    )
