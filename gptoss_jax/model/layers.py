"""The small modules: norm, router, experts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.lora import adapters
from gptoss_jax.model.initial import declare
from gptoss_jax.ops import moe
from gptoss_jax.ops.lora import product
from gptoss_jax.ops.norm import rms_norm
from gptoss_jax.parallel import mesh, sharding


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    config: ModelConfig
    parameter: str  # the path of the scale

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis; see `ops.norm.rms_norm`."""
        return rms_norm(x, declare(self, self.parameter, self.config), eps=self.config.rms_eps)


class Table(nn.Module):
    """A [V, D] table: the embedding or the unembedding."""

    config: ModelConfig
    parameter: str  # the path of the table

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        """Return the table, in its own dtype."""
        return declare(self, self.parameter, self.config)


class Router(nn.Module):
    """The linear layer that scores the experts, and the choice of experts by their scores."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"], *, decoding: bool = False
    ) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"], Float[Array, "B T E"], dict[str, Array]]:
        """Return the chosen experts, their weights, all logits, and the layer's statistics.

        The linear layer accumulates in float32; the weights are a softmax over the chosen logits
        alone. Source: gpt_oss/torch/model.py, MLPBlock.forward.

        With `capacity_factor`, a (token, expert) pair beyond the expert's capacity gets E as its
        expert: see `ops.moe.drop_beyond_capacity`. The token's other weights stay as they are. Load
        and losses count all pairs that the router chose, dropped ones too.
        """
        c = self.config
        weight = declare(self, "layers/router/weight", c)
        weight = sharding.gathered("layers/router/weight", weight)
        bias = declare(self, "layers/router/bias", c)
        logits = jnp.einsum(
            "BTD,ED->BTE", x, weight.astype(x.dtype), preferred_element_type=jnp.float32
        )
        if (adapter := adapters.adapter(self, "weight", c.lora.scale)) is not None:
            logits = logits + product(x, adapter, jnp.float32)
        logits = logits + bias.astype(jnp.float32)

        def top(logits: Array) -> Array:
            return jax.lax.top_k(logits, c.active_experts)[1]

        stopped = jax.lax.stop_gradient(logits)
        chosen = sharding.each_token(top, stopped, whole_rows=decoding)
        # Select by one-hot, not by index: the gradient is then a product and not a scatter.
        one_hot = jax.nn.one_hot(chosen, c.num_experts, dtype=jnp.float32)
        weights = jax.nn.softmax(jnp.einsum("BTAE,BTE->BTA", one_hot, logits), axis=-1)
        stats = _statistics(logits, one_hot, mask)
        if c.capacity_factor:
            # Count in the order of rows and tokens of the whole batch: gathering ids is cheap.
            kept, stats["dropped"] = moe.drop_beyond_capacity(
                chosen.reshape(-1, c.active_experts),
                mask.reshape(-1),
                num_experts=c.num_experts,
                factor=c.capacity_factor,
            )
            chosen = kept.reshape(chosen.shape)
        return chosen, weights, logits, stats


def _statistics(
    logits: Float[Array, "B T E"], one_hot: Float[Array, "B T A E"], mask: Bool[Array, "B T"]
) -> dict[str, Array]:
    """Return one layer's load [E], balancing loss and z-loss over unmasked rows; `dropped` is 0.

    Balancing: E * sum_e load_e * mean_prob_e (Fedus et al. 2021, arXiv:2101.03961, equation 4, with
    load over all active slots). z-loss: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """
    E, A = logits.shape[-1], one_hot.shape[-2]
    real = mask.astype(jnp.float32)
    count = jnp.maximum(real.sum(), 1.0)
    load = jnp.einsum("BTAE,BT->E", one_hot, real) / (count * A)
    prob = jnp.einsum("BTE,BT->E", jax.nn.softmax(logits, axis=-1), real) / count
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real) / count
    return {"load": load, "balance_loss": E * jnp.sum(load * prob), "z_loss": z, "dropped": 0 * z}


class Experts(nn.Module):
    """The experts' projections, dense or packed; both go through the same op."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        chosen: Int[Array, "B T A"],
        weights: Float[Array, "B T A"],
        *,
        mask: Bool[Array, "B T"],
        decoding: bool = False,
    ) -> Float[Array, "B T D"]:
        """Return the weighted sum of the chosen experts' outputs; see `ops.moe.experts`.

        On a mesh, `parallel.experts` computes it; with `decoding`, tokens are not split over
        `context`. With `ModelConfig.qat`, the experts use their weights quantised to MXFP4. This
        happens here, so that only one layer's quantised copy exists at a time, and the backward
        pass makes it again wherever it recomputes the layer.
        """
        c = self.config
        names = ("gate_up_weight", "gate_up_bias", "down_weight", "down_bias")
        parts = {name: declare(self, f"layers/experts/{name}", c) for name in names}
        own = [
            adapters.adapter(self, f"{name}_weight", c.lora.scale) for name in ("gate_up", "down")
        ]
        if any(own):
            parts["adapters"] = moe.Adapters(*own)
        return _weighted_sum(c, parts, x, chosen, weights, mask=mask, decoding=decoding)


def _weighted_sum(
    c: ModelConfig,
    parts: dict[str, Any],
    x: Float[Array, "B T D"],
    *routing: Array,
    mask: Bool[Array, "B T"],
    decoding: bool,
) -> Float[Array, "B T D"]:
    """Run the op on one device or on the mesh; `routing` is the chosen experts and weights."""
    common = {"limit": c.swiglu_limit, "chunk": c.expert_chunk or None}
    if mesh.current() is None:
        rows = (a.reshape(-1, a.shape[-1]) for a in (x, *routing))
        parts = moe.quantised(parts, x.dtype) if c.qat else parts
        return moe.experts(*rows, **parts, mask=mask.reshape(-1), **common).reshape(x.shape)
    from gptoss_jax.parallel import experts

    return experts.experts(
        x,
        *routing,
        weights=parts,
        mask=mask,
        exchange=c.expert_exchange,
        row_axes=(mesh.ROWS, None) if decoding else None,
        quantised=c.qat,
        **common,
    )
