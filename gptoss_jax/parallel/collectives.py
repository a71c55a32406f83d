"""Collectives for use inside `shard_map(..., check_vma=False)`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_once(x: Any, axis: str | tuple[str, ...]) -> Any:
    """Sum over mesh axes, for a result that leaves the `shard_map` the same on all of them.

    As `lax.psum`, but the backward pass does not sum again what is there on each device: the
    cotangent of such a result comes in as an n-th on each of n devices, which makes n times that,
    and no exchange. Not for results that devices go on to use differently.
    """
    return lax.psum(x, axis)


def _fwd(x: Any, axis: Any) -> tuple[Any, None]:
    return lax.psum(x, axis), None


def _bwd(axis: Any, _: None, d_out: Any) -> tuple[Any]:
    return (jax.tree.map(lambda d: d * lax.axis_size(axis), d_out),)


sum_once.defvjp(_fwd, _bwd)
