"""The base of a LoRA run: left out of its checkpoints, found again, and held against its hash."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import make_program
from tiny_training import TINY, write_chats

import gptoss_jax
from gptoss_jax import loading, train, weights
from gptoss_jax.config import LoRAConfig, MeshConfig, command_line
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.loading import checkpoint, resume
from gptoss_jax.loading import frozen_base as begun_base
from gptoss_jax.loading.convert import convert
from gptoss_jax.lora import fold, select
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import padding
from gptoss_jax.parameters.patterns import frozen_paths
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.runs import checkpoints, metrics, records
from gptoss_jax.runs import frozen_base as bases

ROOT = Path(__file__).parents[2]
MODEL = "--model.experts mxfp4 --model.num_layers 1 --model.layer_pattern b --model.d_expert 96 "
MODEL += "--model.num_heads 4 --model.num_kv_heads 2 --data.sequence_length 192 --data.batch_size 4"
LORA = "--model.lora.targets q experts --model.lora.rank 3 --optimizer.only *sinks "
LORA += "--optimizer.schedule constant --optimizer.learning_rate 1e-2 --train.eval_questions 0"
EXPERTS = ("layers/experts/gate_up_weight", "layers/experts/down_weight")
TRAINED = {
    "layers/attention/sinks",
    *(
        f"lora/layers/{name}_weight/{part}"
        for name in ("attention/q", "experts/gate_up", "experts/down")
        for part in "ab"
    ),
}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv(bases.PLACE, raising=False)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Arguments of a run with adapters, but for where it begins and is kept."""
    chats = write_chats(tmp_path_factory.mktemp("data") / "a.jsonl", 40)
    steps = ["--train.steps", "4", "--data.train", str(chats), "--data.held_out"]
    return [*TINY, *MODEL.split(), *LORA.split(), *steps]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, args):
    """A checkpoint to begin with, in float32 with packed experts."""
    os.chdir(ROOT)
    config = dataclasses.replace(command_line.load(args).model, lora=LoRAConfig())
    model = Transformer(config)
    place = tmp_path_factory.mktemp("base") / "hf"
    weights.save(place, model, init_params(model, seed=5))
    return place


@pytest.fixture(scope="module")
def whole(tmp_path_factory, args, folder):
    """A run from beginning to end, of which nothing is changed."""
    workdir = tmp_path_factory.mktemp("whole")
    os.chdir(ROOT)
    train.main([*args, "--init", str(folder), "--workdir", str(workdir)])
    return workdir


@pytest.fixture
def copy(tmp_path, whole, folder):
    """A copy of the run, whose base is a copy too: (workdir, base)."""
    workdir, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(whole, workdir)
    shutil.copytree(folder, base)
    for step in records.steps(workdir):
        _, at = records.read_json(workdir, step)
        path = at / "record" / "metadata"
        raw = json.loads(path.read_text())
        raw["base"] |= {"init": str(base), "folder": str(base)}
        del raw["sha256"]
        path.write_text(json.dumps(raw | {"sha256": records.digest(raw)}))
    return workdir, base


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in metrics.read(workdir) if "loss" in r]


def file_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_checkpoint_holds_what_is_trained_and_names_the_rest(whole, folder):
    raw, at = records.read_json(whole, 4)
    assert set(raw["checksums"]["params"]) == TRAINED
    base = records.read_record(whole).base
    assert base.folder == base.init == str(folder) and base.step is None
    stored = loading.load(folder, dtype=jnp.float32)[1]
    leaves = {path: x for path, x in flatten(stored).items() if path not in TRAINED}
    packed = [path for path, x in leaves.items() if hasattr(x, "blocks")]
    want = {path for path in leaves if path not in packed}
    want |= {f"{path}/{part}" for path in packed for part in ("blocks", "scales")}
    assert set(base.arrays) == want and len(packed) == 2
    assert base.arrays["layers/experts/down_weight/blocks"][:2] == ((1, 4, 32, 3, 16), "uint8")
    assert base.arrays["embedding/weight"][:2] == ((320, 32), "float32")
    # Bytes of what is trained, and no more, but for what orbax itself needs.
    model, params = gptoss_jax.load(whole, dtype=jnp.float32)
    trained = sum(x.nbytes for path, x in flatten(params).items() if path in TRAINED)
    frozen = sum(x.nbytes for x in jax.tree.leaves(params)) - trained
    assert file_bytes(at / "params") < trained + 0.3 * frozen
    # The model that is loaded has both.
    assert model.config.lora.targets == ("q", "experts")
    chex.assert_trees_all_equal(
        {k: v for k, v in flatten(params).items() if k not in TRAINED}, leaves
    )
    assert np.any(params["lora"]["layers"]["experts"]["down_weight"]["b"])
    sinks = params["layers"]["attention"]["sinks"]
    assert np.any(sinks != stored["layers"]["attention"]["sinks"])


