"""One training step: gradient, accumulation, update, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from gptoss_jax.loss import LossSums
from gptoss_jax.optimizer import merge, split_trainable
from gptoss_jax.types import Batch, Params, RouterStats, TrainState


@struct.dataclass
class StepMetrics:
    """What one step measured, float32, over the whole global batch."""

    loss: Float[Array, ""]  # nats a trained token, weighted
    trained: Float[Array, ""]  # sum of the targets' weights
    tokens: Float[Array, ""]  # tokens that are not padding
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]  # NaN if the optimizer does not tell
    router: RouterStats
    finite: Bool[Array, ""]  # loss and gradient are


def init_state(
    model: Any, optimizer: optax.GradientTransformation, params: Params | None, *, seed: int = 0
) -> TrainState:
    """Make the state before the first step; random parameters from the seed where none are given.

    The same seed gives the same state.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = jax.jit(model.init)(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    opt_state = jax.jit(optimizer.init)(split_trainable(params)[0])  # pyright: ignore[reportArgumentType]
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)  # pyright: ignore[reportArgumentType]


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[[Any, Params, Batch], LossSums],
    *,
    accumulate: int = 1,
    on_nan: Literal["stop", "skip"] = "stop",
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Return the jitted `step(state, batch) -> (state, metrics)`; the state given is used up.

    The batch's rows are split into `accumulate` microbatches that run one after the other; weights
    are normalised over all of them, so the loss and its gradient are those of one big batch (of the
    router losses only the balancing one is not: it is averaged over microbatches by tokens).
    Gradients accumulate in float32. Packed weights are passed through, never differentiated.

    With `on_nan="skip"` a step whose loss or gradient is not finite leaves parameters and optimizer
    as they were, and only counts; with "stop" the caller looks at `metrics.finite`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        trainable, frozen = split_trainable(state.params)
        loss, sums, grads = _gradient(
            partial(loss_fn, model), trainable, frozen, batch, accumulate=accumulate
        )
        with jax.named_scope("optimizer"):
            # As the optimizer's own: in float32, and the compiler makes one of the two.
            grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, trainable)  # pyright: ignore[reportArgumentType]
            new = optax.apply_updates(trainable, updates)  # pyright: ignore[reportArgumentType]
            rate = optax.tree_utils.tree_get(opt_state, "learning_rate", jnp.float32(jnp.nan))
            if on_nan == "skip":
                new, opt_state = jax.tree.map(
                    lambda a, b: jnp.where(finite, a, b),
                    (new, opt_state),
                    (trainable, state.opt_state),
                )
        metrics = StepMetrics(
            loss, sums.weight, sums.tokens, grad_norm, rate, sums.router, finite
        )  # fmt: skip
        params = merge(new, frozen)  # pyright: ignore[reportArgumentType]
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def _gradient(
    loss_fn: Callable[[Params, Batch], LossSums],
    trainable: Params,
    frozen: Params,
    batch: Batch,
    *,
    accumulate: int,
) -> tuple[Float[Array, ""], LossSums, Params]:
    """Return the loss, its sums and the gradient of the objective over all microbatches."""
    # Known before any microbatch runs, so that each one's gradient is simply added.
    weight = jnp.sum(batch.weights.astype(jnp.float32))
    tokens = jnp.sum(batch.segment_ids != 0).astype(jnp.float32)
    per_weight = jnp.where(weight == 0, 0.0, 1 / weight)
    per_token = jnp.where(tokens == 0, 0.0, 1 / tokens)

    def objective(trainable: Params, batch: Batch) -> tuple[Float[Array, ""], LossSums]:
        sums = loss_fn(merge(trainable, frozen), batch)
        # Averages become sums here, to be added; `tokens` divides them again below.
        router = jax.tree.map(lambda x: x * sums.tokens, sums.router)
        return sums.nll * per_weight + sums.penalty * per_token, dataclasses.replace(
            sums, router=router
        )

    one = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        grads, sums = one(trainable, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(one, trainable, first)[1]
        zeros = (
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable),
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )

        def add(total: tuple[Params, LossSums], part: Batch) -> tuple[Any, None]:
            more = one(trainable, part)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more), None

        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    router = jax.tree.map(lambda x: x * per_token, sums.router)
    return sums.nll * per_weight, dataclasses.replace(sums, router=router), grads
