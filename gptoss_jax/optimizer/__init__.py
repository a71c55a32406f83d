"""Build the optax optimizer of a config: AdamW, Adafactor or Muon, schedule, trained part."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax.config import OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.optimizer.low_precision import in_float32, like
from gptoss_jax.optimizer.matrix_views import scale_by_adafactor, scale_by_muon_or_adam
from gptoss_jax.parameters.tree import is_weight, path_name
from gptoss_jax.types import MXFP4, Params, Relaid

Schedule = Callable[[Any], Any]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
    """Return the learning rate as a function of the number of updates made so far.

    It rises linearly over `warmup_steps`; the first update already has a rate above 0. Then it
    stays constant ("constant"), or falls along a cosine to `final_learning_rate * learning_rate` at
    the last of `total_steps` ("cosine"), or stays constant and falls linearly to that value in the
    last `decay_share` of all steps ("wsd").
    """
    peak, warmup, end = config.learning_rate, config.warmup_steps, config.final_learning_rate
    last = total_steps - 1
    falling = round(config.decay_share * total_steps)

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        rise = jnp.minimum(1.0, (count + 1) / (warmup + 1))
        if config.schedule == "cosine":
            share = jnp.clip((count - warmup) / max(last - warmup, 1), 0.0, 1.0)
            rise = rise * (end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * share)))
        elif config.schedule == "wsd" and falling:
            left = jnp.clip((last - count) / falling, 0.0, 1.0)
            rise = rise * (end + (1 - end) * left)
        return peak * rise

    return schedule


def make_optimizer(
    config: OptimizerConfig,
    total_steps: int,
    *,
    masks: Params | None = None,
    balance_bias: float = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make the optimizer of the trainable part of a parameter tree (see `split_trainable`).

    Gradients and updates are float32 whatever the parameters' dtype. The first moment is stored in
    `moment_dtype` and AdamW's second in `second_moment_dtype`, rounded to the nearest after a step
    in float32. For a parameter in less than float32, the state has a float32 copy, which is
    updated. With masters "stochastic" there is no copy: the parameter is rounded at random (see
    `low_precision`). AdamW in bfloat16 takes 16 bytes per parameter: 2 + 2 for parameter and
    gradient, 4 + 4 for the moments, 4 for the copy. It takes 10 with neither copy nor float32 first
    moment, and 8 with neither moment in float32.

    It clips by global norm. It decays matrices only (see `is_decayed`), by weight decay times
    learning rate whatever the optimizer.

    Args:
        config: The optimizer's settings.
        total_steps: The number of steps of the schedule.
        masks: Learning-rate factors of all parameters or of the trained ones, from
            `patterns.masks`. Where a factor is 0, the gradient counts nowhere and no bit of the
            parameter changes. `update` accepts `factors` instead, for a part of the parameters.
        balance_bias: What a step adds to the router bias of an expert with less than its share of
            the rows, and subtracts for one with more, instead of following its gradient (Wang et
            al. 2024, arXiv:2408.15664); 0 is off. `update` then needs `load` [L, E], the shares.
        seed: Seed of the random bits for stochastic rounding.

    Raises:
        UserError: `init` raises it for `balance_bias` where the router bias is not trained, or
            masters "stochastic" with float16 parameters.
    """
    moments: dict[str, Any] = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    dtype = jnp.dtype(config.moment_dtype)
    if config.name == "adafactor":
        scale = scale_by_adafactor()
    elif config.name == "muon":
        scale = scale_by_muon_or_adam(**moments, moment_dtype=dtype)
    else:
        scale = _store_second_moment(
            optax.scale_by_adam(**moments, mu_dtype=dtype), jnp.dtype(config.second_moment_dtype)
        )
    parts = [
        _drop_unused(masks, balance_bias),
        _clip(config.clip_norm),
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
        _scale_by_schedule(make_schedule(config, total_steps)),
        _balance(balance_bias),
        _scale_by_factors(masks, balance_bias),
    ]
    return in_float32(optax.chain(*parts), masters=config.masters, seed=seed)


def update_ema(ema: Params, params: Params, *, decay: float, step: Int[Array, ""]) -> Params:
    """Return the float32 moving average of the parameters after step `step`, counted from 0.

    The average starts as the parameters themselves. So that these do not stay in it for
    1 / (1 - decay) steps, the decay rises to its value as (step + 1) / (step + 10) (as TensorFlow's
    ExponentialMovingAverage does with `num_updates`).
    """
    rate = 1 - jnp.minimum(decay, (step + 1) / (step + 10))
    return jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), ema, params)


def is_decayed(params: Params) -> Any:
    """Return for each parameter whether weight decay applies: not to norms, biases and sinks."""

    def by_path(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        return name == "weight" or name.endswith("_weight") or path[0].key == "lora"

    return jax.tree_util.tree_map_with_path(by_path, params, is_leaf=is_weight)


def split_trainable(params: Params, frozen_paths: Collection[str] = ()) -> tuple[Params, Params]:
    """Split a tree into (trainable, frozen); packed experts and integer leaves are frozen.

    Leaves at `frozen_paths` (`patterns.frozen_paths`) are frozen too. Frozen leaves get no gradient
    and take no optimizer memory. Both parts keep the paths of their leaves; `merge` joins them
    again.
    """

    def is_trained(path: tuple[Any, ...], leaf: Any) -> bool:
        return _is_trainable(leaf) and path_name(path) not in frozen_paths

    trained = jax.tree_util.tree_map_with_path(is_trained, params, is_leaf=is_weight)
    return _where(params, trained, True), _where(params, trained, False)


def merge(a: Params, b: Params) -> Params:
    """Join two trees that have no leaf in common."""
    joined = dict(a)
    for name, child in b.items():
        joined[name] = merge(joined[name], child) if name in joined else child
    return joined


def _where(tree: Params, flags: Params, wanted: bool) -> Params:
    """Return the leaves whose flag equals `wanted`, without empty branches."""
    kept: Params = {}
    for name, child in tree.items():
        if not isinstance(child, dict):
            if flags[name] == wanted:
                kept[name] = child
        elif below := _where(child, flags[name], wanted):
            kept[name] = below
    return kept


def _is_trainable(leaf: Any) -> bool:
    if isinstance(leaf, MXFP4 | Relaid):
        return False
    return all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(leaf))


