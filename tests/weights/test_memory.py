"""Peak host memory, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.weights import config_io
from gptoss_jax.weights.names import tensors
from gptoss_jax.weights.safetensors_io import Plan, write_file

# Compiling and what malloc keeps are there before the measurement: the same work is done once.
SCRIPT = """
import gc, json, shutil, sys
from pathlib import Path
import jax
from gptoss_jax import weights
from gptoss_jax.loading import load as read
from gptoss_jax.loading.convert import convert

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def peak(work):
    work(0)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at VmRSS
    before = status("VmRSS")
    kept = work(1)
    return status("VmHWM") - before, kept

source, new = Path(sys.argv[1]), Path(sys.argv[2])
load = dict(dtype=sys.argv[3], split=sys.argv[4] == "split")
loading, (model, params) = peak(lambda n: read(source, **load))
size = sum(x.nbytes for x in jax.tree.leaves(params))
saving, _ = peak(lambda n: weights.save(new / f"saved{n}", model, params, to="openai"))
del params
converting, _ = peak(lambda n: convert(source, new / f"converted{n}", to="openai"))
print(json.dumps({"params": size, "load": loading, "save": saving, "convert": converting}))
"""


def write_large(folder: Path, *, packed: bool) -> int:
    """Write about 200 MB and return the size of the largest tensor."""
    form = "mxfp4" if packed else "dense"
    config = ModelConfig(
        vocab_size=30_001,
        num_layers=11 if packed else 3,
        d_model=512,
        num_experts=23,
        d_expert=768,
        num_heads=8,
        num_kv_heads=2,
    )
    rng = np.random.default_rng(0)
    plans = []
    for tensor in tensors(config, "hf", form):
        if tensor.packed:
            x = rng.integers(1, 200, tensor.shape, dtype=np.uint8)
        else:
            x = rng.standard_normal(tensor.shape, np.float32)
        plans.append(Plan(tensor.name, x.dtype, x.shape, lambda x=x: [x]))
    folder.mkdir()
    write_file(folder / "model.safetensors", plans, lambda num_bytes: None)
    raw = config_io.to_json(config, "hf", form=form, dtype="float32")
    (folder / "config.json").write_text(json.dumps(raw))
    return max(plan.num_bytes for plan in plans)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("packed", "dtype", "split"),
    [
        (True, "float32", "split"),
        (False, "bfloat16", "stacked"),
    ],
)
def test_memory_is_the_parameters_and_the_largest_tensor(
    tmp_path: Path, packed, dtype, split
) -> None:
    largest = write_large(tmp_path / "c", packed=packed)
    # A fixed threshold: large buffers go back to the system when they are freed, and are seen to.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "c"), str(tmp_path), dtype, split]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    size = sum(p.stat().st_size for p in (tmp_path / "c").glob("*.safetensors"))
    assert size > 180e6
    slack = 16e6
    assert used["params"] <= used["load"] <= used["params"] + largest + slack
    assert used["save"] <= largest + slack
    assert used["convert"] <= largest + slack
