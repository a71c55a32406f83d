"""Distillation: train the student's distribution of each next token towards a teacher's.

Hinton et al. 2015, arXiv:1503.02531. With p_T = softmax(logits / T) over the whole vocabulary,

    loss of a token = (1 - nll_weight) * T^2 * KL(teacher_T || student_T)
                      + nll_weight * -log student_1(token)

times the token's weight. The loss of a batch is the sum over its tokens, divided by the sum of
their weights. T^2 keeps the size of the gradient as T changes. The teacher reads the same rows
before each step (`Teacher`). It adds its last hidden states to `Batch.per_token`, and its
unembedding table to `Batch.shared`. Logits of student and teacher exist for a chunk of tokens at a
time (`ops/divergence.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax import loading
from gptoss_jax.config import Config
from gptoss_jax.config.objective import DistillConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.objectives import sft
from gptoss_jax.objectives.objective import ROUND_AS_WRITTEN, Objective
from gptoss_jax.objectives.token_loss import LossSums, forward, router_penalty, trained_first
from gptoss_jax.ops.divergence import Mix, divergence
from gptoss_jax.ops.lora import widen
from gptoss_jax.parallel import mesh, vocabulary
from gptoss_jax.types import Batch, Params, TrainState

HIDDEN, TABLE = "teacher_hidden", "teacher_table"


def objective(config: Config) -> Objective:
    """Return the objective of a config whose `objective.name` is distill."""
    plain, teacher = sft.objective(config), Teacher(config)

    def open_batches(**rows: Any) -> Any:
        check(config)
        return plain.open_batches(**rows)

    return plain._replace(
        open_batches=open_batches,
        make_prepare=lambda model: teacher,
        loss=partial(distill_loss, distill=config.objective.distill, **sft.router_losses(config)),
        complete=teacher.complete,
        compares_models=True,
    )


def distill_loss(
    model: Any,
    params: Params,
    batch: Batch,
    *,
    distill: DistillConfig,
    balance_loss: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Sum the loss over the trained tokens of a batch with the teacher's hidden states and table.

    `extra` has the sums of weight * T^2 * KL, and of weight * nll.
    """
    ordered, out = forward(model, params, batch)
    if ordered.per_token is None or ordered.shared is None:
        raise ValueError("the batch lacks a teacher's hidden states and table: see distill.Teacher")
    taught, taught_table = ordered.per_token[HIDDEN], ordered.shared[TABLE]
    trained = jnp.asarray(ordered.weights, jnp.float32)
    hidden, table = _widened(model, params, out.hidden)
    mix = Mix(distill.temperature, 1 - distill.nll_weight, distill.nll_weight)
    with jax.named_scope("loss"):
        given = taught, taught_table, ordered.targets, trained
        if mesh.current() is not None:
            total, kl, nll = vocabulary.divergence(hidden, table, *given, mix=mix)
        else:
            rows = out.hidden.shape[0] * out.hidden.shape[1]
            flat = [jnp.asarray(x).reshape(rows, *x.shape[2:]) for x in (hidden, taught)]
            first, order, weights, _ = trained_first(
                flat[0], jnp.arange(rows), trained.reshape(rows)
            )
            targets = jnp.asarray(ordered.targets).reshape(rows)[order]
            given = flat[1][order], taught_table, targets, weights
            total, kl, nll = divergence(first, table, *given, mix=mix)
    tokens, penalty = router_penalty(batch, out, balance_loss=balance_loss, z_loss=z_loss)
    extra = {"teacher_kl": kl, "nll": nll}
    return LossSums(total, jnp.sum(trained), penalty, tokens, out.router, extra=extra)


def check(config: Config) -> None:
    """Refuse a teacher that is missing or can't teach this model. Raises `UserError`."""
    distill = config.objective.distill
    if distill.teacher is None:
        raise UserError(
            "objective.name is distill, and there is no teacher: give --objective.distill.teacher "
            "DIR (a checkpoint, of any layout and size)"
        )
    teacher = loading.read_config(distill.teacher)
    if teacher.vocab_size != config.model.vocab_size:
        raise UserError(
            f"objective.distill.teacher {distill.teacher} has a vocabulary of "
            f"{teacher.vocab_size:,} tokens, the model one of {config.model.vocab_size:,}: they "
            "must be the same"
        )
    if teacher.context < config.data.sequence_length:
        raise UserError(
            f"objective.distill.teacher {distill.teacher} has a context of {teacher.context:,}, "
            f"and data.sequence_length is {config.data.sequence_length:,}: make that smaller"
        )


class Teacher:
    """Runs the teacher on each batch: the `Prepare` of an objective."""

    def __init__(self, config: Config) -> None:
        """Store the config; the teacher is loaded when the first batch comes."""
        self._config = config
        self._run: Callable[[Batch], Batch] | None = None

    def __call__(
        self, state: TrainState, batch: Batch, spread: Callable[[Batch], Batch]
    ) -> tuple[Batch, dict[str, float]]:
        """Return the batch with the teacher's hidden states and table, and nothing to log."""
        del state
        if self._run is None:
            self._run = self._load()
        return self._run(spread(batch)), {}

    def complete(self, batch: Batch) -> Batch:
        """Add the shapes of the teacher's arrays to those of a batch, for planning.

        The teacher need not exist: then it is assumed to be as wide as the student.
        """
        c = self._config.model
        width, place = c.d_model, self._config.objective.distill.teacher
        if place is not None and Path(place).exists():
            width = loading.read_config(place).d_model
        dtype = jnp.dtype(c.dtype)
        hidden = jax.ShapeDtypeStruct((*batch.tokens.shape, width), dtype)
        table = jax.ShapeDtypeStruct((c.vocab_size, width), dtype)
        return _with(batch, hidden, table)

    def _load(self) -> Callable[[Batch], Batch]:
        check(self._config)
        place = self._config.objective.distill.teacher
        assert place is not None
        over = jax.sharding.get_mesh()
        model, params = loading.load(
            place, dtype=jnp.dtype(self._config.model.dtype), mesh=None if over.empty else over
        )
        run = jax.jit(partial(teach, model.dropless()), compiler_options=ROUND_AS_WRITTEN)
        return partial(run, params)


def teach(model: Transformer, params: Params, batch: Batch) -> Batch:
    """Return a batch with the teacher's hidden states of it, and the teacher's table."""
    out = model.forward(
        params, batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions
    )
    return _with(batch, *_widened(model, params, out.hidden))


def _widened(
    model: Any, params: Params, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T C"], Float[Array, "V C"]]:
    """Return hidden states and table, with the table's adapter in both where there is one."""
    table = params["unembedding"]["weight"]
    adapter = adapters.of_table(params, "unembedding", model)
    return (hidden, table) if adapter is None else widen(hidden, table, adapter)


def _with(batch: Batch, hidden: Any, table: Any) -> Batch:
    return batch.replace(per_token={HIDDEN: hidden}, shared={TABLE: table})  # type: ignore[attr-defined]
