"""A run's page, `report.html`: `python -m gptoss_jax.report WORKDIR`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax.errors import UserError

FILE = "report.html"


def write(workdirs: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write the page of one run, or of several beside each other, and return its path.

    The page is one file that asks for no other. It goes into the workdir unless `out` is given;
    several runs need it. The file is replaced as a whole.

    Raises:
        UserError: no workdir, a folder without a run, or a page that can't be written.
    """
    from gptoss_jax.runs.report import page, runs  # with matplotlib, which takes a second to import

    if not workdirs:
        raise UserError("no workdir was given: python -m gptoss_jax.report WORKDIR")
    if out is None and len(workdirs) > 1:
        raise UserError(f"{len(workdirs)} workdirs go on one page: say where, with --out FILE")
    path = Path(workdirs[0]) / FILE if out is None else Path(out)
    text = page.render(runs.load(workdirs))
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, path)
    except OSError as error:
        whole.unlink(missing_ok=True)
        raise UserError(f"{path} can't be written: {error.strerror}") from None
    return path
