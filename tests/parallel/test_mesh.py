"""Sizes of the mesh: one -1, products that do not match, neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.config import MeshConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parallel import mesh


def test_a_size_of_minus_one_is_what_the_others_leave():
    made = mesh.make(MeshConfig(fsdp=-1, tensor=2))
    assert dict(made.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert tuple(made.axis_names) == mesh.AXES
    assert mesh.describe(made) == "fsdp 4 x tensor 2 on 8 devices"
    assert mesh.sizes(made) == MeshConfig(fsdp=4, tensor=2)


def test_all_ones_take_the_first_device_and_say_so():
    made = mesh.make(MeshConfig())
    assert made.size == 1 and made.devices.item() == jax.devices()[0]
    assert mesh.describe(made) == "device 1 of 8: --mesh.fsdp -1 uses all"


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"fsdp": 3}, "fsdp 3 is for 3 devices, and there are 8"),
        ({"fsdp": 4, "expert": 4}, "fsdp 4 x expert 4 is for 16 devices, and there are 8"),
        ({"data": -1, "tensor": 3}, "make 3, which does not divide 8"),
        ({"data": -1, "fsdp": -1}, "data and fsdp are both -1: only one may be"),
        ({"context": 0}, "mesh.context is 0: it must be positive, or -1"),
        ({"context": -2}, "mesh.context is -2: it must be positive, or -1"),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes: dict[str, int], said: str):
    with pytest.raises(UserError, match=said) as caught:
        mesh.make(MeshConfig(**sizes))
    assert "\n" not in str(caught.value)


def test_slices_are_told_apart_along_the_outermost_axes(monkeypatch: pytest.MonkeyPatch):
    class Device:
        platform, device_kind, process_index = "cpu", "cpu", 0

        def __init__(self, number: int) -> None:
            self.id, self.slice_index = number, number // 4

    devices = [Device(n) for n in (3, 7, 1, 0, 2, 5, 6, 4)]
    grid = mesh._arrange((2, 2, 1, 1, 2), devices)
    assert {d.slice_index for d in grid[0].flat} == {0}
    assert {d.slice_index for d in grid[1].flat} == {1}
    with pytest.raises(UserError, match="2 slices can't be spread over axes"):
        mesh._arrange((1, 1, 1, 1, 1), [*devices[:1], Device(4)])


def test_the_current_mesh_is_seen_under_jit_and_not_inside_shard_map():
    seen = []
    assert mesh.current() is None and mesh.size("fsdp") == 1

    def local(x: jax.Array) -> jax.Array:
        seen.append(mesh.current())
        return x

    def f(x: jax.Array) -> jax.Array:
        seen.append(mesh.size("fsdp", "tensor"))
        with mesh.alone():
            seen.append(mesh.size("fsdp"))
        return jax.shard_map(local, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp"))(x)

    with jax.set_mesh(mesh.make(MeshConfig(fsdp=4, tensor=2))):
        jax.jit(f)(jnp.ones(8))
    assert seen == [8, 1, None]
    with jax.set_mesh(mesh.make(MeshConfig())):
        assert mesh.current() is None, "a mesh of one device is no mesh to the model"
