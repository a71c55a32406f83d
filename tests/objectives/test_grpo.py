"""GRPO's loss and gradient against NumPy in float64, whose derivatives are finite differences."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import Toy, toy_batch

from gptoss_jax.config.objective import GRPOConfig
from gptoss_jax.objectives.grpo import grpo_loss, token_losses
from gptoss_jax.training.step import init_state, make_train_step
from gptoss_jax.types import Output

B, T = 4, 17
# An uneven clip, a temperature that is not 1: nothing drops out.
GRPO = GRPOConfig(reward="unused", temperature=0.7, clip_low=0.15, clip_high=0.3, kl=0.4)


class WithLora(Toy):
    """The toy with an adapter: a factor on its hidden states, 1 where there is none."""

    def forward(self, params, tokens, *, segment_ids=None, positions=None):
        base = {name: child for name, child in params.items() if name != "lora"}
        out = super().forward(base, tokens, segment_ids=segment_ids, positions=positions)
        if "lora" not in params:
            return out
        return Output(out.hidden * params["lora"]["factor"], None, out.router, {})


@pytest.fixture(scope="module")
def params():
    toy = Toy().init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    factor = 1 + 0.3 * np.random.default_rng(5).standard_normal(toy["middle_bias"].shape)
    return {**toy, "lora": {"factor": jnp.asarray(factor, jnp.float32)}}


def make(params, *, rows=B, seed=0):
    """A batch whose sampler was near the model, so that some tokens are clipped and some not."""
    rng = np.random.default_rng(seed + 1)
    batch = toy_batch(rows, T, seed=seed)
    weights = (batch.weights > 0).astype(np.float32)
    x = log_probs(np64(params), batch, GRPO.temperature)
    sampled = x + 0.4 * rng.standard_normal(x.shape)
    advantages = np.repeat(rng.standard_normal((rows, 1)), T, axis=1)
    advantages[0] = 0  # a group that was all alike
    per_token = {"advantages": advantages * weights, "sampled_logprobs": sampled * weights}
    per_token = {name: value.astype(np.float32) for name, value in per_token.items()}
    return batch.replace(weights=weights, per_token=per_token, shared={"fresh": np.float32(1)})


@jax.jit
def run(params, batch):
    """The loss's sums and its gradient, of one compiled program for all tests."""

    def loss(params):
        sums = grpo_loss(WithLora(), params, batch, grpo=GRPO)
        return sums.nll, sums

    grads, sums = jax.grad(loss, has_aux=True)(params)
    return sums, grads


def np64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def log_probs(params, batch, temperature):
    """The toy's tempered log-probabilities of the targets, in float64."""
    x = params["embedding"]["weight"][batch.tokens]
    x = np.tanh(x @ params["middle_weight"]) + params["middle_bias"]
    x = x * params.get("lora", {"factor": 1.0})["factor"]
    logits = x @ params["unembedding"]["weight"].T / temperature
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]


def reference(params, base, batch, grpo):
    """The sum of the loss over tokens, and of what is logged, token by token."""
    x = log_probs(params, batch, grpo.temperature)
    r = log_probs(base, batch, grpo.temperature)
    sums = dict.fromkeys(("loss", "clipped", "kl", "gap", "sampler_kl"), 0.0)
    gaps = [0.0]
    for at in np.argwhere(batch.weights > 0):
        at = tuple(at)
        q = float(batch.per_token["sampled_logprobs"][at])
        over = float(batch.per_token["advantages"][at])
        ratio = np.exp(x[at] - q)
        bounded = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
        kl = np.exp(r[at] - x[at]) - (r[at] - x[at]) - 1
        sums["loss"] += -min(ratio * over, bounded * over) + grpo.kl * kl
        sums["clipped"] += bounded * over < ratio * over
        sums["kl"] += kl
        gaps.append(abs(x[at] - q))
        sums["sampler_kl"] += ratio - (x[at] - q) - 1
    return sums, gaps


def without_lora(params):
    return {name: child for name, child in params.items() if name != "lora"}


