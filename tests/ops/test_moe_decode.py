"""The kernels for a decode batch's experts against the reference, over the shared cases."""

from __future__ import annotations

import functools
from typing import Any

import decode_expert_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import name, on_host, part_slow

from gptoss_jax import chips
from gptoss_jax.ops.moe import experts, planes
from gptoss_jax.ops.mxfp4 import decode, layouts
from gptoss_jax.types import LayerOf

WEIGHTS = {"gate_up_weight": 2, "down_weight": 1}  # and how many axes of rows


def relaid(arguments: cases.Arguments, layout: str) -> cases.Arguments:
    """Put the weights in a layout; "dense" decodes them."""

    def change(weight: Any, row_axes: int) -> Any:
        if isinstance(weight, LayerOf):
            return LayerOf(change(weight.stack, row_axes), weight.layer)
        if layout == "dense":
            return jax.jit(decode)(weight)
        return on_host(layouts.relayout, weight, layout, row_axes=row_axes)

    return arguments | {key: change(arguments[key], axes) for key, axes in WEIGHTS.items()}


ONE = {"M": 1, "E": 5, "A": 1, "size": (96, 160), "routing": "even", "layers": 3}
ROW_ARGUMENTS = ("x", "expert_ids", "expert_weights")


@functools.partial(jax.jit, static_argnames=("limit", "implementation"))
def call(arguments: cases.Arguments, *, limit: float, implementation: str) -> jax.Array:
    rows = [arguments[key] for key in ROW_ARGUMENTS]
    rest = {key: value for key, value in arguments.items() if key not in ROW_ARGUMENTS}
    return experts(*rows, **rest, limit=limit, implementation=implementation)


def run(arguments: cases.Arguments, layout: str, implementation: str) -> jax.Array:
    arguments = relaid(arguments, layout)
    return call(arguments, limit=arguments.pop("limit"), implementation=implementation)


def codes() -> list[Any]:
    return [*cases.every_code_down(), *cases.every_code_gate_up()]


@pytest.mark.parametrize("case", part_slow(cases.COVERING, every=5))
def test_planes_match_the_reference(case):
    arguments = cases.inputs(case)
    cases.assert_close(run(arguments, "planes", "planes"), cases.expected(arguments))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.EVERY, ids=name)
def test_planes_match_the_reference_in_every_case(case):
    test_planes_match_the_reference(case)


def test_planes_take_dense_weights():
    for layers in (0, 3):
        case = {"M": 3, "E": 5, "A": 2, "size": (96, 160), "routing": "dropped", "layers": layers}
        arguments = cases.inputs(case)
        cases.assert_close(run(arguments, "dense", "planes"), cases.expected(arguments))


def test_planes_in_bfloat16():
    arguments = cases.inputs(
        {"M": 16, "E": 5, "A": 2, "size": (96, 160), "routing": "masked", "layers": 3}, jnp.bfloat16
    )
    cases.assert_close(run(arguments, "planes", "planes"), cases.expected(arguments))


def test_planes_decode_every_code_exactly():
    for arguments, want in codes():
        np.testing.assert_array_equal(run(arguments, "planes", "planes"), want)


def test_planes_refuse_what_they_would_copy():
    arguments = cases.inputs(
        {"M": 1, "E": 5, "A": 1, "size": (96, 160), "routing": "even", "layers": 3}
    )
    del arguments["limit"], arguments["mask"]

    def refuse(arguments):
        rows = [arguments.pop(key) for key in ROW_ARGUMENTS]
        return planes.refuse(*rows, **arguments)

    assert "layouts.relayout" in refuse(dict(arguments))
    assert 'these are in "columns"' in refuse(relaid(arguments, "columns"))
    assert refuse(relaid(arguments, "planes")) is None
    many = relaid(arguments, "planes") | {"x": jnp.zeros((17, 96))}
    assert "these are 17" in refuse(many)


def on_tpu(chip: str, arguments: cases.Arguments, layout: str) -> jax.Array:
    with chips.assume(chip, interpret=True):
        return run(arguments, layout, "pallas_tpu")


@pytest.mark.parametrize("case", part_slow(cases.COVERING, every=7))
def test_the_tpu_kernel_matches_the_reference(case):
    arguments = cases.inputs(case)
    cases.assert_close(on_tpu("v5e", arguments, "columns"), cases.expected(arguments))


# The other layouts differ in how they decode alone; on v5p two cores share the experts.
@pytest.mark.parametrize("case", part_slow(cases.COVERING[::4], every=5))
def test_the_tpu_kernel_matches_the_reference_with_int8(case):
    arguments = cases.inputs(case)
    cases.assert_close(on_tpu("v5p", arguments, "int8"), cases.expected(arguments))


def test_the_tpu_kernel_matches_the_reference_with_fp4():
    arguments = cases.inputs(
        {"M": 3, "E": 5, "A": 4, "size": (256, 192), "routing": "dropped", "layers": 3}
    )
    cases.assert_close(on_tpu("tpu7x", arguments, "fp4"), cases.expected(arguments))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["columns", "int8"])
@pytest.mark.parametrize("case", cases.EVERY, ids=name)
def test_the_tpu_kernel_matches_the_reference_in_every_case(case, layout):
    arguments = cases.inputs(case)
    cases.assert_close(on_tpu("v5p", arguments, layout), cases.expected(arguments))


def test_the_tpu_kernel_in_bfloat16():
    case = {"M": 16, "E": 5, "A": 2, "size": (96, 160), "routing": "masked", "layers": 3}
    arguments = cases.inputs(case, jnp.bfloat16)
    cases.assert_close(on_tpu("v6e", arguments, "columns"), cases.expected(arguments))


@pytest.mark.parametrize(
    ("chip", "layout"),
    [
        ("v5e", "columns"),
        pytest.param("v6e", "int8", marks=pytest.mark.slow),
        pytest.param("tpu7x", "fp4", marks=pytest.mark.slow),
    ],
)
def test_the_tpu_kernel_decodes_every_code_exactly(chip, layout):
    with chips.assume(chip, interpret=True):
        for arguments, want in codes():
            np.testing.assert_array_equal(run(arguments, layout, "pallas_tpu"), want)
        for arguments, want in cases.every_code_down():
            narrow = arguments | {"x": arguments["x"].astype(jnp.bfloat16)}
            got = run(narrow, layout, "pallas_tpu")
            np.testing.assert_array_equal(got.astype(jnp.float32), want)


def test_the_tpu_kernel_refuses_what_it_would_copy():
    arguments = cases.inputs(
        {"M": 1, "E": 5, "A": 1, "size": (96, 160), "routing": "even", "layers": 3}
    )
    with pytest.raises(ValueError, match="it is a TPU kernel"):
        run(arguments, "columns", "pallas_tpu")
    for layout, reason in (("planes", "planes and planes"), ("fp4", "fp4.* is for tpu7x")):
        with pytest.raises(ValueError, match=reason):
            on_tpu("v5e", arguments, layout)
    with pytest.raises(ValueError, match="multiples of 64"):
        on_tpu("tpu7x", arguments, "fp4")
