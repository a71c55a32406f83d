"""A model of one's own, brought by `make_model` of a config file: every command builds by it.

The model is made as docs/change_the_model.md says: a copy of `gptoss_jax/model/`, one line changed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import TINY, write_chats

from gptoss_jax import convert, loading, plan, sample, train
from gptoss_jax.config import MeshConfig, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.planning import plans, programs
from gptoss_jax.planning.programs import Sampling
from gptoss_jax.runs import metrics, model_source, records
from gptoss_jax.training import setup

ROOT = Path(__file__).parents[1]

# A factor on what each head returns: large from the first step on.
OLD, NEW = "heads = out.reshape(", "heads = 3 * out.reshape("
FILE = """
from configs.tiny import get_config
from my_model import Transformer


def make_model(config):
    return Transformer(config)
"""
SMALL = [*TINY[2:], "--train.eval_max_tokens", "2"]
IDS = ["--prompt-ids", "5,3,8,1", "--max-tokens", "6", "--json"]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config file with `make_model`, and the folder of its model beside it."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(ROOT / "gptoss_jax" / "model", folder / "my_model")
    shutil.rmtree(folder / "my_model" / "__pycache__", ignore_errors=True)
    for path in (folder / "my_model").glob("*.py"):
        path.write_text(path.read_text().replace("gptoss_jax.model", "my_model"))
    attention = folder / "my_model" / "attention.py"
    assert attention.read_text().count(OLD) == 1
    attention.write_text(attention.read_text().replace(OLD, NEW))
    (folder / "own.py").write_text(FILE)
    (folder / "plain.py").write_text("from configs.tiny import get_config\n")
    yield folder / "own.py"
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_model"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def make_model(config_file):
    os.chdir(ROOT)
    return command_line.read_make_model(str(config_file))


@pytest.fixture
def calls(make_model, monkeypatch):
    """The functions of the copy that are traced: how it runs its layers."""
    scan, found = sys.modules["my_model.scan"], []

    def spy(name):
        real = getattr(scan, name)
        return lambda *args, **options: found.append(name) or real(*args, **options)

    for name in ("scanned", "unrolled"):
        monkeypatch.setattr(scan, name, spy(name))
    return found


@pytest.fixture(scope="module")
def arguments(config_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    chats = write_chats(folder / "a.jsonl", 40)
    held_out = write_chats(folder / "h.jsonl", 3, seed=1)
    data = ["--data.train", str(chats), "--data.held_out", str(held_out)]
    return ["--config", str(config_file), *SMALL, *data]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A workdir of a run from beginning to end."""
    os.chdir(ROOT)
    workdir = tmp_path_factory.mktemp("whole")
    train.main([*arguments, "--workdir", str(workdir)])
    return workdir


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in metrics.read(workdir) if "loss" in r]


def held_out_losses(workdir: Path) -> list[float]:
    return [r["held_out_loss"] for r in metrics.read(workdir) if "held_out_loss" in r]


