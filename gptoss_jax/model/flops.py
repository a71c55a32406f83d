"""Count a model's floating-point operations from its sizes."""

from __future__ import annotations

from gptoss_jax.config import ModelConfig


def matmul_params(config: ModelConfig) -> tuple[int, int]:
    """Return the matmul parameters that each token uses in the layers, and each unembedded token.

    Of E experts, only the A active ones count. Biases, norms and the embedding look-up are no
    matmuls.
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

    Matmuls take 6 per active parameter and token (2 forward, 4 backward); the unembedding runs only
    on the `trained` tokens. Attention takes 12 * N * H per pair of a query and a key that it sees,
    with each row counted as one segment. Recomputation by remat is not counted.
    """
    c, T = config, sequence_length
    layers, unembedding = matmul_params(config)
    pairs = 0.0  # per token, over layers
    for window in c.layer_windows:
        w = min(window or T, T)
        pairs += (w * (w + 1) / 2 + (T - w) * w) / T
    attention = 12 * c.num_heads * c.head_dim * pairs
    return tokens * (6 * layers + attention) + 6 * trained * unembedding
