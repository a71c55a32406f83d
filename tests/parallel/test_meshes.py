"""The same training and the same sampling on every mesh: loss, gradients, parameters, tokens."""

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

from gptoss_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import sharding
from gptoss_jax.parameters.tree import path_name
from gptoss_jax.sampler import Sampler
from gptoss_jax.types import Batch

B, T, STEPS = 16, 48, 3
MODEL = ModelConfig(
    vocab_size=512,
    num_layers=2,
    d_model=64,
    num_heads=16,
    num_kv_heads=2,
    head_dim=12,
    num_experts=24,
    active_experts=3,
    d_expert=96,
    window=5,
    initial_context=40,
    context=128,
    init_std=0.2,
    dtype="float32",
    param_dtype="float32",
)
CONFIG = Config(
    init="random",
    model=MODEL,
    data=DataConfig(sequence_length=T, batch_size=B),
    # The first moment after a step is a tenth of the gradient; a larger eps would else have the
    # comparison measure the rounding of gradients near zero.
    optimizer=OptimizerConfig(eps=1e-3, learning_rate=1e-3, warmup_steps=0, clip_norm=0, b1=0.9),
)
FAST = ("fsdp 2 expert 2 context 2",)
# Every axis alone, over all devices, and every two axes together.
MESHES = (
    *FAST,
    "data 2 tensor 4",
    *(f"{axis} 8" for axis in meshes.AXES),
    "expert 4 tensor 2",
    "data 2 context 2 tensor 2",
    "data 2 fsdp 2 expert 2",
    "fsdp 2 context 2 tensor 2",
)


def make_batch() -> Batch:
    """Two segments a row, of lengths that no chunk has; every other row ends in padding."""
    rng = np.random.default_rng(0)
    segments, positions = np.ones((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        cut = int(rng.integers(7, 40))
        segments[row, cut:] = 2
        if row % 2:
            segments[row, 43:] = 0
        for t in range(1, T):
            same = segments[row, t] == segments[row, t - 1]
            positions[row, t] = positions[row, t - 1] + 1 if same else 0
    tokens = rng.integers(0, MODEL.vocab_size, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) < 0.7) * (segments != 0)
    arrays: Any = (tokens, np.roll(tokens, -1, 1), weights.astype(np.float32), segments, positions)
    return Batch(*arrays)


def make_mesh(text: str) -> jax.sharding.Mesh:
    words = text.split()
    sizes = {axis: int(n) for axis, n in zip(words[::2], words[1::2], strict=True)}
    return meshes.make(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def to_host(x: Any) -> Any:
    return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def train(mesh: jax.sharding.Mesh, start: Any, **model: Any) -> dict[str, Any]:
    """Take three steps from a state on the host, or from the seed; return what came of them."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **model))
    with jax.set_mesh(mesh):
        program = make_program(config)
        where = jax.tree.map(lambda x: x.sharding, program.abstract_state())
        if start is None:
            start = program.begin(None)
        state = start.replace(rng=jax.random.key(0))  # a step uses its state up
        state, first = jax.device_put(state, where), jax.tree.map(to_host, state)
        batch = jax.device_put(make_batch(), sharding.batch_shardings(make_batch(), mesh))
        # What is compared is how the mesh splits a step, and not how LLVM compiles it.
        step = program.step.lower(state, batch).compile({"xla_backend_optimization_level": 0})  # pyright: ignore
        losses, grads = [], None
        for _ in range(STEPS):
            state, measured = step(state, batch)
            losses.append(float(measured.loss))
            if grads is None:
                moment = optax.tree_utils.tree_get(state.opt_state, "mu")
                grads = jax.tree.map(lambda m: np.asarray(m) / 0.1, moment)
                balance = np.asarray(measured.router.load)
        got = jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state))
        for have, want, x in zip(got, jax.tree.leaves(where), jax.tree.leaves(state), strict=True):
            assert have.is_equivalent_to(want, x.ndim), "a step changed how its state is spread"
    params = jax.tree.map(np.asarray, state.params)
    return {"first": first, "losses": losses, "grads": grads, "params": params, "load": balance}


@functools.cache
def on_one_device(experts: str = "dense") -> dict[str, Any]:
    return train(make_mesh("data 1"), None, experts=experts)


def check(got: dict[str, Any], want: dict[str, Any]) -> None:
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5)
    np.testing.assert_allclose(got["load"], want["load"], atol=1e-6)
    for kind in ("grads", "params"):
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(want[kind]), jax.tree.leaves(got[kind]), strict=True
        )
        for (path, a), b in pairs:
            atol = 1e-5 * np.abs(a).max() if kind == "grads" else 1e-5
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=atol, err_msg=f"{kind} {path}")


def forms(text: str) -> dict[str, Any]:
    """Take turns at the two exchanges, so that every kind of mesh has seen both."""
    kinds = ("all_gather", "all_to_all")
    return {"expert_exchange": kinds[MESHES.index(text) % 2]}


@pytest.mark.parametrize(
    "text",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_three_steps_are_those_of_one_device(text: str):
    want = on_one_device()
    assert want["losses"][-1] < want["losses"][0] - 0.01
    check(train(make_mesh(text), want["first"], **forms(text)), want)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tensor 4", "expert 2 fsdp 2 tensor 2"])
def test_packed_experts_train_through_on_a_mesh_as_on_one_device(text: str):
    """Three blocks of 32 divide by neither 2 nor 4, so they are filled up with zeros."""
    want = on_one_device("mxfp4")
    mesh = make_mesh(text)
    with jax.set_mesh(mesh):
        assert sharding.padded(dataclasses.replace(MODEL, experts="mxfp4")).expert_padding > 0
    got = train(mesh, None, experts="mxfp4")
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5)


def test_parameters_are_born_the_same_on_any_mesh():
    want = on_one_device()["first"]
    with jax.set_mesh(make_mesh("fsdp 2 expert 2 tensor 2")):
        program = make_program(CONFIG)
        state = program.begin(None)
        where = jax.tree.map(lambda x: x.sharding, program.abstract_state())
    for (path, a), b, s in zip(
        jax.tree_util.tree_leaves_with_path(want.params),
        jax.tree.leaves(state.params),
        jax.tree.leaves(where.params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, err_msg=path_name(path))
        assert b.sharding.is_equivalent_to(s, b.ndim), path_name(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "data 2 expert 2 tensor 2",
        "tensor 4",
        "fsdp 2 expert 2 context 2",
        "data 4 context 2",
        "expert 8",
    ],
)
def test_sampling_gives_the_same_tokens(text: str):
    params = on_one_device()["first"].params
    model = make_program(CONFIG).model
    # As many prompts as no mesh divides, one past the window.
    prompts = [[1, 5, 3, 9, 2, 7, 30], [4, 4, 8], [77, *range(2, 14)]]
    rules = {"max_tokens": 7, "temperature": 0.8, "seed": 3, "stop_ids": []}
    want = Sampler(model, jax.device_put(params, jax.devices()[0])).generate(prompts, **rules)
    mesh = make_mesh(text)
    spread = jax.device_put(params, sharding.shardings(params, mesh))
    got = Sampler(model, spread).generate(prompts, **rules)
    assert got.tokens == want.tokens
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
