"""Parameters in less than float32: update them by float32 copies or by stochastic rounding."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, PRNGKeyArray, UInt32

from gptoss_jax.errors import UserError
from gptoss_jax.parameters.tree import replace
from gptoss_jax.types import Params


class Float32State(NamedTuple):
    """The inner transformation's state, and float32 copies of parameters stored in less."""

    inner: Any
    copies: Params


class StochasticState(NamedTuple):
    """The inner transformation's state, and the source of the random bits.

    The bits of an update are a function of (key, updates), and of `part` if `update` gets one: the
    index of the part of the parameters that it updates. So a resumed run draws the same bits as a
    run without a stop.
    """

    inner: Any
    key: UInt32[Array, " 2"]
    updates: Int[Array, ""]


def round_stochastically(
    x: Float32[Array, "*shape"], key: PRNGKeyArray
) -> BFloat16[Array, "*shape"]:
    """Round to one of the two nearest bfloat16 values at random; the expectation is `x`.

    The chance of each is exact to the 16 bits that are dropped. A value that bfloat16 can hold does
    not change; nor do infinities and NaN. A value beyond the largest finite bfloat16 can become
    infinite.
    """
    return _on_the_grid(x, key).astype(jnp.bfloat16)


def _on_the_grid(x: Float32[Array, "*shape"], key: PRNGKeyArray) -> Float32[Array, "*shape"]:
    # A bfloat16 is the upper half of a float32. The lower half, as a share of the step to the next
    # bfloat16 away from zero, is the chance that adding 16 random bits carries into the upper one.
    noise = _random_bits(x.shape, key) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isnan(x), x, jax.lax.bitcast_convert_type(rounded, jnp.float32))


def _random_bits(shape: tuple[int, ...], key: PRNGKeyArray) -> UInt32[Array, "..."]:
    """Return a hash of each index and the key, which is random enough for rounding.

    This is not `jax.random.bits`: on a CPU, that compiles for seconds for an array of five axes,
    and takes longer than the rest of the optimizer. The hash is a few operations in the loop that
    rounds, without an array of its own, and is the same however the array is sharded.
    """
    start, step = jax.random.key_data(key)
    bits = jnp.broadcast_to(start, shape)
    for axis in range(len(shape)):
        bits = (bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) + step
        # Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31: each bit of the input flips
        # each of the output half of the time.
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
        bits = bits ^ (bits >> 16)
    return bits


def in_float32(
    inner: optax.GradientTransformationExtraArgs,
    *,
    masters: Literal["float32", "stochastic"] = "float32",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation in float32 whatever the parameters' dtypes.

    It updates float32 parameters as it would alone. With masters "float32", the state has a float32
    copy of each parameter in less than float32. The copy is updated, and the parameter is the copy
    rounded. With "stochastic" there is no copy: the parameter plus its update is rounded by
    `round_stochastically`.

    The update of such a parameter is (new value - parameter) in float32, which
    `optax.apply_updates` adds in float32 and rounds. A zero update is -0.0: adding it changes no
    bit.

    Raises:
        UserError: "stochastic" with a parameter that is neither bfloat16 nor float32.
    """
    if masters == "stochastic":
        return _rounded_by_chance(inner, seed)

    def init(params: Params) -> Float32State:
        return Float32State(inner.init(_full(params)), _full(_low_part(params)))

    def update(grads: Params, state: Float32State, params: Params | None = None, **extra: Any):
        assert params is not None
        exact = replace(params, state.copies)
        updates, inner_state = inner.update(_full(grads), state.inner, exact, **extra)
        new = jax.tree.map(lambda x, u: x + u, exact, updates)
        copies = like(new, state.copies)
        updates = jax.tree.map(_difference, params, new, updates)
        return updates, Float32State(inner_state, copies)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _rounded_by_chance(
    inner: optax.GradientTransformationExtraArgs, seed: int
) -> optax.GradientTransformationExtraArgs:
    # Name the generator: JAX's default may change, and the bits with it.
    generator = "threefry2x32"

    def init(params: Params) -> StochasticState:
        for leaf in jax.tree.leaves(params):
            if leaf.dtype not in (jnp.float32, jnp.bfloat16):
                raise UserError(
                    f"optimizer.masters is stochastic, which rounds to bfloat16, but there are "
                    f"parameters in {leaf.dtype}: use --optimizer.masters float32, or "
                    "--model.param_dtype bfloat16"
                )
        key = jax.random.key_data(jax.random.key(seed, impl=generator))
        return StochasticState(inner.init(_full(params)), key, jnp.zeros((), jnp.int32))

    def update(
        grads: Params,
        state: StochasticState,
        params: Params | None = None,
        *,
        part: Int[Array, ""] | int | None = None,
        **extra: Any,
    ):
        assert params is not None
        exact = _full(params)
        updates, inner_state = inner.update(_full(grads), state.inner, exact, **extra)
        key = jax.random.wrap_key_data(state.key, impl=generator)
        leaves, tree = jax.tree.flatten(params)
        key = jax.random.fold_in(key, state.updates)
        key = key if part is None else jax.random.fold_in(key, part)
        keys = jax.random.split(key, len(leaves))
        changes = []
        rows = zip(leaves, jax.tree.leaves(exact), tree.flatten_up_to(updates), strict=True)
        for i, (param, x, change) in enumerate(rows):
            new = x + change
            if _is_low(param):
                new = _on_the_grid(new, keys[i])
            changes.append(_difference(param, new, change))
        state = StochasticState(inner_state, state.key, state.updates + 1)
        return jax.tree.unflatten(tree, changes), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def like(tree: Params, part: Params) -> Params:
    """Return the leaves of `tree` at the paths of `part`."""
    return {k: like(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in part.items()}


def _difference(param: Array, new: Array, update: Array) -> Array:
    if not _is_low(param):
        return update
    change = new - param.astype(jnp.float32)
    return jnp.where(change == 0, jnp.float32(-0.0), change)


def _is_low(leaf: Any) -> bool:
    return leaf.dtype != jnp.float32


def _full(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _low_part(tree: Params) -> Params:
    """Return the leaves in less than float32, without empty branches."""
    kept: Params = {}
    for name, child in tree.items():
        if not isinstance(child, dict):
            if _is_low(child):
                kept[name] = child
        elif below := _low_part(child):
            kept[name] = below
    return kept