@pytest.mark.slow
def test_killed_and_gone_on_with_from_a_moved_base_of_another_layout(args, whole, copy, tmp_path):
    workdir, base = copy
    shutil.rmtree(workdir / "checkpoints/4")
    options = [*args, "--workdir", str(workdir)]
    convert(base, tmp_path / "moved", to="openai")
    shutil.rmtree(base)
    for more in ([], ["--init", str(base)]):
        with pytest.raises(UserError) as caught:
            train.main([*options, *more])
        said = str(caught.value)
        assert f"{base}, the base of {workdir}, is not there" in said
        assert "--init" in said and "\n" not in said
    train.main([*options, "--init", str(tmp_path / "moved")])
    assert losses(workdir) == losses(whole)
    a, b = (checkpoint.load_params(w)[1] for w in (whole, workdir))
    chex.assert_trees_all_equal(a, b)
    # From now on it is there.
    assert records.read_record(workdir, 4).base.folder == str(tmp_path / "moved")
    assert records.read_record(workdir, 2).base.folder == str(base)


def test_a_base_is_found_by_argument_record_and_variable(copy, tmp_path, monkeypatch):
    workdir, base = copy
    want = gptoss_jax.load(workdir, dtype=jnp.float32)[1]
    base.rename(tmp_path / "new")
    with pytest.raises(UserError, match=r"is not there: say where it is now, by --init .*base="):
        gptoss_jax.load(workdir)
    got = gptoss_jax.load(workdir, dtype=jnp.float32, base=tmp_path / "new")[1]
    chex.assert_trees_all_equal(got, want)
    monkeypatch.setenv(bases.PLACE, str(tmp_path / "new"))
    chex.assert_trees_all_equal(gptoss_jax.load(workdir, dtype=jnp.float32)[1], want)
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        gptoss_jax.load(workdir, base="nowhere")
    with pytest.raises(UserError, match="base is for workdirs"):
        gptoss_jax.load(tmp_path / "new", base=tmp_path / "new")


