"""LoRA adapters: low-rank products (x A) B beside a weight, for any number of axes."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.ops import mxfp4
from gptoss_jax.types import MXFP4, Relaid


class LowRank(NamedTuple):
    """An adapter: `a` maps a weight's inputs to the rank r, and `b` maps the rank to its outputs.

    The axis of E experts is optional.
    """

    a: Float[Array, "*E *C r"]
    b: Float[Array, "*E r *N"]

    def times(self, scale: float) -> LowRank:
        """Return the adapter with `b`, and so its product, multiplied by `scale`."""
        return self._replace(b=self.b * scale)


def product(
    x: Float[Array, "*lead C"], adapter: LowRank, dtype: DTypeLike | None = None
) -> Float[Array, "*lead *N"]:
    """Return (x A) B in `dtype`, by default the dtype of `x`.

    Operands are in the dtype of `x`, sums in float32. If A has several input axes (heads and head
    dimensions), `x` has them merged into one.
    """
    rank, outputs = adapter.a.shape[-1], adapter.b.shape[1:]
    a = adapter.a.reshape(-1, rank).astype(x.dtype)
    b = adapter.b.reshape(rank, -1).astype(x.dtype)
    low = jnp.einsum("...C,Cr->...r", x, a, preferred_element_type=jnp.float32).astype(x.dtype)
    out = jnp.einsum("...r,rN->...N", low, b, preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype).reshape(*x.shape[:-1], *outputs)


def rows_of(ids: Int[Array, "*lead"], adapter: LowRank, dtype: DTypeLike) -> Array:
    """Return rows `ids` of the product A B, to add to the same rows of a table."""
    low = adapter.a[ids].astype(dtype)
    out = jnp.einsum(
        "...r,rN->...N", low, adapter.b.astype(dtype), preferred_element_type=jnp.float32
    )
    return out.astype(dtype)


def update(
    adapter: LowRank, *, experts: bool = False, lookup: bool = False
) -> Float[Array, "*E *N *C"]:
    """Return A B in float32, with the weight's axes: [*N, *C], or [*C, *N] with `lookup`."""
    a, b = (x.astype(jnp.float32) for x in adapter)
    lead = a.shape[:1] if experts else ()
    inputs, outputs = a.shape[len(lead) : -1], b.shape[len(lead) + 1 :]
    a = a.reshape(*lead, math.prod(inputs), a.shape[-1])
    b = b.reshape(*lead, a.shape[-1], math.prod(outputs))
    product = jnp.matmul(a, b, precision="highest").reshape(*lead, *inputs, *outputs)
    if lookup:
        return product
    sides = range(len(lead), len(lead) + len(inputs)), range(len(lead) + len(inputs), product.ndim)
    return product.transpose(*range(len(lead)), *sides[1], *sides[0])


def fold(
    weight: Array | MXFP4 | Relaid, adapter: LowRank, *, experts: bool = False, lookup: bool = False
) -> Float[Array, "*E *N *C"]:
    """Return W + A B of a layer, where B already holds the scale.

    Merging, training with `qat` and packing all call this function, so they agree to the bit. The
    sum is formed in float32. For a packed W it stays float32; otherwise it is rounded to the dtype
    of W. An export instead calls `update`, because it measures the update, and adds it in float32
    too.
    """
    added = update(adapter, experts=experts, lookup=lookup)
    if isinstance(weight, MXFP4 | Relaid):
        return mxfp4.decode(weight, jnp.float32) + added
    return (weight.astype(jnp.float32) + added).astype(weight.dtype)


def widen(
    hidden: Float[Array, "*lead D"], table: Float[Array, "V D"], adapter: LowRank
) -> tuple[Float[Array, "*lead D+r"], Float[Array, "V D+r"]]:
    """Return wider hidden states and a wider table, whose product includes the adapter's.

    With these, an op that never forms the logits needs no support for adapters. The table is
    copied. Both results are in the dtype of `hidden`.
    """
    dtype = hidden.dtype
    low = jnp.einsum(
        "...D,Dr->...r", hidden, adapter.a.astype(dtype), preferred_element_type=jnp.float32
    )
    wide = jnp.concatenate([table.astype(dtype), adapter.b.T.astype(dtype)], axis=1)
    return jnp.concatenate([hidden, low.astype(dtype)], axis=-1), wide
