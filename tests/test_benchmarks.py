"""The benchmarks of kernels and of training, at their smallest: that they check, time and write."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_quick_run_checks_and_times_every_form(tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "benchmarks/kernels.py", "--quick", "--ops", "mxfp4 decode"]
    done = subprocess.run([*command, "--out", out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout  # what is asked on a device is not claimed on a CPU
    result = json.loads(out.read_text())
    assert result["chip"] == "cpu"
    text = json.dumps(result)
    assert '"xla"' in text and '"reference"' in text


def run_training(out: Path, *options: str) -> list[dict]:
    command = [sys.executable, "benchmarks/train.py", "--quick", "--out", out, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["cases"]


@pytest.mark.slow
def test_a_training_case_on_a_cpu_has_the_same_loss_on_each_side(tmp_path):
    (case,) = run_training(tmp_path / "train.json", "--cases", "1")
    sides = case["sides"]
    assert list(sides) == ["ours dense", "ours mxfp4", "theirs eager", "theirs grouped_mm"]
    there = list(sides) if importlib.util.find_spec("peft") else ["ours dense", "ours mxfp4"]
    for name in there:
        side = sides[name]
        assert side["loss"] == pytest.approx(sides["ours dense"]["loss"], rel=1e-5)
        assert side["trained"] == 4 * 8 * (2 * (128 + 128) + 2 * (128 + 32))  # L r (q, o; k, v)
        assert side["tokens per second"] == pytest.approx(8 * 256 / side["median seconds"])
        assert side["peak bytes"] > side["of which libraries"] > 0


@pytest.mark.parametrize(
    ("number", "name"),
    [
        pytest.param("2", "tiny full", marks=pytest.mark.exhaustive),
        pytest.param("3", "tiny LoRA attention r=16", marks=pytest.mark.slow),
    ],
)
def test_what_a_device_is_for_runs_at_tiny_size(tmp_path, number, name):
    (case,) = run_training(tmp_path / "train.json", "--device", "--cases", number)
    assert case["case"] == name
    (side,) = case["sides"].values()
    assert side["loss"] > 6 and side["tokens per second"] > 0


def test_operations_of_a_training_step_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_cases

    case = next(c for c in train_cases.CPU if c.name == "tiny LoRA attention+experts r=8")
    D, N, K, H, E, A, F, V, L, T, W = 128, 8, 2, 16, 8, 2, 96, 1024, 4, 256, 32
    frozen = L * (2 * D * N * H + 2 * D * K * H + E * D + A * 3 * D * F)
    own = L * 8 * (2 * (D + N * H) + 2 * (D + K * H) + A * ((D + 2 * F) + (F + D)))
    pairs = 2 * sum(min(t + 1, W) for t in range(T)) + 2 * sum(t + 1 for t in range(T))
    row = T * (4 * frozen + 6 * own) + 4 * (T - 1) * V * D + 12 * N * H * pairs
    assert train_cases.flops(case) == pytest.approx(case.rows * row)
