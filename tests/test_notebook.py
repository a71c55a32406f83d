"""The notebooks run as they are, with few steps."""

from __future__ import annotations

import pathlib
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import gptoss_jax

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def said_by(name: str) -> str:
    """Run a notebook that has no outputs in it, and return what it printed."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=500, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_quickstart_runs(monkeypatch):
    monkeypatch.setenv("QUICKSTART_STEPS", "8")
    said = said_by("quickstart.ipynb")
    assert "20b: 20.91B parameters, 3.61B active" in said
    assert "step 8: loss" in said and "model.safetensors" in said


def test_finetune_20b_finds_a_file_of_the_kernels_folder(monkeypatch, tmp_path):
    """Cells open it from there, and commands from the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_DATA", "mine.jsonl")
    cells = nbformat.read(NOTEBOOKS / "finetune_20b.ipynb", as_version=4).cells
    (settings,) = [c.source for c in cells if "FINETUNE_DATA" in c.source]
    names = {"pathlib": pathlib}
    exec(settings, names)
    assert names["DATA"] == tmp_path / "mine.jsonl"
    monkeypatch.delenv("FINETUNE_DATA")
    exec(settings, names)
    assert names["DATA"] == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_finetune_20b_runs_at_tiny_size(monkeypatch, tmp_path):
    for name, value in {"SIZE": "tiny", "STEPS": "8", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"FINETUNE_{name}", value)
    said = said_by("finetune_20b.ipynb")
    first, last = re.search(r"loss ([\d.]+) at the first step, ([\d.]+) at the last", said).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert float(first) > 6 and float(last) < float(first) - 0.3
    assert "\x1b[1;32m" in said, "Jupyter shows colours: what is trained is green"
    assert "dry run: nothing was written" in said
    model, params = gptoss_jax.load(tmp_path / "tuned", dtype="float32")
    base = gptoss_jax.load(tmp_path / "base", dtype="float32")[1]
    assert "lora" not in params and model.config.experts == "dense"
    for where in ("q_weight", "o_weight"):
        tuned = params["layers"]["attention"][where]
        assert np.abs(tuned - base["layers"]["attention"][where]).max() > 1e-4
