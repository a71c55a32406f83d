"""The table of chips, and what is said of targets that are none."""

from __future__ import annotations

import importlib.util
from importlib import resources

import pytest

from gptoss_jax import chips
from gptoss_jax.chips import facts as chip_facts
from gptoss_jax.chips.facts import FACTS, GiB
from gptoss_jax.errors import UserError
from gptoss_jax.runs import metrics


def test_every_chip_that_ops_choose_by_is_in_the_table():
    assert set(FACTS) == set(chips.NAMES)
    assert set(FACTS) == {*chips.TPUS, *chip_facts.GPUS}


# What the data sheets say: peak TFLOP/s, GB/s of memory, GB/s out of a device.
@pytest.mark.parametrize(
    ("kind", "peak", "memory", "links"),
    [
        ("v5e", 197, 819, 200), ("v5p", 459, 2765, 600), ("v6e", 918, 1638, 400),
        ("tpu7x", 2307 / 2, 7380 / 2, 1200 / 4), ("t4", 65, 320, 16), ("l4", 121, 300, 32),
        ("h100", 989, 3350, 450), ("h200", 989, 4800, 450), ("b200", 2250, 8000, 900),
    ],
)  # fmt: skip
def test_rates(kind, peak, memory, links):
    facts = FACTS[kind]
    assert facts.flops == pytest.approx(peak * 1e12)
    assert facts.bandwidth == pytest.approx(memory * 1e9)
    assert facts.links == pytest.approx(links * 1e9)
    assert facts.network < facts.links or kind == "t4"
    shown = next(text for text, name in chips.KINDS.items() if name == kind)
    known = next(t for name, t in metrics._PEAK_TFLOPS if name == shown)
    assert facts.flops == pytest.approx(known * 1e12 / (2 if kind == "tpu7x" else 1))


@pytest.mark.parametrize("kind", FACTS)
def test_usable_memory_is_less_than_is_sold(kind):
    facts = FACTS[kind]
    sold = int(facts.nominal.split()[0])
    assert 0.88 * sold * 1e9 < facts.memory < sold * GiB + GiB


@pytest.mark.parametrize("kind", chip_facts.GPUS)
def test_descriptions_agree_with_the_table(kind):
    text = (resources.files("gptoss_jax") / "targets" / f"{kind}.txtpb").read_text()
    fields = dict(
        line.strip().split(": ", 1)
        for line in text.splitlines()
        if ": " in line and "{" not in line
    )
    assert float(fields["memory_bandwidth"]) == FACTS[kind].bandwidth
    assert int(fields["device_memory_size"]) > FACTS[kind].memory
    label = fields["device_description_str"].strip('"')
    assert next(name for shown, name in chips.KINDS.items() if shown in label) == kind
    # Lanes times two operations times the clock: float32 arithmetic of the data sheet, TFLOP/s.
    cores = int(fields["core_count"]) * int(fields["fpus_per_core"])
    peak = {"t4": 8.1, "l4": 30.3, "h100": 67, "h200": 67, "b200": 75}[kind]
    assert 2 * cores * float(fields["clock_rate_ghz"]) / 1e3 == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("v4:2x2x1", "'v4:2x2x1': the chips are v5e, v5p, v6e, tpu7x, t4, l4, h100, h200, b200"),
        ("h200:two", "after the colon comes a topology as in v5p:4x4x4, or a count"),
        ("v5e:4x0", "after the colon comes a topology"),
    ],
)
def test_a_target_that_is_none(target, words):
    with pytest.raises(UserError, match=words):
        chip_facts.devices(target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("v5p:4x4", "v5p has a topology like that of v5p:4x4x4"),
        ("v5e:2x2x1", "v5e has a topology like that of v5e:4x8"),
        ("h200:12", "more than a host's 8 come in multiples of 8"),
        ("h200:2x4", "give a count, as in h200:8"),
    ],
)
def test_a_shape_that_the_chip_has_not(target, words, monkeypatch):
    monkeypatch.setattr(chip_facts, "_check_compiler", lambda *_: None)
    with pytest.raises(UserError, match=words):
        chip_facts.devices(target)


@pytest.mark.parametrize(
    ("target", "words"), [("v5e", r"TPUs \(libtpu\)"), ("h200:8", r"NVIDIA GPUs \(JAX's CUDA")]
)
def test_a_compiler_that_is_not_installed_is_told_with_how_to_install(target, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"{words}.*pip install -e '.\[aot\]'"):
        chip_facts.devices(target)
