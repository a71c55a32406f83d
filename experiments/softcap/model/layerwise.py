"""The model in pieces, for a training step that differentiates one layer after another.

The pieces are the modules of `Transformer.run` without a cache, in the same order. They work
without adapters and on one device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.softcap.model.attention import Sequence
from experiments.softcap.model.block import Block
from gptoss_jax import chips
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.layers import RMSNorm
from gptoss_jax.ops.rope import cos_sin, inverse_frequencies
from gptoss_jax.parameters.tree import point_at_layer, take_layer
from gptoss_jax.types import Batch, Params


def sequence(config: ModelConfig, batch: Batch) -> Sequence:
    """Return the batch's segments, positions and RoPE angles, which every layer uses."""
    c = config
    inverse, concentration = inverse_frequencies(
        c.head_dim,
        theta=c.rope_theta,
        factor=c.yarn_factor,
        initial_context=c.initial_context,
        beta_fast=c.rope_beta_fast,
        beta_slow=c.rope_beta_slow,
    )
    angles = cos_sin(batch.positions, inverse, concentration)
    return Sequence(batch.segment_ids, batch.positions, *angles)


@jax.named_scope("embedding")
def embed(
    config: ModelConfig, table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Return the residual stream before the first layer."""
    residual = "float32" if config.dtype == "float16" else config.dtype
    return table[tokens].astype(residual)


def pick(layers: Params, i: Int[Array, ""]) -> Params:
    """Take layer `i`: kernels read a packed stack in place; on a CPU it is sliced."""
    return (take_layer if chips.current().platform == "cpu" else point_at_layer)(layers, i)  # pyright: ignore[reportArgumentType]


def layer(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    *,
    sequence: Sequence,
    window: int | None,
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """Return the residual stream after a layer, and its router's statistics (`RouterStats`)."""
    block = Block(config, parent=None)
    x, _, stats, _ = block.apply({"params": params}, x, sequence, window=window)  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
    return x, stats


def final_norm(
    config: ModelConfig, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Normalise the residual stream after the last layer into the hidden states to unembed."""
    norm = RMSNorm(config, "final_norm/scale")
    return norm.apply({"params": params}, x).astype(jnp.dtype(config.dtype))  # pyright: ignore[reportAttributeAccessIssue]
