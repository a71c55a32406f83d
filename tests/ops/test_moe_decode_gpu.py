"""The Hopper kernel for a decode batch's experts, interpreted on a CPU."""

from __future__ import annotations

import covering
import decode_expert_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import chips
from gptoss_jax.ops.mxfp4 import layouts
from gptoss_jax.types import LayerOf

interpreted = pytest.mark.skipif(
    jax.__version_info__ < chips.MOSAIC_GPU, reason="Mosaic GPU kernels need jax 0.11.2"
)

# The interpreter takes about a second for every three tiles of 64 rows and 2880 columns: of the two
# widest cases one expert's are run.
WIDE = [
    {"M": 1, "E": 5, "A": 1, "size": (2880, 64), "routing": "even", "layers": 2},
    {"M": 3, "E": 5, "A": 1, "size": (96, 2880), "routing": "single", "layers": 0},
]


def relaid(weight, row_axes):
    """Return the weight in the kernel's layout, a layer of a stack as one."""
    if isinstance(weight, LayerOf):
        return LayerOf(relaid(weight.stack, row_axes), weight.layer)
    return covering.on_host(layouts.relayout, weight, "hopper", row_axes=row_axes)


def arrange(arguments):
    """Split the arguments of `experts` into rows and weights, these in the kernel's layout."""
    arguments = dict(arguments)
    rows = [arguments.pop(name) for name in ("x", "expert_ids", "expert_weights")]
    arguments["gate_up_weight"] = relaid(arguments["gate_up_weight"], 2)
    arguments["down_weight"] = relaid(arguments["down_weight"], 1)
    return rows, arguments


def run(arguments):
    from gptoss_jax.ops.moe import pallas_gpu_decode

    rows, rest = arrange(arguments)
    limit = rest.pop("limit")
    with chips.assume("h200", interpret=True):
        return jax.jit(lambda a, b: pallas_gpu_decode.experts(*a, **b, limit=limit))(rows, rest)


@interpreted
@pytest.mark.parametrize(
    "case", covering.part_slow(cases.COVERING[: -len(cases.WIDE)] + WIDE, every=3)
)
def test_is_the_reference(case):
    arguments = cases.inputs(case, jnp.bfloat16)
    cases.assert_close(run(arguments), cases.expected(arguments))


def narrow(arguments):
    """Return the arguments with x in bfloat16, which holds its powers of two."""
    return {**arguments, "x": arguments["x"].astype(jnp.bfloat16)}


@interpreted
def test_every_code_of_down_under_every_scale_is_exact():
    for arguments, want in cases.every_code_down():
        got = run(narrow(arguments))
        np.testing.assert_array_equal(got, jnp.asarray(want, jnp.bfloat16))


@interpreted
def test_every_code_of_gate_and_up_under_every_scale_is_exact():
    """What swiglu gives is looked at as float32: a row's values are too far apart for fp16."""
    from gptoss_jax.ops.moe import pallas_gpu_decode as kernel

    def hidden(x, ids, weight, bias):
        groups = kernel._group(ids, num_experts=len(bias), size=kernel.MANY.rows)
        act = kernel._hidden(
            x, groups, weight, bias, limit=float("inf"), shift=None, blocks=kernel.MANY
        )
        return act[groups.group[:, 0], groups.slot[:, 0]]

    for arguments, want in cases.every_code_gate_up():
        (x, ids, _), weights = arrange(narrow(arguments))
        with chips.assume("h200", interpret=True):
            got = jax.jit(hidden)(x, ids, weights["gate_up_weight"], weights["gate_up_bias"])
        np.testing.assert_array_equal(got, want)


@interpreted
def test_large_and_small_rows_keep_their_precision():
    case = {"M": 3, "E": 5, "A": 2, "size": (96, 160), "routing": "even", "layers": 0}
    arguments = cases.inputs(case, jnp.bfloat16)
    # swiglu is linear where both halves are small, so that small rows show nothing but up's bias.
    arguments["gate_up_bias"] = arguments["gate_up_bias"].at[:, 0].set(1.0)
    arguments["down_bias"] = jnp.zeros_like(arguments["down_bias"])
    for power in (-110, 100):
        scaled = {**arguments, "x": arguments["x"] * jnp.bfloat16(2.0**power)}
        cases.assert_close(run(scaled), cases.expected(scaled))


@interpreted
def test_one_expert_beyond_a_group_and_repeated_in_a_row():
    case = {"M": 16, "E": 5, "A": 2, "size": (96, 160), "routing": "even", "layers": 0}
    arguments = cases.inputs(case, jnp.bfloat16)
    ids = np.asarray(arguments["expert_ids"]).copy()
    ids[:, 0] = 3  # 16 rows or more: three groups of 8
    ids[:2] = 3
    arguments["expert_ids"] = jnp.asarray(ids)
    cases.assert_close(run(arguments), cases.expected(arguments))


def test_what_it_refuses():
    from gptoss_jax.ops.moe import pallas_gpu_decode

    case = {"M": 3, "E": 5, "A": 2, "size": (96, 160), "routing": "even", "layers": 0}
    rows, rest = arrange(cases.inputs(case, jnp.bfloat16))
    for name in ("limit", "mask"):
        rest.pop(name)

    def refuse(rows=rows, **change):
        return pallas_gpu_decode.refuse(*rows, **{**rest, **change})

    assert "this is a cpu" in refuse()
    with chips.assume("h200"):
        if jax.__version_info__ < chips.MOSAIC_GPU:
            assert "jax 0.11.2" in refuse()
            return
        assert refuse() is None
        packed = cases.inputs(case, jnp.bfloat16)["down_weight"]
        assert "down_weight" in refuse(down_weight=packed)
        x, *routes = rows
        assert "float32" in refuse((x.astype(jnp.float32), *routes))
        assert "65" in refuse((jnp.zeros((65, 96), jnp.bfloat16), *routes))
        assert "64 rows of a matrix" in refuse((x[:, :32], *routes))
    with chips.assume("v5e"):
        assert "this is a v5e" in refuse()
