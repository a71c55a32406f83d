"""Fake quantisation: arrays rounded to the values of MXFP4, for quantisation-aware training."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from gptoss_jax.ops.mxfp4 import xla
from gptoss_jax.types import MXFP4_BLOCK


def quantise(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Return `decode(encode(x, "least_error"))` in the dtype of `x`, bit for bit, but faster.

    Values are rounded without forming codes. The result is exact in float32 and bfloat16. Values
    that MXFP4 can hold do not change, so quantising again changes nothing. NaN stays NaN.

    Raises:
        ValueError: The last axis is not a multiple of 32.
    """
    if x.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"last axis of {x.shape} is not a multiple of {MXFP4_BLOCK}")
    unit, base = xla.in_units(x.reshape(*x.shape[:-1], -1, MXFP4_BLOCK))
    values, _ = xla.nearest(unit, base)
    values = values * xla.decode_scales(base)[..., None]
    return values.reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def straight_through(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Return `quantise(x)` with the gradient of the identity (Bengio et al. 2013).

    The gradient also passes where a value saturates: with "least_error" scales, the largest value
    of a block may be cut from below 8 units to 6. Estimators that learn a range stop the gradient
    of a cut value, because the range gets a gradient (PACT, LSQ). Here the range follows the
    block's largest value by itself. Without a gradient, the weight that matters most would not
    move: it could neither come back into the range nor grow until the scale follows it.

    Source: arXiv:1308.3432, section 4. The forward pass keeps nothing for the backward pass.
    """
    return quantise(x)


def _forward(x: Array) -> tuple[Array, None]:
    return quantise(x), None


def _backward(_: None, d: Array) -> tuple[Array]:
    return (d,)


straight_through.defvjp(_forward, _backward)
