"""The two limits of style that a test holds: lines of a file, lines of a function."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE, FUNCTION = 400, 60
KERNEL_FILE, KERNEL_FUNCTION = 700, 200  # in files whose names begin with pallas_
LONGER = {("gptoss_jax/train.py", "run"): 250}  # one straight read, in order


def test_files_and_functions_stay_short():
    too_long = []
    files = [
        p
        for room in ("gptoss_jax", "configs", "benchmarks", "experiments")
        for p in ROOT.glob(f"{room}/**/*.py")
    ]
    assert len(files) > 20
    for path in files:
        name, text = str(path.relative_to(ROOT)), path.read_text()
        kernel = path.name.startswith("pallas_")
        if len(text.splitlines()) > (KERNEL_FILE if kernel else FILE):
            too_long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                limit = KERNEL_FUNCTION if kernel else FUNCTION
                if lines > LONGER.get((name, node.name), limit):
                    too_long.append(f"{name}: {node.name} has {lines} lines")
    assert not too_long, "\n".join(too_long)


def test_importing_ops_and_model_needs_only_jax_and_flax():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for m in ('optax', 'orbax', 'grain', 'tyro', 'tiktoken', 'safetensors', 'torch'):\n"
        "    sys.modules[m] = None\n"
        "import gptoss_jax.ops.attention, gptoss_jax.ops.moe, gptoss_jax.ops.mxfp4\n"
        "import gptoss_jax.ops.cross_entropy, gptoss_jax.model\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
