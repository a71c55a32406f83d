"""Grouped matmul in plain XLA against the reference, over the shared cases."""

import grouped_cases as cases
import jax.numpy as jnp
import pytest
from covering import name

from gptoss_jax.ops import mxfp4


# The widest are for hours by hand: the reference takes gigabytes there.
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=name(case),
            marks=[pytest.mark.exhaustive] if case["N"] * case["C"] > 1e6 else [],
        )
        for case in cases.COVERING
    ],
)
def test_xla_matches_the_reference(case):
    args = cases.inputs(case)
    cases.assert_close(cases.results(args, "xla"), cases.results(args, "reference"))


def test_packed_weights_give_what_they_decode_to():
    rows, weight, sizes = cases.inputs({"rows": 130, "groups": "skewed", "E": 5, "N": 96, "C": 160})
    packed = mxfp4.encode(weight)
    got = cases.results((rows, packed, sizes), "xla")
    want = cases.results((rows, mxfp4.decode(packed), sizes), "reference")
    cases.assert_close(got, {key: want[key] for key in got})


def test_a_kernel_for_another_chip_is_refused():
    args = cases.inputs({"rows": 5, "groups": "even", "E": 5, "N": 96, "C": 128})
    with pytest.raises(ValueError, match=r"pallas_tpu.*run: it is a TPU kernel"):
        cases.results(args, "pallas_tpu")
    with pytest.raises(ValueError, match="use 'pallas_tpu', 'xla'"):
        cases.results((args[0], args[1], jnp.asarray(args[2])), "none")
