"""What a run measured: JSON lines, TensorBoard, curves; and how much arithmetic a step is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.config import ModelConfig

FILE = "metrics.jsonl"
CURVES = "curves.png"

# Dense peak of one device in bfloat16 (float16 where it has none), TFLOP/s, by what its
# `device_kind` contains, the first that fits. Source: the vendors' data sheets, without sparsity.
_PEAK_TFLOPS = (
    ("B200", 2_250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("A100", 312.0),
    ("L40S", 362.0), ("L4", 121.0), ("V100", 125.0), ("T4", 65.0),
    ("TPU v6", 918.0), ("TPU v5 lite", 197.0), ("TPU v5e", 197.0), ("TPU v5", 459.0),
    ("TPU v4", 275.0), ("TPU7", 2_307.0), ("TPU v7", 2_307.0),
)  # fmt: skip


class MetricsLog:
    """Appends records to `metrics.jsonl` and to TensorBoard's files in a workdir."""

    def __init__(self, workdir: str | Path, *, step: int = 0) -> None:
        """Open the log of a run that goes on after `step`: later records are taken out of it."""
        from tensorboardX import SummaryWriter

        folder = Path(workdir)
        path = folder / FILE
        kept = [r for r in read(folder) if r["step"] <= step] if step else []
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(whole, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one record, without what is None or not finite (JSON has no NaN).

        Numbers go to TensorBoard too; of lists [L][E] the largest entry of each layer.
        """
        values = {k: v for k, v in values.items() if v is not None}
        values = {k: v for k, v in values.items() if isinstance(v, list) or math.isfinite(v)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()  # a killed run loses no record
        for name, value in values.items():
            if not isinstance(value, list):
                self._board.add_scalar(name, value, step)
            else:
                for layer, row in enumerate(value):
                    self._board.add_scalar(f"{name}_max/layer_{layer}", max(row), step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read(workdir: str | Path) -> list[dict[str, Any]]:
    """Read the records of a run; a last line that was cut short is left out."""
    path = Path(workdir) / FILE
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def matmul_params(config: ModelConfig) -> tuple[int, int]:
    """Return the parameters that multiply each token in the layers, and each unembedded token.

    A of E experts; biases, norms and the embedding's look-up are no matmuls.
    """
    c = config
    attention = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
    experts = c.active_experts * 3 * c.d_model * c.d_expert
    layer = attention + c.num_experts * c.d_model + experts
    return c.num_layers * layer, c.vocab_size * c.d_model


def step_flops(
    config: ModelConfig, *, tokens: float, trained: float, sequence_length: int
) -> float:
    """Return the floating-point operations of a training step, forward and backward.

    6 per active matmul parameter and token (2 forward, 4 backward; the unembedding over the trained
    tokens alone), and in attention 12 * N * H per pair of query and visible key, a row taken as one
    segment. What remat computes again is not counted.
    """
    c, T = config, sequence_length
    layers, unembedding = matmul_params(config)
    pairs = 0.0  # per token, over layers
    for window in c.layer_windows:
        w = min(window or T, T)
        pairs += (w * (w + 1) / 2 + (T - w) * w) / T
    attention = 12 * c.num_heads * c.head_dim * pairs
    return tokens * (6 * layers + attention) + 6 * trained * unembedding


def peak_flops(peak_tflops: float = 0.0, *, devices: int = 1) -> float | None:
    """Return the peak of so many devices in FLOP/s; None if it is not known, as on a CPU.

    `peak_tflops`, of one device, goes before the table.
    """
    kind = jax.devices()[0].device_kind
    known = [peak for name, peak in _PEAK_TFLOPS if name in kind]
    peak = peak_tflops or (known[0] if known else 0.0)
    return peak * 1e12 * devices if peak else None


def plot(workdir: str | Path) -> Path:
    """Draw a run's curves from its records into `curves.png`, and return that path."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read(workdir)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)

    def line(axis: Any, name: str, **style: Any) -> None:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            axis.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)

    line(axes[0, 0], "loss", color="tab:blue", alpha=0.6, linewidth=1)
    line(axes[0, 0], "held_out_loss", color="tab:orange", marker="o")
    axes[0, 0].set(title="loss, nats a token", xlabel="step", ylim=(0, None))
    line(axes[0, 1], "exact_match", color="tab:green", marker="o")
    axes[0, 1].set(title="held-out questions answered exactly", xlabel="step", ylim=(-0.02, 1.02))
    line(axes[1, 0], "learning_rate", color="tab:red")
    axes[1, 0].set(title="learning rate and gradient norm", xlabel="step", ylabel="learning rate")
    norms = axes[1, 0].twinx()
    line(norms, "grad_norm", color="tab:gray", alpha=0.5, linewidth=1)
    norms.set(ylabel="gradient norm", yscale="log")
    loads = [r["expert_load"] for r in records if "expert_load" in r]
    if loads:
        image = axes[1, 1].imshow(loads[-1], aspect="auto", vmin=0, cmap="viridis")
        axes[1, 1].yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes[1, 1])
    axes[1, 1].set(title="share of tokens, last step", xlabel="expert", ylabel="layer")
    for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
        if axis.lines:
            axis.legend()
    path = Path(workdir) / CURVES
    figure.savefig(path, dpi=110)
    return path
