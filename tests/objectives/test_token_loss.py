"""The loss against its definition written out in full."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import D, Toy, V, toy_batch

from gptoss_jax import chips
from gptoss_jax.objectives import token_loss
from gptoss_jax.objectives.token_loss import _permute, loss_fn


@pytest.fixture(scope="module")
def params():
    return jax.jit(Toy().init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@jax.jit
def plain(params, batch):
    """Sum of weight * nll by all logits at once."""
    hidden = Toy().forward(params, batch.tokens, segment_ids=batch.segment_ids).hidden
    logits = jnp.einsum("BTD,VD->BTV", hidden, params["unembedding"]["weight"], precision="highest")
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    return jnp.sum(nll * batch.weights)


def test_value_and_gradients_are_those_of_the_definition(params):
    batch = toy_batch(3, 11)
    sums = jax.jit(lambda p: loss_fn(Toy(), p, batch))(params)
    np.testing.assert_allclose(sums.nll, plain(params, batch), rtol=1e-6)
    np.testing.assert_allclose(sums.weight, batch.weights.sum(), rtol=1e-6)
    assert sums.tokens == 3 * 11 - 3
    assert sums.penalty == 0
    grads = jax.jit(jax.grad(lambda p: loss_fn(Toy(), p, batch).nll))(params)
    chex.assert_trees_all_close(grads, jax.grad(plain)(params, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chip", ["v5e", "t4"])
def test_accelerators_give_the_same_sums_and_gradients(params, chip):
    """By cross entropy over all rows at once; what has no weight has no say there either."""
    batch = toy_batch(3, 11)
    batch = batch.replace(sources=jnp.array([0, 1, 0]))

    def run():
        def total(p):
            sums = loss_fn(Toy(), p, batch, num_sources=2)
            return sums.nll, sums

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    want = run()
    with chips.assume(chip):
        got = run()
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def test_sums_by_source_are_those_of_its_rows_alone(params):
    batch = toy_batch(5, 11).replace(sources=np.array([2, 0, 2, 3, 0], np.int32))
    run = jax.jit(lambda b, n: loss_fn(Toy(), params, b, num_sources=n), static_argnums=1)
    by_source = run(batch, 4).by_source
    for source in range(4):
        rows = np.flatnonzero(batch.sources == source)
        alone = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        np.testing.assert_allclose(by_source.weight[source], alone.weights.sum(), rtol=1e-6)
        assert by_source.tokens[source] == (alone.segment_ids != 0).sum()
        want = plain(params, alone) if len(rows) else 0.0
        np.testing.assert_allclose(by_source.nll[source], want, rtol=1e-5)
    assert run(batch, 0).by_source is None
    with pytest.raises(ValueError, match="the batch has no sources"):
        run(batch.replace(sources=None), 4)


def test_what_has_no_weight_has_no_say(params):
    batch = toy_batch(2, 9)
    other = batch.replace(targets=np.where(batch.weights > 0, batch.targets, 1))
    nll = jax.jit(lambda b: loss_fn(Toy(), params, b).nll)
    assert nll(batch) == nll(other)
    none = batch.replace(weights=np.zeros_like(batch.weights))
    assert nll(none) == 0


def test_only_trained_rows_are_unembedded(monkeypatch, params):
    monkeypatch.setattr(token_loss, "_MIN_ROWS", 2)  # so that 33 rows are chunks of 5
    batch = toy_batch(3, 11)
    count = int((batch.weights > 0).sum())
    seen = []
    real = token_loss.cross_entropy

    def spy(hidden, weight, targets, weights):
        jax.debug.callback(lambda t, w: seen.append((t, w)), targets, weights)
        return real(hidden, weight, targets, weights)

    monkeypatch.setattr(token_loss, "cross_entropy", spy)
    got = loss_fn(Toy(), params, batch).nll
    jax.effects_barrier()
    assert 5 < count < 25 and len(seen) == -(-count // 5)
    targets, weights = (np.concatenate(x) for x in zip(*seen, strict=True))
    order = np.argsort(-weights, kind="stable")[:count]
    trained = batch.weights > 0
    assert not np.delete(weights, order).any()
    assert sorted(zip(targets[order], weights[order], strict=True)) == sorted(
        zip(batch.targets[trained], batch.weights[trained], strict=True)
    )
    np.testing.assert_allclose(got, plain(params, batch), rtol=1e-6)


@pytest.mark.parametrize("min_rows", [3, 8, 128])
def test_chunks_make_no_difference_to_gradients(monkeypatch, params, min_rows):
    monkeypatch.setattr(token_loss, "_MIN_ROWS", min_rows)
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(19, D)), jnp.float32)
    weights = jnp.asarray(np.where(np.arange(19) < 7, 0.5 + np.arange(19), 0), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, 19))
    weight = params["unembedding"]["weight"]

    def want(h, w):
        logp = jax.nn.log_softmax(jnp.einsum("MD,VD->MV", h, w, precision="highest"))
        return -3 * jnp.sum(weights * logp[jnp.arange(19), targets])

    def got(h, w):
        return 3 * token_loss._nll_sum(h, w, targets, weights)[0]

    gradients = (jax.jit(jax.grad(f, (0, 1)))(hidden, weight) for f in (got, want))
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_router_losses_enter_by_their_coefficients(params):
    batch = toy_batch(2, 9)

    @functools.partial(jax.jit, static_argnames=("balance_loss", "z_loss"))
    def penalty(p, **coefficients):
        return loss_fn(Toy(), p, batch, **coefficients).penalty

    forward = jax.jit(lambda p: Toy().forward(p, batch.tokens, segment_ids=batch.segment_ids))
    router = forward(params).router
    tokens = (batch.segment_ids != 0).sum()
    got = penalty(params, balance_loss=0.25, z_loss=0.5)
    want = tokens * (0.25 * router.balance_loss.mean() + 0.5 * router.z_loss.mean())
    np.testing.assert_allclose(got, want, rtol=1e-6)
    off = jax.grad(penalty)(params)
    assert not np.any(off["router_weight"])
    on = jax.grad(lambda p: penalty(p, z_loss=0.5))(params)
    assert np.any(on["router_weight"])


def test_gradient_of_the_permutation():
    x = jax.random.normal(jax.random.key(1), (7, 3))
    order = jax.random.permutation(jax.random.key(2), 7)
    scale = jnp.arange(21.0).reshape(7, 3)
    got = jax.grad(lambda x: jnp.sum(_permute(x, order, jnp.argsort(order)) * scale))(x)
    want = jax.grad(lambda x: jnp.sum(x[order] * scale))(x)
    np.testing.assert_array_equal(got, want)
