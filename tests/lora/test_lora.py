"""LoRA as a run: what is trained and what is not, tiny runs, and what bad input gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import make_program
from tiny_training import TINY, write_chats

import gptoss_jax
from gptoss_jax import train
from gptoss_jax.config import LoRAConfig, MeshConfig, OptimizerConfig, command_line
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.loading import checkpoint
from gptoss_jax.loading.convert import convert
from gptoss_jax.lora import adapters, fold, select
from gptoss_jax.lora.adapters import adapted as lora_paths
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.optimizer.matrix_views import _view
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import padding, sharding
from gptoss_jax.parameters.patterns import frozen_paths
from gptoss_jax.parameters.tree import flatten, path_name
from gptoss_jax.planning import dry_run
from gptoss_jax.planning.shapes import checkpoint_bytes, shapes, tree_bytes
from gptoss_jax.runs import metrics
from gptoss_jax.training import setup
from gptoss_jax.types import Batch
from gptoss_jax.weights import peft

ROOT = Path(__file__).parents[2]
CONFIG = [*TINY, "--model.experts", "mxfp4", "--init", "random", "--model.layer_pattern", "full"]
LORA = ["--model.lora.targets", "attention", "experts", "--model.lora.rank", "3"]
EVERY = ["attention", "experts", "router", "embedding", "unembedding"]
FEW = ["--data.held_out", "--train.steps", "4", "--train.eval_questions", "0"]
L, E = 2, 4


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return str(write_chats(tmp_path_factory.mktemp("data") / "a.jsonl", 40))


def config_of(*options: str):
    return command_line.load([*CONFIG, *options])


def masks_of(*options: str, load=None) -> dict:
    config = config_of(*options)
    shapes = Transformer(config.model).abstract_params()
    return flatten(select.masks(shapes, config.model, config.optimizer, load=load))


def test_only_adapters_are_trained_by_default():
    found = masks_of(*LORA)
    trained = {path for path, factor in found.items() if np.any(factor)}
    assert trained == {path for path in found if path.startswith("lora/")}
    assert len(trained) == 2 * 6
    # And what is named besides.
    more = masks_of(*LORA, "--optimizer.only", "*sinks", "layers[1]/*norm/scale")
    added = {path for path, factor in more.items() if np.any(factor)} - trained
    assert added == {
        "layers/attention/sinks", "layers/attention_norm/scale", "layers/moe_norm/scale"
    }  # fmt: skip
    assert np.array_equal(np.ravel(more["layers/moe_norm/scale"]), [0, 1])
    # Less, and at another pace.
    less = masks_of(*LORA, "--optimizer.freeze", "lora/*/a")
    assert {path[-1] for path, factor in less.items() if np.any(factor)} == {"b"}
    named = masks_of(*LORA, "--optimizer.only", "lora/*/b")
    assert {path for path, factor in named.items() if np.any(factor)} == {
        path for path in trained if path.endswith("/b")
    }
    rates = masks_of(*LORA, "--optimizer.learning_rates", "lora/*/b=16")
    assert rates["lora/layers/attention/q_weight/b"] == 16
    assert rates["lora/layers/attention/q_weight/a"] == 1


def test_experts_by_index_and_by_load_and_layers():
    targets = ["gate_up[1,3]", "down[top1]", "layers[1]/router/*"]
    load = np.array([[4, 1, 2, 3], [0, 1, 5, 2]])
    found = masks_of("--model.lora.targets", *targets, "--model.lora.rank", "3", load=load)
    one, two = (found[f"lora/layers/experts/{name}_weight/b"] for name in ("gate_up", "down"))
    assert one.shape == (L, E, 1, 1, 1) and two.shape == (L, E, 1, 1)
    assert one.ravel().tolist() == 2 * [0, 1, 0, 1]
    assert two.reshape(L, E).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert found["lora/layers/router/weight/a"].ravel().tolist() == [0, 1]
    config = config_of("--model.lora.targets", "down[top1]", "--model.lora.rank", "3")
    assert select.needs_load(config.model, config.optimizer)
    assert not select.needs_load(config_of(*LORA).model, config.optimizer)


def a_batch(config, *, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    size = (config.data.batch_size, 24)
    tokens = rng.integers(0, config.model.vocab_size, (size[0], size[1] + 1)).astype(np.int32)
    ones = np.ones(size, np.int32)
    positions = np.broadcast_to(np.arange(size[1], dtype=np.int32), size)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


def test_steps_move_the_adapters_chosen_and_nothing_else():
    config = config_of("--model.lora.targets", "q", "experts[2]", "--model.lora.rank", "3",
                       "--optimizer.weight_decay", "0.1")  # fmt: skip
    program = make_program(config)
    state = program.begin(None)
    before = jax.device_get(state.params)
    held = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    arrays = [path for path in held if "weight" in path or "layers" in path or "bias" in path]
    assert arrays and all("/lora/" in path for path in arrays)
    adapter_bytes = sum(x.nbytes for x in jax.tree.leaves(before["lora"]))
    assert tree_bytes(state.opt_state) <= 2 * adapter_bytes + 64
    losses = []
    for _ in range(3):  # on one batch
        state, measured = program.step(state, a_batch(config))
        losses.append(float(measured.loss))
    assert losses[-1] < losses[0]
    after = jax.device_get(state.params)
    chex.assert_trees_all_equal(
        *({k: v for k, v in tree.items() if k != "lora"} for tree in (before, after))
    )
    for name in ("gate_up_weight", "down_weight"):
        for part in "ab":
            old, new = (t["lora"]["layers"]["experts"][name][part] for t in (before, after))
            moved = np.any((old != new).reshape(L, E, -1), axis=(0, 2))
            assert moved.tolist() == [False, False, True, False]
            if part == "b":
                assert not np.any(new[:, [0, 1, 3]])
    moved = before["lora"]["layers"]["attention"]["q_weight"]["b"]
    assert np.any(moved != after["lora"]["layers"]["attention"]["q_weight"]["b"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (LORA, True),
        ([*LORA, "--optimizer.only", "*q_weight"], False),  # not the adapters alone
        (["--model.lora.targets", "--optimizer.only", "*router*", "*norm*"], True),
        (["--model.lora.targets", "--optimizer.only", "*experts*"], True),  # they are packed
        (["--model.lora.targets", "--optimizer.only", "*experts*", "--model.experts", "dense"],
         False),
        (["--model.lora.targets"], False),
    ],
)  # fmt: skip
def test_muon_without_a_matrix_says_that_it_is_adamw(options, says):
    config = config_of(*options, "--optimizer.name", "muon")
    model = Transformer(config.model)
    load = np.ones((config.model.num_layers, config.model.num_experts))
    factors = select.masks(model.abstract_params(), config.model, config.optimizer, load=load)
    lines = setup.describe_muon(config, model, factors)
    assert [line.startswith("optimizer AdamW, though") for line in lines] == [True] * says
    adam = dataclasses.replace(config.optimizer, name="adamw")
    assert not setup.describe_muon(dataclasses.replace(config, optimizer=adam), model, factors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_other_optimizers_take_a_step(name):
    config = config_of(*LORA, "--optimizer.name", name)
    program = make_program(config)
    measured = program.step(program.begin(None), a_batch(config))[1]
    assert bool(measured.finite)


def test_adafactor_sees_adapters_as_matrices():
    shapes = flatten(Transformer(config_of(*LORA).model).abstract_params()["lora"])
    views = {}
    for path, x in shapes.items():
        keys = tuple(jax.tree_util.DictKey(k) for k in ("lora", *path.split("/")))
        view, batch = _view(keys, jnp.zeros(x.shape))
        views[path] = view.shape, batch
    assert views["layers/attention/q_weight/b"] == ((L, 3, 48), 1)
    assert views["layers/attention/o_weight/a"] == ((L, 48, 3), 1)
    assert views["layers/experts/gate_up_weight/b"] == ((L, E, 3, 128), 2)
    assert views["layers/experts/down_weight/a"] == ((L, E, 64, 3), 2)


def test_adapters_are_added_to_weights_that_have_none():
    config = config_of(*LORA).model
    plain = dataclasses.replace(config, lora=LoRAConfig())
    base = init_params(Transformer(plain))
    one, two, other = (adapters.add(config, base, seed=seed) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, two)
    assert np.any(flatten(one["lora"])["layers/attention/q_weight/a"] !=
                  flatten(other["lora"])["layers/attention/q_weight/a"])  # fmt: skip
    assert adapters.add(config, one) is one
    assert adapters.add(plain, base) is base
    for wrong in (plain, dataclasses.replace(config, lora=LoRAConfig(("q",), rank=3))):
        with pytest.raises(UserError, match="have adapters, and not those"):
            adapters.add(wrong, one)


def test_bad_input_ends_with_one_line(chats, tmp_path, capsys, monkeypatch):
    wrong = {
        "names nothing that can be adapted": ["--model.lora.targets", "atention"],
        "a side of 4": ["--model.lora.targets", "router", "--model.lora.rank", "9"],
        "there is no 7: the experts are 0 to 3": ["--model.lora.targets", "gate_up[7]"],
        "leave no parameter": [*LORA, "--optimizer.freeze", "*"],
        "names all adapters": [*LORA, "--optimizer.only", "*sinks", "--optimizer.freeze", "lora/*"],
        "names no parameter": [*LORA, "--optimizer.only", "layrs/*"],
    }
    for message, options in wrong.items():
        argv = [*CONFIG, *FEW, "--data.train", chats, "--workdir", str(tmp_path / "no"), *options]
        monkeypatch.setattr("sys.argv", ["train", *argv])
        with pytest.raises(SystemExit) as stop:
            run_entry(train.main)
        said = capsys.readouterr()
        assert stop.value.code == 2 and message in said.err, (message, said.err)
        assert len(said.err.strip().splitlines()) == 1
    assert not (tmp_path / "no").exists()


def test_dry_run_shows_adapters():
    run = shapes(config_of(*LORA))
    table = dry_run.parameter_table(run)
    rows = {line.split()[0]: line for line in table}
    assert "mxfp4" in rows["layers/experts/gate_up_weight"]
    assert "packed" in rows["layers/experts/gate_up_weight"]
    assert "frozen" in rows["embedding/weight"]
    assert " all " in rows["lora/layers/experts/gate_up_weight/a"]
    frozen = frozen_paths(run.factors)
    held = jax.tree.leaves((run.state.params["lora"], run.state.opt_state))
    assert checkpoint_bytes(run.state, left_out=frozen) == sum(
        x.size * x.dtype.itemsize for x in held
    )
    text = "\n".join(setup.describe_trained(run.model, run.factors))
    assert "lora/layers/attention/q_weight/a" in text and "embedding/weight" in text
    chosen = config_of("--model.lora.targets", "down[1,3]", "--model.lora.rank", "3")
    program = make_program(chosen)
    text = "\n".join(setup.describe_trained(program.model, program.factors))
    assert "2 of 4 experts" in text and "experts 1, 3 of layers 0-1" in text


@pytest.fixture(scope="module")
def ran(chats, tmp_path_factory):
    """Train two steps, go on for two more, and return the workdir and the command's options."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    argv = [
        *(*CONFIG, *LORA, *FEW, "--data.train", chats, "--workdir", str(workdir)),
        *("--optimizer.schedule", "constant", "--optimizer.learning_rate", "1e-2"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        train.main([*argv, "--train.steps", "2"])
        train.main(argv)
    return workdir, argv


@pytest.mark.slow
def test_a_run_goes_on_and_is_loaded(ran, tmp_path):
    workdir, argv = ran
    assert [r["step"] for r in metrics.read(workdir) if "loss" in r] == [1, 2, 3, 4]
    model, params = gptoss_jax.load(workdir, dtype=jnp.float32)
    assert model.config.lora.targets == ("attention", "experts")
    chex.assert_trees_all_equal(params["lora"], checkpoint.load_params(workdir)[1]["lora"])
    assert all(np.any(x) for x in jax.tree.leaves(params["lora"]))
    # In another dtype adapters stay as they are.
    low = gptoss_jax.load(workdir, dtype=jnp.bfloat16)[1]
    chex.assert_trees_all_equal(low["lora"], params["lora"])
    assert low["embedding"]["weight"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match=r"another model.*lora\.rank 3 -> 2"):
        train.main([*argv, "--train.steps", "6", "--model.lora.rank", "2"])
    new = [*argv, "--workdir", str(tmp_path / "new"), "--init", str(workdir)]
    for wrong in (["--model.lora.alpha", "7"], ["--model.lora.targets"]):
        with pytest.raises(UserError, match=r"another model than the config's: model\.lora"):
            train.main([*new, *wrong])


@pytest.mark.slow
def test_a_run_is_exported_merged(ran, tmp_path):
    """Trained, merged, exported, imported: the adapted model, or the same requantised."""
    model, params = gptoss_jax.load(ran[0], dtype=jnp.float32)
    tokens = jnp.arange(20)[None] + 5

    def same(folder, config, expected):
        again, stored = gptoss_jax.load(folder, dtype=jnp.float32)
        assert again.config.experts == config.experts and "lora" not in stored
        got = again.apply({"params": stored}, tokens)
        want = Transformer(config).apply({"params": expected}, tokens)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

    gptoss_jax.save(tmp_path / "dense", model, params, experts="dense")
    same(tmp_path / "dense", *fold.merge(*fold.decode_experts(model.config, params)))
    report = convert(ran[0], tmp_path / "packed", to="hf", force=True)
    assert {cost.path for cost in report.costs} == set(lora_paths(model.config))
    same(tmp_path / "packed", *fold.merge(model.config, params))
    convert(ran[0], tmp_path / "peft", to="peft")
    own, written = peft.read(tmp_path / "peft", model.config)
    assert own.targets == ("q", "k", "v", "o", "gate_up", "down") and own.rank == 3
    for path, leaf in flatten(params["lora"]).items():
        assert np.array_equal(flatten(written)[path], leaf), path


@pytest.mark.slow
def test_the_tiny_run_learns_by_adapters_alone(tmp_path):
    workdir = tmp_path / "run"
    short = ["--train.steps", "40", "--data.sequence_length", "256", "--data.batch_size", "4"]
    short += ["--model.num_layers", "2"]
    options = [*short, "--data.held_out", "--workdir", str(workdir)]
    train.main(["--config", "configs/tiny_lora.py", *options])
    losses = [r["loss"] for r in metrics.read(workdir) if "loss" in r]
    assert losses[0] > 6 and np.mean(losses[-5:]) < 2.5


def test_full_tuning_is_what_it_was():
    config = config_of()
    assert config.model.lora == LoRAConfig()
    shapes = Transformer(config.model).abstract_params()
    assert "lora" not in shapes
    found = select.masks(shapes, config.model, OptimizerConfig())
    assert flatten(found)["embedding/weight"] == 1
    assert command_line.from_json(command_line.to_json(config)) == config
    named = config_of(*LORA)
    assert command_line.from_json(command_line.to_json(named)) == named


@pytest.mark.slow
def test_a_mesh_gives_the_adapters_that_one_device_gives():
    """With padding where 3 blocks of 32 do not divide: over `tensor`."""
    config = config_of(
        "--model.lora.targets", *EVERY, "--model.lora.rank", "3", "--model.d_expert", "96",
        "--model.num_heads", "8", "--model.num_kv_heads", "2", "--data.batch_size", "4",
        "--optimizer.learning_rate", "1e-2", "--optimizer.eps", "1e-3",
    )  # fmt: skip

    def run(mesh_config: MeshConfig):
        size = np.prod(dataclasses.astuple(mesh_config))
        mesh = meshes.make(mesh_config, jax.devices()[:size])
        with jax.set_mesh(mesh):
            program = make_program(config)
            state = jax.device_put(
                program.begin(None), jax.tree.map(lambda x: x.sharding, program.abstract_state())
            )
            measured = []
            for seed in range(3):
                batch = a_batch(config, seed=seed)
                batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
                state, metrics_ = program.step(state, batch)
                measured.append([float(metrics_.loss), float(metrics_.grad_norm)])
            extra = program.model.config.expert_padding
            lora = padding.resize({"lora": state.params["lora"]}, by=-extra)
            return jax.device_get(lora), measured, extra

    want, losses, extra = run(MeshConfig())
    assert extra == 0
    for mesh, padded in (
        (MeshConfig(fsdp=2, expert=2, tensor=2), 32),
        (MeshConfig(fsdp=2, context=2), 0),
    ):
        got, spread, extra = run(mesh)
        assert extra == padded
        np.testing.assert_allclose(spread, losses, rtol=1e-5)
        for path, x in flatten(want).items():
            limit = 1e-5 * np.abs(x).max()
            np.testing.assert_allclose(flatten(got)[path], x, atol=limit, rtol=0, err_msg=path)
