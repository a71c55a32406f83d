"""Values and gradients against torch, where it is installed: `pip install -e '.[parity]'`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
reference = pytest.importorskip("torch_reference", exc_type=ImportError)
from mapping import SIZES, to_tree  # noqa: E402

from gptoss_jax.model import Transformer  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.mark.parametrize("length", [5, 127, 128, 129, 130, 300, 4_200])
def test_logits_and_gradients(length):
    """Another seed than the golden files', both references, every gradient."""
    import torch

    theirs, ours = reference.transformers_model(seed=7), Transformer(SIZES)
    params = to_tree(reference.state(theirs))
    tokens = np.random.default_rng(length).integers(0, SIZES.vocab_size, length)
    with torch.no_grad():
        expected = theirs(torch.as_tensor(tokens[None])).logits[0].numpy()
    logits = jax.jit(lambda p, t: ours.apply({"params": p}, t))(params, jnp.asarray(tokens[None]))
    largest = np.abs(expected).max()
    assert np.abs(logits[0] - expected).max() <= 1e-5 * largest
    if length <= 300:
        openai = reference.openai_logits(theirs, tokens)
        assert np.abs(logits[0] - openai).max() <= 1e-5 * largest

    def loss(params):
        log_probs = jax.nn.log_softmax(ours.apply({"params": params}, tokens[None])[0, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, jnp.asarray(tokens)[1:, None], axis=1))

    gradients = jax.jit(jax.grad(loss))(params)
    expected = to_tree(reference.gradients(theirs, tokens))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        apart = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert apart <= 1e-4, f"{jax.tree_util.keystr(path)} differs by {apart:.1e}"
