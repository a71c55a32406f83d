"""Checkpoints: what is saved comes back, which are kept, and what is wrong with bad ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from programs import make_program

from gptoss_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gptoss_jax.config.objective import DistillConfig, DPOConfig, GRPOConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import checkpoint, resume
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import padding
from gptoss_jax.runs import checkpoints, records, same_config
from gptoss_jax.runs.orbax_reader import DamagedError
from gptoss_jax.training.step import init_state
from gptoss_jax.types import MXFP4, TrainState

CONFIG = Config(name="t", data=DataConfig(train=("a.jsonl",)))
PRINT = {"files": [{"name": "a.jsonl", "size": 3}], "settings": {"train.seed": 0}}


def make_state(step: int = 0) -> TrainState:
    packed = MXFP4(jnp.full((5, 2, 16), 9, jnp.uint8), jnp.full((5, 2), 120, jnp.uint8))
    params = {
        "embedding": {"weight": jnp.arange(21.0).reshape(7, 3)},
        "layers": {"x": {"bias": jnp.ones((3,), jnp.bfloat16), "down_weight": packed}},
    }
    state = init_state(None, make_optimizer(OptimizerConfig(), 5), params, seed=2)
    return state.replace(step=jnp.int32(step))


def save(manager, state, **more):
    defaults = {"config": CONFIG, "data_state": {"row": 3}, "fingerprint": PRINT}
    checkpoints.save(manager, state, **(defaults | more))


@pytest.fixture
def workdir(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    with checkpoints.open_manager(tmp_path) as manager:
        for step in (2, 4):
            save(manager, make_state(step))
    return tmp_path


def test_what_is_saved_comes_back(workdir):
    want = make_state(4)
    state, record = resume.restore(workdir, make_state(0))
    assert jax.tree.structure(state) == jax.tree.structure(want)
    chex.assert_trees_all_equal(state.params, want.params)
    chex.assert_trees_all_equal(state.opt_state, want.opt_state)
    chex.assert_trees_all_equal_dtypes(state.params, want.params)
    assert int(state.step) == 4
    assert jax.random.uniform(state.rng) == jax.random.uniform(want.rng)
    assert record == records.Record(4, CONFIG, {"row": 3}, PRINT)
    assert int(resume.restore(workdir, make_state(0), step=2)[0].step) == 2


def test_abstract_states_will_do(workdir):
    abstract = jax.eval_shape(make_state)
    chex.assert_trees_all_equal(resume.restore(workdir, abstract)[0].params, make_state().params)


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    state = TrainState(jnp.int32(1), {"w": jnp.arange(2e6)}, {"m": jnp.ones(9)}, jax.random.key(0))
    go_on = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda p: p * 0 - 1, s.params)), donate_argnums=0
    )
    with checkpoints.open_manager(tmp_path) as manager:
        save(manager, state)
        for _ in range(3):
            state = go_on(state)
    read, _ = resume.restore(tmp_path, state)
    np.testing.assert_array_equal(read.params["w"], np.arange(2e6, dtype=np.float32))


def test_newest_and_best_are_kept(tmp_path):
    losses = [None, 3.0, 2.0, None, 4.0, None, 3.5]
    with checkpoints.open_manager(tmp_path, keep=2) as manager:
        for step, loss in enumerate(losses, 1):
            save(manager, make_state(step), held_out_loss=loss)
    assert records.steps(tmp_path) == [3, 6, 7]
    assert records.best_step(tmp_path) == (3, 2.0)


def test_a_run_killed_while_saving_leaves_the_last_whole_one(workdir):
    broken = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
    (broken / "params").mkdir(parents=True)
    assert records.read_record(workdir).step == 4
    with checkpoints.open_manager(workdir) as manager:
        save(manager, make_state(6))
    assert records.steps(workdir) == [2, 4, 6] and not broken.exists()
    chex.assert_trees_all_equal(
        resume.restore(workdir, make_state())[0].params, make_state().params
    )


def test_missing_checkpoints(tmp_path, workdir):
    with pytest.raises(UserError, match="there is no checkpoint in it"):
        records.read_record(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 2, 4"):
        resume.restore(workdir, make_state(), step=3)


def test_the_best_is_kept_by_a_run_that_goes_on(tmp_path):
    for step, loss in enumerate([3.0, 2.0, None, 4.0, 3.5, None], 1):
        with checkpoints.open_manager(tmp_path, keep=2) as manager:
            save(manager, make_state(step), held_out_loss=loss)
    assert records.steps(tmp_path) == [2, 5, 6]
    (tmp_path / "checkpoints/5/record/metadata").unlink()  # as a kill while it is deleted leaves it
    assert records.best_step(tmp_path) == (2, 2.0)


# --- Averaged parameters -------------------------------------------------------------------------


def with_ema(state: TrainState) -> TrainState:
    return state.replace(ema={"layers": {"x": {"bias": jnp.full((3,), 0.3)}}})


def test_averages_come_back_and_are_what_is_loaded(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        save(manager, with_ema(make_state(2)))
    state, _ = resume.restore(tmp_path, jax.eval_shape(lambda: with_ema(make_state())))
    chex.assert_trees_all_equal(state.ema, with_ema(make_state()).ema)
    assert resume.restore(tmp_path, make_state())[0].ema is None
    with pytest.raises(UserError, match="has no ema: it is not whole"):
        (tmp_path / "checkpoints/2/ema").rename(tmp_path / "gone")
        resume.restore(tmp_path, with_ema(make_state()))


# --- Damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_arrays_cut_short(workdir, item):
    files = [p for p in (workdir / "checkpoints/4" / item).rglob("d/*") if p.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DamagedError, match="is cut short or damaged") as caught:
        resume.restore(workdir, make_state())
    assert f"checkpoints/4: its {item} " in str(caught.value) and "\n" not in str(caught.value)


def test_missing_items_and_damaged_records(workdir):
    folder = workdir / "checkpoints/4"
    (folder / "params").rename(folder / "gone")
    with pytest.raises(DamagedError, match="has no params: it is not whole"):
        resume.restore(workdir, make_state())
    record = folder / "record/metadata"
    whole = record.read_text()
    for text in (whole[:50], "", "\xff", "[]"):
        record.write_text(text, encoding="latin-1")
        with pytest.raises(DamagedError, match="its record "):
            records.read_record(workdir)
        assert records.newest_record(workdir).step == 2


def rewrite(folder, **fields) -> None:
    """Change a record, as another version of this package might have written it."""
    path = folder / "record/metadata"
    record = json.loads(path.read_text()) | fields
    record = {k: v for k, v in record.items() if v is not None and k != "sha256"}
    if record["schema"] != 1:
        record["sha256"] = records.digest(record)
    path.write_text(json.dumps(record))


def test_other_versions(workdir):
    folder = workdir / "checkpoints/4"
    rewrite(folder, schema=7)
    with pytest.raises(UserError, match="has schema version 7, and this gptoss_jax reads 1 to 4"):
        records.newest_record(workdir)
    # What the first version wrote.
    rewrite(folder, schema=1, checksums=None, spikes=None)
    state, record = resume.restore(workdir, make_state(0))
    chex.assert_trees_all_equal(state.params, make_state(4).params)
    assert record == records.Record(4, CONFIG, {"row": 3}, PRINT)
    config = json.loads((folder / "record/metadata").read_text())["config"]
    config["model"]["num_layrs"] = 3
    rewrite(folder, config=config)
    with pytest.raises(UserError, match=r"unknown field model.num_layrs; did you mean num_layers"):
        records.read_record(workdir)


def test_a_record_s_hash_and_step_are_held(workdir):
    folder = workdir / "checkpoints/4"
    path = folder / "record/metadata"
    whole = path.read_text()
    for old, new in [
        ('"row": 3', '"row": 2'),
        ('"schema": 3', '"schema": 1'),
        ("sha256", "sha257"),
    ]:
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(DamagedError, match="not what was written, by its hash"):
            records.read_record(workdir)
    path.write_text(whole)
    folder.rename(folder.with_name("5"))
    with pytest.raises(DamagedError):
        records.read_record(workdir)


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_arrays_are_held_against_their_checksums(workdir, item):
    folder = workdir / "checkpoints/4"
    sums = json.loads((folder / "record/metadata").read_text())["checksums"]
    name = sorted(sums[item])[2]
    sums[item][name] += 1
    rewrite(folder, checksums=sums)
    with pytest.raises(DamagedError) as caught:
        resume.restore(workdir, make_state(0))
    assert f"its {item} is damaged: {name} is not what was written" in str(caught.value)


def test_a_run_goes_on_from_the_last_whole_one(workdir):
    with checkpoints.open_manager(workdir) as manager:
        for step in (6, 8):
            save(manager, make_state(step))
    folder = workdir / "checkpoints"
    (folder / "8/record/metadata").write_text("{")
    (folder / "6/params/manifest.ocdbt").unlink()
    (folder / "6.damaged").mkdir()  # of an earlier time
    assert records.newest_record(workdir).step == 6
    restored = resume.restore_newest(workdir, make_state(0))
    assert restored.record.step == int(restored.state.step) == 4
    assert ["checkpoints/8" in x or "checkpoints/6" in x for x in restored.damaged] == [True, True]
    assert records.steps(workdir) == [4]
    assert (folder / "8.damaged").is_dir() and (folder / "6.damaged-2").is_dir()
    with checkpoints.open_manager(workdir) as manager:
        assert manager.all_steps() == [4]
        save(manager, make_state(6))
    assert resume.restore_newest(workdir, make_state(0)).damaged == []


def test_nothing_is_moved_when_none_is_whole(workdir):
    for step in (2, 4):
        (workdir / f"checkpoints/{step}/params/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole \(steps 2, 4\); choose another"):
        resume.restore_newest(workdir, make_state(0))
    assert records.steps(workdir) == [2, 4]
    for step in (2, 4):
        (workdir / f"checkpoints/{step}/record/metadata").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole \(steps 2, 4\)"):
        records.newest_record(workdir)


def test_what_is_the_machine_s_fault_is_no_damage(workdir, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no room for 12 bytes")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
    with pytest.raises(UserError, match=r"can't be read \(MemoryError: no room for 12"):
        resume.restore_newest(workdir, make_state(0))
    assert records.steps(workdir) == [2, 4]


def damage(folder, rng, every):
    """Yield (file, its bytes) with damage in turn: flipped bits, cut, empty, gone; then repair."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for at in range(int(rng.integers(min(every, len(whole)))), len(whole), every):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(flipped))
            yield path
        for cut in (len(whole) // 2, len(whole) - 1, 0):
            path.write_bytes(whole[:cut])
            yield path
        path.unlink()
        yield path
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "every",
    [997, pytest.param(97, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.exhaustive)],
)
@pytest.mark.timeout(3600)
def test_damage_anywhere_is_found_or_without_effect(tmp_path, every):
    with checkpoints.open_manager(tmp_path) as manager:
        for step in (2, 4):
            save(manager, with_ema(make_state(step)), held_out_loss=1 / step)
    like = with_ema(make_state(4))
    want = jax.device_get(like.replace(rng=0))
    found, harmless = set(), set()
    for n, path in enumerate(damage(tmp_path / "checkpoints/4", np.random.default_rng(5), every)):
        try:
            state, record = resume.restore(tmp_path, like, step=4)
        except DamagedError as error:
            assert "checkpoints/4" in str(error) and "\n" not in str(error)
            found.add(path.name)
        else:
            chex.assert_trees_all_equal(jax.device_get(state.replace(rng=0)), want)
            assert record == records.Record(4, CONFIG, {"row": 3}, PRINT)
            assert jax.random.uniform(state.rng) == jax.random.uniform(like.rng)
            harmless.add(path.name)
        if n % 20 == 0:  # damage to an old checkpoint is no matter for a run that goes on
            records.best_step(tmp_path)
            with checkpoints.open_manager(tmp_path) as manager:
                assert manager.all_steps() == [2, 4]
    assert {"metadata", "manifest.ocdbt", "_METADATA"} <= found
    assert "commit_success.txt" in harmless


