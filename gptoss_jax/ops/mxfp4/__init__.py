"""MXFP4: 4-bit weights with a power of two per 32, decoded exactly, encoded by choice of scale."""

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
    """Return the array that `packed` stands for, e2m1[nibble] * 2**(scale - 127), in `dtype`.

    The product is formed in float32, in which it is exact for scale bytes 2 to 254 (6 * 2**127 and
    the like are infinite), then rounded to `dtype`: exact in bfloat16 as well. Bytes 0 and 1 may
    give zeros; 255 gives NaN for zeros and infinities for the rest, as torch.ldexp does.

    `implementation`: "xla" (bits) or "reference" (a table). None picks "xla". The reference takes a
    relaid weight by restoring it.
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
    """Return the MXFP4 form of `x`, whose last axis, a multiple of 32, the blocks run along.

    "ocp": the scale is 2**(floor(log2(amax)) - 2) (OCP Microscaling Formats v1.0, section 6.3), and
    what exceeds 6 of it saturates. "least_error": that scale or twice it, whichever gives the block
    the least squared error (`xla.nearest`), the same on every backend; training for MXFP4 computes
    with its values (`fake`). Values round to the nearest, ties to even. `x` must be finite; numbers
    below 2**-126 count as zero. Decoding and encoding again changes no value.

    A numpy array is encoded slice by slice and gives numpy arrays: for tensors too big to double.
    Raises ValueError on a last axis that is not a multiple of 32, or another `scale_rule`.
    """
    if scale_rule not in ("ocp", "least_error"):
        raise ValueError(f"scale_rule={scale_rule!r}: use 'ocp' or 'least_error'")
    if x.shape[-1] % MXFP4_BLOCK:
        raise ValueError(f"last axis of {x.shape} is not a multiple of {MXFP4_BLOCK}")
    return xla.encode(x, search=scale_rule == "least_error")
