"""The attention module: biased projections, RoPE, the key/value cache and the attention op."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.softcap.model.softcapped import attention
from gptoss_jax.config import ModelConfig
from gptoss_jax.lora import adapters
from gptoss_jax.model.initial import declare
from gptoss_jax.ops.lora import product
from gptoss_jax.ops.norm import rms_norm
from gptoss_jax.ops.rope import rotate
from gptoss_jax.parallel import mesh, sharding
from gptoss_jax.parallel.cache import write


class Sequence(NamedTuple):
    """Segments, positions and RoPE angles of a call's tokens: the same for every layer."""

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


class LayerCache(NamedTuple):
    """One layer of `types.KVCache`."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]
    positions: Int[Array, "B S"]
    empty: bool


class Attention(nn.Module):
    """Grouped-query attention with sinks; the caller passes the layer's window."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        *,
        window: int | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Return attention's output, and the cache, if any, with these tokens added."""
        c = self.config
        q, k, v = (self._project(name, x) for name in "qkv")
        if c.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        q = rotate(q, sequence.cos, sequence.sin)
        k = rotate(k, sequence.cos, sequence.sin)
        q, k, v = (_by_head(a, decoding=cache is not None) for a in (q, k, v))
        out, cache = _attend(q, k, v, self._sinks(), sequence, window=window, cache=cache)
        weight = declare(self, "layers/attention/o_weight", c)
        weight = sharding.gathered("layers/attention/o_weight", weight)
        bias = declare(self, "layers/attention/o_bias", c)
        flat = weight.reshape(c.d_model, -1).astype(x.dtype)
        heads = out.reshape(*out.shape[:2], -1)
        out = jnp.einsum("BTC,DC->BTD", heads, flat)
        if (adapter := adapters.adapter(self, "o_weight", c.lora.scale)) is not None:
            out = out + product(heads, adapter)
        return out + bias.astype(x.dtype), cache

    def _project(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        c = self.config
        weight = declare(self, f"layers/attention/{name}_weight", c)
        weight = sharding.gathered(f"layers/attention/{name}_weight", weight)
        bias = declare(self, f"layers/attention/{name}_bias", c)
        # Multiply by a matrix: with [N, H, D], XLA would transpose the weight at every call.
        flat = weight.reshape(-1, c.d_model).astype(x.dtype)
        out = jnp.einsum("BTD,CD->BTC", x, flat).reshape(*x.shape[:2], *bias.shape)
        if (adapter := adapters.adapter(self, f"{name}_weight", c.lora.scale)) is not None:
            out = out + product(x, adapter)
        return out + bias.astype(x.dtype)

    def _norm(self, name: str, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        c = self.config
        return rms_norm(x, declare(self, f"layers/attention/{name}", c), eps=c.rms_eps)

    def _sinks(self) -> Float[Array, " N"] | None:
        c = self.config
        if c.sinks == "learned":
            return declare(self, "layers/attention/sinks", c)
        return jnp.zeros((c.num_heads,), jnp.float32) if c.sinks == "zero" else None


def _by_head(x: Float[Array, "B T N H"], *, decoding: bool) -> Float[Array, "B T N H"]:
    """Shard the heads over the mesh axis `tensor`, if it divides them."""
    heads = "tensor" if x.shape[2] % mesh.size("tensor") == 0 else None
    return sharding.constrain(x, mesh.ROWS, None if decoding else "context", heads, None)


def _attend(q, k, v, sinks, sequence: Sequence, *, window, cache: LayerCache | None):
    """Attend to the call's tokens and to the cache; return the output and the updated cache."""
    segments, positions = sequence.segment_ids, sequence.positions

    # On a mesh, too: of plain jnp XLA finds out by itself what each device computes.
    def self_attention():
        where: Any = {"segment_ids": segments, "positions": positions}
        return attention(q, k, v, sinks=sinks, window=window, **where)

    if cache is None:
        return self_attention(), None
    written = _write(cache, k, v, segments=segments, positions=positions)
    if cache.empty:
        return self_attention(), written
    keys, values, key_positions = written.keys, written.values, written.positions
    if window is not None and q.shape[1] > 1:
        # The call's later tokens may have overwritten keys that its earlier tokens still see, so
        # attend to the old slots and the new keys.
        keys = _append(cache.keys, k, fill=0)
        values = _append(cache.values, v, fill=0)
        new = jnp.where(segments != 0, positions, -1)
        key_positions = _append(cache.positions, new, fill=-1)
    out = attention(
        q,
        keys,
        values,
        sinks=sinks,
        window=window,
        segment_ids=(segments != 0).astype(jnp.int32),
        positions=positions,
        kv_segment_ids=(key_positions >= 0).astype(jnp.int32),
        kv_positions=key_positions,
    )
    return out, written


def _append(slots, new, *, fill: int):
    """Append `new` to the slots, and fill up to a multiple of 8 slots, as GPU kernels need."""
    spare = -(slots.shape[1] + new.shape[1]) % 8
    new = jnp.pad(new, [(0, 0), (0, spare)] + [(0, 0)] * (new.ndim - 2), constant_values=fill)
    return jnp.concatenate([slots, new.astype(slots.dtype)], axis=1)


def _write(cache: LayerCache, k, v, *, segments, positions) -> LayerCache:
    """Write the call's keys and values into their slots: position p into slot p % S.

    Padding is not written. Of several tokens that share a slot, only the last is written.
    """
    slots = cache.positions.shape[1]
    real = segments != 0
    newest = jnp.max(jnp.where(real, positions, -1), axis=1, keepdims=True)
    keep = real & (positions > newest - slots)
    slot = jnp.where(keep, positions % slots, slots)  # out of range: not written
    row = jnp.arange(k.shape[0])[:, None]
    return LayerCache(
        write(cache.keys, k, slot),
        write(cache.values, v, slot),
        cache.positions.at[row, slot].set(positions, mode="drop"),
        empty=False,
    )
