"""Adafactor and Muon on stacks, against numpy on one matrix at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptoss_jax.optimizer.matrix_views import scale_by_adafactor, scale_by_muon_or_adam

# Sides below and above 128, from which on Adafactor keeps a row and a column.
SHAPES = {
    "embedding": {"weight": (140, 129)},
    "final_norm": {"scale": (129,)},
    "layers": {
        "attention": {"q_weight": (2, 16, 9, 133), "o_weight": (2, 130, 3, 50), "sinks": (2, 16)},
        "experts": {
            "gate_up_weight": (2, 3, 2, 128, 131),
            "gate_up_bias": (2, 3, 2, 128),
            "down_weight": (2, 3, 40, 60),
            "down_bias": (2, 3, 131),
        },
        "router": {"weight": (2, 5, 133)},
    },
}
# By path: how many axes stack, and the shape of what is stacked.
ONE = {
    "embedding/weight": (0, (140, 129)),
    "final_norm/scale": (0, (129,)),
    "layers/attention/q_weight": (1, (144, 133)),
    "layers/attention/o_weight": (1, (130, 150)),
    "layers/attention/sinks": (1, (16,)),
    "layers/experts/gate_up_weight": (3, (128, 131)),
    "layers/experts/gate_up_bias": (3, (128,)),
    "layers/experts/down_weight": (2, (40, 60)),
    "layers/experts/down_bias": (2, (131,)),
    "layers/router/weight": (1, (5, 133)),
}
MUON = {p for p in ONE if p.startswith("layers/") and p.endswith(("q_weight", "o_weight"))}
MUON |= {"layers/experts/gate_up_weight", "layers/experts/down_weight"}


def gradients(steps):
    """Gradients whose size differs from one matrix, row and step to the next."""
    rng = np.random.default_rng(0)

    def one(shape):
        return np.float32(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1))))

    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return [jax.tree.map(one, SHAPES, is_leaf=is_shape) for _ in range(steps)]


def flatten(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): np.asarray(x) for path, x in flat}


def each(tree):
    """Return by path the stacked matrices and vectors one by one."""
    return {p: list(x.reshape(-1, *ONE[p][1])) for p, x in flatten(tree).items()}


def run(optimizer, grads):
    state = optimizer.init(jax.tree.map(jnp.zeros_like, grads[0]))
    update = jax.jit(optimizer.update)
    out = []
    for g in grads:
        updates, state = update(g, state, g)
        out.append(updates)
    return out, state


def numpy_adafactor(grads):
    """Algorithms 4 and 5 of arXiv:1804.04235 for one matrix or vector, decay 1 - t**-0.8."""
    shape = grads[0].shape
    factored = len(shape) == 2 and min(shape) >= 128
    row, col, v, out = np.zeros(shape[:1]), np.zeros(shape[-1:]), np.zeros(shape), []
    for t, g in enumerate(np.float64(grads), start=1):
        decay, square = 1 - t**-0.8, g**2 + 1e-30
        if factored:
            row = decay * row + (1 - decay) * square.mean(1)
            col = decay * col + (1 - decay) * square.mean(0)
            v = np.outer(row, col) / row.mean()
        else:
            v = decay * v + (1 - decay) * square
        u = g / np.sqrt(v)
        out.append(u / max(1, np.sqrt(np.mean(u**2))))
    return out


def test_adafactor_is_that_of_each_matrix():
    grads = gradients(4)
    got, state = run(scale_by_adafactor(), grads)
    singles = [each(g) for g in grads]
    for path, (_, shape) in ONE.items():
        for i in range(len(singles[0][path])):
            want = numpy_adafactor([g[path][i] for g in singles])
            for t, updates in enumerate(got):
                one = flatten(updates)[path].reshape(-1, *shape)[i]
                np.testing.assert_allclose(one, want[t], rtol=2e-4, atol=2e-6, err_msg=path)
    sizes = {p: sum(x.size for x in jax.tree.leaves(s)) for p, s in _states(state).items()}
    assert sizes["layers/experts/gate_up_weight"] < 12 * (128 + 131 + 4)
    assert sizes["layers/attention/o_weight"] < 2 * (130 + 150 + 4)
    assert sizes["embedding/weight"] < 140 + 129 + 4
    assert sizes["layers/experts/down_weight"] >= 6 * 40 * 60  # too small to factor


def _states(state):
    is_state = lambda x: isinstance(x, tuple)  # noqa: E731
    flat = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_state)
    return {"/".join(k.key for k in path): x for path, x in flat}


def numpy_muon(grads, beta):
    """Nesterov momentum, then Newton-Schulz with Jordan's coefficients, to an rms near 0.2."""
    mu, out = 0.0, []
    for t, g in enumerate(np.float64(grads), start=1):
        mu = beta * mu + (1 - beta) * g
        x = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        x /= np.linalg.norm(x)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        out.append(0.2 * np.sqrt(max(x.shape)) * x)
    return out


def test_muon_is_that_of_each_matrix_and_adam_the_rest():
    grads = gradients(3)
    muon = scale_by_muon_or_adam(b1=0.8, b2=0.9, eps=1e-8, moment_dtype=jnp.float32)
    got, _ = run(muon, grads)
    adam, _ = run(optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-8), grads)
    got, adam = ([flatten(updates) for updates in x] for x in (got, adam))
    singles = [each(g) for g in grads]
    for path, (_, shape) in ONE.items():
        if path not in MUON:
            for have, want in zip(got, adam, strict=True):
                np.testing.assert_allclose(have[path], want[path], rtol=1e-5, atol=1e-6)
            continue
        for i in range(len(singles[0][path])):
            want = numpy_muon([g[path][i] for g in singles], 0.8)
            for t, updates in enumerate(got):
                one = updates[path].reshape(-1, *shape)[i]
                np.testing.assert_allclose(one, want[t], rtol=1e-3, atol=2e-4, err_msg=path)
                assert 0.1 < np.sqrt(np.mean(one**2)) < 0.25


def test_first_moment_in_bfloat16():
    def optimizer(dtype):
        return scale_by_muon_or_adam(b1=0.8, b2=0.9, eps=1e-8, moment_dtype=dtype)

    grads = [{"layers": {"attention": g["layers"]["attention"]}} for g in gradients(3)]
    full, _ = run(optimizer(jnp.float32), grads)
    half, state = run(optimizer(jnp.bfloat16), grads)
    flat = jax.tree_util.tree_leaves_with_path(state)
    first = [x.dtype for path, x in flat if ".mu" in jax.tree_util.keystr(path)]
    second = [x.dtype for path, x in flat if ".nu" in jax.tree_util.keystr(path)]
    assert first == [jnp.bfloat16] * 3 and second == [jnp.float32]
    for path, want in flatten(full[-1]).items():
        have = flatten(half[-1])[path]
        assert np.abs(have - want).mean() < 0.02 * np.abs(want).mean(), path
        assert not np.array_equal(have, want)
