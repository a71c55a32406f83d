"""Rotary position embedding with YaRN's frequencies."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(
    head_dim: int,
    *,
    theta: float,
    factor: float,
    initial_context: int,
    beta_fast: float,
    beta_slow: float,
) -> tuple[np.ndarray, float]:
    """Return the rotation per position [H/2] in radians, and the factor on cos and sin.

    This is YaRN's "NTK-by-parts" (Peng et al. 2023, arXiv:2309.00071, section 3.2), without
    rounding the ends of the ramp. Pairs that turn more than `beta_fast` times in the initial
    context keep their frequency; pairs that turn less than `beta_slow` times are slowed by
    `factor`. A factor of 1 is plain RoPE. The arithmetic is float32 in the order of the reference,
    because at position 4,200 the last bit is 2e-4 radians.
    Source: gpt_oss/torch/model.py, RotaryEmbedding.
    """
    half = head_dim // 2
    one = np.float32(1.0)
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    if factor <= 1.0:
        return one / wavelength, 1.0

    def pair_that_turns(times: float) -> float:
        return half * math.log(initial_context / (times * 2 * math.pi)) / math.log(theta)

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    # In a short context the two ends can meet or leave the range; the ramp is then a step.
    pairs = np.arange(half, dtype=np.float32)
    ramp = np.clip((pairs - np.float32(low)) / np.float32(max(high - low, 1e-3)), 0.0, 1.0)
    keep = one - ramp.astype(np.float32)
    slowed, kept = one / (np.float32(factor) * wavelength), one / wavelength
    return slowed * (one - keep) + kept * keep, 0.1 * math.log(factor) + 1.0


def cos_sin(
    positions: Int[Array, "B T"], inverse: np.ndarray, concentration: float
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """Return cosine and sine of every pair's angle, times `concentration`, in float32."""
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(inverse, jnp.float32)
    return jnp.cos(angle) * concentration, jnp.sin(angle) * concentration


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T H/2"], sin: Float[Array, "B T H/2"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H/2) of each head, in float32; the result has the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
