"""Chunked cross entropy against all the logits at once: value, per row, and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax import chips
from gptoss_jax.ops.cross_entropy import cross_entropy, sharded, vocabulary
from gptoss_jax.ops.cross_entropy.xla import default_chunk

FORMS = ("xla", "vocabulary")


def inputs(rows: int, vocabulary: int, dim: int, dtype: jnp.dtype = jnp.float32) -> tuple:
    rng = np.random.default_rng(3)
    weights = rng.random(rows) * (np.arange(rows) % 4 != 1)
    return (
        jnp.asarray(3 * rng.normal(size=(rows, dim)), dtype),
        jnp.asarray(rng.normal(size=(vocabulary, dim)), dtype),
        jnp.asarray(rng.integers(0, vocabulary, rows), jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


def everything(args: tuple, **options) -> tuple:
    def run(hidden, weight, targets, weights):
        loss, nll = cross_entropy(hidden, weight, targets, weights, **options)
        return 0.7 * loss, nll

    fn = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 3), has_aux=True))
    (loss, nll), grads = fn(*args)
    return loss, nll, *grads


def assert_equal(got: tuple, want: tuple) -> None:
    for name, a, b in zip(("loss", "nll", "hidden", "weight", "weights"), got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        largest = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=0, err_msg=name)


# Of rows or of 71 entries: one chunk, more than there is, some that leave a rest, some that do not.
@pytest.mark.parametrize(
    ("rows", "chunk"), [(1, None), (1, 5), (37, 8), (37, 71), (64, 16), (64, 1000), (5, 1)]
)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_equal_the_reference(form: str, rows: int, chunk: int | None) -> None:
    args = inputs(rows, 71, 24)
    want = everything(args, implementation="reference")
    assert_equal(everything(args, chunk=chunk, implementation=form), want)


def assert_near(got: tuple, want: tuple, tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_operands_keep_float32_sums(form: str) -> None:
    dtype = jnp.bfloat16
    args = inputs(96, 71, 24, dtype)
    want = everything(args, implementation="reference")
    got = everything(args, chunk=7, implementation=form)
    assert got[2].dtype == got[3].dtype == dtype and got[0].dtype == jnp.float32
    assert_near(got, want, 5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_narrow_products_stay_near_the_reference(monkeypatch, form: str) -> None:
    # What an accelerator multiplies: probabilities and their gradients rounded to bfloat16.
    monkeypatch.setattr(
        f"gptoss_jax.ops.cross_entropy.{form}._compute_dtype", lambda dtype: jnp.dtype(dtype)
    )
    args = inputs(96, 71, 24, jnp.bfloat16)
    want = everything(args, implementation="reference")
    assert_near(everything(args, chunk=7, implementation=form), want, 2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_is_not_differentiated_gives_the_same_loss(form: str) -> None:
    args = inputs(37, 71, 24)
    loss, nll = jax.jit(lambda *a: cross_entropy(*a, chunk=8, implementation=form))(*args)
    want, want_nll = jax.jit(lambda *a: cross_entropy(*a, implementation="reference"))(*args)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(nll, want_nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("argnum", [0, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_one_gradient_alone_equals_the_reference(form: str, argnum: int) -> None:
    args = inputs(37, 71, 24)

    def grad(**options):
        return jax.jit(jax.grad(lambda *a: cross_entropy(*a, **options)[0], argnum))(*args)

    got, want = grad(chunk=16, implementation=form), grad(implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_rows_that_are_nearly_certain_keep_the_precision_of_their_gradient(monkeypatch) -> None:
    # softmax - one_hot is 1e-3 here; a bfloat16 probability alone would be off by 4e-3.
    monkeypatch.setattr(vocabulary, "_compute_dtype", lambda dtype: jnp.dtype(dtype))
    hidden, weight, targets, weights = inputs(48, 71, 24, jnp.bfloat16)
    hidden = weight[targets] * 0.7
    for argnums in (0, (0, 1)):

        def grad(h, w, argnums=argnums, **options):
            def loss(h, w):
                return cross_entropy(h, w, targets, weights, **options)[0]

            return jax.tree.leaves(jax.jit(jax.grad(loss, argnums))(h, w))

        got = grad(hidden, weight, chunk=16, implementation="vocabulary")
        wide = (hidden.astype(jnp.float32), weight.astype(jnp.float32))
        assert_near(got, grad(*wide, implementation="reference"), 2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_large_logits_do_not_overflow(form: str) -> None:
    hidden, weight, targets, weights = inputs(9, 71, 24)
    args = (hidden * 1e4, weight, targets, weights)
    loss, nll, *grads = everything(args, chunk=4, implementation=form)
    assert all(np.isfinite(a).all() for a in (loss, nll, *grads))


def test_no_gradient_flows_through_nll() -> None:
    args = inputs(9, 71, 24)
    for implementation in (*FORMS, "reference"):
        grad = jax.grad(
            lambda h, i=implementation: cross_entropy(h, *args[1:], implementation=i)[1].sum()
        )(args[0])
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("form", FORMS)
def test_all_the_logits_never_exist(form: str) -> None:
    rows, vocabulary, dim, chunk = 4096, 2048, 16, 64
    args = inputs(rows, vocabulary, dim)

    def temporary_bytes(**options) -> int:
        fn = jax.value_and_grad(lambda *a: cross_entropy(*a, **options)[0], argnums=(0, 1))
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * rows * vocabulary
    assert temporary_bytes(chunk=chunk, implementation=form) < logits / 8
    assert temporary_bytes(implementation="reference") >= logits  # the measure sees them


@pytest.mark.parametrize(("argnums", "products"), [((), 1), ((0,), 2), ((1,), 3), ((0, 1), 4)])
def test_what_needs_no_gradient_costs_none(argnums: tuple, products: int) -> None:
    rows, V, dim = 64, 512, 512
    args = inputs(rows, V, dim)

    def compiled(argnums):
        def loss(*a):
            return cross_entropy(*a, chunk=V // 4, implementation="vocabulary")

        fn = jax.value_and_grad(loss, argnums, has_aux=True) if argnums else loss
        return jax.jit(fn).lower(*args).compile()

    def flops(c):
        return c.cost_analysis()["flops"]

    one = compiled(argnums)
    assert flops(one) / flops(compiled(())) == pytest.approx(products, rel=0.04)
    extra = one.memory_analysis().temp_size_in_bytes
    assert (extra < 4 * V * dim) or 1 in argnums  # no copy of the weight, no gradient of it


def test_default_chunks_are_equal_and_bounded() -> None:
    assert default_chunk(1000, 1024) == 1000
    assert default_chunk(10_000, 201_088) == 250
    assert default_chunk(20_000, 1024) == 6667
    assert default_chunk(130, 201_088) == 130
    assert vocabulary.default_chunk(8192, 201_088) == 8064
    assert vocabulary.default_chunk(1 << 20, 201_088) == 2048
    assert vocabulary.default_chunk(1, 201_088) == 15_488 < vocabulary.MOST
    assert vocabulary.default_chunk(0, 71) == 128  # cut to V where it is used


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """Beside the weight itself, which is no temporary; the frozen one has no gradient."""
    rows, dim = 24, 16

    def temporaries(size: int) -> int:
        def loss(*a):
            return cross_entropy(*a, implementation="vocabulary")

        args = inputs(rows, 7, dim)
        args = args[0], jax.ShapeDtypeStruct((size, dim), jnp.float32), *args[2:]
        fn = jax.value_and_grad(loss, has_aux=True)
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporaries(n * vocabulary.MOST) for n in (2, 9))
    assert 4 * rows * vocabulary.MOST < large  # the logits of a chunk
    assert large <= small + 4096


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation='fused'"):
        cross_entropy(*inputs(3, 7, 4), implementation="fused")


@pytest.mark.parametrize(("chip", "temporary"), [("cpu", False), ("v6e", True), ("h200", True)])
def test_accelerators_take_chunks_of_the_vocabulary(monkeypatch, chip: str, temporary: bool):
    seen = []
    monkeypatch.setattr(
        vocabulary, "cross_entropy", lambda *a, **_: seen.append(1) or (a[3].sum(), a[3])
    )
    with chips.assume(chip):
        cross_entropy(*inputs(3, 7, 4))
    assert bool(seen) == temporary


# --- spread over devices


def spread(args: tuple, shape: tuple[int, int], *, check: bool, inside: bool, chunk: int | None):
    """Return loss, nll and all gradients with rows over "data" and the vocabulary over "model"."""
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, matrix = P("data"), P("model")
    specs = (rows, matrix, rows, rows)

    def local(hidden, weight, targets, weights):
        loss, nll = sharded(hidden, weight, targets, weights, axis="model", chunk=chunk)
        return jax.lax.psum(0.7 * loss, "data"), nll

    def over_devices(function, out_specs):
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check
        )

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1, 3), has_aux=True)
    if inside:
        fn = over_devices(grad(local), ((P(), rows), (rows, matrix, rows)))
    else:
        fn = grad(over_devices(local, (P(), rows)))
    compiled = jax.jit(fn).lower(*args).compile()
    (loss, nll), grads = compiled(*args)
    return (loss, nll, *grads), compiled.as_text()


@pytest.mark.parametrize(
    ("shape", "chunk", "check", "inside"),
    [
        ((1, 8), None, True, False),
        ((1, 8), 4, True, True),
        ((2, 4), 5, True, True),
        ((2, 4), None, False, False),
        ((8, 1), 16, True, False),
    ],
)
def test_a_spread_vocabulary_gives_the_same(
    shape: tuple[int, int], chunk: int | None, check: bool, inside: bool
) -> None:
    args = inputs(48, 72, 24)
    got, text = spread(args, shape, check=check, inside=inside, chunk=chunk)
    assert_equal(got, everything(args, implementation="reference"))
    assert "all-gather" not in text and "all-to-all" not in text
    if shape[1] > 1:
        # [48 / data, 24] is summed once: d hidden. All else along the vocabulary is a number a row.
        large = [line for line in text.splitlines() if " all-reduce" in line and ",24]" in line]
        hidden = [line for line in large if f"f32[{48 // shape[0]},24]" in line]
        assert len(hidden) == 1, large
        # and d weight over "data"
        assert all(f"f32[{72 // shape[1]},24]" in line for line in set(large) - set(hidden))


def test_a_spread_vocabulary_in_bfloat16() -> None:
    args = inputs(48, 72, 24, jnp.bfloat16)
    got, _ = spread(args, (2, 4), check=True, inside=False, chunk=5)
    assert got[2].dtype == got[3].dtype == jnp.bfloat16
    assert_near(got, everything(args, implementation="reference"), 2e-2)
