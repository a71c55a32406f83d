"""How an op chooses: the declared order, reasons for what can't run, a log line once."""

import logging

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax import chips
from gptoss_jax.ops import dispatch
from gptoss_jax.ops.attention import CACHED_ORDER, SELF_ORDER, attention
from gptoss_jax.ops.grouped_matmul import ORDER as GROUPED_ORDER
from gptoss_jax.ops.moe import ORDER as EXPERTS_ORDER

ORDER = {"tpu": ("a", "b"), "gpu": ("b",), "cpu": ("b", "c"), "named": ("d",)}


def test_the_first_that_supports_the_arguments_is_taken():
    def refuse(name):
        return "too long" if name == "b" else None

    assert dispatch.choose("op", None, order=ORDER, refuse=lambda name: None) == "b"
    assert dispatch.choose("op", None, order=ORDER, refuse=refuse) == "c"
    assert dispatch.choose("op", "d", order=ORDER, refuse=refuse) == "d"
    with chips.assume("v5e"):
        assert dispatch.choose("op", None, order=ORDER, refuse=refuse) == "a"
    with chips.assume("h200"), pytest.raises(ValueError, match=r"nothing runs on a h200: b: too"):
        dispatch.choose("op", None, order=ORDER, refuse=refuse)


def test_a_named_one_runs_or_raises_with_the_reason():
    with pytest.raises(ValueError, match=r"op: implementation='b' can't run: too long"):
        dispatch.choose("op", "b", order=ORDER, refuse=lambda name: "too long")
    with pytest.raises(ValueError, match=r"implementation='e': use 'a', 'b', 'c', 'd' or None"):
        dispatch.choose("op", "e", order=ORDER, refuse=lambda name: None)


def test_the_choice_is_logged_once(caplog):
    def refuse(name):
        return "too wide" if name == "b" else None

    with caplog.at_level(logging.INFO, "gptoss_jax.ops.dispatch"):
        for _ in range(3):
            dispatch.choose("logged op", None, order=ORDER, refuse=refuse)
    assert [r.getMessage() for r in caplog.records] == ["logged op on cpu: c (b: too wide)"]


def test_chips_have_the_names_of_their_devices():
    class Device:
        def __init__(self, platform, device_kind):
            self.platform, self.device_kind = platform, device_kind

    for platform, text, kind in [
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5", "v5p"),
        ("tpu", "TPU v6 lite", "v6e"),
        ("tpu", "TPU7x", "tpu7x"),
        ("gpu", "NVIDIA H200", "h200"),
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "Tesla T4", "t4"),
        ("gpu", "NVIDIA L40S", "l40s"),
        ("gpu", "NVIDIA L40", "other"),
        ("gpu", "NVIDIA L4", "l4"),
        ("cpu", "cpu", "cpu"),
    ]:
        chip = chips._of(Device(platform, text))  # type: ignore[arg-type]
        assert (chip.platform, chip.kind) == (platform, kind), text


def test_assuming_a_chip_forgets_what_was_traced():
    seen = []

    @jax.jit
    def run(x):
        seen.append(chips.current().kind)
        return x

    run(1.0)
    with chips.assume("v6e"):
        run(1.0)
        with chips.assume("cpu"):
            run(1.0)
    run(1.0)
    assert seen == ["cpu", "v6e", "cpu", "cpu"]
    with pytest.raises(ValueError, match="chip 'v4'"), chips.assume("v4"):
        pass


@pytest.mark.parametrize("name", [n for n in SELF_ORDER["tpu"] + SELF_ORDER["gpu"] if n != "xla"])
def test_a_kernel_of_another_chip_says_so(name):
    q = jnp.ones((1, 4, 2, 64))
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"can't run: .*cpu"):
        attention(
            q, q, q, sinks=None, window=None, segment_ids=ids, positions=ids, implementation=name
        )


def test_kernels_can_be_turned_off(monkeypatch):
    from gptoss_jax.ops import moe

    with chips.assume("h200"):
        assert dispatch.choose("op", None, order=GROUPED_ORDER, refuse=lambda name: None) != "xla"
        assert moe.layout_for_chip() == "hopper"
        monkeypatch.setenv("GPTOSS_JAX_KERNELS", "off")
        assert dispatch.choose("op", None, order=GROUPED_ORDER, refuse=lambda name: None) == "xla"
        assert moe.layout_for_chip() is None
    assert moe.layout_for_chip() is None


def test_every_order_ends_in_what_runs_anywhere():
    for order in (SELF_ORDER, CACHED_ORDER, GROUPED_ORDER, EXPERTS_ORDER):
        assert set(order) == {"tpu", "gpu", "cpu", "named"}
        assert all(order[platform][-1] == "xla" for platform in ("tpu", "gpu", "cpu"))
