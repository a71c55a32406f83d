"""Times of transformers' eager attention and experts, for benchmarks/kernels.py to compare with.

Run by it, in a process of its own: prints one line of JSON. Attention is `eager_attention_forward`
of its GPT-OSS (with sinks, without the projections), the experts its `GptOssExperts`, whose weights
are dense: also where ours are packed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU is torch's here
sys.path[:0] = [str(Path(__file__).parent.parent)]

import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
import transformers  # noqa: E402  # pyright: ignore[reportMissingImports]
from kernel_case import FULL, QUICK, SMALL, Sizes  # noqa: E402
from transformers.models.gpt_oss import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    modeling_gpt_oss as gpt_oss,
)

Call = Callable[[int], Any]  # of a number, which chooses among the arguments
SETS = 16
BOTH = "forward + backward"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=("full", "small", "quick"), default="small")
    sizes = {"full": FULL, "small": SMALL, "quick": QUICK}[parser.parse_args().sizes]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if sizes is FULL and device == "cpu":
        sys.exit("torch sees no GPU")
    dtype = getattr(torch, sizes.dtype)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    timings: list[dict[str, Any]] = []
    with torch.device(device):
        torch.set_default_dtype(dtype)
        for name, cases, call in (*_attention(sizes), *_experts(sizes)):
            row: dict[str, Any] = {"implementation": f"transformers {name}"}
            try:
                row["ms"] = 1e3 * _seconds(call, device, 0.05 if sizes is QUICK else 0.7)
            except (RuntimeError, NotImplementedError) as error:  # out of memory, no such kernel
                row["error"] = str(error).splitlines()[0][:200]
            timings += [{"op": op, "case": case, "way": way, **row} for op, case, way in cases]
            if device == "cuda":
                torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"device": device, "versions": versions, "timings": timings}))


def _seconds(call: Call, device: str, budget: float) -> float:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def sample(calls: int) -> float:
        wait()
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        wait()
        return (time.perf_counter() - start) / calls

    sample(1)
    calls = 1 if sample(1) > 2e-3 else SETS
    samples, end = [], time.perf_counter() + budget
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 200):
        samples.append(sample(calls))
    return statistics.median(samples)


def _config(s: Sizes) -> Any:
    return transformers.GptOssConfig(
        num_hidden_layers=2, hidden_size=s.D, intermediate_size=s.F, num_attention_heads=s.N,
        num_key_value_heads=s.K, head_dim=s.H, num_local_experts=s.E, num_experts_per_tok=s.A,
        sliding_window=s.W, attn_implementation="eager",
    )  # fmt: skip


def _attention(s: Sizes):
    """Yield (name, the cases that it stands beside, a call) for self-attention and with a cache."""
    module = gpt_oss.GptOssAttention(_config(s), 0).eval()
    torch.nn.init.normal_(module.sinks)

    def call(batch: int, queries: int, keys: int, window: int | None, train: bool) -> Call:
        shapes = ((s.N, queries), (s.K, keys), (s.K, keys))
        sets = 1 if queries > 1 else SETS
        every = [[torch.randn(batch, n, t, s.H) for n, t in shapes] for _ in range(sets)]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        if window is not None:
            seen &= torch.ones_like(seen).triu(keys - queries - window + 1)
        lowest = torch.finfo(torch.get_default_dtype()).min
        mask = torch.zeros(1, 1, queries, keys).masked_fill(~seen, lowest)
        d_out = torch.randn(batch, queries, s.N, s.H) if train else None

        def run(i: int) -> None:
            args = every[i % sets]
            with torch.set_grad_enabled(train):
                if train:
                    args = [a.detach().requires_grad_() for a in args]
                out, _ = gpt_oss.eager_attention_forward(module, *args, mask, scaling=s.H**-0.5)
                if train:
                    out.backward(d_out)

        return run

    for window in (s.W, None):
        case = f"{'full' if window is None else 'banded'} T={s.T}"
        for way in ("forward", BOTH):
            run = call(1, s.T, s.T, window, way == BOTH)
            yield "eager", [("attention", case, way)], run
    for batch in s.batches:
        for window in (s.W, None):
            slots = window or s.S
            case = f"{'cache' if window is None else 'ring'} S={slots} batch {batch}"
            run = call(batch, 1, slots, None, False)
            yield "eager", [("cached attention", case, "forward")], run


def _experts(s: Sizes):
    config = _config(s)
    module = gpt_oss.GptOssExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def call(form: str, rows: int, train: str) -> Call:
        every = []
        for _ in range(SETS):
            ids = torch.rand(rows, s.E).argsort(dim=-1)[:, : s.A]
            every.append((torch.randn(rows, s.D), ids, torch.rand(rows, s.A)))

        def run(i: int) -> None:
            config._experts_implementation = form
            x, ids, shares = every[i % SETS]
            for parameter in module.parameters():
                parameter.grad = None
                parameter.requires_grad_(train == "all")
            with torch.set_grad_enabled(train != ""):
                x = x.detach().requires_grad_(train != "")
                out = module(x, ids, shares)
                if train:
                    out.backward(x.detach())

        return run

    for form in ("eager", "grouped_mm"):
        for rows in s.decode:
            yield form, [("experts", f"M={rows} packed", "forward")], call(form, rows, "")
        dense, packed = (f"M={s.prefill} {kind}" for kind in (s.dtype, "packed"))
        both = [("experts", dense, "forward"), ("experts", packed, "forward")]
        yield form, both, call(form, s.prefill, "")
        yield form, [("experts", packed, BOTH)], call(form, s.prefill, "x")
        yield form, [("experts", dense, BOTH)], call(form, s.prefill, "all")


if __name__ == "__main__":
    main()
