"""The Hopper kernels of grouped matmul, interpreted with race detection, in bfloat16."""

from __future__ import annotations

import grouped_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import name, on_host, part_slow

from gptoss_jax import chips
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.grouped_matmul import grouped_matmul, pallas_gpu_kernels, pallas_gpu_packed
from gptoss_jax.ops.mxfp4 import layouts, reference
from gptoss_jax.types import MXFP4, LayerOf, Relaid

QUICK = [case for case in cases.COVERING if max(case["N"], case["C"]) < 2880]
# Both axes of 2880 take the interpreter minutes: thousands of tiles.
WIDE = [case for case in cases.COVERING if case not in QUICK and min(case["N"], case["C"]) < 2880]
MIDDLING = {"rows": 130, "groups": "short", "E": 5, "N": 96, "C": 160}
DTYPE = jnp.bfloat16
encode, decode = jax.jit(mxfp4.encode), jax.jit(mxfp4.decode)

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < chips.MOSAIC_GPU, reason="Mosaic GPU before jax 0.11.2 is another"
)


@pytest.fixture
def small_tiles(monkeypatch):
    """Let small cases take several tiles each way, the last of them in part."""
    tile = pallas_gpu_kernels.Tile(rows=128, columns=64, depth=64, stages=2)
    blocks = pallas_gpu_kernels.Blocks(tile, tile, tile, tile, resident=4)
    monkeypatch.setitem(pallas_gpu_kernels.BLOCKS, "h200", blocks)


def relaid(packed: MXFP4) -> Relaid:
    return on_host(layouts.relayout, packed, "hopper", row_axes=packed.ndim - 2)


def check(rows, weight, sizes, *, stands_for, capsys):
    want = cases.results((rows, stands_for.astype(jnp.float32), sizes), "reference")
    with chips.assume("h200", interpret=True):
        got = jax.block_until_ready(cases.results((rows, weight, sizes), "pallas_gpu"))
    cases.assert_close(got, {key: want[key] for key in got}, dtype=DTYPE)
    assert "RACE DETECTED" not in capsys.readouterr().out


def check_case(case, form, capsys, dtype=DTYPE):
    rows, weight, sizes = cases.inputs(case, dtype)
    if form == "dense":
        return check(rows, weight, sizes, stands_for=weight, capsys=capsys)
    packed = encode(weight.astype(jnp.float32))
    weight = relaid(packed) if form == "packed" else packed
    check(rows, weight, sizes, stands_for=decode(packed), capsys=capsys)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("case", part_slow(QUICK, every=2))
