"""How much arithmetic a model takes, counted from its sizes."""

from __future__ import annotations

from gptoss_jax.config import ModelConfig


def matmul_params(config: ModelConfig) -> tuple[int, int]:
    """Return the parameters that multiply each token in the layers, and each unembedded token.

    A of E experts; biases, norms and the embedding's look-up are no matmuls.
    """
    c = config
    attention = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
    experts = c.active_experts * 3 * c.d_model * c.d_expert
    layer = attention + c.num_experts * c.d_model + experts
    return c.num_layers * layer, c.vocab_size * c.d_model


def step_flops(
    config: ModelConfig, *, tokens: float, trained: float, sequence_length: int
) -> float:
    """Return the floating-point operations of a training step, forward and backward.

    6 per active matmul parameter and token (2 forward, 4 backward; the unembedding over the trained
    tokens alone), and in attention 12 * N * H per pair of query and visible key, a row taken as one
    segment. What remat computes again is not counted.
    """
    c, T = config, sequence_length
    layers, unembedding = matmul_params(config)
    pairs = 0.0  # per token, over layers
    for window in c.layer_windows:
        w = min(window or T, T)
        pairs += (w * (w + 1) / 2 + (T - w) * w) / T
    attention = 12 * c.num_heads * c.head_dim * pairs
    return tokens * (6 * layers + attention) + 6 * trained * unembedding
