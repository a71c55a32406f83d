"""What the compiled step of a mesh exchanges, and what never exists on one device."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import pytest
from programs import make_program
from test_meshes import CONFIG, MODEL, make_batch, make_mesh

from gptoss_jax.config import LoRAConfig
from gptoss_jax.parallel import sharding

E, V, D, F = MODEL.num_experts, MODEL.vocab_size, MODEL.d_model, MODEL.d_expert
SHAPE = re.compile(r"(?:f32|bf16|s32|u8|pred)\[([\d,]+)\]")


def compiled_step(text: str, **model: Any) -> str:
    mesh = make_mesh(text)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **model))
    with jax.set_mesh(mesh):
        program = make_program(config)
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            make_batch(),
            sharding.batch_shardings(make_batch(), mesh),
        )
        step = program.step.lower(program.abstract_state(), shapes)  # pyright: ignore
        return step.compile().as_text()


def shapes_of(lines: list[str]) -> set[tuple[int, ...]]:
    return {
        tuple(int(n) for n in found.split(",")) for line in lines for found in SHAPE.findall(line)
    }


@pytest.mark.parametrize(
    "text",
    [
        "expert 2 fsdp 2 tensor 2",
        pytest.param("expert 2 context 4", marks=pytest.mark.slow),
        pytest.param("expert 8", marks=pytest.mark.slow),
        pytest.param("tensor 8", marks=pytest.mark.slow),
    ],
)
def test_no_experts_no_vocabulary_and_no_logits_are_gathered(text: str):
    lines = compiled_step(text).splitlines()
    results = [line.split(" all-gather", 1)[0] for line in lines if " all-gather" in line]
    gathered = shapes_of([result for result in results if "=" in result])
    assert gathered or text == "tensor 8", "FSDP gathers something, or this reads the text wrongly"
    experts = [s for s in gathered if E in s and s[-2:] != (E, D)]  # that is the router's weight
    assert not experts, f"expert weights are gathered over expert: {experts}"
    assert not [s for s in gathered if V in s], "an all-gather has the whole vocabulary in it"
    logits = [s for s in shapes_of(lines) if len(s) > 1 and s[-1] == V]
    assert not logits, f"whole rows of logits exist: {logits}"
    kinds = ["all-gather"] if text == "tensor 8" else ["all-gather", "reduce-scatter", "all-to-all"]
    assert any(kind in line for line in lines for kind in kinds)


@pytest.mark.slow
def test_adapters_of_experts_are_gathered_of_the_device_s_own_experts_alone():
    """FSDP gathers a layer's A and B, and nothing is gathered over expert."""
    lora = LoRAConfig(targets=("attention", "experts"), rank=3)
    lines = compiled_step("expert 2 fsdp 2 tensor 2", experts="mxfp4", lora=lora).splitlines()
    results = [line.split(" all-gather", 1)[0] for line in lines if " all-gather" in line]
    gathered = shapes_of([result for result in results if "=" in result])
    assert [s for s in gathered if s[-2:] == (D, 3)], "A of gate_up is split over fsdp"
    assert not [s for s in gathered if E in s and s[-2:] != (E, D)]  # that is the router's weight