def change(**sections):
    return dataclasses.replace(
        CONFIG,
        **{k: dataclasses.replace(getattr(CONFIG, k), **v) for k, v in sections.items()},
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_layers": 3}}, "another model: model.num_layers 24 -> 3"),
        ({"model": {"capacity_factor": 1.5}}, "another model: model.capacity_factor 0.0 -> 1.5"),
        ({"model": {"qat": True}}, "another model: model.qat False -> True"),
        (
            {"objective": {"name": "dpo", "dpo": DPOConfig(beta=0.3)}},
            "another objective: objective.name sft -> dpo;",
        ),
        ({"model": {"param_dtype": "float32"}}, "model.param_dtype bfloat16 -> float32"),
        ({"optimizer": {"b2": 0.9}}, "another optimizer: optimizer.b2 0.95 -> 0.9"),
        ({"train": {"z_loss": 0.5}}, "another optimizer: train.z_loss 0.0 -> 0.5"),
        (
            {"model": {"window": 9}, "optimizer": {"eps": 0.5}},
            "another model and optimizer: model.window 128 -> 9, optimizer.eps 1e-08 -> 0.5",
        ),
    ],
)
def test_another_run_is_refused_by_what_differs(sections, message):
    record = records.Record(4, CONFIG, {}, PRINT)
    with pytest.raises(UserError) as caught:
        same_config.check_same_run(record, change(**sections), data_changes=[], workdir="w")
    assert message in str(caught.value) and str(caught.value).startswith("w holds a run of")


