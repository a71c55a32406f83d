"""Weights & Biases: what is sent there, and what is said when nothing can be."""

from __future__ import annotations

import contextlib
import importlib.util
import types

import pytest

from gptoss_jax import train
from gptoss_jax.errors import UserError
from gptoss_jax.runs import metrics, tracking


class Page:
    """A run of the fake wandb."""

    def __init__(self, **options):
        self.options, self.rows, self.steps, self.finished = options, [], {}, False

    def define_metric(self, name, step_metric=None):
        self.steps[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def pages(monkeypatch):
    """Put a fake wandb in place; return the pages that it opens."""
    opened: list[Page] = []
    fake = types.ModuleType("wandb")
    fake.Settings = dict
    fake.login = lambda: True
    fake.init = lambda **options: opened.append(Page(**options)) or opened[-1]
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return opened


def test_a_run_that_goes_on_keeps_its_page_and_a_new_one_gets_another(pages, tmp_path):
    config = {"train.steps": 3}
    for step in (None, 1, None):
        log = metrics.MetricsLog(tmp_path, step=step, project="p", config=config)
        log.write(1, {"loss": 2.0, "held_out_loss": 1.5, "mfu": None, "expert_load": [[0.1, 0.9]]})
        log.close()
    first, second, third = (page.options["id"] for page in pages)
    assert first == second != third
    page = pages[0]
    assert page.options["project"] == "p" and page.options["config"] == config
    assert page.options["resume"] == "allow" and page.options["dir"] == str(tmp_path)
    numbers = {"train/loss": 2.0, "eval/loss": 1.5, "router/expert_load_max/layer_0": 0.9}
    assert page.rows == [{"step": 1, **numbers}] and page.finished
    assert page.steps == {"step": None, "*": "step"}


def test_without_a_project_nothing_is_opened(pages, tmp_path):
    tracking.check(None)
    log = metrics.MetricsLog(tmp_path)
    log.write(1, {"loss": 2.0})
    log.close()
    assert pages == [] and not (tmp_path / tracking.ID).exists()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train.wandb is p, .* pip install 'gptoss-jax\[wandb\]'"):
        tracking.check("p")


@pytest.mark.parametrize("first", [True, False])
def test_only_the_process_that_logs_has_to_be_logged_in(first, monkeypatch):
    checked = []
    monkeypatch.setattr(train.processes, "start", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(train.processes, "from_first", lambda do: do() if first else None)
    monkeypatch.setattr(train.tracking, "check", checked.append)
    monkeypatch.setattr(train.meshes, "make", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--config", "20b_lora", "--train.wandb", "p"])
    assert checked == (["p"] if first else [])


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_no_login_is_said_before_the_run_unless_it_is_offline(pages, monkeypatch, mode):
    def refuse():
        raise ValueError("No API key configured.\nmore")

    monkeypatch.setattr("wandb.login", refuse)
    monkeypatch.setenv("WANDB_MODE", mode)
    if mode == "offline":
        tracking.check("p")
        return
    with pytest.raises(UserError, match=r"No API key configured.; log in with `wandb login`") as no:
        tracking.check("p")
    assert "\n" not in str(no.value) and "WANDB_MODE=offline" in str(no.value)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_package_writes_a_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking.check("p")
    log = metrics.MetricsLog(tmp_path, project="p", config={"train.steps": 1})
    log.write(1, {"loss": 2.0})
    log.close()
    name = (tmp_path / tracking.ID).read_text().strip()
    (written,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    assert b"train/loss" in written.read_bytes()
