"""The update in the backward pass, compiled: gradients of a layer at a time, stacks in place."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax

from gptoss_jax import chips
from gptoss_jax.chips import topologies
from gptoss_jax.config import command_line
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.planning import cost, programs

CONFIG = Path(__file__).parents[2] / "configs/20b_one_gpu.py"
# Experts are nearly all there is: what 256 tokens and the tables take is little beside a layer's.
SIZES = {"num_experts": 32, "d_model": 512, "d_expert": 768, "num_heads": 8, "num_kv_heads": 2}
# One kind of layer, and matrices alone are trained: less for the compiler.
SIZES |= {"vocab_size": 3072, "layer_pattern": "banded"}
FROZEN = ("*bias", "*scale", "*/sinks")
LAYERS = (8, 16)
LAYER = 3 * 32 * 512 * 768 * 2  # bytes of a layer's matrices, and of their gradients


def compiled(layers: int) -> tuple[programs.Lowered, Any]:
    """Return the step of so many layers as it was lowered, and what the compiler made of it."""
    options = ["--config", str(CONFIG), "--data.sequence_length", "128"]
    for name, size in (SIZES | {"num_layers": layers}).items():
        options += [f"--model.{name}", str(size)]
    config = command_line.load(options, prog="plan")
    optimizer = dataclasses.replace(config.optimizer, freeze=FROZEN)
    config = dataclasses.replace(config, optimizer=optimizer)
    mesh = meshes.make(config.mesh, topologies.devices("h200"))
    with chips.assume("h200"), jax.set_mesh(mesh):
        lowered = programs.train(config, mesh)
        return lowered, lowered.compile()


def check_stacks(text: str, layers: int) -> None:
    """Hold the stacks of both matrices, and of their moments, to be written a layer at a time."""
    made = re.findall(rf"^.*= \(?bf16\[{layers},32,[\d,]+\]\S* ([\w\-]+)\(.*$", text, re.M)
    assert made.count("dynamic-update-slice") >= 3 * 2
    assert not {"copy", "copy-start", "transpose", "broadcast", "concatenate"} & {*made}


def test_gradients_of_the_whole_model_never_exist_and_stacks_are_updated_in_place():
    few, many = LAYERS
    beside = {}
    for layers in LAYERS:
        lowered, step = compiled(layers)
        memory = step.memory_analysis()
        whole = lowered.parts["parameters"] + lowered.parts["optimizer state"]
        assert memory.alias_size_in_bytes > 0.999 * whole
        check_stacks(step.as_text(), layers)
        arguments = memory.argument_size_in_bytes
        assert arguments > 3 * layers * LAYER  # parameters and two moments
        beside[layers] = cost._allocated(memory, "h200") - arguments
    # A layer's parameters, moments and gradient: measured, 4.2 times its matrices.
    assert LAYER < beside[many] < 5 * LAYER < many * LAYER / 3
    # A layer more keeps its input, of 256 tokens of 512.
    assert beside[many] - beside[few] < (many - few) * 256 * 512 * 4 + 1e6
