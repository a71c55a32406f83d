"""Run the stack of layers: scan over groups of layers, or run one layer after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gptoss_jax import chips
from gptoss_jax.config import ModelConfig
from gptoss_jax.model.attention import LayerCache, Sequence
from gptoss_jax.model.block import Block
from gptoss_jax.parallel import mesh
from gptoss_jax.parameters.tree import is_weight, point_at_layer, take_layer
from gptoss_jax.types import MXFP4, KVCache, Params, Relaid

Results = tuple[dict[str, Array], dict[str, Array]]  # statistics and captures, each [L, ...]
INPUT = "layer_input"  # names the layers' inputs, which remat "offload" keeps on the host


def scanned(
    config: ModelConfig, layers: Params, x: Array, sequence: Sequence, *, capture: tuple[str, ...]
) -> tuple[Float[Array, "B T D"], *Results]:
    """Scan groups of one period of layer kinds, then unroll the rest. Stacks are [L, ...]."""
    c = config
    groups, rest = divmod(c.num_layers, c.period)
    blocks = [_block(c, w, capture) for w in c.layer_windows[: c.period]]
    pick = _picker()
    remat = partial(_remat, how=c.remat)
    if c.remat == "none" and chips.current().platform == "cpu" and mesh.current() is None:
        remat = partial(jax.checkpoint, policy=_all_but_cuts, prevent_cse=False)

    def layer(i: int, x: Array, first: Array, params: Params):
        # Slice the layer in the recomputed function: a slice made outside would be kept for it.
        def of(stack: Any, cut: Any) -> Any:
            return pick(stack, first + i) if cut is None else cut[i]

        own = jax.tree.map(of, layers, params, is_leaf=is_weight)
        return blocks[i](own, x, sequence, None)

    def group(x: Array, part: tuple[Array, Params]):
        results = []
        for i in range(c.period):
            x, _, stats, captured = remat(partial(layer, i))(x, *part)
            results.append((stats, captured))
        return x, jax.tree.map(lambda *a: jnp.stack(a), *results)

    def grouped(stack: Array) -> Array:
        whole = stack[: groups * c.period] if rest else stack
        return whole.reshape(groups, c.period, *stack.shape[1:])

    def cut(stack: Any) -> Any:
        """Leave out stacks that kernels read in place: a scan would copy each layer."""
        in_place = pick is point_at_layer and isinstance(stack, MXFP4 | Relaid)
        return None if in_place else jax.tree.map(grouped, stack)

    firsts = jnp.arange(groups, dtype=jnp.int32) * c.period
    parts = firsts, jax.tree.map(cut, layers, is_leaf=is_weight)
    x, results = jax.lax.scan(group, x, parts)
    results = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), results)

    def left_over(i: int, x: Array):
        return blocks[i % c.period](pick(layers, i), x, sequence, None)

    for i in range(c.num_layers - rest, c.num_layers):
        x, _, stats, captured = _remat(partial(left_over, i), c.remat)(x)
        results = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[None]]), results, (stats, captured)
        )
    return x, *results


def unrolled(
    config: ModelConfig,
    layers: Params,
    x: Array,
    sequence: Sequence,
    *,
    capture: tuple[str, ...],
    cache: KVCache | None,
) -> tuple[Float[Array, "B T D"], KVCache | None, *Results]:
    """Run one layer after another, each with its part of the cache, as decoding does."""
    parts, results = [], []
    for i, window in enumerate(config.layer_windows):
        part = None
        if cache is not None:
            slots = cache.keys[i], cache.values[i], cache.positions[i]
            part = LayerCache(*slots, empty=cache.empty)

        def layer(x: Array, i: int = i, window: int | None = window, part: Any = part):
            return _block(config, window, capture)(_picker()(layers, i), x, sequence, part)

        # With a cache there is no backward pass, so nothing to recompute.
        x, part, stats, captured = _remat(layer, "none" if cache is not None else config.remat)(x)
        parts.append(part)
        results.append((stats, captured))
    if cache is not None:
        keys, values, positions, _ = zip(*parts, strict=True)
        cache = KVCache(keys, values, positions, empty=False)
    return x, cache, *jax.tree.map(lambda *a: jnp.stack(a), *results)


def _block(config: ModelConfig, window: int | None, capture: tuple[str, ...]) -> Callable:
    """Return a function of (layer's parameters, x, sequence, cache) for one kind of layer."""

    def block(params: Params, x: Array, sequence: Sequence, cache: LayerCache | None):
        apply = partial(Block(config, parent=None).apply, {"params": params})
        return apply(x, sequence, window=window, cache=cache, capture=capture)

    return block


def _picker() -> Callable:
    """Choose how to take a layer: kernels read packed stacks in place; on a CPU it is sliced."""
    return take_layer if chips.current().platform == "cpu" else point_at_layer


def _all_but_cuts(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep all but slices for the backward pass: a scan would copy every layer's weights.

    No policy reaches into loops: their results are computed again, unless they have a name.
    """
    return primitive not in (jax.lax.slice_p, jax.lax.squeeze_p)


def _remat(layer: Callable, how: str) -> Callable:
    """Wrap a function of (x, ...) so that the backward pass recomputes what `how` says."""
    policies = jax.checkpoint_policies
    if how == "none":
        return layer
    if how == "offload":
        # Recompute from the named copy of x, which waits on the host; x itself is freed.
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(
            lambda x, *rest: layer(checkpoint_name(x, INPUT), *rest), policy=policy
        )
    policy = policies.dots_with_no_batch_dims_saveable if how == "dots" else None
    return jax.checkpoint(layer, policy=policy)
