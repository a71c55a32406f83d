"""The log of a run, and its curves."""

from __future__ import annotations

import json

import numpy as np
from matplotlib.figure import Figure

from gptoss_jax.runs import metrics


def test_records_are_appended_and_read(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(1, {"loss": 2.5, "mfu": None, "grad_norm": float("nan"), "expert_load": [[0.5, 0.5]]})
    log.write(2, {"loss": 2.25})
    log.close()
    assert metrics.read(tmp_path) == [
        {"step": 1, "loss": 2.5, "expert_load": [[0.5, 0.5]]},
        {"step": 2, "loss": 2.25},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_going_on_takes_out_later_records(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    for step in range(5):
        log.write(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the run was killed here
    log = metrics.MetricsLog(tmp_path, step=2)
    log.write(3, {"loss": 9.0})
    log.close()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["loss"]) for x in lines] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 9.0)]
    metrics.MetricsLog(tmp_path, step=0).close()
    assert metrics.read(tmp_path) == [{"step": 0, "loss": 0.0}]
    metrics.MetricsLog(tmp_path).close()  # from the beginning
    assert metrics.read(tmp_path) == []


def test_curves_are_drawn(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(0, {"held_out_loss": 3.0, "exact_match": 0.0})
    load = np.full((3, 5), 0.2).tolist()
    log.write(1, {"loss": 2.5, "learning_rate": 0.1, "grad_norm": 2.0, "expert_load": load})
    log.close()
    path = metrics.plot(tmp_path)
    assert path == tmp_path / "curves.png"
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000
    (tmp_path / "empty").mkdir()
    assert metrics.plot(tmp_path / "empty").is_file()


def test_curves_say_what_the_losses_and_answers_are(tmp_path, monkeypatch):
    """The titles of the two first pictures, for each objective."""
    titles = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: titles.update({objective: self.axes[:2]})
    )
    by_objective = {
        "sft": {"held_out_loss": 3.0, "exact_match": 0.0},
        "dpo": {"reward_margin": 1.0, "reward_accuracy": 0.5},
        "grpo": {"reward": 0.5, "groups_alike": 0.5},
        "distill": {"teacher_kl": 0.5},
    }
    for objective, values in by_objective.items():
        (tmp_path / objective).mkdir()
        log = metrics.MetricsLog(tmp_path / objective)
        log.write(1, {"loss": 2.5, **values})
        log.close()
        metrics.plot(tmp_path / objective)
    said = {name: [axis.get_title() for axis in axes] for name, axes in titles.items()}
    assert said["sft"] == ["loss, nats a token", "held-out questions answered exactly"]
    assert said["dpo"][1] == "pairs whose chosen answer has the larger reward"
    assert said["grpo"][1] == "reward, mean over a step's answers"
    for name in ("dpo", "grpo", "distill"):
        assert "nats" not in said[name][0]


def test_numbers_are_in_groups(tmp_path):
    values = {
        "loss": 1.0, "reward": 2.0, "held_out_loss": 3.0, "exact_match": 4.0, "z_loss": 5.0,
        "mfu": 6.0, "source/a/loss": 7.0, "expert_load": [[0.25, 0.75], [1.0, 0.0]],
    }  # fmt: skip
    assert metrics.tagged(values) == {
        "train/loss": 1.0, "train/reward": 2.0, "eval/loss": 3.0, "eval/exact_match": 4.0,
        "router/z_loss": 5.0, "speed/mfu": 6.0, "source/a/loss": 7.0,
        "router/expert_load_max/layer_0": 0.75, "router/expert_load_max/layer_1": 1.0,
    }  # fmt: skip
    log = metrics.MetricsLog(tmp_path)
    log.write(1, values)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    for tag in metrics.tagged(values):
        assert tag.encode() in file.read_bytes()
