"""The count of a step's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.model import flops

CONFIG = ModelConfig(
    vocab_size=50, num_layers=3, d_model=12, num_heads=6, num_kv_heads=2, head_dim=4,
    num_experts=5, active_experts=2, d_expert=7, window=4, layer_pattern="bfb",
)  # fmt: skip


def test_flops_are_counted_by_hand():
    attention = 12 * 4 * (6 + 2 + 2 + 6)  # q, k, v, o
    layers = 3 * (attention + 5 * 12 + 2 * (2 * 7 * 12 + 12 * 7))
    assert flops.matmul_params(CONFIG) == (layers, 50 * 12)
    # Visible keys of the 6 queries of a row: banded 1 2 3 4 4 4, full 1 to 6.
    pairs = 2 * 18 + 21
    want = 6 * layers * 12 + 6 * 50 * 12 * 5 + 2 * 12 * 6 * 4 * pairs  # two rows
    got = flops.step_flops(CONFIG, tokens=12, trained=5, sequence_length=6)
    np.testing.assert_allclose(got, want)


def test_active_parameters_of_the_real_model():
    layers, unembedding = flops.matmul_params(ModelConfig())
    assert layers + unembedding == pytest.approx(3.61e9, rel=2e-3)
