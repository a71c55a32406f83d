"""Choice of an op's implementation."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence

from gptoss_jax import chips

log = logging.getLogger(__name__)


def choose(
    op: str,
    implementation: str | None,
    *,
    order: Mapping[str, Sequence[str]],
    refuse: Callable[[str], str | None],
) -> str:
    """Return the name of the implementation to run.

    If `implementation` is a name, that one runs, or a ValueError says why it can't. If it is None,
    the first name of `order[platform]` that `refuse` gives no reason against runs; if kernels are
    off, "xla" runs. The choice is logged once per process for each (op, chip, choice). `order`
    holds all names; "named" lists those that run only if the caller names them.
    """
    known = list(dict.fromkeys(name for names in order.values() for name in names))
    if implementation is not None:
        if implementation not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(f"{op}: implementation={implementation!r}: use {names} or None")
        reason = refuse(implementation)
        if reason is not None:
            raise ValueError(f"{op}: implementation={implementation!r} can't run: {reason}")
        return implementation
    chip = chips.current()
    if kernels_are_off() and "xla" in known:
        _report(op, chip.kind, "xla", "GPTOSS_JAX_KERNELS=off")
        return "xla"
    reasons = []
    for name in order[chip.platform]:
        reason = refuse(name)
        if reason is None:
            _report(op, chip.kind, name, "; ".join(reasons))
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"{op}: nothing runs on a {chip.kind}: {'; '.join(reasons)}")


def kernels_are_off() -> bool:
    """Return whether GPTOSS_JAX_KERNELS=off is set, for users who distrust a kernel."""
    return os.environ.get("GPTOSS_JAX_KERNELS") == "off"


@functools.cache
def _report(op: str, kind: str, name: str, reasons: str) -> None:
    log.info("%s on %s: %s%s", op, kind, name, f" ({reasons})" if reasons else "")
