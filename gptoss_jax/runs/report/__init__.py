"""A run's page, `report.html`: `python -m gptoss_jax.report WORKDIR`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax.errors import UserError

FILE = "report.html"


def write(workdirs: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write the page of one run, or of several runs side by side, and return its path.

    The page is one file that loads no other. It goes into the workdir, or to `out`, which several
    runs need. An old file is replaced as a whole.

    Raises:
        UserError: no workdir is given, a folder holds no run, or the page can't be written.
    """
    from gptoss_jax.runs.report import page, runs  # imports matplotlib, which takes a second

    if not workdirs:
        raise UserError("no workdir was given: python -m gptoss_jax.report WORKDIR")
    if out is None and len(workdirs) > 1:
        raise UserError(f"{len(workdirs)} workdirs go on one page: say where, with --out FILE")
    path = Path(workdirs[0]) / FILE if out is None else Path(out)
    text = page.render(runs.load(workdirs))
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"{path} can't be written: {error.strerror}") from None
    return path