def test_data_changes_are_refused_and_the_rest_may_change():
    record = records.Record(4, CONFIG, {}, PRINT)
    with pytest.raises(UserError, match=r"another data: data file a\.jsonl is gone"):
        same_config.check_same_run(
            record, CONFIG, data_changes=["data file a.jsonl is gone"], workdir="w"
        )
    free = change(
        train={"steps": 9, "log_every": 7, "eval_every": 3, "keep": 1, "on_nan": "skip"},
        model={"remat": "full", "layer_pattern": "bf" * 12},
        data={"train": ("/moved/a.jsonl",)},
    )
    same_config.check_same_run(record, free, data_changes=[], workdir="w")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ObjectiveConfig("dpo", dpo=DPOConfig(beta=0.2)),
            ObjectiveConfig("dpo", dpo=DPOConfig(beta=0.3)),
            "another objective: objective.dpo.beta 0.2 -> 0.3;",
        ),
        (
            ObjectiveConfig("distill", distill=DistillConfig("/a/big")),
            ObjectiveConfig("distill", distill=DistillConfig("/b/small")),
            "objective.distill.teacher big -> small",
        ),
        (  # what was moved, and what is no part of the objective
            ObjectiveConfig("grpo", grpo=GRPOConfig("a/r.py:f")),
            ObjectiveConfig("grpo", grpo=GRPOConfig("/b/r.py:f"), dpo=DPOConfig(beta=0.3)),
            None,
        ),
    ],
)
def test_objectives_are_compared(old, new, message):
    one, two = (dataclasses.replace(CONFIG, objective=objective) for objective in (old, new))
    with pytest.raises(UserError) if message else contextlib.nullcontext() as caught:
        record = records.Record(4, one, {}, PRINT)
        same_config.check_same_run(record, two, data_changes=[], workdir="w")
    assert message is None or message in str(caught.value)


