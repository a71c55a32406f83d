"""Experts over sorted rows against every expert on every row: values and every gradient.

And what an expert of limited capacity drops, against a loop that counts.
"""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import LIMIT, NAMES, D, F, cast, check, everything, inputs, pack

from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.moe import drop_beyond_capacity, experts, xla


@pytest.mark.parametrize(
    ("rows", "num_experts", "active", "routing"),
    [
        (1, 5, 2, "even"),
        (37, 5, 2, "skewed"),
        (300, 5, 3, "single"),
        (300, 32, 4, "even"),
        (129, 32, 4, "skewed"),
    ],
)
def test_values_and_gradients(rows: int, num_experts: int, active: int, routing: str) -> None:
    args = inputs(rows, num_experts, active, routing=routing)
    check(everything(args, {}), everything(args, {}, implementation="reference"))


def test_packed_weights_give_what_they_decode_to() -> None:
    args, packed = pack(inputs(70, 5, 2))
    got = everything(args, packed)
    check(got, everything(args, packed, implementation="reference"))
    dense = {k: jax.jit(mxfp4.decode)(w) for k, w in packed.items()}
    check(got, everything(args, dense))


def forward(args: tuple, packed: dict, mask=None, **options) -> jax.Array:
    x, ids, shares, weights = args
    run = jax.jit(lambda x: experts(x, ids, shares, **weights, **packed, limit=LIMIT, **options))
    return (
        run(x)
        if mask is None
        else jax.jit(
            lambda x, mask: experts(x, ids, shares, **weights, **packed, limit=LIMIT, mask=mask)
        )(x, mask)
    )


