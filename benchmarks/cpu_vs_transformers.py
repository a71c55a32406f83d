"""This project against transformers on a CPU: forward, train step and greedy decode, side by side.

    pip install -e '.[parity]'
    python benchmarks/cpu_vs_transformers.py    # writes benchmarks/results/*.json

Both in one process on the same threads, float32, random weights of the same shapes, in turns,
medians. transformers runs eagerly, as its users run it, with each of its expert forms; the
faster one counts. The train step is forward, loss over every token, backward, clipping and AdamW.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

THREADS = len(os.sched_getaffinity(0))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, str(THREADS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
import transformers  # noqa: E402  # pyright: ignore[reportMissingImports]
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from gptoss_jax import Sampler, make_train_step  # noqa: E402
from gptoss_jax.config import ModelConfig, OptimizerConfig  # noqa: E402
from gptoss_jax.model import Transformer  # noqa: E402
from gptoss_jax.objectives.token_loss import loss_fn  # noqa: E402
from gptoss_jax.optimizer import make_optimizer  # noqa: E402
from gptoss_jax.training.step import init_state  # noqa: E402
from gptoss_jax.types import Batch  # noqa: E402

MODELS = {
    # configs/tiny.py's sizes
    "tiny": ModelConfig(
        vocab_size=1024, num_layers=4, d_model=128, num_heads=8, num_kv_heads=2, head_dim=16,
        num_experts=8, active_experts=2, d_expert=96, window=32,
        dtype="float32", param_dtype="float32",
    ),
    "small": ModelConfig(
        vocab_size=16_384, num_layers=6, d_model=256, num_heads=8, num_kv_heads=2, head_dim=64,
        num_experts=32, active_experts=4, d_expert=384, window=128,
        dtype="float32", param_dtype="float32",
    ),
}  # fmt: skip
SHAPES = {"tiny": (8, 256), "small": (2, 512)}  # rows, tokens
PROMPT, ANSWER = 32, 64  # tokens, batch 1
TARGETS = {
    "tiny": {"forward": 1.5, "train step": 1.5, "decode": 3.0},
    "small": {"forward": 1.1, "train step": 1.1, "decode": 3.0},
}


def theirs(config: ModelConfig, form: str, tokens: np.ndarray) -> dict[str, Callable[[], None]]:
    """Return what to time of transformers, with one of its forms of the experts."""
    c = config
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            vocab_size=c.vocab_size,
            num_hidden_layers=c.num_layers,
            hidden_size=c.d_model,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            num_local_experts=c.num_experts,
            num_experts_per_tok=c.active_experts,
            intermediate_size=c.d_expert,
            sliding_window=c.window,
            layer_types=[
                "full_attention" if w is None else "sliding_attention" for w in c.layer_windows
            ],
            attn_implementation="eager",
            experts_implementation=form,
        )
    ).float()
    ids = torch.as_tensor(tokens, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def train_step() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def decode() -> None:
        prompt = ids[:1, :PROMPT]
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=ANSWER, min_new_tokens=ANSWER, pad_token_id=0,
        )  # fmt: skip

    return {"forward": forward, "train step": train_step, "decode": decode}


def ours(config: ModelConfig, tokens: np.ndarray) -> dict[str, Callable[[], None]]:
    """Return what to time of this project."""
    model = Transformer(config)
    optimizer = make_optimizer(OptimizerConfig(), 10_000)
    state = [init_state(model, optimizer, None)]
    params = jax.tree.map(jnp.copy, state[0].params)
    ids = jnp.asarray(tokens, jnp.int32)
    ones = jnp.ones_like(ids)
    batch = Batch(
        tokens=ids,
        targets=jnp.roll(ids, -1, axis=1),
        weights=ones.at[:, -1].set(0).astype(jnp.float32),
        segment_ids=ones,
        positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
    )
    apply = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    step = make_train_step(model, optimizer, functools.partial(loss_fn))
    sampler = Sampler(model, params)

    def forward() -> None:
        jax.block_until_ready(apply(params, ids))

    def train_step() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready(metrics.loss)

    def decode() -> None:
        sampler.generate([tokens[0, :PROMPT].tolist()], max_tokens=ANSWER, stop_ids=())

    return {"forward": forward, "train step": train_step, "decode": decode}


def measure(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Time the runs in turns of four each; return the median of each in milliseconds.

    The first of a turn is left out: it pays for the memory that the one before gave back.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 6:
        for name, run in runs.items():
            run()
            for _ in range(3):
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="gptoss_jax against transformers on a CPU")
    parser.add_argument("--seconds", type=float, default=20, help="of timing, a model and task")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", default="benchmarks/results/cpu_vs_transformers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    table = Table("model", "task", "transformers, ms", "ours, ms", "times as fast", "to reach")
    rows = []
    for name in arguments.models:
        config = MODELS[name]
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, SHAPES[name])
        forms = {form: theirs(config, form, tokens) for form in ("eager", "grouped_mm")}
        mine = ours(config, tokens)
        for task in ("forward", "train step", "decode"):
            runs = {form: tasks[task] for form, tasks in forms.items()} | {"ours": mine[task]}
            took = measure(runs, arguments.seconds)
            best = min(took[form] for form in forms)
            ratio = best / took["ours"]
            rows.append(
                {"model": name, "task": task}
                | {"times as fast": ratio, "to reach": TARGETS[name][task]}
                | {f"{k} ms": v for k, v in took.items()}
            )  # fmt: skip
            table.add_row(
                name, task, f"{best:.1f}", f"{took['ours']:.1f}", f"{ratio:.2f}",
                str(TARGETS[name][task]),
            )  # fmt: skip
    Console().print(table)
    result = {
        "threads": THREADS,
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "models": {name: dataclasses.asdict(MODELS[name]) for name in arguments.models},
        "rows, tokens": {name: SHAPES[name] for name in arguments.models},
        "decode": {"prompt": PROMPT, "answer": ANSWER, "batch": 1},
        "results": rows,
    }
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
