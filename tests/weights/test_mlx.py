"""Against MLX, where it is installed: it loads an export and computes our logits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install -e '.[serving]'")
utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")

import gptoss_jax  # noqa: E402
from gptoss_jax import loading  # noqa: E402
from gptoss_jax.config import ModelConfig  # noqa: E402
from gptoss_jax.model import Transformer  # noqa: E402
from gptoss_jax.model.initial import init_params  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]
# No YaRN: mlx-lm rounds its bounds, whatever `truncate` says (3e-4 of the logits).
MODEL = ModelConfig(
    vocab_size=tiny.V, num_layers=4, d_model=64, num_heads=8, num_kv_heads=2, head_dim=16,
    num_experts=5, active_experts=3, d_expert=96, window=tiny.W, context=64, rope_factor=1.0,
    initial_context=64, dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, tiny.V, (2, 3 * tiny.W))


def test_it_computes_our_logits_and_the_same_greedy_tokens(tmp_path: Path) -> None:
    model = Transformer(MODEL)
    params = jax.tree.map(lambda x: 4 * x, init_params(model, seed=3))
    gptoss_jax.save(tmp_path / "hf", model, params, to="hf", experts="mxfp4", force=True)
    theirs, _ = utils.load_model(tmp_path / "hf", lazy=True)
    theirs.set_dtype(mx.float32)
    found = np.array(theirs(mx.array(TOKENS)).astype(mx.float32))
    model, params = loading.load(tmp_path / "hf", dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        want = np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)))
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
    assert np.array_equal(found.argmax(-1), want.argmax(-1))
