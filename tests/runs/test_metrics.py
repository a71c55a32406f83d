"""The log of a run, and the count of its arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.runs import metrics

CONFIG = ModelConfig(
    vocab_size=50, num_layers=3, d_model=12, num_heads=6, num_kv_heads=2, head_dim=4,
    num_experts=5, active_experts=2, d_expert=7, window=4, layer_pattern="bfb",
)  # fmt: skip


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


def test_flops_are_counted_by_hand():
    attention = 12 * 4 * (6 + 2 + 2 + 6)  # q, k, v, o
    layers = 3 * (attention + 5 * 12 + 2 * (2 * 7 * 12 + 12 * 7))
    assert metrics.matmul_params(CONFIG) == (layers, 50 * 12)
    # Visible keys of the 6 queries of a row: banded 1 2 3 4 4 4, full 1 to 6.
    pairs = 2 * 18 + 21
    want = 6 * layers * 12 + 6 * 50 * 12 * 5 + 2 * 12 * 6 * 4 * pairs  # two rows
    got = metrics.step_flops(CONFIG, tokens=12, trained=5, sequence_length=6)
    np.testing.assert_allclose(got, want)


def test_active_parameters_of_the_real_model():
    layers, unembedding = metrics.matmul_params(ModelConfig())
    assert layers + unembedding == pytest.approx(3.61e9, rel=2e-3)


def test_peak_is_asked_for_or_unknown_on_a_cpu():
    assert metrics.peak_flops() is None
    assert metrics.peak_flops(2.5, devices=2) == 5e12


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
