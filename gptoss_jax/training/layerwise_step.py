"""One training step that updates each layer in the backward pass, as soon as its gradient is known.

The model has these parts: the embedding, each layer, and the head (final norm and unembedding). The
forward pass keeps the input of each layer. Then the step differentiates and updates the head, each
layer from the last to the first, and the embedding. It recomputes a layer from its input, and
writes the updated layer into its place in the stacks of parameters and optimizer state, which are
donated. So gradients exist for one part at a time, never for the whole model (as in LOMO, Lv et al.
2023, arXiv:2306.09782, here with any optimizer).

The price: a part is updated before the gradient of the next part is known, so nothing can depend on
the gradient of the whole model. Each part is clipped by its own norm, and no step can be skipped.

XLA writes the stacks in place when it compiles for GPUs; for CPUs it copies them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.errors import UserError
from gptoss_jax.objectives.token_loss import LossSums, trained_weight
from gptoss_jax.optimizer import ClipState, merge, split_trainable
from gptoss_jax.parallel import mesh
from gptoss_jax.parameters.tree import path_name, replace
from gptoss_jax.training.step import StepMetrics
from gptoss_jax.types import Batch, Output, Params, RouterStats, TrainState

_HEAD = ("final_norm", "unembedding")
_ROOTS = {"embedding", "layers", *_HEAD}


def make_layerwise_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    loss_fn: Callable[[Any, Params, Batch], LossSums],
    *,
    factors: Params,
    frozen_paths: Collection[str] = (),
    total: Callable[[Batch], Float[Array, ""]] = trained_weight,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Return the jitted `step(state, batch) -> (state, metrics)`, which donates the state.

    It does the same as `step.make_train_step`, with the same state, except for this: `clip_norm`
    applies to each part by itself (the embedding, a layer, the head); `grad_norm` is the norm over
    all parts, before clipping; the backward pass recomputes every layer; stochastic rounding draws
    random bits for each part.

    Args:
        model: A `Transformer` without adapters.
        optimizer: An optimizer of `make_optimizer`: the step relies on the form of its state.
        loss_fn: Returns the sums of a batch, and calls `forward` once.
        factors: Factors on the learning rate of each parameter, as given to the optimizer.
        frozen_paths: Parameters that are not trained.
        total: Returns the value that `LossSums.weight` of a batch will have.
        compiler_options: XLA's, beside the step's own.

    Raises:
        UserError: the current mesh has several devices.
    """
    if mesh.current() is not None:
        raise UserError(
            "optimizer.fused is for one device, and the mesh has several: leave optimizer.fused "
            "out, and shard the state over mesh.fsdp"
        )
    update = optax.with_extra_args_support(optimizer).update

    def apply(params: Params, grads: Params, state: Any, **extra: Any) -> tuple[Params, Any]:
        """Update a part of the parameters; return it and its part of the optimizer state."""
        with jax.named_scope("optimizer"):
            updates, state = update(grads, state, params, **extra)  # pyright: ignore[reportArgumentType]
            return optax.apply_updates(params, updates), state  # pyright: ignore[reportReturnType, reportArgumentType]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        trainable, _ = split_trainable(state.params, frozen_paths)
        given = {"trainable": trainable, "factors": factors, "weight": total(batch)}
        return _step(model, state, batch, loss_fn=loss_fn, apply=apply, **given)

    options = {**(compiler_options or {}), **_compiler_options()}
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def _step(
    model: Any,
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: Callable[[Any, Params, Batch], LossSums],
    apply: Callable,
    trainable: Params,
    factors: Params,
    weight: Float[Array, ""],
) -> tuple[TrainState, StepMetrics]:
    """Take the step. `apply` updates a part; the loss is divided by `weight`."""
    c = model.config
    layerwise = model.layerwise
    sequence = layerwise.sequence(c, batch)
    done: list[tuple[Params, Any]] = []

    def part(roots: Collection[str]) -> tuple[Params, Any]:
        return _cut((trainable, state.opt_state), roots)

    embedding, embedding_state = part(["embedding"])
    x, back_to_table = jax.vjp(
        lambda part: layerwise.embed(
            c, replace(state.params, part)["embedding"]["weight"], batch.tokens
        ),
        embedding,
    )
    layers = _Layers(model, state.params["layers"], *part(["layers"]), sequence)
    x, inputs, stats = layers.forward(x)

    head, head_state = part(_HEAD)
    loss, sums, (d_head, d_x, d_stats) = _loss(
        model, loss_fn, (head, x, stats), params=state.params, batch=batch, weight=weight
    )
    if head:
        done.append(apply(head, d_head, head_state, part=c.num_layers))
    d_x, *updated = layers.backward(d_x, inputs, stats, d_stats, apply=apply, factors=factors)
    done += updated
    if embedding:
        (d_embedding,) = back_to_table(d_x)
        done.append(apply(embedding, d_embedding, embedding_state, part=c.num_layers + 1))

    params, opt_state = _join((state.params, state.opt_state), done)
    grad_norm = optax.tree_utils.tree_get(opt_state, "grad_norm")
    rate = optax.tree_utils.tree_get(opt_state, "learning_rate")
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    metrics = StepMetrics(
        loss, sums.weight, sums.tokens, grad_norm, rate, sums.router, finite, sums.by_source,
        sums.extra,
    )  # fmt: skip
    state = TrainState(state.step + 1, params, opt_state, state.rng, None)  # pyright: ignore[reportArgumentType]
    return state, metrics


