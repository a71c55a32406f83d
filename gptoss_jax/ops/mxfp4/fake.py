"""Fake quantisation: arrays that hold what MXFP4 would make of others, for training with it."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from gptoss_jax.ops.mxfp4 import xla
from gptoss_jax.types import MXFP4_BLOCK


def quantise(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Return `decode(encode(x, "least_error"))` in the dtype of `x`, bit for bit, but faster.

    No codes are made: values round where they are. Exact in float32 and bfloat16. What MXFP4 can
    hold comes back as it is, so quantising again changes nothing. NaN stays NaN.

    Raises ValueError on a last axis that is not a multiple of 32.
    """
    if x.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"last axis of {x.shape} is not a multiple of {MXFP4_BLOCK}")
    unit, base = xla.in_units(x.reshape(*x.shape[:-1], -1, MXFP4_BLOCK))
    values, _ = xla.nearest(unit, base)
    values = values * xla.decode_scales(base)[..., None]
    return values.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def straight_through(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Return `quantise(x)`, whose gradient goes to `x` as if it were `x` (Bengio et al. 2013).

    Also where a value saturates: with scales of least error the largest of a block may be cut, from
    below 8 units to 6. Estimators that learn a range stop the gradient of what is cut, since the
    range gets one (PACT, LSQ). Here the range follows the block's largest value by itself: stopped,
    the weight that matters most would stay where it is, and could neither come back into the range
    nor grow until the scale follows it.

    Source: arXiv:1308.3432, section 4. Forward alone keeps nothing for the backward pass.
    """
    return quantise(x)


def _forward(x: Array) -> tuple[Array, None]:
    return quantise(x), None


def _backward(_: None, d: Array) -> tuple[Array]:
    return (d,)


straight_through.defvjp(_forward, _backward)
