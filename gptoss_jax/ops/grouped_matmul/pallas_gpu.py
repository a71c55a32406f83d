"""Grouped matmul on Hopper."""

from __future__ import annotations

from typing import Any

from gptoss_jax.ops.chips import refuse_hopper_kernel


def refuse(rows: Any, weight: Any, group_sizes: Any) -> str | None:
    """Say why the kernel can't take these, or None."""
    return refuse_hopper_kernel() or "it is not there yet"


def grouped_matmul(rows: Any, weight: Any, group_sizes: Any) -> Any:
    """Raise."""
    raise NotImplementedError
