"""The rules of choice against numpy, and by how often each token comes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.sampler.rules import Rules, choose, kept

V = 11


def numpy_probs(logits: np.ndarray, rules: Rules) -> np.ndarray:
    """What `choose` should draw from: one row, in float64, token by token in falling order."""
    scaled = logits.astype(np.float64) / rules.temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs)
    if rules.top_k is not None:
        order = order[: rules.top_k]
    keep, mass, total = [], 0.0, probs[order].sum()
    for token in order:
        if keep and mass >= rules.top_p:
            break
        keep.append(token)
        mass += probs[token] / total
    keep = [token for token in keep if probs[token] >= rules.min_p * probs.max()]
    result = np.zeros_like(probs)
    result[keep] = probs[keep]
    return result / result.sum()


RULES = [
    Rules(temperature=1.0),
    Rules(temperature=0.6),
    Rules(temperature=2.5),
    Rules(temperature=1.0, top_k=1),
    Rules(temperature=1.0, top_k=4),
    Rules(temperature=1.0, top_k=400),
    Rules(temperature=1.0, top_p=0.7),
    Rules(temperature=1.7, top_p=0.7),
    Rules(temperature=1.0, top_p=1e-6),
    Rules(temperature=1.0, min_p=0.2),
    Rules(temperature=0.5, min_p=0.2),
    Rules(temperature=1.0, min_p=1.0),
    Rules(temperature=1.3, top_k=6, top_p=0.8, min_p=0.15),
    Rules(temperature=1.3, top_k=3, top_p=0.95),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_kept_tokens_match_numpy(rules: Rules):
    logits = np.random.default_rng(3).normal(size=(20, V)).astype(np.float32) * 2
    scaled = (logits - logits.max(-1, keepdims=True)) / rules.temperature
    keep = kept(scaled, rules.values(V), ordered=rules.mode == "sorted")
    expected = [numpy_probs(row, rules) > 0 for row in logits]
    np.testing.assert_array_equal(np.asarray(keep), np.stack(expected))


@pytest.mark.parametrize("rules", [RULES[0], RULES[2], RULES[4], RULES[7], RULES[12]], ids=str)
def test_frequencies_match_probabilities(rules: Rules):
    draws = 20_000
    logits = np.random.default_rng(5).normal(size=V).astype(np.float32) * 1.5
    keys = jax.random.split(jax.random.key(8), draws)
    rows = jnp.broadcast_to(logits, (draws, V))
    tokens, logprobs = jax.jit(choose, static_argnames="mode")(
        rows, keys, rules.values(V), mode=rules.mode
    )
    probs = numpy_probs(logits, rules)
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert not counts[probs == 0].any()
    expected = draws * probs[probs > 0]
    chi_square = np.sum((counts[probs > 0] - expected) ** 2 / expected)
    # Above 35 in one of 10,000 seeds at 10 degrees of freedom, rarer with fewer.
    assert chi_square < 35.6
    np.testing.assert_allclose(
        logprobs, np.asarray(jax.nn.log_softmax(logits))[np.asarray(tokens)], atol=1e-6
    )


def test_greedy_takes_the_likeliest_and_its_untempered_logprob():
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, -2.0, 4.5]])
    keys = jax.random.split(jax.random.key(0), 2)
    tokens, logprobs = choose(logits, keys, Rules().values(3), mode="greedy")
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(
        logprobs, np.asarray(jax.nn.log_softmax(logits))[[0, 1], [1, 0]], atol=1e-6
    )


@pytest.mark.parametrize("rules", [RULES[1], RULES[2], RULES[12], Rules()], ids=str)
def test_tempered_log_probabilities_are_those_before_anything_is_cut_off(rules: Rules):
    rules = dataclasses.replace(rules, tempered=True)
    logits = np.random.default_rng(6).normal(size=(30, V)).astype(np.float32) * 3
    keys = jax.random.split(jax.random.key(1), 30)
    values = rules.values(V)
    tokens, logprobs = choose(jnp.asarray(logits), keys, values, mode=rules.mode)
    scaled = logits.astype(np.float64) / (rules.temperature or 1.0)
    want = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, want[np.arange(30), tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_very_cold_is_greedy(temperature: float):
    rules = Rules(temperature=temperature)
    logits = np.random.default_rng(1).normal(size=(50, V)).astype(np.float32) * 30
    keys = jax.random.split(jax.random.key(2), 50)
    tokens, logprobs = choose(jnp.asarray(logits), keys, rules.values(V), mode=rules.mode)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    assert np.isfinite(logprobs).all()


def test_top_p_of_one_keeps_the_whole_tail():
    # In float32 the sum over so many equal tokens reaches 1 long before the last of them.
    scaled = jnp.zeros((1, 70_000)).at[0, 0].set(-30.0) - 0.0
    keep = kept(scaled, Rules(temperature=1.0, top_k=70_000).values(70_000))
    assert keep.all()


def test_a_row_depends_on_its_own_key_and_logits():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(6, V)), jnp.float32)
    keys = jax.random.split(jax.random.key(9), 6)
    values = Rules(temperature=1.0, top_p=0.9).values(V)
    together, _ = choose(logits, keys, values, mode="sorted")
    alone = [choose(logits[i : i + 1], keys[i : i + 1], values, mode="sorted")[0] for i in range(6)]
    assert together.tolist() == [int(token[0]) for token in alone]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": -0.01}, "min_p is -0.01"),
        ({"min_p": 1.5}, "min_p is 1.5"),
    ],
)
def test_bad_rules_are_refused_by_name(values: dict, named: str):
    with pytest.raises(UserError, match=named) as refused:
        Rules(**values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rules", "mode"),
    [
        (Rules(top_k=3, top_p=0.5), "greedy"),
        (Rules(temperature=1.0, min_p=0.1), "draw"),
        (Rules(temperature=1.0, top_k=3), "sorted"),
        (Rules(temperature=1.0, top_p=0.5), "sorted"),
    ],
)
def test_rules_sort_only_where_they_must(rules: Rules, mode: str):
    assert rules.mode == mode
