"""docs/add_a_parameter.md, followed to the letter: a row and two lines add a parameter."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from programs import make_program

from gptoss_jax import loading, weights
from gptoss_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import resume
from gptoss_jax.model import Transformer, attention, block
from gptoss_jax.model.initial import init_params
from gptoss_jax.optimizer.matrix_views import scale_by_adafactor, scale_by_muon_or_adam
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import padding, sharding
from gptoss_jax.parameters import table
from gptoss_jax.parameters.table import Parameter
from gptoss_jax.runs import checkpoints
from gptoss_jax.types import Batch
from gptoss_jax.weights.safetensors_io import read_header

PATH, AFTER = "layers/attention/head_scale", "window=window, cache=cache)\n"
DOC = (Path(__file__).parents[2] / "docs" / "add_a_parameter.md").read_text()
ROW_TEXT, LINES, _ = re.findall(r"```python\n(.*?)```", DOC, re.S)
ROW = eval(ROW_TEXT)
L, N, T, V = 2, 4, 16, 64
# Of no other test: `abstract_params` remembers the models that it has seen.
MODEL = ModelConfig(
    vocab_size=V, num_layers=L, d_model=32, num_heads=N, num_kv_heads=2, head_dim=6, num_experts=4,
    active_experts=2, d_expert=48, window=8, context=64, init_std=0.03,
    dtype="float32", param_dtype="float32",
)  # fmt: skip


@pytest.fixture
def model(monkeypatch) -> None:
    """The model with the page's two lines; what it changes is as before after the test."""
    monkeypatch.setattr(table, "_ROWS", dict(table._ROWS))
    source = inspect.getsource(attention)
    assert source.count(AFTER) == 1
    copy = types.ModuleType("attention_with_a_scale")
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    exec(source.replace(AFTER, AFTER + LINES), copy.__dict__)
    monkeypatch.setattr(block, "Attention", copy.Attention)


@pytest.fixture
def row(model) -> None:
    """The page's row."""
    table.add(ROW)


CONFIG = Config(
    model=MODEL,
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0),
    data=DataConfig(sequence_length=T),
)


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, V, (8, T + 1)).astype(np.int32)
    ones = np.ones((8, T), np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (8, 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


def scale_of(params) -> np.ndarray:
    return np.asarray(params["layers"]["attention"]["head_scale"])


def test_it_begins_trains_and_comes_back(row, tmp_path):
    program = make_program(CONFIG)
    state, metrics = program.step(program.begin(None), batch())
    assert math.isfinite(metrics.loss)
    moved = scale_of(state.params)
    assert moved.shape == (L, N) and np.all(moved != 1)
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, state, config=CONFIG, data_state={}, fingerprint={})
    back, _ = resume.restore(tmp_path, program.abstract_state())
    chex.assert_trees_all_equal(back.params, state.params)
    chex.assert_trees_all_equal(back.opt_state, state.opt_state)


def test_it_is_split_over_a_mesh(row):
    with jax.set_mesh(meshes.make(MeshConfig(fsdp=2, expert=2, tensor=2))):
        state = make_program(CONFIG).abstract_state()
    for tree in (state.params, optax.tree_utils.tree_get(state.opt_state, "mu")):
        assert tree["layers"]["attention"]["head_scale"].sharding.spec == P(None, "tensor")


@pytest.mark.slow
def test_it_trains_on_a_mesh_as_on_one_device(row):
    def run():
        program = make_program(CONFIG)
        state, losses = program.begin(None), []
        for _ in range(2):
            state, metrics = program.step(state, batch())
            losses.append(float(metrics.loss))
        return losses, state.params["layers"]["attention"]["head_scale"]

    want, alone = run()
    with jax.set_mesh(meshes.make(MeshConfig(fsdp=2, expert=2, tensor=2))):
        have, own = run()
    assert own.addressable_shards[0].data.shape == (L, N // 2)
    np.testing.assert_allclose(have, want, rtol=1e-5)
    np.testing.assert_allclose(own, alone, atol=1e-4)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_take_it_as_vectors(row, name):
    optimizer = scale_by_adafactor() if name == "adafactor" else scale_by_muon_or_adam(**MUON)
    grads = jax.tree.map(lambda x: x * jnp.arange(1.0, 5.0), tree())
    updates, _ = optimizer.update(grads, optimizer.init(tree()), tree())
    np.testing.assert_allclose(scale_of(updates), np.ones((L, N)), atol=1e-3)  # the first step


def test_files_that_lack_it_load_and_it_is_refused_where_no_tensor_is_named(row, tmp_path):
    params = init_params(Transformer(MODEL))
    with pytest.raises(UserError, match=f"{PATH} can't be expressed in the Hugging Face layout"):
        weights.save(tmp_path / "no", Transformer(MODEL), params)
    assert not (tmp_path / "no").exists()
    del table._ROWS[PATH], params["layers"]["attention"]["head_scale"]
    weights.save(tmp_path / "without", Transformer(MODEL), params)
    table.add(ROW)
    _, loaded = loading.load(tmp_path / "without", dtype=jnp.float32)
    np.testing.assert_array_equal(scale_of(loaded), np.ones((L, N)))


def test_it_is_written_and_read_where_a_tensor_is_named(model, tmp_path):
    table.add(dataclasses.replace(ROW, files=("attn.head_scale", "self_attn.head_scale")))
    params = init_params(Transformer(MODEL))
    own = np.arange(L * N, dtype=np.float32).reshape(L, N)
    params["layers"]["attention"]["head_scale"] = jnp.asarray(own)
    weights.save(tmp_path / "a", Transformer(MODEL), params)
    header = read_header(tmp_path / "a" / "model.safetensors")
    assert header["model.layers.1.self_attn.head_scale"].shape == (N,)
    _, back = loading.load(tmp_path / "a", dtype=jnp.float32)
    chex.assert_trees_all_equal(back, params)


def tree() -> dict:
    return {"layers": {"attention": {"head_scale": jnp.ones((L, N))}}}


MUON = {"b1": 0.9, "b2": 0.9, "eps": 1e-8, "moment_dtype": jnp.float32}
READERS = {
    "model": lambda: init_params(Transformer(MODEL)),
    "sharding": lambda: sharding.specs(tree(), jax.sharding.AbstractMesh((2,), ("tensor",))),
    "gathered": lambda: table.row(PATH),
    "padding": lambda: padding.resize(tree(), by=32),
    "adafactor": lambda: scale_by_adafactor().init(tree()),
    "muon": lambda: scale_by_muon_or_adam(**MUON).init(tree()),
}


@pytest.mark.parametrize("reader", READERS)
def test_without_a_row_every_reader_raises(model, reader):
    with pytest.raises(ValueError, match=rf"table of parameters .*table\.py\) has no {PATH}"):
        READERS[reader]()


def test_without_a_row_an_export_refuses_the_leaf(row, tmp_path):
    params = init_params(Transformer(MODEL))
    del table._ROWS[PATH]
    with pytest.raises(UserError, match=f"has the unknown leaf {PATH}"):
        weights.save(tmp_path / "no", Transformer(MODEL), params)


def test_a_row_is_added_once(model):
    table.add(ROW)
    table.add(eval(ROW_TEXT))
    with pytest.raises(ValueError, match=f"has another row for {PATH}"):
        table.add(Parameter(PATH, "L H"))
    with pytest.raises(ValueError, match="L is the first axis under layers/"):
        Parameter("layers/attention/other", "N")
