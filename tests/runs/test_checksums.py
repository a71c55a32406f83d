"""Checksums: every change is seen, and how arrays are spread over devices is not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.parallel import padding
from gptoss_jax.runs.checksums import checksums, differences
from gptoss_jax.types import MXFP4

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, jnp.dtype(dtype).itemsize))
    if dtype == "bool":
        return bits[..., 0] > 127
    return bits.astype(np.uint8).view(jnp.dtype(dtype))[..., 0]


def flipped(x: np.ndarray, bit: int) -> np.ndarray:
    raw = bytearray(x.tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "bool"])
def test_every_flipped_bit_is_seen(dtype):
    x = values((3, 5), dtype)
    whole = checksums({"x": jnp.asarray(x)})
    for bit in range(x.nbytes * 8):
        assert checksums({"x": jnp.asarray(flipped(x, bit))}) != whole, bit


def test_flipped_signs_moved_and_zeroed_elements_are_seen():
    x = values((40, 7, 30), "float32")
    one = checksums({"x": jnp.asarray(x)})["x"]
    changed = [x.copy() for _ in range(4)]
    changed[0][[3, 31], 2, 11] *= -1  # the highest bit of two elements
    changed[1][[3, 4]] = x[[4, 3]]
    changed[2][5:9] = 0
    changed[3][:] = 0
    sums = {checksums({"x": jnp.asarray(c)})["x"] for c in changed}
    assert len(sums) == 4 and one not in sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (600,), (3, 2, 700), (8, 6, 16)])
def test_it_does_not_matter_where_an_array_lies(shape, dtype):
    x = values(shape, dtype)
    here = checksums({"x": jnp.asarray(x)})
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    for spec in (jax.P(), jax.P("a", "b"), jax.P("b"), jax.P(None, "a")):
        parts = spec if len(spec) <= len(shape) else jax.P()
        sizes = [mesh.shape[name] if name else 1 for name in parts]
        if any(n % size for n, size in zip(shape, sizes, strict=False)):
            continue
        spread = jax.device_put(x, jax.NamedSharding(mesh, parts))
        assert checksums({"x": spread}) == here, parts


def test_the_same_on_every_machine():
    """By hand: each element mixed with its mixed place, summed."""

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    x = values((5, 9), "uint8")
    want = sum(mix(int(v) ^ mix(place)) for place, v in enumerate(x.reshape(-1))) % 2**32
    assert checksums({"x": jnp.asarray(x)}) == {"x": want}


def test_paths_and_differences():
    packed = MXFP4(jnp.ones((2, 16), jnp.uint8), jnp.ones((2,), jnp.uint8))
    tree = {"layers": {"x": {"w": packed, "b": jnp.ones(3)}}, "s": (jnp.int32(1), ())}
    sums = checksums(tree)
    assert set(sums) == {"layers/x/w/blocks", "layers/x/w/scales", "layers/x/b", "s/0"}
    assert differences(sums, dict(sums)) == []
    assert differences(sums, sums | {"layers/x/b": 1, "new": 2}) == ["layers/x/b", "new"]
    assert differences(sums | {"gone": 2}, sums) == ["gone"]


@pytest.mark.parametrize("devices", [1, 2])
def test_what_a_mesh_added_to_experts_does_not_count(devices):
    rng = np.random.default_rng(0)
    shapes = ((3, 4, 5, 2, 16), (3, 4, 5, 2))
    packed = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    bias = rng.normal(size=(3, 4, 2, 6)).astype(np.float32)
    experts = {"gate_up_bias": jnp.asarray(bias), "down_weight": MXFP4(*map(jnp.asarray, packed))}
    plain = {"layers": {"experts": experts}}
    # With more than zeros in what was added.
    wide = jax.tree.map(
        lambda x, y: (x + 7).at[tuple(map(slice, y.shape))].set(y),
        padding.resize(plain, by=64),
        plain,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",))
    wide = jax.device_put(wide, jax.sharding.NamedSharding(mesh, jax.P(None, "x")))
    assert checksums(wide, expert_padding=64) == checksums(plain)
    assert len(differences(checksums(wide), checksums(plain))) == 3
