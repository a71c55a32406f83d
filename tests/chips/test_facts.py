"""The table of chips."""

from __future__ import annotations

from importlib import resources
from types import SimpleNamespace

import jax
import pytest

from gptoss_jax import chips
from gptoss_jax.chips.facts import FACTS, GPUS, TARGETS, TPUS, GiB, name_of

DESCRIPTIONS = resources.files("gptoss_jax.chips") / "targets"


def test_every_target_is_a_tpu_or_has_a_description_for_the_compiler():
    described = {p.name.partition(".")[0] for p in DESCRIPTIONS.iterdir()}
    assert set(TARGETS) == {*TPUS, *described}
    assert set(GPUS) == described and set(chips.HOPPER) <= described


# What the data sheets say: peak TFLOP/s, GB/s of memory, GB/s out of a device.
@pytest.mark.parametrize(
    ("kind", "peak", "memory", "links"),
    [
        ("v5e", 197, 819, 200), ("v5p", 459, 2765, 600), ("v6e", 918, 1638, 400),
        ("tpu7x", 2307 / 2, 7380 / 2, 1200 / 4), ("t4", 65, 320, 16), ("l4", 121, 300, 32),
        ("h100", 989, 3350, 450), ("h200", 989, 4800, 450), ("b200", 2250, 8000, 900),
        ("gh200", 989, 4000, 450), ("a100", 312, 2039, 300), ("a100-40", 312, 1555, 300),
        ("l40s", 362, 864, 32), ("rtx4090", 165, 1008, 32), ("rtx5090", 209.5, 1792, 64),
    ],
)  # fmt: skip
def test_rates(kind, peak, memory, links):
    facts = TARGETS[kind]
    assert facts.flops == pytest.approx(peak * 1e12)
    assert facts.bandwidth == pytest.approx(memory * 1e9)
    assert facts.links == pytest.approx(links * 1e9)
    assert facts.network < facts.links or kind == "t4"


@pytest.mark.parametrize("kind", TARGETS)
def test_usable_memory_is_less_than_is_sold(kind):
    facts = TARGETS[kind]
    sold = int(facts.nominal.split()[0])
    assert 0.88 * sold * 1e9 < facts.memory < sold * GiB + GiB


@pytest.mark.parametrize("kind", GPUS)
def test_descriptions_agree_with_the_table(kind):
    text = (DESCRIPTIONS / f"{kind}.txtpb").read_text()
    fields = dict(
        line.strip().split(": ", 1)
        for line in text.splitlines()
        if ": " in line and "{" not in line
    )
    assert float(fields["memory_bandwidth"]) == TARGETS[kind].bandwidth
    assert int(fields["device_memory_size"]) > TARGETS[kind].memory
    label = fields["device_description_str"].strip('"')
    assert name_of(label) == kind
    # Lanes times two operations times the clock: float32 arithmetic of the data sheet, TFLOP/s.
    cores = int(fields["core_count"]) * int(fields["fpus_per_core"])
    peak = {
        "t4": 8.1, "l4": 30.3, "h100": 67, "h200": 67, "b200": 75, "gh200": 67, "a100": 19.5,
        "a100-40": 19.5, "l40s": 91.6, "rtx4090": 82.6, "rtx5090": 104.8,
    }[kind]  # fmt: skip
    assert 2 * cores * float(fields["clock_rate_ghz"]) / 1e3 == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(
    ("device_kind", "name", "tflops"),
    [
        ("TPU v4", "v4", 275), ("TPU v5 lite", "v5e", 197), ("TPU v5e", "v5e", 197),
        ("TPU v5", "v5p", 459), ("TPU v5p", "v5p", 459), ("TPU v6 lite", "v6e", 918),
        ("TPU7x", "tpu7x", 1153.5),  # one of the two devices of a chip
        ("NVIDIA A100-SXM4-80GB", "a100", 312), ("NVIDIA A100 80GB PCIe", "a100", 312),
        ("NVIDIA A100-SXM4-40GB", "a100-40", 312), ("NVIDIA A100-PCIE-40GB", "a100-40", 312),
        ("NVIDIA GH200 480GB", "gh200", 989), ("NVIDIA GeForce RTX 4090", "rtx4090", 165),
        ("NVIDIA GeForce RTX 5090", "rtx5090", 209.5), ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H100 80GB HBM3", "h100", 989), ("NVIDIA H200", "h200", 989),
        ("NVIDIA B200", "b200", 2250), ("NVIDIA L4", "l4", 121), ("NVIDIA L40", "l40", 181),
        ("NVIDIA L40S", "l40s", 362), ("Tesla V100-SXM2-16GB", "v100", 125), ("Tesla T4", "t4", 65),
    ],
)  # fmt: skip
def test_a_device_is_known_by_what_jax_calls_it(device_kind, name, tflops, monkeypatch):
    assert name_of(device_kind) == name
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=device_kind)])
    assert chips.peak_flops(devices=3) == pytest.approx(3 * tflops * 1e12)
    assert 60 < FACTS[name].flops / FACTS[name].bandwidth < 600  # FLOPs a byte


def test_a_form_of_a_chip_takes_its_programs_and_one_without_a_description_none():
    def kind(shown: str) -> str:
        return chips._of(SimpleNamespace(platform="gpu", device_kind=shown)).kind

    assert kind("NVIDIA H100 PCIe") == kind("NVIDIA GH200 480GB") == "h100"
    assert kind("NVIDIA A100-SXM4-40GB") == chips.named("a100-40").kind == "a100"
    assert kind("Tesla V100-SXM2-16GB") == kind("NVIDIA GeForce RTX 3090") == "other"
    with pytest.raises(ValueError, match="chip 'v100'"):
        chips.named("v100")


def test_peak_is_asked_for_or_unknown_on_a_cpu():
    assert chips.peak_flops() is None
    assert chips.peak_flops(2.5, devices=2) == 5e12
