"""The experiments' runner and analyses: what is run, resumed, refused, and read off a run."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import command_line
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.parameters.tree import take_layer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from experiments import common, run  # noqa: E402
from experiments.layer_patterns import analysis as patterns_analysis  # noqa: E402
from experiments.layer_patterns import config as patterns_config  # noqa: E402
from experiments.qat import config as qat_config  # noqa: E402
from experiments.sinks import analysis as sinks_analysis  # noqa: E402
from experiments.sinks import config as sinks_config  # noqa: E402


def plan(folder: Path, **changes) -> list[run.Job]:
    asked = {"variants": ("1:1", "5:1"), "seeds": (0, 4), "steps": None} | changes
    return run.plan(common.load("layer_patterns"), folder=folder, **asked)


def test_the_plan_is_every_variant_and_seed_as_a_command_of_the_trainer(tmp_path: Path):
    jobs = plan(tmp_path)
    assert [(j.run.variant, j.run.seed) for j in jobs] == [
        ("1:1", 0), ("5:1", 0), ("1:1", 4), ("5:1", 4)
    ]  # fmt: skip
    command = jobs[3].command
    config_file = "experiments/layer_patterns/config.py"
    assert command[:4] == ["-m", "gptoss_jax.train", "--config", config_file]
    assert command[4:] == [
        "--model.layer_pattern", "5:1", "--train.seed", "4", "--workdir", f"{tmp_path}/5-1-seed4"
    ]  # fmt: skip
    # What the command trains is the config that results are told of.
    config = command_line.load([*command[2:3], f"{ROOT}/{command[3]}", *command[4:-2]])
    assert config == jobs[3].run.config
    assert plan(tmp_path, steps=7)[0].run.workdir.name == "1-1-seed0-steps7"


def test_what_is_complete_stays_and_what_was_another_config_is_refused(tmp_path: Path):
    job = plan(tmp_path)[1]
    job.run.workdir.mkdir(parents=True)
    config = json.loads(command_line.to_json(job.run.config))
    path = job.run.workdir / run.RECORD
    path.write_text(json.dumps({"complete": True, "seconds": 12.5, "config": config}))
    assert [(j.complete, j.seconds) for j in plan(tmp_path)[:2]] == [(False, 0.0), (True, 12.5)]
    config["optimizer"]["learning_rate"] = 1.0
    path.write_text(json.dumps({"complete": False, "seconds": 12.5, "config": config}))
    with pytest.raises(UserError, match=r"5-1-seed0 is a run of another config \(optimizer\.learn"):
        plan(tmp_path)


def test_a_variant_that_starts_from_another_waits_for_it_and_has_its_seed(tmp_path: Path):
    experiment = common.load("qat")
    asked = {"seeds": (3, 5), "steps": 7, "folder": tmp_path}
    jobs = run.plan(experiment, variants=("qat", "float"), **asked)
    assert [(j.run.variant, j.run.seed) for j in jobs] == [
        ("float", 3), ("qat", 3), ("float", 5), ("qat", 5)
    ]  # fmt: skip
    assert [j.after for j in jobs] == [None, jobs[0], None, jobs[2]]
    command = jobs[3].command
    assert command[command.index("--init") + 1] == str(tmp_path / "float-seed5-steps7")
    assert "--init" not in jobs[0].command and jobs[2].run.config.init == "random"
    with pytest.raises(UserError, match="--variants qat: it starts from float; name both"):
        run.plan(experiment, variants=("qat", "longer"), **asked)


def test_the_last_step_is_read_from_a_log_that_is_being_written(tmp_path: Path):
    assert run.last_step(tmp_path) == 0
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 3}\n' + '{"step": 41, "load": [' + "0.5, " * 20_000 + "1]}\n")
    assert run.last_step(tmp_path) == 0  # no whole record in the part that is read
    log.write_text('{"step": 3}\n{"step": 41, "loss": 0.5}\n{"step": 42, "lo')
    assert run.last_step(tmp_path) == 41


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["nope"], "no experiment 'nope': there are .*layer_patterns, qat, sinks"),
        (["sinks", "--variants", "of"], "--variants of: sinks has learned, zero, off"),
        (["sinks", "--steps", "0"], "--steps 0: at least 1"),
        (["sinks", "--seeds", "a"], "invalid int value: 'a'"),
    ],
)
def test_what_can_not_be_run_is_said_in_a_line(options: list[str], error: str):
    with pytest.raises(UserError, match=error):
        run.main(options)


def test_results_come_back_as_they_were_written(tmp_path: Path):
    measured = common.Measured({"loss": 1 / 3, "none": float("nan")}, {"c": ([0.0, 1.0], [2.5, 4])})
    record = {"variants": {"a": {"seeds": {"0": dataclasses.asdict(measured)}}}}
    common.write_results(tmp_path / "results.json", record)
    text = (tmp_path / "results.json").read_text()
    assert "[0.0, 1.0]" in text and "NaN" not in text
    (back,) = common.read_results(tmp_path / "results.json")["a"]
    assert back.numbers == {"loss": 0.33333, "none": None}
    assert back.curves == {"c": ([0.0, 1.0], [2.5, 4])}


@pytest.mark.parametrize("config", [patterns_config, sinks_config, qat_config])
def test_every_character_of_the_generated_data_is_a_token(config):
    texts = [config.draw_record(random.Random(seed)) for seed in range(50)]
    encoding = tokenizer.get_tokenizer(512)
    assert all(len(encoding.encode_ordinary(text)) == len(text) for text in texts)
    assert len(set(texts)) == 50
    length = config.get_config().data.sequence_length
    assert length - 1 <= len(texts[0]) + 1 <= length


def test_symbols_are_copied_from_where_the_analyses_say():
    text = patterns_config.draw_record(random.Random(3))
    copies = 0
    for i, letter in enumerate(text[::2]):
        if letter in patterns_analysis.DISTANCES:
            assert text[2 * i + 1] == text[2 * i - patterns_analysis.DISTANCES[letter]]
            copies += 1
    assert copies > 20
    text = sinks_config.draw_record(random.Random(3))
    tokens = np.array([tokenizer.get_tokenizer(512).encode_ordinary(text)])
    sources = sinks_analysis.find_sources(tokens)[0]
    for t in range(0, len(text), 2):
        expected = text[sources[t]] if sources[t] >= 0 else sinks_config.NOTHING
        assert (sources[t] == -2) == (text[t] == "x")
        assert text[t] == "x" or text[t + 1] == expected
    assert (sources >= 0).sum() > 5 and (sources == -1).sum() > 3


@pytest.mark.parametrize("sinks", ["learned", "off"])
def test_the_weights_that_the_analysis_makes_again_are_the_models(sinks: str):
    config = sinks_config.get_config(sinks)
    model = Transformer(config.model)
    assert config.model.num_layers == 2
    batch = jax.tree.map(lambda x: x[:3], sinks_analysis.draw_batch(5, pairs=sinks_config.PAIRS))

    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), model.abstract_params()
    )

    @jax.jit
    def both(params):
        weights, on_sink = sinks_analysis.attention_weights(model, params, batch)
        out = model.forward(
            params,
            batch.tokens,
            segment_ids=batch.segment_ids,
            capture=("residual", "attention_out"),
        )
        p = take_layer(params["layers"], 1)
        x = out.captured["residual"][0]
        x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + config.model.rms_eps)
        x = x * p["attention_norm"]["scale"]
        v = jnp.einsum("BTD,NHD->BTNH", x, p["attention"]["v_weight"]) + p["attention"]["v_bias"]
        mixed = jnp.einsum("BNTS,BSNH->BTNH", weights[1], jnp.repeat(v, 2, axis=2))
        again = jnp.einsum("BTNH,DNH->BTD", mixed, p["attention"]["o_weight"])
        return weights, on_sink, again + p["attention"]["o_bias"], out.captured["attention_out"][-1]

    weights, on_sink, again, real = jax.device_get(both(params))
    np.testing.assert_allclose(weights.sum(-1) + on_sink, 1.0, rtol=1e-5)
    np.testing.assert_allclose(again, real, rtol=2e-4, atol=2e-4)
    assert (on_sink.max() == 0) == (sinks == "off")


@pytest.mark.slow
def test_what_is_trained_for_mxfp4_loses_nothing_by_it(tmp_path: Path):
    options = ["qat", "--steps", "120", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path)]
    command = [sys.executable, "experiments/run.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    seeds = {v: of["seeds"]["1"] for v, of in record["variants"].items()}
    # As the trainer computed it after its last step, and as a model that was exported and read.
    trained = {v: seed["curves"]["held_out_loss"][1][-1] for v, seed in seeds.items()}
    lost = {v: abs(seed["numbers"]["in MXFP4"] - trained[v]) for v, seed in seeds.items()}
    assert lost["qat"] < 1.01e-4, "more than the last of the 5 digits that are written"
    assert lost["longer"] > 5e-4, "quantising costs too little for this to show anything"
    assert trained["qat"] < trained["float"], "going on does not help"


@pytest.mark.slow
def test_an_experiment_runs_stops_and_goes_on(tmp_path: Path):
    options = ["sinks", "--steps", "3", "--seeds", "1", "--variants", "learned", "off"]
    command = [sys.executable, "experiments/run.py", *options, "--out", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[2/2] off, seed 1" in first.stdout and "held-out loss" in first.stdout
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["variants"]["off"]["options"] == ["--model.sinks", "off"]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    # A run that was stopped goes on, and nothing else is run again.
    path = tmp_path / "off-seed1-steps3" / run.RECORD
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    times = (tmp_path / "learned-seed1-steps3" / "metrics.jsonl").stat().st_mtime_ns
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "1 of 2 runs are complete already" in second.stdout
    assert (tmp_path / "learned-seed1-steps3" / "metrics.jsonl").stat().st_mtime_ns == times
    # One that fails is named, with what its log ends in.
    (tmp_path / "off-seed1-steps3" / run.RECORD).unlink()
    (tmp_path / "off-seed1-steps3" / "checkpoints").rename(tmp_path / "kept")
    (tmp_path / "off-seed1-steps3" / "checkpoints").write_text("in the way")
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 2
    assert third.stderr.startswith("error: off, seed 1 failed; ")
