"""What `benchmarks/train.py` times: models, cases, and what its two sides have in common.

Each side runs in a process of its own, made by `serve`, so that its peak of memory is its own. The
sides take turns all the same: the parent says on their standard input whose turn it is.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.config import Config, DataConfig, LoRAConfig, ModelConfig, OptimizerConfig
from gptoss_jax.model.flops import matmul_params, step_flops

ATTENTION = ("attention",)
EXPERTS = ("attention", "experts")
SIZES = {
    # configs/tiny.py's sizes
    "tiny": ModelConfig(
        vocab_size=1024, num_layers=4, d_model=128, num_heads=8, num_kv_heads=2, head_dim=16,
        num_experts=8, active_experts=2, d_expert=96, window=32,
    ),
    # cpu_vs_transformers.py's
    "small": ModelConfig(
        vocab_size=16_384, num_layers=6, d_model=256, num_heads=8, num_kv_heads=2, head_dim=64,
        num_experts=32, active_experts=4, d_expert=384, window=128,
    ),
    "20b": ModelConfig(),
    "120b": ModelConfig(num_layers=36, num_experts=128),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, what of it is tuned, and on what."""

    size: str
    targets: tuple[str, ...]  # of LoRA; empty: every parameter
    rank: int
    rows: int
    tokens: int  # a row
    dtype: str
    ours: tuple[str, ...]  # forms of the experts' weights that this project is timed with
    theirs: tuple[str, ...]  # forms of transformers' experts; none: this project alone
    to_reach: dict[str, float]  # "times as fast", "tokens per second", "share of memory"
    remat: str = "none"
    optimizer: tuple[tuple[str, Any], ...] = ()  # of OptimizerConfig

    @property
    def name(self) -> str:
        """What it is called in the table."""
        if not self.targets:
            return f"{self.size} full"
        return f"{self.size} LoRA {'+'.join(self.targets)} r={self.rank}"


def _on_cpu(size: str, targets: tuple[str, ...], rows: int, tokens: int) -> Case:
    packed = ("dense", "mxfp4") if targets else ("dense",)
    forms = ("eager", "grouped_mm")
    return Case(
        size, targets, 8, rows, tokens, "float32", packed, forms, {"times as fast": 1.5}
    )  # fmt: skip


CPU = tuple(
    _on_cpu(size, targets, *shape)
    for size, shape in (("tiny", (8, 256)), ("small", (2, 512)))
    for targets in ((), ATTENTION, EXPERTS)
)
_LORA = {"tokens per second": 25_000, "times as fast": 2.0, "share of memory": 0.5}
# What transformers tunes in full does not fit into one device: there is no side of theirs.
DEVICE = (
    Case("20b", ATTENTION, 16, 1, 4096, "bfloat16", ("mxfp4",), ("grouped_mm", "eager"), _LORA,
         remat="full"),
    Case("20b", EXPERTS, 8, 1, 4096, "bfloat16", ("mxfp4",), ("grouped_mm",), _LORA, remat="full"),
    # configs/20b_one_gpu.py's
    Case("20b", (), 0, 4, 4096, "bfloat16", ("dense",), (), {"tokens per second": 13_000},
         remat="full", optimizer=(("fused", True), ("masters", "stochastic"),
                                  ("moment_dtype", "bfloat16"),
                                  ("second_moment_dtype", "bfloat16"))),
    Case("120b", ATTENTION, 16, 1, 4096, "bfloat16", ("mxfp4",), (), {}, remat="full"),
)  # fmt: skip


def at_tiny_size(case: Case) -> Case:
    """Return a case of a device as a CPU can run it: everything but the sizes stays."""
    return dataclasses.replace(case, size="tiny", rows=2, tokens=64)


def model_config(case: Case, form: str) -> ModelConfig:
    """Return the model that a case tunes, adapters included; `form` of the experts' weights."""
    lora = LoRAConfig(targets=case.targets, rank=case.rank or 8, alpha=16.0)
    return dataclasses.replace(
        SIZES[case.size], experts=form, dtype=case.dtype, param_dtype=case.dtype, lora=lora,
        remat=case.remat,
    )  # fmt: skip


def run_config(case: Case, form: str) -> Config:
    """Return the run that a case is a step of."""
    return Config(
        name="benchmark",
        model=model_config(case, form),
        data=DataConfig(sequence_length=case.tokens, batch_size=case.rows),
        optimizer=OptimizerConfig(learning_rate=1e-4, **dict(case.optimizer)),
    )


def token_ids(case: Case) -> np.ndarray:
    """Return [rows, tokens], the same for both sides; every token but a row's first is trained."""
    shape = (case.rows, case.tokens)
    return np.random.default_rng(0).integers(0, SIZES[case.size].vocab_size, shape)


def flops(case: Case) -> float:
    """Return the operations that a step of a case cannot do without.

    Of full tuning `step_flops`: 6 a parameter and token. With LoRA the weights that stay
    take 4 (no gradient of theirs) and the adapters 6; all of attention counts. What is computed
    again for memory's sake does not.
    """
    config = SIZES[case.size]
    tokens = case.rows * case.tokens
    trained = case.rows * (case.tokens - 1)
    whole = step_flops(config, tokens=tokens, trained=trained, sequence_length=case.tokens)
    if not case.targets:
        return whole
    layers, unembedding = matmul_params(config)
    return whole - 2 * tokens * layers - 2 * trained * unembedding + 6 * tokens * adapted(case)


def adapted(case: Case) -> int:
    """Return the adapters' parameters that a token meets."""
    c, r = SIZES[case.size], case.rank
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sides = 2 * (c.d_model + heads) + 2 * (c.d_model + kv)
    if case.targets == EXPERTS:
        sides += c.active_experts * (2 * c.d_model + 3 * c.d_expert)
    return c.num_layers * r * sides


def status(field: str) -> int:
    """Read a field of this process in bytes: VmHWM is the peak of its host memory, VmRSS now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let VmHWM begin again from now, so that what loading and compiling took is no part of it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def serve(begin: Callable[[], dict[str, Any]], step: Callable[[], float], peak: Callable) -> None:
    """Do what the parent asks for on standard input: a number of steps a line, and at last none.

    `begin` builds, and runs what has to be compiled; `step` runs one and returns its loss; `peak`
    returns the memory that was taken. Answers a line of JSON each, on what was standard output.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    print(json.dumps(begin()), file=answers)
    for line in sys.stdin:
        count, seconds = int(line), []
        if count == 0:
            break
        step()  # pays for the memory and the caches that the side before took
        began = time.process_time()
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        cpu = (time.process_time() - began) / count
        print(json.dumps({"seconds": seconds, "cpu seconds": cpu}), file=answers)
    print(json.dumps(peak()), file=answers)


def choose(number: int, *, device: bool, tiny: bool) -> Case:
    """Return a case by its number."""
    case = (DEVICE if device else CPU)[number]
    return at_tiny_size(case) if tiny else case