def _compiler_options() -> dict[str, str]:
    """Turn off XLA's rematerialization on GPUs, because it overestimates the memory of this step.

    It counts a stack that is updated in place as one more array. So it takes the step for far too
    large, and recomputes the update of each stack: three times in all.
    """
    if chips.current().platform != "gpu":
        return {}
    return {"xla_disable_hlo_passes": "rematerialization"}


def largest_part(gradients: dict[str, int], *, num_layers: int) -> int:
    """Return the most gradient bytes that exist at once. `gradients` has the bytes of each path."""
    parts: dict[str, int] = dict.fromkeys(("embedding", "layers", "head"), 0)
    for path, size in gradients.items():
        root = path.partition("/")[0]
        parts["head" if root in _HEAD else root] += size
    return max(parts["embedding"], parts["layers"] // num_layers, parts["head"])


class _Tail(NamedTuple):
    """The model after its layers. The loss function gets it as its model and calls `forward`."""

    model: Any
    x: Float[Array, "B T D"]
    stats: dict[str, Array]

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def forward(self, params: Params, tokens: Int[Array, "B T"], **_: Any) -> Output:
        """Return the hidden states of the batch, whose layers have already run."""
        if tokens.shape != self.x.shape[:2]:
            raise ValueError("the loss runs the model on other tokens than the batch's")
        hidden = self.model.layerwise.final_norm(self.model.config, params["final_norm"], self.x)
        return Output(hidden, None, RouterStats(**self.stats), {})


def _loss(
    model: Any, loss_fn: Callable, at: Any, *, params: Params, batch: Batch, weight: Array
) -> tuple[Array, LossSums, Any]:
    """Return the loss, its sums, and the gradients by head, residual stream and router stats."""
    tokens = jnp.sum(batch.segment_ids != 0).astype(jnp.float32)
    per_weight = jnp.where(weight == 0, 0.0, 1 / weight)
    per_token = jnp.where(tokens == 0, 0.0, 1 / tokens)

    def objective(at: Any) -> tuple[Float[Array, ""], LossSums]:
        head, x, stats = at
        sums = loss_fn(_Tail(model, x, stats), replace(params, head), batch)
        return sums.nll * per_weight + sums.penalty * per_token, sums

    grads, sums = jax.grad(objective, has_aux=True)(at)
    extra = jax.tree.map(lambda x: x * per_weight, sums.extra)
    return sums.nll * per_weight, dataclasses.replace(sums, extra=extra), grads


class _Layers:
    """The stacks of all layers: parameters, the trained ones among them, and optimizer state."""

    def __init__(self, model: Any, layers: Params, part: Params, opt_state: Any, sequence: Any):
        """Take the branch `layers` of all parameters, and {"layers": ...} of the trained ones."""
        self.config, self.part, self.sequence = model.config, part, sequence
        self.layerwise = model.layerwise
        self.layers = layers
        self.frozen = _without(layers, part.get("layers", {}))
        self.is_trained = bool(part)
        leaves, self.tree = jax.tree_util.tree_flatten_with_path((part, opt_state))
        # Stacks have an axis of layers. All layers share the other leaves: counts, rates, keys.
        self.is_stack = [x.ndim > 0 and "/layers/" in f"/{path_name(path)}/" for path, x in leaves]
        self.stacks = [x for (_, x), flag in zip(leaves, self.is_stack, strict=True) if flag]
        self.shared = [x for (_, x), flag in zip(leaves, self.is_stack, strict=True) if not flag]

    def run(self, params: Params, x: Array, *, kind: int) -> tuple[Array, dict[str, Array]]:
        """Run one layer; `kind` is its index within the period of the layer pattern."""
        window = self.config.layer_windows[kind]
        return self.layerwise.layer(self.config, params, x, sequence=self.sequence, window=window)

    def forward(self, x: Array) -> tuple[Array, Any, dict[str, Array]]:
        """Run all layers; return the residual stream, the input of each, and statistics [L]."""
        c = self.config

        def several(x: Array, first: Any, count: int) -> tuple[Array, Any]:
            inputs, stats = [], []
            for kind in range(count):
                inputs.append(x)
                x, found = self.run(self.layerwise.pick(self.layers, first + kind), x, kind=kind)
                stats.append(found)
            return x, (inputs, jax.tree.map(lambda *a: jnp.stack(a), *stats))

        groups, rest = divmod(c.num_layers, c.period)
        firsts = jnp.arange(groups, dtype=jnp.int32) * c.period
        x, (inputs, stats) = jax.lax.scan(lambda x, i: several(x, i, c.period), x, firsts)
        stats = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stats)
        last = []
        if rest:
            x, (last, more) = several(x, jnp.int32(groups * c.period), rest)
            stats = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stats, more)
        return x, (firsts, inputs, last), stats

    def backward(
        self, d_x: Array, inputs: Any, stats: Any, d_stats: Any, *, apply: Callable, factors: Params
    ) -> list[Any]:
        """Go back through all layers, update each, and return d_x, and (part, state) if trained."""
        firsts, inputs, last = inputs

        def one(carry: Any, i: Array, x: Array, *, kind: int) -> Any:
            d_x, stacks, shared, squares = carry
            part, opt_state = self._take(stacks, i)

            def run(part: Params, x: Array) -> tuple[Array, dict[str, Array]]:
                own = jax.tree.map(lambda a: a[0], part).get("layers", {})
                return self.run(merge(own, self.layerwise.pick(self.frozen, i)), x, kind=kind)

            pull = jax.vjp(run, part, x)[1]
            d_part, d_x = pull((d_x, jax.tree.map(lambda a: a[i], d_stats)))
            if self.is_trained:
                load = jax.lax.dynamic_slice_in_dim(stats["load"], i, 1)
                new, opt_state = apply(
                    part, d_part, opt_state, part=i, load=load, factors=_at_layer(factors, i)
                )
                squares = squares + optax.tree_utils.tree_get(opt_state, "grad_norm") ** 2
                stacks, shared = self._put(stacks, (new, opt_state), i)
            return d_x, stacks, shared, squares

        def group(carry: Any, xs: tuple[Array, list[Array]]) -> tuple[Any, None]:
            first, each = xs
            for kind in reversed(range(len(each))):
                carry = one(carry, first + kind, each[kind], kind=kind)
            return carry, None

        carry = d_x, self.stacks, self.shared, jnp.float32(0)
        if last:
            first = self.config.num_layers - len(last)
            carry, _ = group(carry, (jnp.int32(first), last))
        carry, _ = jax.lax.scan(group, carry, (firsts, inputs), reverse=True)
        d_x, stacks, shared, squares = carry
        if not self.is_trained:
            return [d_x]
        part, opt_state = self._fill(stacks, shared)
        return [d_x, (part, _set_norm(opt_state, jnp.sqrt(squares)))]

    def _take(self, stacks: list[Array], i: Array) -> Any:
        """Cut layer `i` out. The axis of layers stays, with size 1, so paths and axes are the same.

        Shared leaves have their values from before the step: all layers are updated with one count.
        """
        # Cut out once: if several places read a stack, XLA may copy it before writing to it.
        own = [jax.lax.dynamic_slice_in_dim(x, i, 1) for x in stacks]
        return self._fill(jax.lax.optimization_barrier(own), self.shared)

    def _put(self, stacks: list[Array], new: Any, i: Array) -> tuple[list[Array], list[Array]]:
        leaves = list(zip(self.tree.flatten_up_to(new), self.is_stack, strict=True))
        own = [x for x, flag in leaves if flag]
        put = jax.lax.dynamic_update_slice_in_dim
        stacks = [put(stack, x, i, 0) for stack, x in zip(stacks, own, strict=True)]
        return stacks, [x for x, flag in leaves if not flag]

    def _fill(self, stacks: list[Array], shared: list[Array]) -> Any:
        some, others = iter(stacks), iter(shared)
        return self.tree.unflatten([next(some if flag else others) for flag in self.is_stack])


