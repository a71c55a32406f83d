"""Values and gradients against golden files made from the torch references (make_golden.py)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mapping import SIZES, to_tree

import gptoss_jax
from gptoss_jax.model import Transformer

GOLDEN = Path(__file__).parent / "golden"
LOGITS = 1e-5  # of the largest logit
GRADIENTS = 1e-4  # relative norm, a tensor


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "golden.npz"))


def logits(model, params, tokens) -> np.ndarray:
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    return np.asarray(apply(params, jnp.asarray(tokens[None]))[0])


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() <= LOGITS * np.abs(theirs).max()


@pytest.mark.parametrize("length", [5, 127, 128, 129, 130, 300])
def test_logits_from_a_float32_checkpoint(golden, length):
    model, params = gptoss_jax.load(GOLDEN / "hf_float32", dtype=jnp.float32)
    assert_close(logits(model, params, golden["tokens"][:length]), golden["logits"][:length])


def test_logits_past_yarns_initial_context(golden):
    model, params = gptoss_jax.load(GOLDEN / "hf_float32", dtype=jnp.float32)
    assert golden["sample"].max() > SIZES.initial_context
    ours = logits(model, params, golden["tokens"])[golden["sample"]]
    assert_close(ours, golden["logits_sample"])


def test_every_gradient(golden):
    model, params = gptoss_jax.load(GOLDEN / "hf_float32", dtype=jnp.float32)
    tokens = jnp.asarray(golden["tokens"][: len(golden["logits"])])

    def loss(params):
        log_probs = jax.nn.log_softmax(model.apply({"params": params}, tokens[None])[0, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[1:, None], axis=1))

    ours = jax.jit(jax.grad(loss))(params)
    named = {k.removeprefix("gradient:"): v for k, v in golden.items() if k.startswith("gradient")}
    theirs = to_tree(named)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        apart = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert apart <= GRADIENTS, f"{jax.tree_util.keystr(path)} differs by {apart:.1e}"


@pytest.mark.parametrize(
    "folder, key", [("hf_bf16", "logits_bf16"), ("openai_mxfp4", "logits_mxfp4")]
)
@pytest.mark.parametrize("experts", [None, "dense"])
def test_logits_from_other_forms(golden, folder, key, experts):
    model, params = gptoss_jax.load(GOLDEN / folder, dtype=jnp.float32, experts=experts)
    theirs = golden[key]
    assert_close(logits(model, params, golden["tokens"][: len(theirs)]), theirs)


def test_float32_checkpoint_gives_the_tree_by_hand(golden):
    """The name table maps as the mapping by hand does, and init makes the same tree."""
    from safetensors.numpy import load_file

    _, params = gptoss_jax.load(GOLDEN / "hf_float32", dtype=jnp.float32)
    by_hand = to_tree(load_file(GOLDEN / "hf_float32" / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, params, by_hand)
    expected = Transformer(SIZES).abstract_params()
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision_is_near_by_divergence(golden, dtype):
    """bf16 and float16 compute: mean KL to float32 small (maximum error means nothing, trap 8)."""
    model, params = gptoss_jax.load(GOLDEN / "hf_bf16", dtype=jnp.dtype(dtype))
    ours = jax.nn.log_softmax(logits(model, params, golden["tokens"][:130]))
    theirs = jax.nn.log_softmax(golden["logits_bf16"])
    divergence = float(jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)))
    assert divergence < {"bfloat16": 2e-3, "float16": 3e-4}[dtype], divergence
