"""The benchmark of kernels, at its smallest: that it checks, times and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
