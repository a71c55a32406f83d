"""The experiment `softcap`: its attention against a plain one, and its model against the package's.

That its runs train, resume, sample and convert is what `test_own_model.py` tests of any such model.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import MeshConfig, command_line
from gptoss_jax.model import Transformer
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.sampler import Sampler

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments.softcap import config as softcap_config  # noqa: E402
from experiments.softcap import softcap  # noqa: E402
from experiments.softcap.model import softcapped  # noqa: E402

B, T, N, K, H = 2, 11, 6, 3, 4
MODEL = dataclasses.replace(
    softcap_config.get_config().model,
    num_layers=3, d_model=24, num_heads=6, num_kv_heads=2, head_dim=8, d_expert=16, window=4,
)  # fmt: skip


def plain(q, k, v, sinks, *, window, segments, positions, cap):
    """Attend with a loop over rows, queries and heads, in float64."""
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        h = n * K // N
        seen = [
            s
            for s in range(k.shape[1])
            if segments[b, s] == segments[b, t] != 0
            and 0 <= positions[b, t] - positions[b, s] < (window or 10**9)
        ]
        logits = np.array([q[b, t, n] @ k[b, s, h] / H**0.5 for s in seen])
        weights = np.exp(cap * np.tanh(logits / cap))
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n]))
        if seen:
            out[b, t, n] = weights @ v[b, seen, h] / total
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_softcapped_attention_is_the_plain_one(window, has_sinks):
    rng = np.random.default_rng(0)
    q, k, v = (3 * rng.normal(size=(B, T, heads, H)) for heads in (N, K, K))
    sinks = rng.normal(size=N) if has_sinks else None
    segments = np.array([[1] * 4 + [2] * 7, [1] * 9 + [0] * 2])
    positions = np.array([[*range(4), *range(7)], [*range(11)]])
    where = {"segments": segments, "positions": positions}
    expected = plain(q, k, v, sinks, window=window, **where, cap=2.0)

    @functools.partial(jax.jit, static_argnums=3)
    def run(q, k, v, cap):
        of_sinks = None if sinks is None else jnp.float32(sinks)
        return softcapped.attention(
            *(jnp.float32(x) for x in (q, k, v)),
            sinks=of_sinks, window=window, segment_ids=segments, positions=positions, cap=cap,
        )  # fmt: skip

    np.testing.assert_allclose(run(q, k, v, 2.0), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(run(q, k, v, None) - expected).max() > 0.01  # CAP is another
    # The gradient, against differences of the plain one.
    d_out, d = rng.normal(size=q.shape), rng.normal(size=k.shape)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(run(q, k, v, 2.0) * d_out)))(jnp.float32(k))
    slope = np.sum(np.asarray(gradient) * d)
    ends = [plain(q, k + e * d, v, sinks, window=window, **where, cap=2.0) for e in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, np.sum((ends[0] - ends[1]) * d_out) / 2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype),
        Transformer(MODEL).abstract_params(),
    )


def test_without_a_bound_it_is_the_package_s_model(params, monkeypatch):
    tokens = np.random.default_rng(2).integers(0, MODEL.vocab_size, (2, 13))
    segments = np.array([[1] * 13, [1] * 5 + [2] * 6 + [0] * 2])
    mine, package = softcap.make_model(MODEL), Transformer(MODEL)
    assert jax.tree.map(jnp.shape, mine.abstract_params()) == jax.tree.map(jnp.shape, params)
    real = segments != 0

    def logits(model):
        run = jax.jit(lambda params: model.apply({"params": params}, tokens, segments))
        return np.asarray(run(params))[real]

    expected = logits(package)
    assert np.abs(logits(mine) - expected).max() > 0.01
    monkeypatch.setattr(softcapped, "CAP", 1e6)
    uncapped = logits(mine)
    np.testing.assert_allclose(uncapped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sampling_from_its_cache_has_the_log_probabilities_of_training(params):
    prompts = [[5, 3, 8, 1, 9, 2, 7], [4, 6]]  # longer than the window, and shorter
    model = softcap.make_model(MODEL)
    out = Sampler(model, params).generate(prompts, max_tokens=9, temperature=1.0, stop_ids=())

    def of(model, ids):
        run = jax.jit(lambda params: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))
        return np.asarray(run(params))

    for prompt, tokens, sampled in zip(prompts, out.tokens, out.logprobs, strict=True):
        ids = np.array([prompt + tokens])
        logprobs, plain = of(model, ids), of(Transformer(MODEL), ids)
        found = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]
        np.testing.assert_allclose(sampled, found, rtol=1e-4, atol=1e-4)
        assert np.abs(plain - logprobs).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "context", "tensor"])
def test_on_a_mesh_it_is_the_same_model(params, axis):
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab_size, (6, 16))
    model = softcap.make_model(MODEL)
    expected = jax.jit(lambda params: model.apply({"params": params}, tokens))(params)
    mesh = meshes.make(MeshConfig(**{axis: 2}), jax.devices()[:2])
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params: model.apply({"params": params}, tokens))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_both_variants_have_the_same_config():
    for variant in softcap_config.VARIANTS:
        name = softcap_config.CONFIGS.get(variant, "config.py")
        path = str(ROOT / "experiments" / "softcap" / name)
        assert command_line.load(["--config", path]) == softcap_config.get_config(variant)
        assert (command_line.read_make_model(path) is not None) == (variant == "softcap")