def test_values_and_gradients(case, form, capsys):
    check_case(case, form, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("case", WIDE, ids=name)
def test_values_and_gradients_of_wide_weights(case, form, capsys):
    check_case(case, form, capsys)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("case", cases.EVERY, ids=name)
def test_every_case(case, form, capsys):
    check_case(case, form, capsys)


def test_a_weight_in_the_order_of_the_checkpoint(capsys):
    check_case(MIDDLING, "mxfp4", capsys)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_float16(form, capsys):
    check_case(MIDDLING, form, capsys, dtype=jnp.float16)


@pytest.mark.parametrize("form", ["dense", "packed", "mxfp4"])
def test_a_layer_of_a_stack_with_two_axes_of_rows(form, capsys):
    rows, _, sizes = cases.inputs(MIDDLING, DTYPE)
    stack = np.random.default_rng(0).normal(size=(3, 5, 2, 48, 160)) * 160**-0.5
    weight = jnp.asarray(stack, DTYPE)
    if form == "dense":
        want = weight[2]
    else:
        packed = encode(weight.astype(jnp.float32))
        want = decode(packed)[2]
        if form == "mxfp4":
            weight = packed
        else:
            weight = on_host(layouts.relayout, packed, "hopper", row_axes=2)
    want = want.reshape(5, 96, 160)
    layer = LayerOf(weight, jnp.int32(2))
    check(rows, layer, sizes, stands_for=want, capsys=capsys)


def test_rows_of_no_group_leave_no_trace():
    """Their values and the result's gradient there are NaN; nothing else becomes so."""
    rows, weight, sizes = cases.inputs(MIDDLING, DTYPE)
    used = int(sizes.sum())
    assert used < rows.shape[0]
    assert bool(jnp.isnan(rows[used:]).all())
    with chips.assume("h200", interpret=True):
        out, vjp = jax.vjp(
            lambda r, w: grouped_matmul(r, w, sizes, implementation="pallas_gpu"), rows, weight
        )
        d_rows, d_weight = vjp(jnp.ones_like(out).at[used:].set(jnp.nan))
    assert bool(jnp.isfinite(out[:used]).all())
    assert bool(jnp.isfinite(d_rows).all())
    assert bool((d_rows[used:] == 0).all())
    assert bool(jnp.isfinite(d_weight).all())


def test_every_code_under_every_scale_is_exact():
    """A row that is one at one place reads out a column, and backwards a row, of the weight."""
    codes = np.arange(32, dtype=np.uint8) % 16
    block = codes[0::2] | codes[1::2] << 4
    scales = np.resize(np.arange(2, 241, dtype=np.uint8), 64 * 4).reshape(1, 64, 4)
    packed = MXFP4(jnp.broadcast_to(block, (*scales.shape, 16)), jnp.asarray(scales))
    want = mxfp4.decode(packed, DTYPE)[0]
    weight, sizes = relaid(packed), jnp.array([128], jnp.int32)
    with chips.assume("h200", interpret=True):
        out, vjp = jax.vjp(
            lambda rows: grouped_matmul(rows, weight, sizes, implementation="pallas_gpu"),
            jnp.eye(128, dtype=DTYPE),
        )
        (d_rows,) = vjp(jnp.eye(128, 64, dtype=DTYPE))
    assert bool((out == want.T).all())
    assert bool((d_rows[:64] == want).all())


@pytest.mark.parametrize("sizes", [[1], [7, 130, 0, 121], [0, 9, 122] * 9, [0, 0, 64], [15] * 20])
@pytest.mark.parametrize("spare", [0, 3])
def test_items_of_work_cover_each_row_once(sizes, spare):
    """With the fewest rows that the sizes fit in, too: there are always items enough."""
    tile, used = 64, sum(sizes)
    work = pallas_gpu_kernels.work_items(jnp.array(sizes), jnp.int32(10), used + spare, tile)
    matrix_of = np.full(used, -1)
    for matrix, start, skip, size in zip(*map(np.asarray, work), strict=True):
        assert start % pallas_gpu_kernels.ALIGN == 0
        assert skip + size <= tile
        rows = slice(start + skip, start + skip + size)
        assert (matrix_of[rows] == -1).all()
        matrix_of[rows] = matrix
    assert (matrix_of == 10 + np.repeat(np.arange(len(sizes)), sizes)).all()


def test_words_of_codes_become_pairs_of_bfloat16():
    """What the chip does and the interpreter does not: for every two bytes, both planes."""
    low, high = (x.astype(np.uint32) for x in np.divmod(np.arange(1 << 16), 256)[::-1])
    for plane in range(2):
        bits = pallas_gpu_packed.place(low | high << 16, plane).astype(np.uint32)
        # In float64, as float32 may flush what is subnormal in it.
        pairs = bits[:, None].view(np.uint16).view(jnp.bfloat16).astype(np.float64) * 2.0**126
        nibbles = np.stack([low, high], axis=-1) >> 4 * plane & 15
        want = np.where(nibbles & 8, -1, 1) * np.array(reference.MAGNITUDES)[nibbles & 7]
        assert (pairs == want).all()


def test_what_the_kernels_cannot_take_is_refused():
    rows, weight, sizes = cases.inputs(MIDDLING)
    packed = mxfp4.encode(weight)
    with chips.assume("h200", interpret=True):
        for args, reason in (
            ((rows, weight), "bfloat16 or float16"),
            ((rows.astype(DTYPE), weight), "have to be the same"),
            ((rows[:, :80].astype(DTYPE), weight[..., :80].astype(DTYPE)), "multiples of 32"),
            ((rows.astype(DTYPE), layouts.relayout(packed, "planes")), "layout 'hopper'"),
        ):
            with pytest.raises(ValueError, match=reason):
                grouped_matmul(args[0], args[1], sizes, implementation="pallas_gpu")
    with chips.assume("v5e"), pytest.raises(ValueError, match="a kernel for Hopper"):
        grouped_matmul(rows, weight, sizes, implementation="pallas_gpu")
