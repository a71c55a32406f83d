"""What the tests of the training stack share: a model of a few lines, batches, a tiny config."""

from __future__ import annotations

import json
import random
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.types import Batch, Output, RouterStats

V, D, E, L = 37, 12, 5, 3


class Toy(nn.Module):
    """Embedding, one layer with a bias, a router that only counts: the interface of Transformer."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens, segment_ids=None):
        init = nn.initializers.normal(0.5)
        dtype = jnp.dtype(self.dtype)
        x = _Weight((V, D), dtype, name="embedding")()[tokens].astype(jnp.float32)
        x = jnp.tanh(x @ self.param("middle_weight", init, (D, D), dtype).astype(jnp.float32))
        x = x + self.param("middle_bias", nn.initializers.zeros, (D,), dtype).astype(jnp.float32)
        logits = jnp.einsum("...D,LED->L...E", x, self.param("router_weight", init, (L, E, D)))
        _Weight((V, D), dtype, name="unembedding")()
        real = (jnp.ones_like(tokens) if segment_ids is None else segment_ids) != 0
        return x, logits, real

    @nn.nowrap
    def forward(self, params, tokens, *, segment_ids=None, positions=None):
        x, logits, real = self.apply({"params": params}, tokens, segment_ids)
        prob = jax.nn.softmax(logits) * real[..., None]
        count = jnp.maximum(real.sum(), 1)
        load = prob.sum((1, 2)) / count
        z = (jax.nn.logsumexp(logits, -1) ** 2 * real).sum((1, 2)) / count
        return Output(x, None, RouterStats(load, E * jnp.sum(load**2, -1), z, 0 * z), {})


class _Weight(nn.Module):
    shape: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self):
        return self.param("weight", nn.initializers.normal(0.5), self.shape, self.dtype)


def toy_batch(rows: int, length: int, *, seed: int = 0) -> Batch:
    """Random tokens; about a third of the targets count, by uneven weights; a padded end."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.35) * rng.random((rows, length))
    segments = np.ones((rows, length), np.int32)
    segments[-1, -3:] = 0
    weights = (weights * segments).astype(np.float32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def write_chats(path: Path, count: int, *, seed: int = 0) -> Path:
    """Write chats that ask for four digits in order."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            digits = [str(rng.randrange(10)) for _ in range(4)]
            chat = [
                {"role": "user", "content": " ".join(digits)},
                {"role": "assistant", "content": " ".join(sorted(digits))},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path


# configs/tiny.py, made small enough to compile in seconds.
TINY = str.split(
    "--config configs/tiny.py --model.vocab_size 320 --model.num_layers 2 --model.d_model 32 "
    "--model.num_heads 6 --model.num_kv_heads 3 --model.head_dim 8 --model.num_experts 4 "
    "--model.d_expert 64 --model.window 16 --model.context 512 --data.sequence_length 256 "
    "--data.batch_size 2 --optimizer.warmup_steps 2 --train.steps 6 --train.eval_every 3 "
    "--train.checkpoint_every 2 --train.eval_questions 2 --train.eval_max_tokens 4"
)
