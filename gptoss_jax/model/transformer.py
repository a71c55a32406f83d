"""The transformer: embedding, layers, norm, unembedding, and the one forward pass.

Dimension letters are listed at the top of `gptoss_jax/types.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.model import lora
from gptoss_jax.model.attention import Attention, LayerCache, Sequence
from gptoss_jax.model.layers import Experts, RMSNorm, Router, Table
from gptoss_jax.ops import chips
from gptoss_jax.ops.lora import product, rows_of
from gptoss_jax.ops.rope import cos_sin, inverse_frequencies
from gptoss_jax.ops.unembed import unembed
from gptoss_jax.parallel import context, mesh, sharding, vocabulary
from gptoss_jax.types import (
    MXFP4,
    KVCache,
    Output,
    Params,
    Relaid,
    RouterStats,
    is_weight,
    point_at_layer,
    take_layer,
)

# What `capture` may name, each [L, B, T, ...] in the result.
CAPTURES: tuple[str, ...] = (
    "residual",  # the residual stream after the layer [D]
    "attention_out",  # what attention adds [D]
    "moe_out",  # what the experts add [D]
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
        """Return the residual stream, the cache, the router's statistics and what was captured."""
        c = self.config
        D, dtype = c.d_model, jnp.dtype(c.dtype)
        spread = sharding.tokens if cache is None else sharding.rows
        attention_norm = RMSNorm(D, c.rms_eps, c.param_dtype, name="attention_norm")
        moe_norm = RMSNorm(D, c.rms_eps, c.param_dtype, name="moe_norm")
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


def _picker() -> Callable:
    """Choose how a layer is taken: kernels read packed stacks in place; a CPU takes them apart."""
    return take_layer if chips.current().platform == "cpu" else point_at_layer


def _remat(block: Callable, how: str) -> Callable:
    """Wrap a layer so that the backward pass recomputes what `how` says."""
    if how == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if how == "dots" else None
    return jax.checkpoint(block, policy=policy)


