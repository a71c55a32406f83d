"""What is said of targets that are none, or whose compiler is not here."""

from __future__ import annotations

import importlib.util

import pytest

from gptoss_jax.chips import topologies
from gptoss_jax.errors import UserError


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
