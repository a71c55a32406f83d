"""The experts as grouped matmuls, in chunks, and as layers of stacks, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import LIMIT, NAMES, cast, check, everything, inputs, pack

from gptoss_jax import chips
from gptoss_jax.ops.moe import experts
from gptoss_jax.types import LayerOf


@pytest.mark.parametrize(
    ("rows", "num_experts", "active", "routing"),
    [(1, 5, 2, "even"), (37, 5, 2, "skewed"), (130, 5, 3, "single"), (75, 32, 4, "skewed")],
)
def test_values_and_gradients(rows, num_experts, active, routing):
    args = inputs(rows, num_experts, active, routing=routing)
    want = everything(args, {}, implementation="reference")
    check(everything(args, {}, implementation="grouped"), want)


def test_packed_weights_give_what_they_decode_to():
    args, packed = pack(inputs(70, 5, 2))
    want = everything(args, packed, implementation="reference")
    check(everything(args, packed, implementation="grouped"), want)


@pytest.mark.parametrize("implementation", ["xla", "grouped"])
@pytest.mark.parametrize("masked", [False, True])
def test_dropped_and_masked_rows(implementation, masked):
    rows, num_experts, active = 75, 5, 3
    x, ids, shares, weights = inputs(rows, num_experts, active)
    dropped = np.random.default_rng(1).random((rows, active)) < 0.4
    dropped[7] = True
    dropped |= np.asarray(ids) == 2
    mask = jnp.arange(rows) % 4 != 1 if masked else jnp.ones(rows, bool)
    args = jnp.where(mask[:, None], x, jnp.nan), jnp.where(dropped, 5, ids), shares, weights
    clean = x, jnp.where(dropped, 5, ids), shares, weights
    want = everything(clean, {}, mask, implementation="reference")
    check(everything(args, {}, mask, implementation=implementation), want)
    check(everything(args, {}, mask, implementation=implementation, chunk=16), want)


@pytest.mark.parametrize("chunk", [1, 16, 37, 100])
def test_chunks_change_nothing(chunk):
    args, packed = pack(inputs(37, 5, 2, routing="skewed"))
    want = everything(args, packed, implementation="reference")
    check(everything(args, packed, chunk=chunk), want)


def test_chunks_bound_the_memory():
    def temporary_bytes(rows, chunk):
        args = jax.eval_shape(lambda: inputs(rows, 5, 2))

        def loss(x, ids, shares, weights):
            return experts(x, ids, shares, **weights, limit=LIMIT, chunk=chunk).sum()

        compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096, 256) < 0.5 * temporary_bytes(4096, None)


@pytest.mark.parametrize("implementation", ["xla", "grouped", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_of_a_stack_is_that_layer(implementation, packed):
    """With a traced index, and a gradient for what is no layer of a stack."""
    (x, ids, shares, weights), fixed = pack(inputs(40, 5, 2))
    if not packed:
        fixed = {}
        x, ids, shares, weights = inputs(40, 5, 2)
    fixed = fixed or {name: weights.pop(name) for name in ("gate_up_weight", "down_weight")}
    stacks = jax.tree.map(lambda w: jnp.stack([w[::-1], w, w[::-1]]), fixed)

    def loss(x, weights, layer):
        layers = {
            name: LayerOf(stack, layer) if layer is not None else fixed[name]
            for name, stack in stacks.items()
        }
        out = experts(
            x, ids, shares, **weights, **layers, limit=LIMIT, implementation=implementation
        )
        return jnp.sum(out**2)

    got = jax.jit(jax.grad(loss, (0, 1)))(x, weights, jnp.int32(1))
    want = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, weights, None)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5 * np.abs(want[0]).max())
    check(got[1], want[1])


@pytest.mark.parametrize("implementation", ["grouped"])
def test_narrow_dtypes(implementation):
    """At a limit that few activations meet: rounding moves some across it, and their gradient."""
    args = cast(inputs(70, 5, 2), jnp.bfloat16)
    got = everything(args, {}, implementation=implementation, limit=7.0)
    want = everything(args, {}, implementation="reference", limit=7.0)
    for name, a in got.items():
        a, b = np.asarray(a, np.float64), np.asarray(want[name], np.float64)
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b), name


def test_without_a_kernel_the_loops_are_taken():
    """A product over all experts costs more than a loop over the rows, whatever the chip."""
    x, ids, shares, weights = inputs(300, 5, 2)
    with chips.assume("t4"):
        run = jax.jit(lambda *a: experts(*a, **weights, limit=LIMIT))
        assert "ragged_dot" not in str(jax.make_jaxpr(run)(x, ids, shares))
        assert set(NAMES) == set(weights)
