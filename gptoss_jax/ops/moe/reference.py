"""Reference experts: every expert on every row in float32, and a weighted sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.types import MXFP4

SWIGLU_ALPHA = 1.702


def clamped_swiglu(
    gate: Float[Array, "*n"], up: Float[Array, "*n"], *, limit: float
) -> Float[Array, "*n"]:
    """Return gate * sigmoid(1.702 gate) * (up + 1), gate at most `limit`, up within +-`limit`."""
    gate = jnp.minimum(gate, limit)
    up = jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def _float32(weight: Array | MXFP4) -> Array:
    if isinstance(weight, MXFP4):
        return mxfp4.decode(weight, jnp.float32, implementation="reference")
    return weight.astype(jnp.float32)


def _low_rank(inward: str, outward: str, x: Array, adapter: LowRank) -> Array:
    low = jnp.einsum(inward, x, adapter.a.astype(jnp.float32), precision="highest")
    return jnp.einsum(outward, low, adapter.b.astype(jnp.float32), precision="highest")


def experts(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
    *,
    gate_up_weight: Float[Array, "E 2 F D"] | MXFP4,
    gate_up_bias: Float[Array, "E 2 F"],
    down_weight: Float[Array, "E D F"] | MXFP4,
    down_bias: Float[Array, "E D"],
    limit: float,
    mask: Bool[Array, " M"] | None,
    adapters: Adapters | None = None,
) -> Float[Array, "M D"]:
    """Run all E experts on all rows; autodiff gives the gradients."""
    rows = x.astype(jnp.float32)
    if mask is not None:
        rows = jnp.where(mask[:, None], rows, 0)
        expert_weights = jnp.where(mask[:, None], expert_weights, 0)
    # A dropped pair has id E, whose one-hot row is zeros.
    chosen = jax.nn.one_hot(expert_ids, gate_up_bias.shape[0], dtype=jnp.float32)
    share = jnp.einsum("MA,MAE->ME", expert_weights, chosen, precision="highest")
    adapters = adapters or Adapters()
    hidden = jnp.einsum("MD,ECFD->MECF", rows, _float32(gate_up_weight), precision="highest")
    if adapters.gate_up:
        hidden += _low_rank("MD,EDr->MEr", "MEr,ErCF->MECF", rows, adapters.gate_up)
    hidden += gate_up_bias.astype(jnp.float32)
    hidden = clamped_swiglu(hidden[:, :, 0], hidden[:, :, 1], limit=limit)
    y = jnp.einsum("MEF,EDF->MED", hidden, _float32(down_weight), precision="highest")
    if adapters.down:
        y += _low_rank("MEF,EFr->MEr", "MEr,ErD->MED", hidden, adapters.down)
    y = y + down_bias.astype(jnp.float32)
    return jnp.einsum("ME,MED->MD", share, y, precision="highest").astype(x.dtype)
