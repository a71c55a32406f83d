"""A checkpoint of gpt-oss-20b's real names, shapes and shards, on an ordinary machine.

    python benchmarks/full_size.py [--dir DIR] [--scale small]

Makes it (12.8 GiB; finite random numbers, scale bytes 110 to 125), loads it packed with floats in
float32 (about 17.5 GB: a machine of 24 GiB holds it), decodes 16 tokens on the CPU and converts it
to OpenAI's layout. Prints seconds, tokens a second and peak host memory, each phase in a process of
its own, and writes benchmarks/results/full_size.json. Needs 28 GB of disk, given back at the end.
Decoding is timed after one run for compiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.weights import config_io
from gptoss_jax.weights.names import Tensor, tensors
from gptoss_jax.weights.safetensors_io import Plan, write_file
from gptoss_jax.weights.write import INDEX, SHARD_BYTES, write_json

RESULTS = Path(__file__).parent / "results" / "full_size.json"
NEW_TOKENS = 16
PROMPT = [11, 13, 17, 19, 23, 29, 31, 37]
FULL = ModelConfig()
SMALL = dataclasses.replace(
    FULL, num_layers=4, d_model=576, d_expert=576, num_heads=16, vocab_size=20_000
)


def status(field: str) -> int:
    """Read a field of this process in bytes: VmHWM is the peak of its host memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def random_bytes(kind: str) -> np.ndarray:
    """Return 32 MiB that tensors are tiled from."""
    rng = np.random.default_rng(0)
    if kind == "blocks":
        return rng.integers(0, 256, 1 << 25, dtype=np.uint8)
    if kind == "scales":
        return rng.integers(110, 126, 1 << 25, dtype=np.uint8)
    if kind == "norm":
        return np.ones(1 << 24, ml_dtypes.bfloat16).view(np.uint8)
    values = rng.standard_normal(1 << 24, np.float32) * 0.02
    return values.astype(ml_dtypes.bfloat16).view(np.uint8)


def make(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Write the checkpoint in the Hugging Face layout, its shards named as published."""
    tiles = {kind: random_bytes(kind) for kind in ("blocks", "scales", "norm", "weight")}

    def plan(tensor: Tensor) -> Plan:
        part = tensor.parts[0]
        dtype = np.dtype(np.uint8 if tensor.packed else ml_dtypes.bfloat16)
        kind = part.field if tensor.packed else "norm" if "norm" in part.path else "weight"

        def pieces() -> Iterator[np.ndarray]:
            left, tile = int(np.prod(tensor.shape)) * dtype.itemsize, tiles[kind]
            while left:
                yield tile[:left].view(dtype)
                left -= min(left, len(tile))

        return Plan(tensor.name, dtype, tensor.shape, pieces)

    folder.mkdir(parents=True)
    shards: list[list[Plan]] = [[]]
    for each in (plan(tensor) for tensor in tensors(config, "hf", "mxfp4")):
        if sum(p.num_bytes for p in shards[-1]) + each.num_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(each)
    last = len(shards) - 1
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i:05d}-of-{last:05d}.safetensors"
        write_file(folder / file, shard, lambda num_bytes: None)
        weight_map |= {p.name: file for p in shard}
    size = sum(p.num_bytes for shard in shards for p in shard)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    raw = config_io.to_json(config, "hf", form="mxfp4", dtype="bfloat16")
    write_json(folder / "config.json", raw)
    return {"bytes": size, "tensors": len(weight_map), "shards": len(shards)}


def decode(folder: Path) -> dict[str, Any]:
    """Load packed, in the form that a CPU decodes from, and sample greedily."""
    import jax.numpy as jnp

    from gptoss_jax import load
    from gptoss_jax.sampler import Sampler

    start = time.perf_counter()
    model, params = load(folder, dtype=jnp.float32, split=True)
    loaded = time.perf_counter() - start
    result: dict[str, Any] = {"load_seconds": loaded, "load_peak_bytes": status("VmHWM")}
    sampler = Sampler(model, params)
    start = time.perf_counter()
    sampler.generate([PROMPT], max_tokens=NEW_TOKENS, stop_ids=())
    result["first_run_seconds"] = time.perf_counter() - start
    out = sampler.generate([PROMPT], max_tokens=NEW_TOKENS, stop_ids=())
    assert len(out.tokens[0]) == NEW_TOKENS and np.isfinite(out.logprobs[0]).all()
    result |= {
        "prefill_seconds": out.prefill_seconds,
        "decode_tokens_per_second": out.tokens_per_second,
        "tokens": out.tokens[0],
    }
    return result


def run_phase(phase: str, folder: Path, scale: str) -> dict[str, Any]:
    """Do one phase in this process."""
    from gptoss_jax.loading.convert import convert

    result: dict[str, Any]
    start = time.perf_counter()
    if phase == "make":
        result = make(folder, FULL if scale == "full" else SMALL)
    elif phase == "decode":
        result = decode(folder)
    else:
        destination = folder.with_name("openai")
        convert(folder, destination, to="openai")
        written = sum(file.stat().st_size for file in destination.iterdir())
        result = {"bytes": written}
    result["seconds"] = time.perf_counter() - start
    result["peak_bytes"] = status("VmHWM")
    return result


def in_process(phase: str, folder: Path, scale: str) -> dict[str, Any]:
    """Do one phase in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--phase", phase, "--dir", str(folder), "--scale", scale]
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{phase} failed")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{phase:8}{result['seconds']:9.1f} s   peak {result['peak_bytes'] / 2**30:6.2f} GiB")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--dir", type=Path, help="where it is made; default: a temporary folder")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--phase", choices=("make", "decode", "convert"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(run_phase(args.phase, args.dir, args.scale)))
        return
    base = Path(tempfile.mkdtemp(prefix="full_size.", dir=args.dir))
    try:
        phases = {
            phase: in_process(phase, base / "hf", args.scale)
            for phase in ("make", "decode", "convert")
        }
    finally:
        shutil.rmtree(base)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = {"cpus": os.cpu_count(), "memory_bytes": memory, "machine": platform.machine()}
    result = {"scale": args.scale, "machine": machine, **phases}
    print(
        f"load    {phases['decode']['load_seconds']:9.1f} s   peak "
        f"{phases['decode']['load_peak_bytes'] / 2**30:6.2f} GiB\n"
        f"decode  {phases['decode']['decode_tokens_per_second']:9.2f} tokens/s"
    )
    if args.scale == "full":
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, result)
        print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