class Transformer(nn.Module):
    """GPT-OSS. `apply({"params": params}, tokens)` gives logits; `forward` gives everything."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters: `layers` stacked [L, ...], whatever a layer's kind."""
        c = self.config
        self.embedding = Table(c)
        self.final_norm = RMSNorm(c.d_model, c.rms_eps, c.param_dtype)
        self.unembedding = Table(c)
        if not self.has_variable("params", "layers"):
            self.param("layers", self._init_layers)
        if c.lora.targets and self.is_initializing():
            self.param("lora", lora.init, c)

    def _init_layers(self, key: Array) -> Params:
        c = self.config
        x, one = jnp.zeros((1, 1, c.d_model), jnp.dtype(c.dtype)), jnp.ones((1, 1), jnp.int32)
        angle = jnp.zeros((1, 1, c.head_dim // 2))
        sequence = Sequence(one, one, angle, angle)

        def init(key: Array) -> Params:
            return dict(Block(c, parent=None).init(key, x, sequence, window=None)["params"])

        return jax.vmap(init)(jax.random.split(key, c.num_layers))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return the logits, float32."""
        out = self.run(tokens, segment_ids=segment_ids, positions=positions)
        return self.to_logits(out.hidden)

    def to_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Unembed: logits in float32 from the dtype of `hidden`.

        On a mesh each device forms those of its part of the vocabulary for all of `hidden`.
        """
        hidden = sharding.constrain(hidden, *(None,) * hidden.ndim)
        logits = unembed(hidden, self.unembedding())
        if (adapter := lora.of_table(self.variables["params"], "unembedding", self)) is not None:
            logits = logits + product(hidden, adapter, jnp.float32)
        return sharding.constrain(logits, *(None,) * (hidden.ndim - 1), sharding.VOCABULARY)

    def run(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        capture: Iterable[str] = (),
        balanced: bool = False,
    ) -> Output:
        """Run all layers on bound parameters; see `forward`."""
        c = self.config
        capture = tuple(capture)
        unknown = [name for name in capture if name not in CAPTURES]
        if unknown:
            raise ValueError(f"capture names {unknown[0]!r}; there are {', '.join(CAPTURES)}")
        if cache is not None and positions is None:
            raise ValueError("positions are needed with a cache: where do the tokens stand?")
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = restarting_positions(segment_ids)
        reorders = cache is None and mesh.size("context") > 1 and not balanced
        if reorders:
            order = partial(context.balance, shards=mesh.size("context"))
            tokens, segment_ids, positions = map(order, (tokens, segment_ids, positions))
        sequence = Sequence(segment_ids, positions, *self._angles(positions))
        residual = jnp.dtype("float32" if c.dtype == "float16" else c.dtype)
        table = self.embedding()
        self.unembedding()  # declared even where only hidden states are asked for
        with jax.named_scope("embedding"):
            x = self._embed(table, tokens, decoding=cache is not None).astype(residual)
            if (adapter := lora.of_table(self.variables["params"], "embedding", self)) is not None:
                x = x + rows_of(tokens, adapter, residual)
        layers = lora.join(self.variables["params"])
        if cache is None and not isinstance(_a_stack(layers), tuple):
            x, stats, captured = self._scan(layers, x, sequence, capture)
        else:
            x, cache, stats, captured = self._unroll(layers, x, sequence, capture, cache=cache)
        hidden = self.final_norm(x).astype(jnp.dtype(c.dtype))
        if reorders:
            hidden = context.unbalance(hidden, shards=mesh.size("context"))
            back = partial(context.unbalance, shards=mesh.size("context"), axis=2)
            captured = {name: back(value) for name, value in captured.items()}
        return Output(hidden, cache, RouterStats(**stats), captured)

    def _embed(self, table: Array, tokens: Int[Array, "B T"], *, decoding: bool) -> Array:
        if mesh.current() is None:
            return table[tokens]
        return vocabulary.embed(table, tokens, whole_rows=decoding)

    def _angles(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        c = self.config
        inverse, concentration = inverse_frequencies(
            c.head_dim,
            theta=c.rope_theta,
            factor=c.yarn_factor,
            initial_context=c.initial_context,
            beta_fast=c.rope_beta_fast,
            beta_slow=c.rope_beta_slow,
        )
        return cos_sin(positions, inverse, concentration)

    def _block(self, window: int | None, capture: tuple[str, ...]) -> Callable:
        """Return a function of (layer's parameters, x, sequence, cache) for one kind of layer."""

        def block(params: Params, x: Array, sequence: Sequence, cache: LayerCache | None):
            apply = partial(Block(self.config, parent=None).apply, {"params": params})
            return apply(x, sequence, window=window, cache=cache, capture=capture)

        return block

    def _scan(self, layers: Params, x: Array, sequence: Sequence, capture: tuple[str, ...]):
        """Scan groups of one period of layer kinds; unroll what is left over."""
        c = self.config
        groups, rest = divmod(c.num_layers, c.period)
        blocks = [self._block(w, capture) for w in c.layer_windows[: c.period]]
        pick = _picker()

        def layer(i: int, x: Array, first: Array, params: Params):
            # The layer is cut out in what is run again: cut out before, it would be kept for that.
            def of(stack: Any, cut: Any) -> Any:
                return pick(stack, first + i) if cut is None else cut[i]

            own = jax.tree.map(of, layers, params, is_leaf=is_weight)
            return blocks[i](own, x, sequence, None)

        def group(x: Array, part: tuple[Array, Params]):
            results = []
            for i in range(c.period):
                x, _, stats, captured = _remat(partial(layer, i), c.remat)(x, *part)
                results.append((stats, captured))
            return x, jax.tree.map(lambda *a: jnp.stack(a), *results)

        def grouped(stack: Array) -> Array:
            whole = stack[: groups * c.period] if rest else stack
            return whole.reshape(groups, c.period, *stack.shape[1:])

        def scanned(stack: Any) -> Any:
            """Leave out what is read in place: a scan would cut out each layer, which copies."""
            in_place = pick is point_at_layer and isinstance(stack, MXFP4 | Relaid)
            return None if in_place else jax.tree.map(grouped, stack)

        firsts = jnp.arange(groups, dtype=jnp.int32) * c.period
        parts = firsts, jax.tree.map(scanned, layers, is_leaf=is_weight)
        x, results = jax.lax.scan(group, x, parts)
        results = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)
        for i in range(c.num_layers - rest, c.num_layers):
            block = _remat(blocks[i % c.period], c.remat)
            x, _, stats, captured = block(pick(layers, i), x, sequence, None)
            results = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b[None]]), results, (stats, captured)
            )
        return x, *results

    def _unroll(self, layers, x, sequence: Sequence, capture: tuple[str, ...], *, cache):
        """Run layer after layer, each with its part of the cache: how decoding does it."""
        c = self.config
        parts, results = [], []
        for i, window in enumerate(c.layer_windows):
            part = None
            if cache is not None:
                slots = cache.keys[i], cache.values[i], cache.positions[i]
                part = LayerCache(*slots, empty=cache.empty)
            # With a cache there is no backward pass, so nothing to recompute.
            block = _remat(self._block(window, capture), "none" if cache is not None else c.remat)
            x, part, stats, captured = block(_picker()(layers, i), x, sequence, part)
            parts.append(part)
            results.append((stats, captured))
        if cache is not None:
            keys, values, positions, _ = zip(*parts, strict=True)
            cache = KVCache(keys, values, positions, empty=False)
        return x, cache, *jax.tree.map(lambda *a: jnp.stack(a), *results)

    @nn.nowrap
    def forward(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        capture: Iterable[str] = (),
        balanced: bool = False,
    ) -> Output:
        """Return hidden states, cache, router statistics and captures: trainer and sampler both.

        `segment_ids` are 0 for padding (all 1 if not given); `positions` default to restarting in
        each segment. With a cache `positions` are absolute, padding is not written, and a query
        sees what the cache holds and the tokens before it; an `empty` cache is filled by the very
        pass that training runs. `capture` names intermediates, see `CAPTURES`.

        On a mesh that splits tokens over `context`, they are put into the order in which its shards
        have equal work (`parallel.context.balance`), and results back; with `balanced` tokens,
        segments and positions come in that order, and results stay in it.

        Raises ValueError for an unknown capture, or a cache without positions.
        """
        return self.apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            capture=capture,
            balanced=balanced,
            method="run",
        )  # type: ignore[return-value]

    @nn.nowrap
    def dropless(self) -> Transformer:
        """Return the model that evaluates and samples: the same one, without a capacity factor."""
        if not self.config.capacity_factor:
            return self
        return Transformer(dataclasses.replace(self.config, capacity_factor=0.0))

    @nn.nowrap
    def unembed(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Return float32 logits of hidden states."""
        return self.apply({"params": params}, hidden, method="to_logits")  # type: ignore[return-value]

    @nn.nowrap
    def init_cache(self, batch_size: int, length: int, dtype: str | None = None) -> KVCache:
        """Return an empty cache for `length` positions: a ring of W slots in a banded layer."""
        c = self.config
        slots = [length if w is None else min(w, length) for w in c.layer_windows]

        def zeros() -> tuple[Array, ...]:
            shape = (c.num_kv_heads, c.head_dim)
            return tuple(
                jnp.zeros((batch_size, s, *shape), jnp.dtype(dtype or c.dtype)) for s in slots
            )

        positions = tuple(jnp.full((batch_size, s), -1, jnp.int32) for s in slots)
        cache = KVCache(zeros(), zeros(), positions, empty=True)
        return sharding.constrain_cache(cache)

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Return the shapes and dtypes of the parameters without making them."""

        def init() -> Params:
            return dict(self.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])

        with mesh.alone():
            return jax.eval_shape(init)

    @nn.nowrap
    def num_parameters(self) -> tuple[int, int]:
        """Return total parameters, and those active for a token.

        Active leaves out the embedding and counts A of E experts, as the model card does.
        """
        leaves = jax.tree_util.tree_leaves_with_path(self.abstract_params(), is_leaf=is_weight)
        total = active = 0
        for path, leaf in leaves:
            names = [step.key for step in path]
            size = math.prod(leaf.shape)
            total += size
            if names[0] != "embedding":
                share = self.config.active_experts / self.config.num_experts
                active += round(size * share) if "experts" in names else size
        return total, active


def restarting_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Count from 0 in each contiguous segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _a_stack(layers: Params):
    return jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, tuple))[0]