def logprobs(model, params, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Return the log-probability of each of `tokens` after the prompt."""
    logits = model.apply({"params": params}, jnp.asarray([prompt + tokens]))[0]
    each = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
    return np.asarray(jnp.take_along_axis(each, jnp.asarray(tokens)[:, None], axis=1)[:, 0])


# --- Training --------------------------------------------------------------------------------


def test_the_record_names_the_source_and_the_workdir_keeps_a_copy(whole, config_file):
    source = records.read_record(whole).model_source
    assert source.file == str(config_file)
    copy = whole / model_source.FOLDER / source.sha256[:12]
    assert (copy / "own.py").read_text() == FILE
    assert NEW in (copy / "my_model" / "attention.py").read_text()
    package = {f"my_model/{path.name}" for path in (ROOT / "gptoss_jax" / "model").glob("*.py")}
    names = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert names == package | {"own.py"}


def test_it_is_evaluated_by_its_own_model(whole, make_model, arguments):
    from gptoss_jax import data
    from gptoss_jax.objectives.token_loss import loss_fn

    model, params = loading.load(whole, dtype="float32", make_model=make_model)
    assert type(model).__module__ == "my_model.transformer"
    batches, found = data.eval_batches(command_line.load(arguments)), {}
    for name, one in (("own", model), ("package", Transformer(model.config))):
        sums = [jax.jit(loss_fn, static_argnums=0)(one, params, batch) for batch in batches]
        found[name] = float(sum(s.nll for s in sums) / sum(s.weight for s in sums))
    logged = held_out_losses(whole)
    np.testing.assert_allclose(logged[-1], found["own"], rtol=1e-4)
    assert abs(found["package"] - found["own"]) > 1e-3
    assert len(metrics.read(whole, metrics.SAMPLES)) == 2 * len(logged)


@pytest.mark.slow
def test_a_crashed_run_resumes_to_equal_losses_with_a_note_of_what_changed(
    whole, arguments, config_file, tmp_path, monkeypatch, capsys
):
    real = setup.make_train_step

    def make(*args, **kwargs):
        step, calls = real(*args, **kwargs), []

        def failing(state, batch):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(state, batch)

        return failing

    run = [*arguments, "--workdir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(setup, "make_train_step", make)
        with pytest.raises(KeyboardInterrupt):
            train.main(run)
    assert records.steps(tmp_path) == [2]
    attention = config_file.parent / "my_model" / "attention.py"
    before = attention.read_text()
    try:
        attention.write_text(before + "# a word more\n")
        train.main(run)
    finally:
        attention.write_text(before)
    assert losses(tmp_path) == losses(whole)
    out, error = capsys.readouterr()
    assert f"built by make_model() of {config_file}" in out
    assert f"--checkpoint {tmp_path} --config {config_file} --prompt" in out
    (note,) = [line for line in error.splitlines() if line.startswith("note: ")]
    assert "another version of its model" in note and "(my_model/attention.py)" in note
    copies = list((tmp_path / model_source.FOLDER).iterdir())
    assert len(copies) == 2 and any(note.endswith(str(copy)) for copy in copies)


def test_without_its_config_it_is_refused(whole, arguments, config_file, tmp_path):
    plain = ["--config", str(config_file.with_name("plain.py"))]
    expected = (
        rf"{whole}: its model is built by make_model\(\) of {config_file} .*--config {config_file}"
    )
    with pytest.raises(UserError, match=expected):
        train.main([*plain, *arguments[2:], "--workdir", str(whole), "--train.steps", "8"])
    with pytest.raises(UserError, match=expected):
        sample.main(["--checkpoint", str(whole), *IDS, *plain])
    with pytest.raises(UserError, match=expected):
        convert.main([str(whole), str(tmp_path / "out"), "--to", "hf"])
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_package_s_model_refuses_another(make_model, arguments, tmp_path):
    with pytest.raises(UserError, match=r"its model is the package's own, and .*own.py defines"):
        model_source.check(None, make_model, command_line.load(arguments).model, whose=tmp_path)


def test_make_model_that_returns_something_else_is_refused(config_file, arguments, tmp_path):
    path = tmp_path / "bad.py"
    start = "from configs.tiny import get_config\n"
    path.write_text(f"{start}def make_model(config):\n    return 3\n")
    with pytest.raises(UserError, match=r"bad.py: make_model\(\) returned an object of type int"):
        train.main(["--config", str(path), *arguments[2:], "--workdir", str(tmp_path / "w")])
    with pytest.raises(UserError, match=r"bad.py: make_model\(\) returned an object of type int"):
        train.main(["--config", str(path), *arguments[2:], "--dry-run"])
    path.write_text(f"{start}make_model = 3\n")
    with pytest.raises(UserError, match=r"bad.py: make_model is of type int: it has to be"):
        train.main(["--config", str(path), *arguments[2:], "--workdir", str(tmp_path / "w")])
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_fused_step_is_of_its_own_layers(whole, arguments, tmp_path):
    options = "--optimizer.fused --model.remat full --train.steps 1 --train.eval_questions 0"
    run = [*arguments[:-2], *options.split(), "--data.held_out", "--workdir", str(tmp_path)]
    train.main(run)
    ((_, loss),) = losses(tmp_path)
    np.testing.assert_allclose(loss, losses(whole)[0][1], rtol=1e-5)


@pytest.mark.slow
def test_adapters_are_trained_on_it_and_resume(
    whole, arguments, make_model, config_file, tmp_path, capsys
):
    options = "--model.lora.targets attention --model.lora.rank 2 --train.eval_questions 0"
    run = [*arguments, *options.split(), "--init", str(whole), "--workdir", str(tmp_path)]
    run += ["--optimizer.learning_rate", "0.01"]
    train.main([*run, "--train.steps", "2"])
    train.main([*run, "--train.steps", "4"])  # reads its base again
    held_out = {
        r["step"]: r["held_out_loss"] for r in metrics.read(tmp_path) if "held_out_loss" in r
    }
    before = [r["held_out_loss"] for r in metrics.read(whole) if "held_out_loss" in r][-1]
    np.testing.assert_allclose(held_out[0], before, rtol=1e-5)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]
    model, params = loading.load(tmp_path, dtype="float32", make_model=make_model)
    assert type(model).__module__ == "my_model.transformer" and "lora" in params
    with pytest.raises(UserError, match=r"give --config .*own.py, or make_model= in Python"):
        loading.load(tmp_path)
    assert "note:" not in capsys.readouterr().err


@pytest.mark.slow
def test_grpo_s_answers_are_sampled_from_it(arguments, calls, tmp_path):
    options = str.split(
        "--objective.name grpo --init random --data.batch_size 4 --objective.grpo.group_size 2 "
        "--objective.grpo.max_tokens 4 --train.steps 1 --train.eval_questions 0 --data.held_out"
    )
    reward, questions = tmp_path / "reward.py", tmp_path / "q.jsonl"
    reward.write_text("def reward(answer, record):\n    return float(sum(answer.tokens))\n")
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    questions.write_text(3 * (json.dumps({"messages": chat}) + "\n"))
    run = [*arguments[:-4], *options, "--data.train", str(questions)]
    run += ["--objective.grpo.reward", str(reward), "--objective.grpo.temperature", "1"]
    train.main([*run, "--workdir", str(tmp_path / "w")])
    (record,) = metrics.read(tmp_path / "w")
    assert set(calls) == {"scanned", "unrolled"}  # of training, and of decoding
    assert record["sampler_gap"] < 1e-4


@pytest.mark.slow
def test_a_dry_run_and_a_plan_s_programs_are_of_it(arguments, make_model, calls, capsys):
    train.main([*arguments, "--dry_run"])
    assert calls and "nothing was written" in capsys.readouterr().out
    config = command_line.load(arguments)
    mesh = meshes.make(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        calls.clear()
        programs.train(config, mesh, make_model)
        assert "scanned" in calls
        calls.clear()
        programs.decode(config, mesh, Sampling(1, 32, 16), make_model)
    assert "unrolled" in calls


def test_plan_compiles_it(arguments, monkeypatch, capsys):
    given = []

    def make(config, *args, make_model, **options):
        given.append(make_model(config.model))
        return [], None

    monkeypatch.setattr(plans, "make", make)
    assert plan.run(*plan.parse([*arguments, "--target", "h200"]))
    assert [type(model).__module__ for model in given] == ["my_model.transformer"]


# --- What is done with a run ------------------------------------------------------------------


def sampled(capsys, *args: str) -> dict:
    capsys.readouterr()
    sample.main([*IDS, *args])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_it_is_sampled_and_exported(whole, config_file, make_model, tmp_path, capsys):
    config = ["--config", str(config_file)]
    answer = sampled(capsys, "--checkpoint", str(whole), *config)
    model, params = loading.load(whole, dtype="float32", make_model=make_model)
    expected = logprobs(model, params, [5, 3, 8, 1], answer["ids"])
    np.testing.assert_allclose(answer["logprobs"], expected, rtol=1e-4)

    # It has no parameter of its own, so its weights are GPT-OSS's, and the code lies beside them.
    out = tmp_path / "hf"
    convert.main([str(whole), str(out), "--to", "hf", *config])
    note = capsys.readouterr().err
    assert note.count("note: ") == 1 and "files of weights hold no code" in note
    assert f"not what make_model() of {config_file} builds" in note
    (copy,) = (out / model_source.FOLDER).iterdir()
    assert NEW in (copy / "my_model" / "attention.py").read_text()
    plain, read = loading.load(out, dtype="float32")
    assert type(plain) is Transformer
    chex.assert_trees_all_equal(read, params)
    other = logprobs(plain, read, [5, 3, 8, 1], answer["ids"])
    assert np.abs(other - expected).max() > 1e-3
    assert sampled(capsys, "--checkpoint", str(out), *config)["logprobs"] == answer["logprobs"]
    with pytest.raises(UserError, match=r"hf: --config is for workdirs"):
        convert.main([str(out), str(tmp_path / "again"), "--to", "hf", *config])
