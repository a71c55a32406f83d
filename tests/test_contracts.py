"""What every file of configs/ and every folder of experiments/ has to keep, found by looking.

A training step of each is lowered, at its full size and without a number: no config rots unseen.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import make_program

from gptoss_jax.config import Config, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.types import Batch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import common  # noqa: E402

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
EXPERIMENTS = common.names()
VARIANTS = [(name, variant) for name in EXPERIMENTS for variant in common.load(name).variants]
FAST = {"tiny.py", "20b_lora.py"}
SEEDS = {"0", "1", "2"}


def lower_step(config: Config, file: str) -> str:
    """Lower the step that the trainer would run, from shapes alone; return its text.

    The model is built by the `make_model` of the config file, if it has one.
    """
    c = config.model
    even = np.full((c.num_layers, c.num_experts), 1 / c.num_experts)
    sources = len(config.data.weights)
    make_model = command_line.read_make_model(file) or Transformer
    program = make_program(config, load=even, make_model=make_model)
    state = jax.eval_shape(program.begin, None)
    B, T = config.data.batch_size, config.data.sequence_length
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = Batch(
        tokens=ids,
        targets=ids,
        weights=jax.ShapeDtypeStruct((B, T), jnp.float32),
        segment_ids=ids,
        positions=ids,
        sources=jax.ShapeDtypeStruct((B,), jnp.int32) if sources else None,
    )
    lowered = program.step.lower(state, program.objective.complete(batch))
    new, measured = lowered.out_info
    assert jax.tree.map(_form, new) == jax.tree.map(_form, state), "the state changes its form"
    assert measured.router.load.shape == (c.num_layers, c.num_experts)
    return lowered.as_text()


def _form(x: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], str]:
    return x.shape, str(x.dtype)


def test_there_are_configs_and_experiments():
    assert {"tiny.py", "20b.py", "120b.py"} <= set(CONFIGS)
    assert {"sinks", "layer_patterns"} <= set(EXPERIMENTS)
    folders = {
        path.name
        for path in (ROOT / "experiments").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert folders == set(EXPERIMENTS), "a folder of experiments/ without config.py"


# Each takes seconds to trace: in the fast tier the smallest, and a real one.
@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_a_step_of_every_config_lowers(name: str):
    file = f"{ROOT}/configs/{name}"
    config = command_line.load(["--config", file])
    shape = f"tensor<{config.data.batch_size}x{config.data.sequence_length}xi32>"
    assert shape in lower_step(config, file)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_step_of_every_variant_lowers(name: str, variant: str):
    experiment = common.load(name)
    config = experiment.get_config(variant)
    shape = f"tensor<{config.data.batch_size}x{config.data.sequence_length}xi32>"
    assert shape in lower_step(config, f"{ROOT}/{experiment.config_file(variant)}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_variants_change_what_they_say_and_are_options_of_the_command_line(name: str):
    experiment = common.load(name)
    base = experiment.get_config(experiment.variants[0])
    assert base.init == "random" and base.workdir is None
    assert set(experiment.configs) <= set(experiment.variants[1:])
    changed: set[str] = set()
    for variant in experiment.variants:
        config, file = experiment.get_config(variant), f"{ROOT}/{experiment.config_file(variant)}"
        fields = common.differences(config, base)
        own = variant in experiment.configs and command_line.read_make_model(file)
        assert fields or own or variant == experiment.variants[0], f"{variant} is the same run"
        assert set(fields) <= set(experiment.changes), f"{variant} changes {', '.join(fields)}"
        options = experiment.options(variant)
        assert command_line.load(["--config", file, *options]) == config
        assert bool(options) == (bool(fields) and variant not in experiment.configs)
        changed |= set(fields)
    assert changed == set(experiment.changes)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_written_up_with_results_of_its_variants(name: str):
    experiment = common.load(name)
    log = (ROOT / "experiments" / "README.md").read_text()
    assert f"\n### {name}" in log, f"experiments/README.md has no entry '### {name}'"
    entry = log.split(f"\n### {name}")[1].split("\n### ")[0]
    assert f"{name}/figure.png" in entry and f"run.py {name}" in entry
    assert (experiment.folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((experiment.folder / "results.json").read_text())
    assert record["command"] == f"python experiments/run.py {name}"
    base = experiment.get_config(experiment.variants[0])
    assert list(record["variants"]) == list(experiment.variants)
    assert record["steps"] == base.train.steps
    for variant, runs in record["variants"].items():
        options = experiment.options(variant)
        assert runs["options"] == options, f"{variant} was run with other options: run it again"
        file = experiment.config_file(variant) if variant in experiment.configs else None
        assert runs.get("config") == file, f"{variant} was run by another config: run it again"
        assert set(runs["seeds"]) >= SEEDS
        for run in runs["seeds"].values():
            assert all(isinstance(n, float | int) for n in run["numbers"].values())
    text = (experiment.folder / "results.json").read_text()
    assert str(ROOT) not in text and str(Path.home()) not in text


def test_options_say_every_kind_of_difference():
    base = Config()
    model = dataclasses.replace(base.model, qk_norm=True, sinks="off", rope_factor="auto")
    optimizer = dataclasses.replace(base.optimizer, freeze=("a", "b"), learning_rate=3e-3)
    config = dataclasses.replace(base, model=model, optimizer=optimizer)
    file = ["--config", f"{ROOT}/configs/20b.py"]
    there = command_line.load(file)
    there_model = dataclasses.replace(there.model, qk_norm=True, sinks="off", rope_factor="auto")
    there_new = dataclasses.replace(there, model=there_model)
    assert command_line.load([*file, *common.options(there_new, there)]) == there_new
    assert common.options(there, there_new)[0] == "--model.sinks"
    assert "--model.no-qk_norm" in common.options(there, there_new)
    assert common.options(config, base)[-3:] == ["--optimizer.freeze", "a", "b"]


def test_an_experiment_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"no experiment 'sink': there are .*sinks"):
        common.load("sink")
