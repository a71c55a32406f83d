"""A model that trains for MXFP4 is sampled as the packed one that it computes as."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import LoRAConfig, MeshConfig, ModelConfig
from gptoss_jax.model import Transformer
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import sharding
from gptoss_jax.parameters.tree import flatten, split_layers
from gptoss_jax.sampler import Generation, Sampler
from gptoss_jax.types import MXFP4, Params

# A banded layer and a full one; sizes pairwise distinct.
DENSE = ModelConfig(
    vocab_size=320, num_layers=2, d_model=32, num_heads=6, num_kv_heads=2, head_dim=10,
    num_experts=5, active_experts=3, d_expert=64, window=6, context=48, dtype="float32",
    param_dtype="float32", qat=True,
)  # fmt: skip
TARGETS = ("gate_up", "q")  # so that `down` has none, and what is of attention stays
ADAPTED = dataclasses.replace(
    DENSE, experts="mxfp4", lora=LoRAConfig(targets=TARGETS, rank=4, alpha=6.0)
)
PROMPTS = [[7, 30, 211, 5, 90, 14, 301], [256, 3], [12, 12, 9, 77, 1]]
TOKENS = 9
WARM: dict[str, Any] = {"temperature": 0.9, "top_k": 60, "seed": 3, "stop_ids": []}


def make(config: ModelConfig) -> Params:
    """Make parameters by numpy, adapters' B too: compiling an init costs seconds."""
    random = np.random.default_rng(1)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if x.dtype == jnp.uint8:
            low, high = (121, 125) if "scales" in name else (0, 256)
            return jnp.asarray(random.integers(low, high, x.shape), jnp.uint8)
        return jnp.asarray(0.15 * random.normal(size=x.shape) + ("norm" in name), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, Transformer(config).abstract_params())


@partial(jax.jit, static_argnums=0)
def trained_logprobs(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Return what training computes with: all of a row at once, quantised in the pass."""
    logits: Any = Transformer(config).apply({"params": params}, tokens)
    return jax.nn.log_softmax(logits)


def check(out: Generation, config: ModelConfig, params: Params) -> None:
    """Hold what was sampled against the unpacked model: within 1e-5."""
    rows = np.zeros((len(PROMPTS), 16), np.int32)
    for row, prompt, tokens in zip(rows, PROMPTS, out.tokens, strict=True):
        row[: len(prompt) + TOKENS] = prompt + tokens
    found = np.asarray(trained_logprobs(config, params, rows))  # pyright: ignore[reportArgumentType]
    for row, prompt, tokens, got in zip(found, PROMPTS, out.tokens, out.logprobs, strict=True):
        at = np.arange(len(prompt) - 1, len(prompt) - 1 + TOKENS)
        np.testing.assert_allclose(got, row[at, tokens], rtol=0, atol=1e-5)


BOTH = [
    pytest.param(DENSE, marks=pytest.mark.slow, id="dense"),
    pytest.param(ADAPTED, id="adapted"),
]


@pytest.mark.parametrize("config", BOTH)
def test_it_samples_as_the_model_that_is_trained(config: ModelConfig) -> None:
    params = make(config)
    sampler = Sampler(Transformer(config), params)
    out = sampler.generate(PROMPTS, max_tokens=TOKENS, **WARM)
    check(out, config, params)
    # Nothing is quantised in a pass; what has no business with that is as it was.
    assert (sampler.model.config.experts, sampler.model.config.qat) == ("mxfp4", False)
    held = sampler.params["layers"]["experts"]
    assert all(isinstance(held[name][0], MXFP4) for name in ("gate_up_weight", "down_weight"))
    own = sampler.params.get("lora", {}).get("layers", {})
    assert list(own) == (["attention"] if config is ADAPTED else [])
    # A tuple of layers for a stack, as `weights.load(..., split=True)` gives them.
    split = {**params, "layers": split_layers(params["layers"], config.num_layers)}
    again = Sampler(Transformer(config), split)
    chex.assert_trees_all_equal(again.params, sampler.params)
    assert Sampler(Transformer(config), again.params).params == again.params


@pytest.mark.parametrize("config", BOTH)
def test_what_was_trained_since_is_quantised_anew(config: ModelConfig) -> None:
    params = make(config)
    sampler = Sampler(Transformer(config), params)
    before = sampler.params["layers"]["experts"]
    new = jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x * 1.3, params)
    sampler.renew(new)
    chex.assert_trees_all_equal(sampler.params, Sampler(Transformer(config), new).params)
    after = sampler.params["layers"]["experts"]
    assert np.any(after["gate_up_weight"][0].blocks != before["gate_up_weight"][0].blocks)
    # Packed weights without an adapter are never trained: not a copy is made of them.
    assert (after["down_weight"] is before["down_weight"]) == (config is ADAPTED)
    check(sampler.generate(PROMPTS, max_tokens=TOKENS, **WARM), config, new)


@pytest.mark.slow
@pytest.mark.parametrize("config", BOTH)
def test_on_a_mesh_what_is_packed_is_spread_as_it_was(config: ModelConfig) -> None:
    config = dataclasses.replace(config, num_experts=6, d_expert=128)
    params = make(config)
    mesh = meshes.make(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, mesh))
    sampler = Sampler(Transformer(config), placed)
    for turn in range(2):
        held = {
            f"layers/experts/{name}": stack
            for name, stack in sampler.params["layers"]["experts"].items()
        }
        for path, stack in flatten(held).items():
            stack = stack[0] if isinstance(stack, tuple) else stack
            layer = jax.tree.map(lambda x: x[None], stack)
            want = sharding.shardings({path: layer}, mesh)[path]
            for x, s in zip(jax.tree.leaves(stack), jax.tree.leaves(want), strict=True):
                spec = jax.sharding.PartitionSpec(*s.spec[1:])
                assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), x.ndim), path
        out = sampler.generate(PROMPTS, max_tokens=TOKENS, **WARM)
        check(out, config, jax.tree.map(np.asarray, placed))
        if turn == 0:
            placed = jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x * 1.3, placed)
            sampler.renew(placed)
