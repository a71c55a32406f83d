"""AdamW with its schedule, and which parameters it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax.config import OptimizerConfig
from gptoss_jax.types import MXFP4, Params, is_weight

Schedule = Callable[[Any], Any]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Return the learning rate as a function of the updates made so far.

    Rises linearly over `warmup_steps` (the first update already moves), then stays, or falls along
    a cosine to `final_learning_rate * learning_rate` at the last of `total_steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(total_steps - warmup - 1, 1)

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        rise = jnp.minimum(1.0, (count + 1) / (warmup + 1))
        if config.schedule == "constant":
            return peak * rise
        share = jnp.clip((count - warmup) / decay, 0.0, 1.0)
        end = config.final_learning_rate
        return peak * rise * (end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * share)))

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Make AdamW for the trainable part of a parameter tree (see `split_trainable`).

    Gradients, moments and updates are float32 whatever the parameters' dtype. A parameter kept in
    less than float32 has a float32 copy in the optimizer's state, which is what is updated; the
    parameter is that copy rounded. So steps much smaller than a bfloat16's spacing add up, at 4
    more bytes a parameter (2 + 2 of parameter and gradient, 4 + 4 of moments, 4 of copy: 16).

    Clips by global norm; decays matrices only (see `is_decayed`).
    """
    parts = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        _scale_by_schedule(make_schedule(config, total_steps)),
    ]
    return _in_float32(optax.chain(*parts))


def is_decayed(params: Params) -> Any:
    """Say for each parameter whether weight decay applies: not to norms, biases and sinks."""

    def by_path(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        return name == "weight" or name.endswith("_weight")

    return jax.tree_util.tree_map_with_path(by_path, params, is_leaf=is_weight)


def split_trainable(params: Params) -> tuple[Params, Params]:
    """Split a tree into (trainable, frozen); packed experts and integer leaves are frozen.

    Both keep the paths of their leaves; `merge` puts them together again.
    """
    return select(params, _is_trainable), select(params, lambda x: not _is_trainable(x))


def select(params: Params, wanted: Callable[[Any], bool]) -> Params:
    """Return the part of a tree whose leaves are wanted, without empty branches."""
    kept: Params = {}
    for name, child in params.items():
        if not isinstance(child, dict):
            if wanted(child):
                kept[name] = child
        elif below := select(child, wanted):
            kept[name] = below
    return kept


def merge(a: Params, b: Params) -> Params:
    """Join two trees that have no leaf in common."""
    joined = dict(a)
    for name, child in b.items():
        joined[name] = merge(joined[name], child) if name in joined else child
    return joined


def _is_trainable(leaf: Any) -> bool:
    if isinstance(leaf, MXFP4):
        return False
    return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(leaf))


class ScheduleState(NamedTuple):
    """Updates made, and the learning rate of the last one: for the log."""

    updates: Int[Array, ""]
    learning_rate: Float[Array, ""]


def _scale_by_schedule(schedule: Schedule) -> optax.GradientTransformation:
    def init(params: Params) -> ScheduleState:
        return ScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Params, state: ScheduleState, params: Params | None = None):
        rate = jnp.asarray(schedule(state.updates), jnp.float32)
        return jax.tree.map(lambda u: -rate * u, updates), ScheduleState(state.updates + 1, rate)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


class Float32State(NamedTuple):
    """State of the transformation within, and float32 copies of what is kept in less."""

    inner: Any
    copies: Params


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run a transformation in float32, on float32 copies of parameters that have less.

    The updates of such parameters are (new copy - parameter): `optax.apply_updates` adds them in
    float32 and rounds, which gives the new copy rounded.
    """

    def is_low(leaf: Any) -> bool:
        return leaf.dtype != jnp.float32

    def full(tree: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Params) -> Float32State:
        return Float32State(inner.init(full(params)), full(select(params, is_low)))

    def update(grads: Params, state: Float32State, params: Params | None = None):
        assert params is not None
        exact = merge(select(params, lambda x: not is_low(x)), state.copies)
        updates, inner_state = inner.update(full(grads), state.inner, exact)
        if not state.copies:
            return updates, Float32State(inner_state, {})
        low = jax.tree.map(lambda p: is_low(p), params)
        new = jax.tree.map(jnp.add, exact, updates)
        copies = jax.tree.map(lambda _, n: n, state.copies, _like(new, state.copies))
        updates = jax.tree.map(
            lambda is_low, n, p, u: n - p.astype(jnp.float32) if is_low else u,
            low, new, params, updates,
        )  # fmt: skip
        return updates, Float32State(inner_state, copies)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _like(tree: Params, part: Params) -> Params:
    """Return the leaves of `tree` at the paths of `part`."""
    return {k: _like(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in part.items()}