def test_another_base_is_refused_by_what_differs(copy, args, capsys, monkeypatch):
    workdir, base = copy
    model, params = loading.load(base, dtype=jnp.float32)
    record = records.read_record(workdir)

    def saved(name: str, path: str) -> str:
        """Save the base with one number changed; return the folder."""
        leaves = flatten(params)
        leaves[path] = leaves[path].at[0, 2].add(1e-3)
        weights.save(base.parent / name, model, nest(leaves))
        return str(base.parent / name)

    def refused(folder: str) -> str:
        with pytest.raises(UserError) as caught:
            checkpoint.load_base(record.base, record.config.model, place=folder, whose=workdir)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    changed = saved("changed", "layers/router/bias")
    steps = ["--train.steps", "6", "--workdir", str(workdir)]
    monkeypatch.setattr("sys.argv", ["train", *args, *steps, "--init", changed])
    with pytest.raises(SystemExit) as stop:
        run_entry(train.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.strip().splitlines()) == 1
    assert f"{changed} is not the base of {workdir}: layers/router/bias has other values" in said
    assert "by its checksum; give the one that it was trained on" in said
    # What is trained may differ: it comes from the checkpoint.
    frozen, found = checkpoint.load_base(
        record.base, record.config.model, place=saved("sinks", "layers/attention/sinks")
    )
    assert found.folder == str(base.parent / "sinks") and found.digest == record.base.digest
    assert "sinks" not in frozen["layers"]["attention"]
    # Another model.
    wide = Transformer(dataclasses.replace(model.config, vocab_size=321))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), wide.abstract_params())
    weights.save(base.parent / "wide", wide, ones)
    said = refused(str(base.parent / "wide"))
    assert "embedding/weight is float32[321,32] and was float32[320,32], unembed" in said
    # Damage, by which a file can't be read.
    file = next(base.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert file.name in refused(str(base))
    assert records.steps(workdir) == [2, 4]  # nothing was taken for damage of the checkpoint


def test_damage_to_a_checkpoint_is_not_that_of_the_base(copy):
    workdir, base = copy
    (workdir / "checkpoints/4/params/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="step 2 is whole: ask for it"):
        gptoss_jax.load(workdir)
    base.rename(base.parent / "gone")
    config = records.read_record(workdir).config
    state = jax.eval_shape(make_program(config).begin, None)
    with pytest.raises(UserError, match="is not there"):
        resume.restore_newest(workdir, state)
    assert records.steps(workdir) == [2, 4]
    restored = resume.restore_newest(workdir, state, place=str(base.parent / "gone"))
    assert restored.record.step == 2 and records.steps(workdir) == [2]


MESHES = [MeshConfig(fsdp=2, expert=2), MeshConfig(tensor=2, data=2)]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_over_meshes(whole, sizes, tmp_path):
    """Along tensor 3 blocks become 4: what the mesh adds is neither kept nor hashed."""
    config = records.read_record(whole).config
    model, want = checkpoint.load_params(whole)
    mesh = meshes.make(sizes, jax.devices()[:4])
    with jax.set_mesh(mesh):
        program = make_program(config)
        extra = program.model.config.expert_padding
        assert extra == (32 if sizes.tensor > 1 else 0)
        abstract = program.abstract_state()
        state, record = resume.restore(whole, abstract, expert_padding=extra)
        for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert x.shape == like.shape and x.sharding == like.sharding
        frozen = frozen_paths(program.factors)
        again = begun_base.measure(
            record.base, state.params, frozen_paths=frozen, expert_padding=extra
        )
        assert again == record.base
        with checkpoints.open_manager(tmp_path) as manager:
            checkpoints.save(
                manager, state, config=config, data_state={}, fingerprint={},
                expert_padding=extra, base=again,
            )  # fmt: skip
    sums = [records.read_json(w, 4)[0]["checksums"] for w in (whole, tmp_path)]
    assert sums[0] == sums[1]
    chex.assert_trees_all_equal(
        padding.resize(jax.device_get(state.params), by=-extra), jax.device_get(want)
    )
    # Loaded for use, too.
    loaded, params = gptoss_jax.load(whole, mesh, dtype=jnp.float32)
    assert loaded.config == dataclasses.replace(model, expert_padding=extra)
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(state.params))
    for x, like in zip(jax.tree.leaves(params), jax.tree.leaves(abstract.params), strict=True):
        assert x.sharding == like.sharding


@pytest.mark.slow
def test_random_parameters_are_made_again(args, tmp_path, monkeypatch):
    config = command_line.load([*args, "--init", "random", "--train.seed", "7"])
    program = make_program(config)
    state = program.begin(None)
    base = begun_base.begin(config)
    frozen = frozen_paths(program.factors)
    base = begun_base.measure(base, state.params, frozen_paths=frozen)
    assert base.folder is None and base.seed == 7
    assert bases.from_json(json.loads(json.dumps(base.to_json()))) == base
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, state, config=config, data_state={}, fingerprint={}, base=base)
    chex.assert_trees_all_equal(checkpoint.load_params(tmp_path)[1], state.params)
    with pytest.raises(UserError, match=r"is random, of seed 7, and not elsewhere: leave --init"):
        checkpoint.load_base(base, config.model, place="elsewhere")
    other = dataclasses.replace(base, seed=8, made_by="JAX 0.1 on TPU v1")
    with pytest.raises(UserError, match=r"of seed 8, made by .* \(the run used JAX 0\.1 on TPU"):
        checkpoint.load_base(other, config.model)


