"""One layer: attention and mixture of experts, each around a residual stream."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.attention import Attention, LayerCache, Sequence
from gptoss_jax.model.layers import Experts, RMSNorm, Router
from gptoss_jax.parallel import sharding

# The names that `capture` accepts. Each result is [L, B, T, ...], with the last axis given here.
CAPTURES: tuple[str, ...] = (
    "residual",  # the residual stream after the layer [D]
    "attention_out",  # attention's output, which is added to the residual stream [D]
    "moe_out",  # the experts' output, which is added too [D]
    "router_logits",  # [E], float32
    "expert_ids",  # [A]; E where the expert was full (training with a capacity factor)
    "expert_weights",  # [A], float32
)


class Block(nn.Module):
    """One layer: attention and mixture of experts, each around a residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        *,
        window: int | None,
        cache: LayerCache | None = None,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, dict[str, Array], dict[str, Array]]:
        """Return the residual stream, the cache, the router's statistics and the captures."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        spread = sharding.tokens if cache is None else sharding.rows
        attention_norm = RMSNorm(c, "layers/attention_norm/scale", name="attention_norm")
        moe_norm = RMSNorm(c, "layers/moe_norm/scale", name="moe_norm")
        attend = Attention(c, name="attention")
        mask = sequence.segment_ids != 0
        decoding = cache is not None

        def mix(h: Float[Array, "B T D"]):
            with jax.named_scope("router"):
                chosen, weights, logits, stats = Router(c, name="router")(
                    h, mask, decoding=decoding
                )
            with jax.named_scope("experts"):
                experts = Experts(c, name="experts")
                out = experts(h, chosen, weights, mask=mask, decoding=decoding)
            return out, (logits, chosen, weights), stats

        def add(x: Array, y: Array, norm: RMSNorm) -> Array:
            x = spread(x + y.astype(x.dtype))
            return norm(x) if c.norm == "post" else x

        def into(x: Array, norm: RMSNorm) -> Array:
            return (norm(x) if c.norm == "pre" else x).astype(dtype)

        with jax.named_scope("attention"):
            h = into(x, attention_norm)
            attended, cache = attend(h, sequence, window=window, cache=cache)
            x = add(x, attended, attention_norm)
        mixed, routing, stats = mix(into(x, moe_norm))
        x = add(x, mixed, moe_norm)
        every = dict(zip(CAPTURES, (x, attended, mixed, *routing), strict=True))
        return x, cache, stats, {name: every[name] for name in capture}
