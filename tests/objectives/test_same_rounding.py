"""In bfloat16 a model that equals its reference has its log-probabilities, bit for bit."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from gptoss_jax.config.objective import DistillConfig, GRPOConfig
from gptoss_jax.data.packing import Segment, fill
from gptoss_jax.lora import select
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.objectives import make_objective
from gptoss_jax.objectives.reinforcement.rollouts import ADVANTAGES, FRESH, SAMPLED
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.runs import metrics
from gptoss_jax.training import held_out, setup

V, T, ROWS = 40, 24, 4
MODEL = ModelConfig(
    vocab_size=V, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8,
    num_experts=4, active_experts=2, d_expert=64, window=8, context=T, rope_factor=1.0,
    initial_context=T, dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
ADAPTERS = LoRAConfig(targets=("attention", "router", "unembedding"), rank=3, alpha=6.0)
EVERY = LoRAConfig(targets=("attention", "experts", "embedding"), rank=3, alpha=6.0)
LOG_2 = np.float32(np.log(2.0))


def config_of(objective, *, lora=ADAPTERS, remat="none", **optimizer):
    return Config(
        model=dataclasses.replace(MODEL, lora=lora, remat=remat),
        objective=objective,
        data=DataConfig(train=("unread",), sequence_length=T, batch_size=ROWS),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, **optimizer),
    )


def make_batch():
    """Rows of two pairs of segments; also what GRPO reads of each token."""
    rng = np.random.default_rng(0)

    def segment():
        tokens = rng.integers(0, V, 6).astype(np.int32)
        return Segment(tokens, np.array([0, 0, 1, 1, 1, 1], np.float32))

    batch = fill([[segment() for _ in range(4)] for _ in range(ROWS)], T)
    values = {name: rng.normal(size=(ROWS, T)).astype(np.float32) for name in (ADVANTAGES, SAMPLED)}
    return batch, batch.replace(per_token=values, shared={FRESH: np.float32(1)})


def start(config):
    """The model, its parameters before the first step, and the step, as `train.py` makes them."""
    model = Transformer(config.model)
    params = {
        # Larger than they are at first, so that rounding makes more of a difference.
        k: v if k == "lora" else jax.tree.map(lambda x: 4 * x, v)
        for k, v in init_params(model).items()
    }
    factors = select.masks(model.abstract_params(), model.config, config.optimizer, load=None)
    optimizer = setup.optimizer_of(config, factors)
    objective = make_objective(config)
    step = setup.make_step(config, model, optimizer, objective, factors=factors)
    state = setup.first_state(config, model, optimizer, params, factors=factors)
    return model, objective, state, step


def first_step(config, batch, **mesh):
    with jax.set_mesh(meshes.make(MeshConfig(**mesh))):
        state, step = start(config)[2:]
        return jax.device_get(step(state, batch)[1])


def check_dpo(config, **mesh):
    measured = first_step(config, make_batch()[0], **mesh)
    assert measured.loss == LOG_2 and measured.grad_norm > 0
    assert {k: float(v) for k, v in measured.extra.items()} == {
        "reward_margin": 0, "reward_accuracy": 0.5, "reward_chosen": 0, "reward_rejected": 0,
    }  # fmt: skip


DPO = ObjectiveConfig(name="dpo")


@pytest.mark.slow
def test_a_run_of_dpo_begins_at_log_2_compiled_as_users_have_it(tmp_path):
    """XLA leaves out roundings only where it merges operations, so with its full optimisation."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [f for f in flags if "optimization_level" not in f and "fusion_emitters" not in f]
    command = [sys.executable, "-m", "gptoss_jax.train", "--config", "configs/tiny_dpo.py"]
    options = "--model.dtype bfloat16 --model.param_dtype bfloat16 --train.steps 1 --data.held-out"
    subprocess.run(
        [*command, *options.split(), "--workdir", str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": " ".join(kept)},
    )
    first = next(r for r in metrics.read(tmp_path) if "loss" in r)
    assert np.float32(first["loss"]) == LOG_2
    assert (first["reward_margin"], first["reward_accuracy"]) == (0, 0.5)


@pytest.mark.slow
def test_dpo_begins_at_log_2():
    check_dpo(config_of(DPO, accumulate=2))


@pytest.mark.slow
def test_the_held_out_loss_of_dpo_begins_at_log_2():
    config = config_of(DPO)
    model, _, state, _ = start(config)
    batch = make_batch()[0]
    scores, _ = held_out.evaluate(model, state.params, [batch], questions=[], config=config)
    assert np.float32(scores["held_out_loss"]) == LOG_2 and scores["held_out_reward_margin"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "remat", "mesh"),
    [
        (EVERY, "none", {}),
        (EVERY, "full", {}),
        (ADAPTERS, "dots", {}),
        (ADAPTERS, "none", {"data": 2, "fsdp": 2, "context": 2}),
        (EVERY, "full", {"fsdp": 2, "tensor": 2, "expert": 2}),
    ],
)
def test_dpo_begins_at_log_2_in_every_form_of_the_step(lora, remat, mesh):
    check_dpo(config_of(DPO, lora=lora, remat=remat), **mesh)


@pytest.mark.slow
def test_grpo_begins_at_its_reference():
    grpo = GRPOConfig(kl=0.1, reward="unread", group_size=2, max_tokens=4)
    config = config_of(ObjectiveConfig(name="grpo", grpo=grpo))
    assert first_step(config, make_batch()[1]).extra["kl"] == 0


def distilled(tmp_path, *, lora, remat="none", **optimizer):
    """The first step of a student that is its own teacher, as `train.py` prepares and takes it."""
    distill = DistillConfig(teacher=str(tmp_path / "teacher"))
    objective = ObjectiveConfig(name="distill", distill=distill)
    config = config_of(objective, lora=lora, remat=remat, **optimizer)
    with jax.set_mesh(meshes.make(MeshConfig())):
        model, objective, state, step = start(config)
        plain = {k: v for k, v in state.params.items() if k != "lora"}
        teacher = model.with_config(dataclasses.replace(model.config, lora=LoRAConfig()))
        gptoss_jax.save(distill.teacher, teacher, plain, to="hf", experts="dense")
        batch, _ = objective.make_prepare(model)(state, make_batch()[0], lambda b: b)
        return jax.device_get(step(state, batch)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "form"),
    [
        (LoRAConfig(), {"accumulate": 2}),
        (LoRAConfig(), {"remat": "full", "fused": True}),
        (EVERY, {}),
    ],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(lora, form, tmp_path):
    assert distilled(tmp_path, lora=lora, **form).extra["teacher_kl"] == 0