def test_checkpoints_without_a_base_are_whole(whole, tmp_path):
    """As they were written before."""
    config, params = checkpoint.load_params(whole)
    record = records.read_record(whole)
    begin = make_program(record.config).begin
    state = begin(params)
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, state, config=record.config, data_state={}, fingerprint={})
    path = tmp_path / "checkpoints/0/record/metadata"
    raw = json.loads(path.read_text()) | {"schema": 2}
    raw = {k: v for k, v in raw.items() if k not in ("sha256", "base")}
    path.write_text(json.dumps(raw | {"sha256": records.digest(raw)}))
    again, read = checkpoint.load_params(tmp_path)
    assert again == config
    chex.assert_trees_all_equal(read, params)
    restored = resume.restore_newest(tmp_path, jax.eval_shape(begin, None), place="nowhere")
    assert restored.record.base is None
    chex.assert_trees_all_equal(restored.state.params, params)


def test_a_run_on_another_s_adapters_has_its_base(whole, folder, args):
    """Where all that it leaves as it is is in there; or else the other's checkpoint is its base."""
    params = loading.load(whole, dtype=jnp.float32)[1]

    def base_of(*options: str) -> bases.Base:
        config = command_line.load([*args, "--init", str(whole), *options])
        frozen = frozen_paths(select.masks(params, config.model, config.optimizer))
        begun = begun_base.begin(config)
        assert begun.folder == str(whole) and begun.step == 4
        return begun_base.measure(begun, params, frozen_paths=frozen)

    same = base_of()
    assert same == records.read_record(whole).base
    fewer = base_of("--optimizer.only")
    assert (fewer.folder, fewer.step) == (str(whole), 4)
    assert "layers/attention/sinks" in fewer.arrays
    assert not any(path.startswith("lora/") for path in fewer.arrays)
    config = records.read_record(whole).config.model
    frozen = checkpoint.load_base(fewer, config)[0]
    chex.assert_trees_all_equal(
        frozen["layers"]["attention"]["sinks"], params["layers"]["attention"]["sinks"]
    )


@pytest.mark.slow
def test_a_run_on_another_s_adapters_goes_on_without_it(copy, args, tmp_path):
    other, _ = copy
    args = [*args, "--init", str(other), "--workdir", str(tmp_path / "next")]
    train.main([*args, "--train.steps", "2"])
    shutil.rmtree(other)
    train.main([*args, "--train.steps", "3"])
    assert [step for step, _ in losses(tmp_path / "next")] == [1, 2, 3]


def test_adapters_alone_are_not_written_for_a_run_that_trained_more(whole, tmp_path):
    with pytest.raises(UserError, match=r"trained \*sinks besides its adapters.*--to hf"):
        convert(whole, tmp_path / "peft", to="peft")
    assert not (tmp_path / "peft").exists()


def test_convert_takes_base_and_adapters(whole, tmp_path):
    convert(whole, tmp_path / "hf", to="hf", experts="dense")
    got = flatten(loading.load(tmp_path / "hf", dtype=jnp.float32)[1])
    model, params = gptoss_jax.load(whole, dtype=jnp.float32)
    base = flatten(fold.decode_experts(model.config, params)[1])
    want = flatten(fold.merge(*fold.decode_experts(model.config, params))[1])
    for path, x in got.items():
        if path not in ("layers/attention/q_weight", *EXPERTS):
            np.testing.assert_array_equal(x, want[path])
            continue
        assert np.abs(want[path] - base[path]).max() > 1e-3
        rounding = 2**-8 if path in EXPERTS else 0  # to bfloat16
        tolerance = 1e-5 * np.abs(want[path]).max()
        np.testing.assert_allclose(x, want[path], rtol=rounding, atol=tolerance)
