"""Collectives for use inside `shard_map(..., check_vma=False)`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_once(x: Any, axis: str | tuple[str, ...]) -> Any:
    """Sum over mesh axes, for a result that leaves the `shard_map` and is the same on all devices.

    It differs from `lax.psum` in the backward pass. The cotangent of such a result comes in as one
    n-th of it on each of n devices. So it is multiplied by n, and the devices do not communicate.
    Do not use it for results that devices then use in different ways.
    """
    return lax.psum(x, axis)


def _fwd(x: Any, axis: Any) -> tuple[Any, None]:
    return lax.psum(x, axis), None


def _bwd(axis: Any, _: None, d_out: Any) -> tuple[Any]:
    return (jax.tree.map(lambda d: d * lax.axis_size(axis), d_out),)


sum_once.defvjp(_fwd, _bwd)