@pytest.mark.parametrize("rows", [1, 7, 16, 17])  # 16 * 2 pairs is the last that go one by one
def test_few_rows_without_gradients(rows: int) -> None:
    args = inputs(rows, 5, 2)
    want = forward(args, {}, implementation="reference")
    np.testing.assert_allclose(forward(args, {}), want, atol=1e-5 * np.abs(want).max(), rtol=0)
    args, packed = pack(args)
    want = forward(args, packed, implementation="reference")
    np.testing.assert_allclose(forward(args, packed), want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_tiles_that_do_not_divide_the_rows_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_jax.ops.moe.xla.TILE", 40)
    args, packed = pack(inputs(3, 5, 2))
    want = forward(args, packed, implementation="reference")
    np.testing.assert_allclose(forward(args, packed), want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_masked_rows_may_hold_anything() -> None:
    rows = 75
    args = inputs(rows, 5, 2)
    x, ids, shares, weights = args
    mask = jnp.arange(rows) % 3 != 1
    poisoned = (
        jnp.where(mask[:, None], x, jnp.nan),
        jnp.where(mask[:, None], ids, 4),
        jnp.where(mask[:, None], shares, jnp.nan),
        weights,
    )
    got = everything(poisoned, {}, mask)
    check(got, everything(args, {}, mask, implementation="reference"))
    for name in ("out", "x", "shares"):
        np.testing.assert_array_equal(got[name][~mask], 0, err_msg=name)
    kept = tuple(a[mask] for a in args[:3])
    alone = everything((*kept, weights), {}, implementation="reference")
    np.testing.assert_allclose(got["out"][mask], alone["out"], atol=1e-5 * np.abs(x).max())
    few = forward((*(a[:6] for a in poisoned[:3]), weights), {}, mask[:6])
    np.testing.assert_allclose(few, got["out"][:6], atol=1e-5 * np.abs(few).max())


def test_all_rows_masked_give_zeros_everywhere() -> None:
    args = inputs(20, 5, 2)
    got = everything((args[0] * jnp.nan, *args[1:]), {}, jnp.zeros(20, bool))
    for name, a in got.items():
        np.testing.assert_array_equal(a, 0, err_msg=name)


@pytest.mark.parametrize(("rows", "masked"), [(75, False), (300, True)])
def test_dropped_pairs_add_nothing(rows: int, masked: bool) -> None:
    num_experts, active = 5, 3
    args = inputs(rows, num_experts, active)
    x, ids, shares, weights = args
    dropped = np.random.default_rng(rows).random((rows, active)) < 0.4
    dropped[7] = True  # a row of which nothing is left
    dropped |= np.asarray(ids) == 2  # and an expert
    mask = jnp.arange(rows) % 4 != 1 if masked else None
    less = x, jnp.where(dropped, num_experts, ids), shares, weights
    got = everything(less, {}, mask)
    check(got, everything(less, {}, mask, implementation="reference"))
    # The same with the weights of those pairs at zero, which is where their own gradient differs.
    zero = everything((x, ids, jnp.where(dropped, 0, shares), weights), {}, mask)
    others = [name for name in got if name != "shares"]
    check({name: got[name] for name in others}, {name: zero[name] for name in others})
    kept = ~dropped if mask is None else ~dropped & np.asarray(mask)[:, None]
    np.testing.assert_allclose(
        got["shares"], jnp.where(kept, zero["shares"], 0), atol=1e-5 * np.abs(zero["shares"]).max()
    )
    for name in ("out", "x"):
        np.testing.assert_array_equal(got[name][7], 0, err_msg=name)
    for name in NAMES:
        np.testing.assert_array_equal(got[name][2], 0, err_msg=name)


@pytest.mark.parametrize("rows", [7, 75])  # 7 * 2 pairs go one by one
def test_an_expert_that_lost_all_its_pairs_may_hold_anything(rows: int) -> None:
    x, ids, shares, weights = inputs(rows, 5, 2)
    less = jnp.where(ids == 3, 5, ids)
    want = forward((x, less, shares, weights), {}, implementation="reference")
    poisoned = {name: w.at[3].set(jnp.nan) for name, w in weights.items()}
    got = forward((x, less, shares, poisoned), {})
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    if rows > 16:
        grads = everything((x, less, shares, poisoned), {})
        check(grads, everything((x, less, shares, weights), {}, implementation="reference"))


def test_the_loops_go_over_what_is_not_dropped() -> None:
    """Their trip counts are read off the routes: pairs of an expert, and experts with pairs."""
    _, ids, shares, _ = inputs(75, 5, 2)
    less = jnp.where((ids == 3) | (jnp.arange(75)[:, None] % 2 == 0), 5, ids)
    routes = xla._route(less, shares, num_experts=5, block=16)
    counts = np.bincount(np.asarray(less).ravel(), minlength=6)[:5]
    np.testing.assert_array_equal(np.diff(routes.bounds), counts)
    assert int(routes.num_used) == np.count_nonzero(counts) == 4


def drop_one_by_one(ids: np.ndarray, mask: np.ndarray, num_experts: int, factor: float):
    """Let the experts take pairs in GShard's order until they are full; what is left out gets E."""
    room = [math.ceil(factor * mask.sum() * ids.shape[1] / num_experts)] * num_experts
    taken = np.full_like(ids, num_experts)
    for a in range(ids.shape[1]):
        for m in range(ids.shape[0]):
            if mask[m] and room[ids[m, a]]:
                room[ids[m, a]] -= 1
                taken[m, a] = ids[m, a]
    return taken


@pytest.mark.parametrize(
    ("routing", "factor"),
    [("even", 1e-6), ("skewed", 0.5), ("even", 1.0), ("skewed", 1.25), ("skewed", 100.0)],
)
def test_experts_take_first_choices_first_up_to_their_capacity(routing: str, factor: float) -> None:
    rows, num_experts = 83, 6
    ids = np.asarray(inputs(rows, num_experts, 3, routing=routing)[1])
    mask = np.arange(rows) % 5 != 2
    drop = jax.jit(drop_beyond_capacity, static_argnames=("num_experts", "factor"))
    taken, dropped = drop(ids, mask, num_experts=num_experts, factor=factor)
    want = drop_one_by_one(ids, mask, num_experts, factor)
    np.testing.assert_array_equal(taken, want)
    assert dropped.dtype == jnp.float32
    np.testing.assert_allclose(dropped, (want == num_experts)[mask].mean(), rtol=1e-6)
    assert (dropped > 0) == (factor < 2)  # no expert can have more than twice the mean
    counts = np.bincount(np.asarray(taken)[mask].ravel(), minlength=num_experts + 1)[:-1]
    assert counts.max() == min(
        math.ceil(factor * mask.sum() * 3 / num_experts), np.bincount(ids[mask].ravel()).max()
    )


def test_capacity_without_a_row() -> None:
    taken, dropped = drop_beyond_capacity(
        jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, bool), num_experts=3, factor=1.0
    )
    assert np.all(taken == 3) and dropped == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype: jnp.dtype) -> None:
    args = cast(inputs(70, 5, 2), dtype)
    got = everything(args, {})
    want = everything(args, {}, implementation="reference")
    for name, a in got.items():
        assert a.dtype == want[name].dtype, name
        a, b = np.asarray(a, np.float64), np.asarray(want[name], np.float64)
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b), name


