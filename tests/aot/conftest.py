"""Compiling for chips that are not here: helpers, and a skip where their compilers are not."""

from __future__ import annotations

import importlib.util

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptoss_jax import chips
from gptoss_jax.chips import topologies


def pytest_collection_modifyitems(items):
    missing = [
        name for name in ("libtpu", "jax_cuda13_plugin") if not importlib.util.find_spec(name)
    ]
    for item in items:
        if "/aot/" in str(item.path):
            item.add_marker(pytest.mark.aot)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}: .[aot]"))


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Leave the cache of compiled code aside: what the compilers write beside it is read here."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def compile_for():
    """Return a function (chip, function, *shapes) -> what the chip's compiler made of it.

    The shapes are `jax.ShapeDtypeStruct`s, in a pytree or not; all is on one device.
    """

    def run(chip: str, function, *shapes, donate=()):
        mesh = topologies.mesh(chip)
        here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def put(s):
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here)

        with chips.assume(chip.partition(":")[0]), jax.set_mesh(mesh):
            jitted = jax.jit(lambda *args: function(*args), donate_argnums=donate)
            return jitted.lower(*jax.tree.map(put, shapes)).compile()

    return run
