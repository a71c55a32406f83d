"""One training step: gradient, accumulation, update, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from gptoss_jax.model import host_embedding
from gptoss_jax.model.initial import init_params
from gptoss_jax.objectives.token_loss import LossSums, SourceSums, trained_weight
from gptoss_jax.optimizer import merge, split_trainable, update_ema
from gptoss_jax.parallel import sharding
from gptoss_jax.parameters.tree import overlay
from gptoss_jax.types import Batch, Params, RouterStats, TrainState


@struct.dataclass
class StepMetrics:
    """The metrics of one step, in float32, over the global batch."""

    loss: Float[Array, ""]  # nats per trained token, weighted
    trained: Float[Array, ""]  # sum of the targets' weights
    tokens: Float[Array, ""]  # tokens that are not padding
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]  # NaN if the optimizer does not report it
    router: RouterStats
    finite: Bool[Array, ""]  # whether loss and gradient are finite
    by_source: SourceSums | None = None  # for each source of a mixture
    # Further numbers of the objective.
    extra: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    params: Params | None,
    *,
    seed: int = 0,
    frozen_paths: Collection[str] = (),
    average: bool = False,
) -> TrainState:
    """Make the state before the first step, with random parameters if `params` is None.

    The same seed gives the same state. `frozen_paths` are not trained. With `average` the state has
    a float32 moving average of the trained parameters, which starts as a copy of them.
    """
    key = jax.random.split(jax.random.key(seed))[1]
    params = init_params(model, seed=seed) if params is None else params
    trainable = split_trainable(params, frozen_paths)[0]

    def init(trainable: Params) -> Any:
        return sharding.constrain_tree(optimizer.init(trainable))  # pyright: ignore[reportArgumentType]

    opt_state = jax.jit(init)(trainable)
    # A copy, because the step donates the parameters and the average separately.
    ema = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key, ema)  # pyright: ignore[reportArgumentType]


def averaged_params(state: TrainState) -> Params:
    """Return the parameters to evaluate: their moving average, in their dtypes, if there is one."""
    params = host_embedding.on_device(state.params)
    return params if state.ema is None else overlay(params, state.ema)


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[[Any, Params, Batch], LossSums],
    *,
    accumulate: int = 1,
    on_nan: Literal["stop", "skip"] = "stop",
    frozen_paths: Collection[str] = (),
    ema: float = 0.0,
    total: Callable[[Batch], Float[Array, ""]] = trained_weight,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Return the jitted `step(state, batch) -> (state, metrics)`, which donates the state.

    The batch's rows are split into `accumulate` microbatches, which run one after the other. The
    weights are normalised over all microbatches, so the loss and its gradient are those of one big
    batch. The load-balancing loss of the routers is the one exception: it is a mean over
    microbatches, weighted by their tokens. Gradients accumulate in float32. Packed weights and
    those at `frozen_paths` are passed through and not differentiated. `ema` is the decay of the
    state's averaged parameters, if it has them. `total` returns what `LossSums.weight` of a whole
    batch will be, before it runs. `compiler_options` are options of XLA.

    With `on_nan="skip"`, a step whose loss or gradient is not finite leaves parameters and
    optimizer state unchanged, but counts as a step. With "stop" the caller has to check
    `metrics.finite`.
    """
    update = optax.with_extra_args_support(optimizer).update  # some take the experts' load

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        trainable, frozen = split_trainable(state.params, frozen_paths)
        loss, sums, grads = _gradient(
            partial(loss_fn, model), trainable, frozen, batch, accumulate=accumulate, total=total
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = update(grads, state.opt_state, trainable, load=sums.router.load)  # pyright: ignore[reportArgumentType]
            new = optax.apply_updates(trainable, updates)  # pyright: ignore[reportArgumentType]
            # The package's optimizer reports the norm over trained parameters; others may not.
            grad_norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
            if grad_norm is None:
                grad_norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            rate = optax.tree_utils.tree_get(opt_state, "learning_rate", jnp.float32(jnp.nan))
            if on_nan == "skip":
                new, opt_state = jax.tree.map(
                    lambda a, b: jnp.where(finite, a, b),
                    (new, opt_state),
                    (trainable, state.opt_state),
                )
        metrics = StepMetrics(
            loss, sums.weight, sums.tokens, grad_norm, rate, sums.router, finite, sums.by_source,
            sums.extra,
        )  # fmt: skip
        average = state.ema
        if average is not None:
            average = update_ema(average, new, decay=ema, step=state.step)  # pyright: ignore[reportArgumentType]
        params = merge(new, frozen)  # pyright: ignore[reportArgumentType]
        state = TrainState(state.step + 1, params, opt_state, state.rng, average)
        return sharding.constrain_tree(state), sharding.replicate(metrics)

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options)


def _gradient(
    loss_fn: Callable[[Params, Batch], LossSums],
    trainable: Params,
    frozen: Params,
    batch: Batch,
    *,
    accumulate: int,
    total: Callable[[Batch], Float[Array, ""]],
) -> tuple[Float[Array, ""], LossSums, Params]:
    """Return the loss, its sums and the gradient, over all microbatches."""
    # The divisors are known before any microbatch runs, so gradients can simply be added.
    weight = total(batch)
    tokens = jnp.sum(batch.segment_ids != 0).astype(jnp.float32)
    per_weight = jnp.where(weight == 0, 0.0, 1 / weight)
    per_token = jnp.where(tokens == 0, 0.0, 1 / tokens)

    def objective(trainable: Params, batch: Batch) -> tuple[Float[Array, ""], LossSums]:
        sums = loss_fn(merge(trainable, frozen), batch)
        # Means become sums here, so that they can be added; `per_token` makes them means again.
        router = jax.tree.map(lambda x: x * sums.tokens, sums.router)
        return sums.nll * per_weight + sums.penalty * per_token, dataclasses.replace(
            sums, router=router
        )

    one = jax.grad(objective, has_aux=True)
    if accumulate == 1:
        grads, sums = one(trainable, batch)
        grads = sharding.constrain_tree(grads)
    else:
        shared, batch = batch.shared, batch.replace(shared=None)  # type: ignore[attr-defined]
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        parts = jax.tree.map(sharding.microbatches, parts)

        def whole(part: Batch) -> Batch:
            return part.replace(shared=shared)  # type: ignore[attr-defined]

        first = whole(jax.tree.map(lambda x: x[0], parts))
        shapes = jax.eval_shape(one, trainable, first)[1]
        zeros = (
            sharding.constrain_tree(
                jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
            ),
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        )

        def add(so_far: tuple[Params, LossSums], part: Batch) -> tuple[Any, None]:
            grads, sums = one(trainable, whole(part))
            more = sharding.constrain_tree(grads), sums
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), so_far, more), None

        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    router = jax.tree.map(lambda x: x * per_token, sums.router)
    extra = jax.tree.map(lambda x: x * per_weight, sums.extra)
    return sums.nll * per_weight, dataclasses.replace(sums, router=router, extra=extra), grads