def test_inside_scan_and_checkpoint() -> None:
    x, ids, shares, weights = inputs(40, 5, 2)
    stack = jax.tree.map(lambda w: jnp.stack([w, w * 0.5, -w]), weights)

    def loss(stack, x, implementation):
        @jax.checkpoint
        def layer(x, weights):
            y = experts(x, ids, shares, **weights, limit=LIMIT, implementation=implementation)
            return x + y, None

        return jnp.sum(jax.lax.scan(layer, x, stack)[0] ** 2)

    grads = [jax.jit(jax.grad(loss), static_argnums=2)(stack, x, i) for i in ("xla", "reference")]
    check(*grads)


def test_the_loops_copy_no_stack() -> None:
    args = inputs(300, 32, 4)
    text = everything.lower(args, {}).compile().as_text()
    assert f"f32[32,{2 * F},{D}]" in text  # how the stacks appear, so that the next line can fail
    for stack in (f"f32[32,{2 * F},{D}]", f"f32[32,2,{F},{D}]", f"f32[32,{D},{F}]"):
        copies = [line for line in text.splitlines() if f"= {stack}" in line and " copy(" in line]
        assert not copies, copies


def test_memory_does_not_follow_the_experts() -> None:
    def temporary_bytes(num_experts: int, implementation: str) -> int:
        args = jax.eval_shape(lambda: inputs(256, num_experts, 2))

        def run(x, ids, shares, weights):
            options = {"limit": LIMIT, "implementation": implementation}
            return experts(x, ids, shares, **weights, **options)

        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64, "xla") < 1.5 * temporary_bytes(8, "xla")
    assert temporary_bytes(64, "reference") > 4 * temporary_bytes(8, "reference")


@pytest.mark.slow
def test_time_does_not_follow_the_experts() -> None:
    """The same rows for the same eight of 8 or of 64 experts, at a size that takes time."""
    rows, width, hidden = 2048, 256, 512
    run = jax.jit(lambda x, ids, shares, weights: experts(x, ids, shares, **weights, limit=LIMIT))

    def case(num_experts: int) -> tuple:
        keys = jax.random.split(jax.random.key(7), 6)
        shapes = ((2, hidden, width), (2, hidden), (width, hidden), (width,))
        weights = {
            name: jax.random.normal(key, (num_experts, *shape)) * 0.05
            for name, key, shape in zip(NAMES, keys, shapes, strict=False)
        }
        ids = jax.random.randint(keys[4], (rows, 2), 0, 8)
        return jax.random.normal(keys[5], (rows, width)), ids, jnp.full((rows, 2), 0.5), weights

    cases = {num_experts: case(num_experts) for num_experts in (8, 64)}
    times: dict[int, list[float]] = {8: [], 64: []}
    for turn in range(8):
        for num_experts, args in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if turn > 1:
                times[num_experts].append(time.perf_counter() - start)
    few, many = min(times[8]), min(times[64])
    assert many < 4 * few, (few, many)  # to go through all 64 would be 8


def test_an_unknown_implementation_is_refused() -> None:
    x, ids, shares, weights = inputs(2, 5, 2)
    with pytest.raises(ValueError, match="implementation='pallas'"):
        experts(x, ids, shares, **weights, limit=LIMIT, implementation="pallas")