def _at_layer(factors: Params, i: Array) -> Params:
    """Cut out the factors of layer `i`, where factors differ between layers."""

    def of(factor: Any) -> Any:
        if np.ndim(factor) == 0 or factor.shape[0] == 1:
            return factor
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(factor), i, 1)

    return {"layers": jax.tree.map(of, factors["layers"])}


def _without(tree: Params, part: Params) -> Params:
    """Return the leaves of `tree` that are not in `part`."""
    kept: Params = {}
    for name, child in tree.items():
        if name not in part:
            kept[name] = child
        elif isinstance(child, dict) and (below := _without(child, part[name])):
            kept[name] = below
    return kept


def _is_params(x: Any) -> bool:
    """Say whether a node is a tree of parameters, or of optimizer state with the same paths."""
    return isinstance(x, dict) and not _ROOTS.isdisjoint(x)


def _cut(tree: Any, roots: Collection[str]) -> Any:
    """Keep only the branches `roots` of parameters, or of all such trees in an optimizer state."""

    def of(x: Any) -> Any:
        return {name: x[name] for name in roots if name in x} if _is_params(x) else x

    return jax.tree.map(of, tree, is_leaf=_is_params)


def _join(whole: Any, parts: list[Any]) -> Any:
    """Put updated parts back into `whole`. Shared leaves come from the last part.

    The gradient norm becomes the norm over all parts.
    """

    def is_leaf(x: Any) -> bool:
        return _is_params(x) or isinstance(x, ClipState)

    def of(old: Any, *new: Any) -> Any:
        if isinstance(old, ClipState):
            return ClipState(jnp.sqrt(sum(part.grad_norm**2 for part in new)))
        if not _is_params(old):
            return new[-1]
        for part in new:
            old = replace(old, part)
        return old

    leaves, tree = jax.tree.flatten(whole, is_leaf=is_leaf)
    flat = [tree.flatten_up_to(part) for part in parts]
    return tree.unflatten([of(*rows) for rows in zip(leaves, *flat, strict=True)])


def _set_norm(opt_state: Any, norm: Array) -> Any:
    return jax.tree.map(
        lambda x: ClipState(norm) if isinstance(x, ClipState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, ClipState),
    )
