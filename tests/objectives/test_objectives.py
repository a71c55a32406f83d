"""Objectives on meshes, each step as on one device; what a reference may be when a run begins."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest
from programs import make_program

from gptoss_jax import data
from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from gptoss_jax.config.objective import DistillConfig, DPOConfig, GRPOConfig
from gptoss_jax.errors import UserError
from gptoss_jax.objectives import check_start
from gptoss_jax.objectives.distill import HIDDEN, TABLE
from gptoss_jax.objectives.reinforcement import rollouts
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.types import Batch

B, T, V, WIDER = 8, 40, 320, 48
MODEL = ModelConfig(
    vocab_size=V, num_layers=1, d_model=32, num_heads=8, num_kv_heads=4, head_dim=6,
    num_experts=6, active_experts=2, d_expert=64, window=7, initial_context=T, context=64,
    init_std=0.2, dtype="float32", param_dtype="float32", experts="mxfp4",
    lora=LoRAConfig(targets=("attention", "experts", "unembedding"), rank=3, alpha=6.0),
)  # fmt: skip
OBJECTIVES = {
    "dpo": ObjectiveConfig("dpo", dpo=DPOConfig(beta=0.4, label_smoothing=0.1, sft_weight=0.3)),
    "distill": ObjectiveConfig("distill", distill=DistillConfig("t", 2.0, nll_weight=0.25)),
    "grpo": ObjectiveConfig("grpo", grpo=GRPOConfig(reward="r.py", temperature=0.8, kl=0.3)),
}
# Packed experts are filled up on none of these, so that adapters are drawn alike.
MESHES = "fsdp 2 expert 2 context 2", "data 4 tensor 2"


def config_of(name: str) -> Config:
    return Config(
        init="random",
        model=MODEL,
        objective=OBJECTIVES[name],
        data=DataConfig(sequence_length=T, batch_size=B),
        # See tests/parallel/test_meshes.py for the large eps.
        optimizer=OptimizerConfig(eps=1e-3, learning_rate=1e-3, warmup_steps=0, clip_norm=0),
    )


def make_batch() -> Batch:
    """Four segments a row, so two pairs, that end anywhere; with what the objectives add."""
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, B, T), np.int32)
    for row in range(B):
        cuts = np.sort(rng.choice(np.arange(5, T), 4, replace=False))
        for i, (start, stop) in enumerate(zip([0, *cuts], cuts, strict=False)):
            segments[row, start:stop] = i + 1
            positions[row, start:stop] = np.arange(stop - start)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = ((rng.random((B, T)) < 0.6) & (segments > 0)).astype(np.float32)
    per_token = {
        rollouts.ADVANTAGES: rng.normal(size=(B, T)) * weights,
        rollouts.SAMPLED: -4 + 0.3 * rng.normal(size=(B, T)),
        HIDDEN: rng.normal(size=(B, T, WIDER)),
    }
    shared = {rollouts.FRESH: np.float32(1), TABLE: rng.normal(size=(V, WIDER)).astype(np.float32)}
    arrays: Any = (tokens, np.roll(tokens, -1, 1), weights, segments, positions)
    wide = {name: x.astype(np.float32) for name, x in per_token.items()}
    return Batch(*arrays).replace(per_token=wide, shared=shared)  # type: ignore[attr-defined]


def step_on(text: str, name: str) -> dict[str, Any]:
    """Take a step with adapters that are not 0; return loss, extras, and the adapters' gradient."""
    words = text.split()
    sizes = {axis: int(n) for axis, n in zip(words[::2], words[1::2], strict=True)}
    mesh = meshes.make(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        program = make_program(config_of(name))
        state = program.begin(None)
        leaves, tree = jax.tree.flatten(state.params["lora"])
        rng = np.random.default_rng(2)
        lora = tree.unflatten([0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])
        state = state.replace(params={**state.params, "lora": lora})  # type: ignore[attr-defined]
        where = jax.tree.map(lambda x: x.sharding, program.abstract_state())
        state = jax.device_put(state, where)
        batch = data.spread(make_batch(), mesh, rows=(0, B), size=B)
        step = program.step.lower(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
        state, measured = step.compile({"xla_backend_optimization_level": 0})(state, batch)
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(
        np.asarray, {"loss": measured.loss, "extra": measured.extra, "moment": moment}
    )


@functools.cache
def on_one_device(name: str) -> dict[str, Any]:
    return step_on("data 1", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("text", MESHES)
def test_a_step_on_a_mesh_is_that_of_one_device(text, name):
    want, got = on_one_device(name), step_on(text, name)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
    assert got["extra"].keys() == want["extra"].keys() != set()
    for key, value in want["extra"].items():
        np.testing.assert_allclose(got["extra"][key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(want["moment"]),
        jax.tree.leaves(got["moment"]),
        strict=True,
    )
    for (path, a), b in pairs:
        largest = np.abs(a).max()
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * largest, err_msg=str(path))
        assert largest > 0


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_run_from_adapters_says_what_its_reference_is(name):
    """Without its adapters the model is another than the one that the run begins with."""
    config = dataclasses.replace(config_of(name), init="runs/sft")
    plain = dataclasses.replace(MODEL, lora=LoRAConfig())
    check_start(config, plain)
    with pytest.raises(UserError, match=r"--init runs/sft has adapters.*convert runs/sft OUT") as e:
        check_start(config, MODEL)
    assert "\n" not in str(e.value) and name in str(e.value)
    meant = dataclasses.replace(config.objective, reference="base")
    check_start(dataclasses.replace(config, objective=meant), MODEL)
    free = dataclasses.replace(config.objective, grpo=GRPOConfig(reward="r.py"))
    if name == "grpo":  # nothing to compare with
        check_start(dataclasses.replace(config, objective=free), MODEL)
    check_start(dataclasses.replace(config, objective=ObjectiveConfig()), MODEL)
