"""The limits that a test holds: lines of a file and of a function, and what two rooms import."""

from __future__ import annotations

import ast
import subprocess
import sys
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
    """Every module of the two rooms; what jax and flax import themselves does not count."""
    code = (
        "import importlib, pkgutil, sys\n"
        "import flax.linen, jax\n"
        "before = set(sys.modules)\n"
        "import gptoss_jax.model, gptoss_jax.ops\n"
        "for room in (gptoss_jax.model, gptoss_jax.ops):\n"
        "    for found in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    arrays = {"jax", "jaxlib", "flax", "numpy", "ml_dtypes", "jaxtyping"}
    assert set(result.stdout.split()) - sys.stdlib_module_names <= {"gptoss_jax", *arrays}
