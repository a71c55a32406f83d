"""Chunked cross entropy against all the logits at once: value, per row, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.ops.cross_entropy import cross_entropy
from gptoss_jax.ops.cross_entropy.xla import default_chunk


def inputs(rows: int, vocabulary: int, dim: int, dtype: jnp.dtype = jnp.float32) -> tuple:
    keys = jax.random.split(jax.random.key(3), 4)
    weights = jax.random.uniform(keys[3], (rows,)) * (jnp.arange(rows) % 4 != 1)
    return (
        jax.random.normal(keys[0], (rows, dim)).astype(dtype) * 3,
        jax.random.normal(keys[1], (vocabulary, dim)).astype(dtype),
        jax.random.randint(keys[2], (rows,), 0, vocabulary),
        weights,
    )


def everything(args: tuple, **options) -> tuple:
    def run(hidden, weight, targets, weights):
        loss, nll = cross_entropy(hidden, weight, targets, weights, **options)
        return 0.7 * loss, nll

    fn = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 3), has_aux=True))
    (loss, nll), grads = fn(*args)
    return loss, nll, *grads


@pytest.mark.parametrize(("rows", "chunk"), [(1, None), (37, 8), (64, 16)])
def test_values_and_gradients_equal_the_reference(rows: int, chunk: int | None) -> None:
    args = inputs(rows, 71, 24)
    want = everything(args, implementation="reference")
    got = everything(args, chunk=chunk)
    for name, a, b in zip(("loss", "nll", "hidden", "weight", "weights"), got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        largest = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=0, err_msg=name)


def test_narrow_operands_keep_float32_sums() -> None:
    dtype = jnp.bfloat16
    args = inputs(96, 71, 24, dtype)
    want = everything(args, implementation="reference")
    got = everything(args, chunk=7)
    assert got[2].dtype == got[3].dtype == dtype and got[0].dtype == jnp.float32
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)


def test_a_call_that_is_not_differentiated_gives_the_same_loss() -> None:
    args = inputs(37, 71, 24)
    loss, nll = jax.jit(lambda *a: cross_entropy(*a, chunk=8))(*args)
    want, want_nll = cross_entropy(*args, implementation="reference")
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(nll, want_nll, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets, weights = inputs(9, 71, 24)
    loss, nll, *grads = everything((hidden * 1e4, weight, targets, weights), chunk=4)
    assert all(np.isfinite(a).all() for a in (loss, nll, *grads))


def test_no_gradient_flows_through_nll() -> None:
    args = inputs(9, 71, 24)
    for implementation in ("xla", "reference"):
        grad = jax.grad(
            lambda h, i=implementation: cross_entropy(h, *args[1:], implementation=i)[1].sum()
        )(args[0])
        np.testing.assert_array_equal(grad, 0)


def test_all_the_logits_never_exist() -> None:
    rows, vocabulary, dim, chunk = 4096, 2048, 16, 64
    args = inputs(rows, vocabulary, dim)

    def temporary_bytes(**options) -> int:
        fn = jax.value_and_grad(lambda *a: cross_entropy(*a, **options)[0], argnums=(0, 1))
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows * vocabulary
    assert temporary_bytes(chunk=chunk) < logits / 8
    assert temporary_bytes(implementation="reference") >= logits  # the measure sees them


def test_default_chunks_are_equal_and_bounded() -> None:
    assert default_chunk(1000, 1024) == 1000
    assert default_chunk(10_000, 201_088) == 250
    assert default_chunk(20_000, 1024) == 6667
    assert default_chunk(130, 201_088) == 130


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation='fused'"):
        cross_entropy(*inputs(3, 7, 4), implementation="fused")