@pytest.fixture(scope="module")
def model_run(tmp_path_factory):
    """Workdir, model and parameters of a run with averages of some, checkpoints 3 and 5."""
    from gptoss_jax.model import Transformer

    workdir = tmp_path_factory.mktemp("run")
    config = ModelConfig(
        num_layers=2, d_model=24, num_heads=6, num_kv_heads=2, head_dim=10, num_experts=5,
        active_experts=2, d_expert=14, vocab_size=40, param_dtype="bfloat16",
    )  # fmt: skip
    shapes = Transformer(config).abstract_params()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    ema = {"unembedding": {"weight": jnp.asarray(rng.normal(size=(40, 24)), jnp.float32)}}
    with checkpoints.open_manager(workdir) as manager:
        for step in (3, 5):
            state = TrainState(jnp.int32(step), params, (), jax.random.key(0), ema)
            save(manager, state, config=Config(model=config, train=TrainConfig(steps=step)))
    return workdir, config, params, ema


def test_load_params_reads_the_model_of_the_run(model_run):
    workdir, config, params, ema = model_run
    got, read = checkpoint.load_params(workdir, ema=False)
    assert got == config
    with pytest.raises(UserError, match="holds all of its parameters: leave out base"):
        checkpoint.load_params(workdir, base="elsewhere")
    chex.assert_trees_all_equal(read, params)
    _, read = checkpoint.load_params(workdir)
    averaged = params | {
        "unembedding": {"weight": ema["unembedding"]["weight"].astype(jnp.bfloat16)}
    }
    chex.assert_trees_all_equal(read, averaged)
    chex.assert_trees_all_equal_dtypes(read, params)


