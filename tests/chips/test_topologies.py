"""What is said of targets that are none, or whose compiler is not here."""

from __future__ import annotations

import importlib.util
import math

import pytest

from gptoss_jax.chips import topologies
from gptoss_jax.errors import UserError


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("v4:2x2x1", "'v4:2x2x1': the chips are v5e, v5p, v6e, tpu7x, t4, l4, h100, h200, b200"),
        ("h200:two", "after the colon comes a topology as in v5p:4x4x4, or a count"),
        ("v5e:4x0", "after the colon comes a topology"),
        ("v6e-12", "there are v6e-1, v6e-4, v6e-8, .*; or give a topology, v6e:..."),
        ("mi300x", "no plans for AMD's GPUs"),
        ("mi300x:8", "no plans for AMD's GPUs"),
    ],
)
def test_a_target_that_is_none(target, words):
    with pytest.raises(UserError, match=words):
        topologies.devices(target)


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
    monkeypatch.setattr(topologies, "_check_compiler", lambda *_: None)
    with pytest.raises(UserError, match=words):
        topologies.devices(target)


@pytest.mark.parametrize(
    ("target", "words"), [("v5e", r"TPUs \(libtpu\)"), ("h200:8", r"NVIDIA GPUs \(JAX's CUDA")]
)
def test_a_compiler_that_is_not_installed_is_told_with_how_to_install(target, words, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"{words}.*pip install -e '.\[aot\]'"):
        topologies.devices(target)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("v6e-8", ("v6e", "2x4")),
        ("v5litepod-32", ("v5e", "4x8")),
        ("v5e-1", ("v5e", "1x1")),
        ("v5p-8", ("v5p", "2x2x1")),  # eight cores are four chips
        ("v5p-128", ("v5p", "4x4x4")),
        ("tpu7x-16", ("tpu7x", "2x2x2")),  # sixteen cores are eight chips
        ("V6E-8", ("v6e", "2x4")),
        ("A100", ("a100", "")),
        ("a100:40", ("a100-40", "")),
        ("a100:80", ("a100", "")),
        ("a100:8", ("a100", "8")),
        ("a100-40:8", ("a100-40", "8")),
        ("rtx4090", ("rtx4090", "")),
    ],
)
def test_what_a_target_means(target, parts):
    assert topologies.split(target) == parts


@pytest.mark.parametrize(("target", "right"), [("a100:40:8", "a100-40:8"), ("a100:80:8", "a100:8")])
def test_a_count_after_the_memory_is_refused_with_the_right_name(target, right):
    with pytest.raises(UserError, match=rf"several A100 of \d0 GB are {right}$"):
        topologies.split(target)
    assert topologies.split(right)[1] == "8"


@pytest.mark.parametrize("family", topologies._SOLD)
def test_a_slice_has_the_chips_of_its_name(family):
    kind, cores, shapes = topologies._SOLD[family]
    for chips in shapes:
        found, shape = topologies.split(f"{family}-{chips * cores}")
        assert found == kind and math.prod(map(int, shape.split("x"))) == chips
