"""The transformer: embedding, layers, norm, unembedding, and the one forward pass.

Dimension letters are listed at the top of `gptoss_jax/types.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import lru_cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from gptoss_jax.config import ModelConfig
from gptoss_jax.harmony.tokenizer import check_ids
from gptoss_jax.lora import adapters
from gptoss_jax.model import layerwise, scan
from gptoss_jax.model.attention import Sequence
from gptoss_jax.model.block import CAPTURES, Block
from gptoss_jax.model.layers import RMSNorm, Table
from gptoss_jax.ops.lora import product, rows_of
from gptoss_jax.ops.rope import cos_sin, inverse_frequencies
from gptoss_jax.ops.unembed import unembed
from gptoss_jax.parallel import context, mesh, sharding, vocabulary
from gptoss_jax.parameters.tree import is_weight
from gptoss_jax.types import KVCache, Output, Params, RouterStats


class Transformer(nn.Module):
    """GPT-OSS. `apply({"params": params}, tokens)` returns logits; `forward` an `Output`."""

    config: ModelConfig
    # The model in pieces, for `training/layerwise_step.py`. A copy of this folder uses its own one.
    layerwise = layerwise

    def setup(self) -> None:
        """Declare the parameters; those of all layers, banded or full, are stacked [L, ...]."""
        c = self.config
        self.embedding = Table(c, "embedding/weight")
        self.final_norm = RMSNorm(c, "final_norm/scale")
        self.unembedding = Table(c, "unembedding/weight")
        if not self.has_variable("params", "layers"):
            self.param("layers", self._init_layers)
        if c.lora.targets and self.is_initializing():
            self.param("lora", adapters.init, c)

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
        """Return the logits, float32. Raises UserError as `forward`."""
        out = self.run(tokens, segment_ids=segment_ids, positions=positions)
        return self.to_logits(out.hidden)

    def to_logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Unembed: return float32 logits of a product in the dtype of `hidden`.

        On a mesh, each device computes the logits of its part of the vocabulary, for all of
        `hidden`.
        """
        hidden = sharding.constrain(hidden, *(None,) * hidden.ndim)
        logits = unembed(hidden, self.unembedding())
        if (
            adapter := adapters.of_table(self.variables["params"], "unembedding", self)
        ) is not None:
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
        embedded: Float[Array, "B T D"] | None = None,
    ) -> Output:
        """Run all layers on bound parameters; see `forward`."""
        c = self.config
        _check_tokens(tokens, c.vocab_size)
        capture = tuple(capture)
        unknown = [name for name in capture if name not in CAPTURES]
        if unknown:
            raise ValueError(f"capture names {unknown[0]!r}; there are {', '.join(CAPTURES)}")
        if cache is not None and positions is None:
            raise ValueError("positions are needed with a cache: give the position of each token")
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = restarting_positions(segment_ids)
        reorders = cache is None and mesh.size("context") > 1 and not balanced
        if reorders:
            order = partial(context.balance, shards=mesh.size("context"))
            tokens, segment_ids, positions = map(order, (tokens, segment_ids, positions))
            embedded = None if embedded is None else order(embedded)
        sequence = Sequence(segment_ids, positions, *self._angles(positions))
        residual = jnp.dtype("float32" if c.dtype == "float16" else c.dtype)
        self.unembedding()  # declare it even if the caller wants only hidden states
        with jax.named_scope("embedding"):
            if embedded is None:
                embedded = self._embed(self.embedding(), tokens, decoding=cache is not None)
            x = embedded.astype(residual)
            if (
                adapter := adapters.of_table(self.variables["params"], "embedding", self)
            ) is not None:
                x = x + rows_of(tokens, adapter, residual)
        layers = adapters.join(self.variables["params"])
        if self.is_initializing():
            # `setup` has declared the layers, so they need not run: it would take most of the time.
            stats, captured = {f.name: jnp.zeros(()) for f in dataclasses.fields(RouterStats)}, {}
        elif cache is None and not isinstance(_a_stack(layers), tuple):
            x, stats, captured = scan.scanned(c, layers, x, sequence, capture=capture)
        else:
            x, cache, stats, captured = scan.unrolled(
                c, layers, x, sequence, capture=capture, cache=cache
            )
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
        embedded: Float[Array, "B T D"] | None = None,
    ) -> Output:
        """Return hidden states, cache, router statistics and captures, for trainer and sampler.

        `segment_ids` are 0 for padding (default: all 1). By default `positions` restart in each
        segment. With a cache, `positions` are absolute, padding is not written, and a query sees
        the cache and the tokens before it. An `empty` cache is filled by the same pass that
        training runs. `capture` names intermediates: see `CAPTURES`.

        On a mesh that splits tokens over `context`, tokens are reordered so that its shards have
        equal work (`parallel.context.balance`), and results are put back in order. With `balanced`,
        tokens, segments and positions are already in that order, and results stay in it. `embedded`
        gives the tokens' rows of the embedding; `params` then need not hold that table.

        Raises ValueError for an unknown capture, or a cache without positions; UserError for an id
        outside the vocabulary, except under `jax.jit`, where the ids are unknown.
        """
        return self.apply(
            {"params": params},
            tokens,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            capture=capture,
            balanced=balanced,
            embedded=embedded,
            method="run",
        )  # type: ignore[return-value]

    @nn.nowrap
    def dropless(self) -> Transformer:
        """Return the same model without a capacity factor, for evaluation and sampling."""
        if not self.config.capacity_factor:
            return self
        return self.with_config(dataclasses.replace(self.config, capacity_factor=0.0))

    @nn.nowrap
    def with_config(self, config: ModelConfig) -> Transformer:
        """Return a model of the same code with another config."""
        return self.clone(parent=None, config=config)

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
        return jax.tree.map(lambda x: x, _abstract_params(self))  # a copy  # pyright: ignore[reportArgumentType]

    @nn.nowrap
    def num_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, and the number that is active for a token.

        The second leaves out the embedding and counts A of E experts, as the model card does.
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


@lru_cache(maxsize=32)  # one run asks five times, and tracing takes half a second
def _abstract_params(model: Transformer) -> Params:
    def init() -> Params:
        return dict(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])

    with mesh.alone():
        return jax.eval_shape(init)


def _check_tokens(tokens: Int[Array, "B T"], vocab_size: int) -> None:
    """Refuse ids outside the vocabulary, which JAX would clip to its last row.

    Nothing is checked while a program is traced, or where this process has only a part of the ids.
    """
    if isinstance(tokens, Tracer):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    check_ids(tokens, vocab_size)


def restarting_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Count from 0 in each contiguous segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _a_stack(layers: Params):
    return jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, tuple))[0]