def test_load_params_names_the_whole_one_before_a_damaged_one(model_run, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(model_run[0], workdir)
    (workdir / "checkpoints/5/ema/manifest.ocdbt").unlink()
    for step in (None, 5):
        with pytest.raises(UserError) as caught:
            checkpoint.load_params(workdir, step=step)
        assert "checkpoints/5: its ema is cut short or damaged" in str(caught.value)
        assert str(caught.value).endswith("step 3 is whole: ask for it (--step 3, or step=3)")
    assert checkpoint.load_params(workdir, step=3)[0] == model_run[1]
    (workdir / "checkpoints/3/record/metadata").write_text("")
    with pytest.raises(UserError, match=r"checkpoints/5.*; no earlier checkpoint is whole"):
        checkpoint.load_params(workdir)
    assert records.steps(workdir) == [3, 5]  # reading moves nothing


# --- Meshes ------------------------------------------------------------------------------------

MESHES = (MeshConfig(), MeshConfig(fsdp=2, expert=2, context=2), MeshConfig(tensor=4, data=2))


@pytest.mark.slow
def test_from_any_mesh_to_any_mesh(tmp_path):
    """Packed experts of 2 blocks are 4 along tensor 4: what the mesh adds is no part of a run."""
    sizes = {"vocab_size": 48, "num_layers": 2, "d_model": 64, "num_heads": 8, "num_kv_heads": 4}
    sizes |= {"head_dim": 6, "num_experts": 4, "active_experts": 2, "d_expert": 64, "context": 64}
    model = ModelConfig(**sizes, experts="mxfp4", dtype="float32", param_dtype="bfloat16")
    config = Config(
        model=model,
        data=DataConfig(sequence_length=32),
        optimizer=OptimizerConfig(ema=0.5),
    )
    states, paddings = [], []
    for i, sizes in enumerate(MESHES):
        with jax.set_mesh(meshes.make(sizes)):
            begun = make_program(config)
            paddings.append(begun.model.config.expert_padding)
            abstract = begun.abstract_state()
            if i == 0:
                state = jax.device_put(begun.begin(None), jax.tree.map(placement, abstract))
                leaves, tree = jax.tree.flatten(state.opt_state)
                leaves = [x + i for i, x in enumerate(leaves, 1)]  # as after steps: none alike
                state = state.replace(opt_state=tree.unflatten(leaves))
            else:
                state, _ = resume.restore(
                    tmp_path / str(i - 1), abstract, expert_padding=paddings[i]
                )
                for x, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
                    assert x.shape == want.shape and x.sharding == want.sharding
            with checkpoints.open_manager(tmp_path / str(i)) as manager:
                save(manager, state, config=config, expert_padding=paddings[i])
            states.append(jax.device_get(state.replace(rng=jax.random.key_data(state.rng))))
    assert paddings == [0, 0, 64]
    added = states[2].params["layers"]["experts"]["down_weight"].blocks[:, :, :, 2:]
    assert added.shape[3] == 2 and not added.any()
    chex.assert_trees_all_equal(states[1], states[0])
    chex.assert_trees_all_equal(padding.resize(states[2], by=-64), states[0])
    a, b = (checkpoint.load_params(tmp_path / name) for name in "02")
    assert a[0] == b[0] == config.model
    chex.assert_trees_all_equal(a[1], b[1])
    there = [records.read_json(tmp_path / str(i), None)[0] for i in range(3)]
    assert there[0]["checksums"] == there[1]["checksums"] == there[2]["checksums"]


def placement(x):
    return x.sharding
