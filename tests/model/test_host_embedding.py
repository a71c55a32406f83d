"""The embedding table on the host: the same training, and so many bytes less in the step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import make_program
from tiny_training import TINY, write_chats

from gptoss_jax import data, train
from gptoss_jax.config import command_line
from gptoss_jax.errors import UserError
from gptoss_jax.model import host_embedding
from gptoss_jax.model.initial import init_params
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.planning.shapes import shapes
from gptoss_jax.runs import metrics
from gptoss_jax.training.step import averaged_params
from gptoss_jax.types import Batch

ROOT = Path(__file__).parents[2]
LORA = ["--init", "random", "--model.lora.targets", "attention", "embedding"]
LORA += ["--model.lora.rank", "3", "--model.layer_pattern", "full"]
ON_HOST = "--model.embedding_on_host"
B, T = 6, 24


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(*options: str):
    sizes = ["--data.batch_size", str(B), "--data.sequence_length", str(T)]
    return command_line.load([*TINY, *LORA, *sizes, *options])


def batch_of(config) -> Batch:
    rng = np.random.default_rng(4)
    ids = rng.integers(0, config.model.vocab_size, (B, T + 1)).astype(np.int32)
    segments = np.ones((B, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    weights = (rng.random((B, T)) < 0.4).astype(np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], weights, segments, positions)  # pyright: ignore[reportArgumentType]


def two_steps(config, mesh):
    """Train twice on one batch, from a state placed as the trainer places it.

    Not from adapters of zero: gradients of near nothing are rounding, which Adam makes large. And
    not from large ones: at a gradient norm of 45 a step makes rounding a hundred times as large.
    """
    program = make_program(config)
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state())
    params, rng = init_params(program.model), np.random.default_rng(3)
    shaken = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), params)
    state = jax.device_put(program.begin(shaken), shardings)
    spread = partial(data.spread, mesh=mesh, rows=(0, B), size=B)
    seen = []
    for _ in range(2):
        batch, more = program.prepare(state, batch_of(config), spread)
        assert not more
        state, measured = program.step(state, batch)
        seen.append(jax.device_get((measured.loss, measured.grad_norm)))
    return state, seen


@pytest.mark.slow
def test_it_trains_the_same():
    """In microbatches, with layers' inputs on the host too: as if all were on the device."""
    options = ["--optimizer.accumulate", "2"]
    plain, on_host = config_of(*options), config_of(*options, ON_HOST, "--model.remat", "offload")
    mesh = meshes.make(plain.mesh, jax.devices())
    with jax.set_mesh(mesh):
        want, expected = two_steps(plain, mesh)
        state, seen = two_steps(on_host, mesh)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    assert seen[0] != seen[1]
    got, wanted = (flatten(s.params["lora"]) for s in (state, want))
    for name, x in wanted.items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-5 * float(np.abs(x).max()))
    table = state.params["embedding"]["weight"]
    assert table.sharding.memory_kind == host_embedding.HOST
    assert np.array_equal(table, want.params["embedding"]["weight"])
    # What evaluates and samples has it on the device.
    for params in (averaged_params(state), host_embedding.on_device(state.params)):
        kinds = {x.sharding.memory_kind for x in jax.tree.leaves(params)}
        assert kinds == {jax.devices()[0].default_memory().kind}


def test_the_step_takes_rows_and_no_table():
    config = config_of(ON_HOST)
    run = shapes(config)
    lowered = run.step.lower(run.state, run.batch)
    c, taken = config.model, [x.shape for x in jax.tree.leaves(lowered.in_avals)]
    assert taken.count((B, T, c.d_model)) == 1
    assert taken.count((c.vocab_size, c.d_model)) == 1  # of the unembedding


def test_a_table_that_is_trained_is_refused():
    words = "embedding table out of the step.*optimizer.freeze embedding/weight"
    with pytest.raises(UserError, match=words):
        make_program(config_of(ON_HOST, "--optimizer.only", "embedding/weight"))
    make_program(config_of(ON_HOST))


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path):
    """Without adapters, so that checkpoints hold the table."""
    chats = str(write_chats(tmp_path / "a.jsonl", 40))
    options = [*TINY, "--init", "random", "--optimizer.freeze", "embedding/weight"]
    options += ["--data.train", chats, "--data.held_out", "--optimizer.schedule", "constant"]

    def run(name: str, steps: str, *more: str) -> list[float]:
        workdir = tmp_path / name
        train.main([*options, "--workdir", str(workdir), "--train.steps", steps, *more])
        return [r["loss"] for r in metrics.read(workdir) if "loss" in r]

    want = run("plain", "3")
    run("host", "2", ON_HOST)
    assert run("host", "3", ON_HOST) == pytest.approx(want)