_ROUTER_BIAS = "layers/router/bias"


class ClipState(NamedTuple):
    """The norm of the trained parameters' last gradient before clipping: for the log."""

    grad_norm: Float[Array, ""]


class ScheduleState(NamedTuple):
    """The number of updates made, and the learning rate of the last one: for the log."""

    updates: Int[Array, ""]
    learning_rate: Float[Array, ""]


def _store_second_moment(
    adam: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Store Adam's second moment in `dtype` between steps; a step computes in float32."""
    if dtype == jnp.float32:
        return adam

    def cast(state: Any, dtype: Any) -> Any:
        return state._replace(nu=jax.tree.map(lambda x: x.astype(dtype), state.nu))

    def init(params: Params) -> Any:
        return cast(adam.init(params), dtype)

    def update(grads: Params, state: Any, params: Params | None = None):
        updates, state = adam.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _drop_unused(
    masks: Params | None, balance_bias: float
) -> optax.GradientTransformationExtraArgs:
    """Zero gradients that update nothing, so that they count in no norm and no moment."""

    def of_leaf(path: tuple[Any, ...], grad: Array, factor: Any) -> Array:
        if balance_bias and path_name(path) == _ROUTER_BIAS:
            return jnp.zeros_like(grad)
        return grad if _all_are(factor, np.all) else jnp.where(factor == 0, 0.0, grad)

    return _with_factors(of_leaf, masks)


def _clip(limit: float) -> optax.GradientTransformation:
    """Scale gradients down to a global norm; a limit of 0 only measures the norm."""

    def init(_: Params) -> ClipState:
        return ClipState(jnp.zeros((), jnp.float32))

    def update(grads: Params, _: ClipState, params: Params | None = None):
        norm = optax.tree.norm(grads)
        if limit > 0:
            # Multiply by one factor: dividing each entry would write the result to memory first.
            factor = jnp.where(norm < limit, 1.0, limit / norm)
            grads = jax.tree.map(lambda g: g * factor, grads)
        return grads, ClipState(norm)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _scale_by_schedule(schedule: Schedule) -> optax.GradientTransformation:
    def init(params: Params) -> ScheduleState:
        return ScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: Params, state: ScheduleState, params: Params | None = None):
        rate = jnp.asarray(schedule(state.updates), jnp.float32)
        return jax.tree.map(lambda u: -rate * u, updates), ScheduleState(state.updates + 1, rate)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _balance(step: float) -> optax.GradientTransformationExtraArgs:
    """Replace the router bias's update by `step`, up for experts with less than their share."""

    def init(params: Params) -> optax.EmptyState:
        if step and "bias" not in params.get("layers", {}).get("router", {}):
            raise UserError(
                f"train.balance_bias moves {_ROUTER_BIAS}, which is not trained: leave it out of "
                "optimizer.freeze, name it in optimizer.only, or set train.balance_bias to 0"
            )
        return optax.EmptyState()

    def update(
        updates: Params,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        load: Float[Array, "L E"] | None = None,
        **extra: Any,
    ) -> tuple[Params, optax.EmptyState]:
        if not step or "layers" not in updates:
            return updates, state
        if load is None:
            raise ValueError("balance_bias: update() has to be given load=")
        layers = updates["layers"]
        bias = step * jnp.sign(1 / load.shape[1] - load.astype(jnp.float32))
        router = {**layers["router"], "bias": bias}
        return {**updates, "layers": {**layers, "router": router}}, state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _scale_by_factors(
    masks: Params | None, balance_bias: float
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by their factors; of a balanced router bias, only a factor 0 counts."""

    def of_leaf(path: tuple[Any, ...], update: Array, factor: Any) -> Array:
        if balance_bias and path_name(path) == _ROUTER_BIAS:
            factor = (factor != 0) * np.float32(1)
        if _all_are(factor, lambda f: np.all(f == 1)):
            return update
        # Adding -0.0 changes no value, not even a zero's sign; 0 * inf would be NaN.
        return jnp.where(factor == 0, jnp.float32(-0.0), update * factor)

    return _with_factors(of_leaf, masks)


def _all_are(factor: Any, test: Callable[[Any], Any]) -> bool:
    """Return whether a factor passes a test; False if it is only known as the step runs."""
    return not isinstance(factor, jax.Array) and bool(test(factor))


def _with_factors(
    of_leaf: Callable[[tuple[Any, ...], Array, Any], Array], masks: Params | None
) -> optax.GradientTransformationExtraArgs:
    """Replace each gradient by a function of the parameter's path, gradient and factor."""

    def update(
        updates: Params,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        factors: Params | None = None,
        **extra: Any,
    ) -> tuple[Params, optax.EmptyState]:
        del params, extra
        found = masks if factors is None else factors
        found = jax.tree.map(lambda _: 1.0, updates) if found is None else like(found, updates)
        return jax.tree_util.tree_map_with_path(of_leaf, updates, found), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]
