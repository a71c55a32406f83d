"""The TPU kernel of grouped matmul, interpreted with race detection, against the reference."""

import grouped_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import name, on_host, part_slow
from test_mxfp4_layouts import every_code_and_scale

from gptoss_jax import chips
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.grouped_matmul import blocks, grouped_matmul
from gptoss_jax.types import MXFP4, LayerOf

SMALL = [case for case in cases.COVERING if max(case["N"], case["C"]) < 2880]
QUICK = [case for case in SMALL if case["E"] == 5]
REST = [case for case in cases.COVERING if case not in QUICK]
# Minutes in the interpreter: the tier of every case has them.
WIDEST = [case for case in REST if case["N"] == case["C"] == 2880]
MIDDLING = {"rows": 130, "groups": "short", "E": 5, "N": 300, "C": 160}
LAYOUTS = ["columns", "int8", "fp4"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Let small cases take several tiles each way, the last of them in part."""
    for chip in ("v5e", "tpu7x"):
        tiles = blocks.Blocks(48, 1024, 128, (64, 128, 128), 96 << 20)
        monkeypatch.setitem(blocks.BLOCKS, chip, tiles)


def run(args, layout="dense"):
    with chips.assume("tpu7x" if layout == "fp4" else "v5e", interpret=True):
        return jax.block_until_ready(cases.results(args, "pallas_tpu"))


def pack(weight, layout) -> tuple:
    """Return the weight in a layout, and what it stands for."""
    packed = jax.jit(mxfp4.encode)(weight)
    relaid = packed
    if layout != "mxfp4":
        relaid = on_host(mxfp4.relayout, packed, layout, row_axes=weight.ndim - 2)
    return relaid, jax.jit(mxfp4.decode)(packed)


def reference(args):
    return cases.results(args, "reference")


def rows_only(results):
    return {key: results[key] for key in ("out", "rows")}


@pytest.mark.parametrize("case", part_slow(QUICK, every=4))
def test_dense_matches_the_reference(case):
    args = cases.inputs(case)
    cases.assert_close(run(args), reference(args))


@pytest.mark.parametrize("case", part_slow(QUICK[::-1], every=4))
def test_packed_matches_the_reference(case):
    rows, weight, sizes = cases.inputs(case)
    relaid, dense = pack(weight, "columns")
    want = rows_only(reference((rows, dense, sizes)))
    cases.assert_close(run((rows, relaid, sizes)), want)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["dense", "columns"])
@pytest.mark.parametrize("case", [case for case in REST if case not in WIDEST], ids=name)
def test_the_rest_matches_the_reference(case, layout, monkeypatch):
    monkeypatch.setitem(
        blocks.BLOCKS, "v5e", blocks.Blocks(128, 1024, 640, (128, 640, 1024), 96 << 20)
    )
    rows, weight, sizes = cases.inputs(case)
    if layout == "dense":
        return cases.assert_close(run((rows, weight, sizes)), reference((rows, weight, sizes)))
    relaid, dense = pack(weight, layout)
    want = rows_only(reference((rows, dense, sizes)))
    cases.assert_close(run((rows, relaid, sizes)), want)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["dense", "columns", "int8"])
@pytest.mark.parametrize("case", cases.EVERY, ids=name)
def test_every_case_matches_the_reference(case, layout, monkeypatch):
    test_the_rest_matches_the_reference(case, layout, monkeypatch)


@pytest.mark.parametrize("layout", ["mxfp4", "int8", "fp4"])
def test_other_layouts_match_the_reference(layout):
    case = MIDDLING | {"C": 192 if layout == "fp4" else 160}
    rows, weight, sizes = cases.inputs(case)
    relaid, dense = pack(weight, layout)
    want = rows_only(reference((rows, dense, sizes)))
    cases.assert_close(run((rows, relaid, sizes), layout), want)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "columns"])
def test_bfloat16(layout):
    rows, weight, sizes = cases.inputs(MIDDLING, jnp.bfloat16)
    if layout == "dense":
        got, want = run((rows, weight, sizes)), reference((rows, weight, sizes))
        assert got["weight"].dtype == jnp.bfloat16
    else:
        relaid, dense = pack(weight, layout)
        got = run((rows, relaid, sizes))
        want = rows_only(reference((rows, dense.astype(jnp.bfloat16), sizes)))
    assert got["rows"].dtype == jnp.bfloat16
    cases.assert_close(got, want, dtype=jnp.bfloat16)


@pytest.mark.parametrize("layout", ["dense", "mxfp4", "columns"])
def test_a_layer_of_a_stack_with_two_row_axes(layout):
    rows, weight, sizes = cases.inputs(MIDDLING)
    weight = np.asarray(weight)
    layers = np.stack([weight * 0.5, weight, weight * (np.nan if layout == "dense" else -1)])
    layers = jnp.asarray(layers.reshape(3, 5, 2, 150, 160))
    if layout == "dense":
        stack, dense = layers, weight
    else:
        stack = jax.jit(mxfp4.encode)(layers)
        dense = jax.jit(mxfp4.decode)(stack)[1]
        stack = stack if layout == "mxfp4" else on_host(mxfp4.relayout, stack, layout, row_axes=2)
    want = rows_only(reference((rows, dense.reshape(5, 300, 160), sizes)))
    cases.assert_close(run((rows, LayerOf(stack, jnp.int32(1)), sizes)), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_and_scale_is_decoded_exactly(layout, dtype):
    columns = 128 if layout == "fp4" else 96
    packed = every_code_and_scale(columns)
    want = np.asarray(jax.jit(mxfp4.decode, static_argnums=1)(packed, dtype))
    weight = on_host(mxfp4.relayout, MXFP4(packed.blocks[None], packed.scales[None]), layout)
    rows = jnp.eye(256, columns, dtype=dtype)

    @jax.jit
    def products(rows):
        def product(rows):
            return grouped_matmul(rows, weight, jnp.array([256]), implementation="pallas_tpu")

        out, pull = jax.vjp(product, rows)
        return out, pull(jnp.eye(256, dtype=dtype))[0]

    with chips.assume("tpu7x" if layout == "fp4" else "v5e", interpret=True):
        out, d_rows = products(rows)
    np.testing.assert_array_equal(out[:columns].T, want)
    np.testing.assert_array_equal(d_rows, want)


@pytest.mark.slow
def test_nothing_comes_from_cotangents_of_rows_in_no_group():
    rows, weight, sizes = cases.inputs(MIDDLING | {"N": 160})
    inside = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
    relaid, dense = pack(weight, "columns")

    @jax.jit
    def gradients(d_out):
        def product(rows, matrix):
            return grouped_matmul(rows, matrix, sizes, implementation="pallas_tpu")

        _, pull = jax.vjp(product, rows, dense)
        _, pull_packed = jax.vjp(lambda rows: product(rows, relaid), rows)
        return *pull(d_out), *pull_packed(d_out)

    with chips.assume("v5e", interpret=True):
        ones = jnp.ones((rows.shape[0], weight.shape[1]))
        got = gradients(jnp.where(inside, ones, jnp.nan))
        for a, b in zip(got, gradients(jnp.where(inside, ones, 7.0)), strict=True):
            assert bool(jnp.isfinite(a).all())
            np.testing.assert_array_equal(a, b)
    for d_rows in (got[0], got[2]):
        assert bool((jnp.where(inside, 0, d_rows) == 0).all())


def test_groups_without_any_row_give_gradients_of_zero():
    rows, weight, sizes = cases.inputs({"rows": 5, "groups": "even", "E": 5, "N": 96, "C": 128})
    got = run((rows * jnp.nan, weight, sizes * 0))
    assert bool((got["rows"] == 0).all()) and bool((got["weight"] == 0).all())


def test_what_the_kernel_cannot_take_is_refused(monkeypatch):
    rows, weight, sizes = cases.inputs({"rows": 5, "groups": "even", "E": 5, "N": 96, "C": 160})

    def refused(weight, match, rows=rows, chip="v5e"):
        with chips.assume(chip, interpret=True), pytest.raises(ValueError, match=match):
            grouped_matmul(rows, weight, sizes, implementation="pallas_tpu")

    refused(pack(weight, "planes")[0], "layout 'planes': it reads columns, int8, fp4")
    refused(pack(weight, "fp4")[0], "'fp4' is for tpu7x")
    refused(pack(weight, "fp4")[0], "multiple of 64, not 160", chip="tpu7x")
    refused(weight, "rows are float16", rows=rows.astype(jnp.float16))
    refused(weight, "this is a h200", chip="h200")
    tiny = blocks.BLOCKS["v5e"]._replace(vmem=1 << 16)
    monkeypatch.setitem(blocks.BLOCKS, "v5e", tiny)
    refused(weight, r"\(5, 96, 160\) do not fit a v5e's fast memory")
