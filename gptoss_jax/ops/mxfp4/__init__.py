"""MXFP4: 4-bit weights in blocks of 32 that share a scale, a power of two.

Decoding is exact; encoding chooses the scales by one of two rules.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gptoss_jax.ops.mxfp4 import layouts, reference, xla
from gptoss_jax.ops.mxfp4.layouts import relayout as relayout
from gptoss_jax.ops.mxfp4.layouts import restore as restore
from gptoss_jax.types import MXFP4, MXFP4_BLOCK, Relaid


def decode(
    packed: MXFP4 | Relaid, dtype: DTypeLike = jnp.float32, *, implementation: str | None = None
) -> Float[Array, "... C"]:
    """Return the decoded array, e2m1[nibble] * 2**(scale - 127), in `dtype`.

    The product is formed in float32 and rounded to `dtype`. In float32 it is exact for scale bytes
    2 to 254 (6 * 2**127 and the like are infinite), and so it is in bfloat16. Scale bytes 0 and 1
    may give zeros. Scale byte 255 gives NaN for zeros and infinities for the rest, as torch.ldexp
    does.

    `implementation`: "xla" (arithmetic on bits) or "reference" (a table). None picks "xla". The
    reference first restores a relaid weight.
    """
    if isinstance(packed, Relaid):
        if implementation in (None, "xla"):
            return layouts.decode(packed, jnp.dtype(dtype))
        packed = restore(packed)
    if implementation == "reference":
        return reference.decode(packed, jnp.dtype(dtype))
    if implementation in (None, "xla"):
        return xla.decode(packed, jnp.dtype(dtype))
    raise ValueError(f"implementation={implementation!r}: use 'xla', 'reference' or None")


def encode(
    x: Float[Array, "... C"] | np.ndarray, scale_rule: Literal["ocp", "least_error"] = "ocp"
) -> MXFP4:
    """Return `x` in MXFP4, with blocks of 32 along the last axis.

    `scale_rule`:
    - "ocp": the scale is 2**(floor(log2(amax)) - 2) (OCP Microscaling Formats v1.0, section 6.3).
      Values above 6 times the scale saturate.
    - "least_error": that scale or twice it, whichever gives the block the least squared error
      (`xla.nearest`). The choice is the same on every backend. Training for MXFP4 computes with
      these values (`fake`).

    Values round to the nearest, ties to even. `x` must be finite; numbers below 2**-126 count as
    zero. Decoding and encoding again changes no value. A numpy array is encoded slice by slice into
    numpy arrays, for tensors that are too big to hold twice.

    Raises:
        ValueError: The last axis is not a multiple of 32, or `scale_rule` is not known.
    """
    if scale_rule not in ("ocp", "least_error"):
        raise ValueError(f"scale_rule={scale_rule!r}: use 'ocp' or 'least_error'")
    if x.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"last axis of {x.shape} is not a multiple of {MXFP4_BLOCK}")
    return xla.encode(x, search=scale_rule == "least_error")