def test_loss_and_log_are_those_of_numpy(params):
    batch = make(params)
    sums = run(params, batch)[0]
    p = np64(params)
    want, gaps = reference(p, without_lora(p), batch, GRPO)
    weight = batch.weights.sum()
    np.testing.assert_allclose(float(sums.nll), want["loss"], rtol=1e-5)
    assert float(sums.weight) == weight and float(sums.tokens) == (batch.segment_ids != 0).sum()
    assert 2 < want["clipped"] < weight - 2, "the case has to have both"
    found = {
        "clipped": want["clipped"],
        "kl": want["kl"],
        "sampler_gap": sum(gaps),
        "sampler_gap_max": max(gaps) * weight,
        "sampler_kl": want["sampler_kl"],
    }
    assert sums.extra.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(float(sums.extra[name]), value, rtol=1e-5, err_msg=name)
    # Later steps on the same answers differ from the sampler by design: no gap is told.
    again = run(params, batch.replace(shared={"fresh": np.float32(0)}))[0]
    assert np.isnan(float(again.extra["sampler_gap"])) and np.isfinite(float(again.nll))
    assert float(again.extra["kl"]) == float(sums.extra["kl"])


def test_gradient_is_that_of_finite_differences(params):
    batch = make(params, seed=3)
    grads = run(params, batch)[1]
    p = np64(params)
    base = without_lora(np64(params))  # the reference stands still while the model is moved
    rng = np.random.default_rng(0)
    leaves = [p["embedding"]["weight"], p["middle_weight"], p["middle_bias"]]
    leaves += [p["unembedding"]["weight"], p["lora"]["factor"]]
    found = [grads["embedding"]["weight"], grads["middle_weight"], grads["middle_bias"]]
    found += [grads["unembedding"]["weight"], grads["lora"]["factor"]]
    for leaf, grad in zip(leaves, found, strict=True):
        grad = np.asarray(grad)
        picks = rng.choice(leaf.size, min(leaf.size, 12), replace=False)
        picks = [int(np.abs(grad).argmax()), *picks.tolist()]
        for i in picks:
            at = np.unravel_index(i, leaf.shape)
            old, values = leaf[at], []
            for step in (1e-6, -1e-6):
                leaf[at] = old + step
                values.append(reference(p, base, batch, GRPO)[0]["loss"])
            leaf[at] = old
            slope = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose(grad[at], slope, atol=1e-5 * np.abs(grad).max())


def test_accumulation_is_one_big_step(params):
    """Microbatches with uneven counts of tokens add up to the step over all of them."""
    batch = make(params, seed=8)
    batch.weights[0, : T // 2] = 0
    counts = batch.weights.reshape(2, -1).sum(1)
    assert counts[0] != counts[1]
    sums, grads = run(params, batch)
    model, sgd = WithLora(), optax.sgd(1.0)
    step = make_train_step(model, sgd, partial(grpo_loss, grpo=GRPO), accumulate=2)
    state, measured = step(init_state(model, sgd, jax.tree.map(jnp.array, params)), batch)
    want = jax.tree.map(lambda p, g: p - g / sums.weight, params, grads)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(measured.loss, sums.nll / sums.weight, rtol=1e-5, atol=1e-6)
    for name in ("clipped", "kl", "sampler_gap", "sampler_kl"):
        np.testing.assert_allclose(measured.extra[name], sums.extra[name] / sums.weight, rtol=1e-5)
    largest = float(sums.extra["sampler_gap_max"] / sums.weight)
    assert largest / 2 < float(measured.extra["sampler_gap_max"]) <= largest


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_clipping_cuts_only_what_goes_too_far_already(advantage):
    """A ratio beyond the bound that would be pushed back keeps its gradient: it is no dead end."""
    grpo = dataclasses.replace(GRPO, kl=0.0)
    ratios = np.array([[0.5, 0.84, 0.9, 1.0, 1.2, 1.31, 3.0]], np.float32)
    over = np.full_like(ratios, advantage)
    zeros = np.zeros_like(ratios)
    each, slope, extra = token_losses(jnp.log(ratios), zeros, over, reference=None, grpo=grpo)
    cut = ratios > 1.3 if advantage > 0 else ratios < 0.85
    np.testing.assert_allclose(slope, np.where(cut, 0, -ratios * advantage), rtol=1e-6)
    np.testing.assert_array_equal(extra["clipped"], cut)
    bound = 1.3 if advantage > 0 else 0.85
    np.testing.assert_allclose(each, -np.where(cut, bound, ratios) * advantage, rtol=1e-6)


def test_probabilities_far_apart_stay_finite():
    x = jnp.array([[0.0, -200.0]])
    each, slope, _ = token_losses(
        x, x[:, ::-1], jnp.array([[-1.0, 1.0]]), reference=x[:, ::-1], grpo=GRPO
    )
    assert np.isfinite(each).all() and np.isfinite(slope).all()
