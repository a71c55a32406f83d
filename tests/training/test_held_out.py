"""Evaluation beside the state of a run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import data
from gptoss_jax.config import Config, ModelConfig, TrainConfig
from gptoss_jax.model import Transformer
from gptoss_jax.ops import moe
from gptoss_jax.sampler import Sampler, sampler
from gptoss_jax.training import held_out

MODEL = ModelConfig(
    vocab_size=320,
    num_layers=1,
    d_model=32,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    num_experts=5,
    active_experts=3,
    d_expert=64,
    dtype="float32",
    param_dtype="float32",
    experts="mxfp4",
)


def test_questions_are_answered_without_a_copy_of_packed_experts(monkeypatch):
    """An accelerator's sampler would else put them into its kernels' order, beside the state."""
    monkeypatch.setattr(sampler, "_on_cpu", lambda params: False)
    monkeypatch.setattr(moe, "layout_for_chip", lambda: "planes")
    random = np.random.default_rng(1)

    def leaf(x):
        if x.dtype == jnp.uint8:  # codes, and scales about 1/32
            return jnp.asarray(random.integers(119, 124, x.shape), jnp.uint8)
        return jnp.asarray(random.normal(size=x.shape) * 0.15, x.dtype)

    model = Transformer(MODEL)
    params = jax.tree.map(leaf, model.abstract_params())
    assert Sampler(model, params).params["layers"]["experts"]["down_weight"].layout == "planes"
    sampled_from = []

    class Watched(Sampler):
        def generate(self, *args, **options):
            sampled_from.append(self.params)
            return super().generate(*args, **options)

    monkeypatch.setattr(held_out, "Sampler", Watched)
    questions = [data.Question([3, 5, 7], "no", "a:1"), data.Question([11, 13], "nor", "a:2")]
    config = Config(model=MODEL, train=TrainConfig(eval_max_tokens=4, eval_samples=1))
    scores, samples = held_out.evaluate(model, params, [], questions=questions, config=config)
    assert scores["exact_match"] == 0 and len(samples) == 1
    (seen,) = sampled_from
    kept = zip(jax.tree.leaves(seen), jax.tree.leaves(params), strict=True)
    assert all(one is other for one, other in kept)
