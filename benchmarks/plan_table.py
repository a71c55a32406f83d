"""The smallest set of chips for each use of 20b and 120b, by `python -m gptoss_jax.plan`.

    .venv-aot/bin/python benchmarks/plan_table.py            # print the table from the results
    .venv-aot/bin/python benchmarks/plan_table.py --missing  # compile what has no result yet
    .venv-aot/bin/python benchmarks/plan_table.py --only 20b-v5e-4x4

Results are kept in `benchmarks/results/plan.json`, one entry a row: the command, and what the
compiler said. Compiling takes minutes a row and up to a few GB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
GiB = 2**30
PACKED = "--model.experts mxfp4"
SAMPLE = "--what prefill,decode --context 8192"
BF16 = (
    "--optimizer.moment_dtype bfloat16 --optimizer.second_moment_dtype bfloat16 "
    "--optimizer.masters stochastic"
)
SHORT = "--data.sequence_length 1024"
ATTENTION = "--model.lora.targets attention --model.lora.rank 16"
EXPERTS = "--model.lora.targets attention experts"
ON_HOST = "--model.embedding_on_host"
LONG = "--data.sequence_length 131072 --model.expert_chunk 16384"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    use: str
    target: str
    options: str  # --config and overrides

    @property
    def command(self) -> str:
        return f"python -m gptoss_jax.plan --target {self.target} {self.options}"


ROWS = (
    Row("20b-v5e", "20b sampling, 8,192 tokens", "v5e:1x1",
        f"--config configs/20b.py {SAMPLE} {PACKED}"),
    Row("20b-l4", "20b sampling, 8,192 tokens", "l4",
        f"--config configs/20b.py {SAMPLE} {PACKED}"),
    Row("20b-t4", "20b sampling, 8,192 tokens, float16", "t4",
        f"--config configs/20b.py {SAMPLE} {PACKED} --model.dtype float16 "
        "--model.param_dtype float16"),
    Row("20b-lora-router-h100", "20b LoRA of attention and router, 4,096 tokens", "h100",
        "--config configs/20b_lora.py"),
    Row("20b-lora-router-v6e", "20b LoRA of attention and router, 4,096 tokens", "v6e:1x1",
        "--config configs/20b_lora.py"),
    Row("20b-lora-h100", "20b LoRA, experts too, 4,096 tokens", "h100",
        f"--config configs/20b_lora.py {EXPERTS}"),
    Row("20b-lora-v6e", "20b LoRA, experts too, 4,096 tokens", "v6e:1x1",
        f"--config configs/20b_lora.py {EXPERTS}"),
    Row("20b-lora-1k", "20b LoRA of attention, rank 16, 1,024 tokens, embedding on the host",
        "h200", f"--config configs/20b_lora.py {SHORT} {ATTENTION} {ON_HOST}"),
    Row("20b-lora-1k-experts", "20b LoRA, experts too, rank 8, 1,024 tokens, embedding on the host",
        "h200", f"--config configs/20b_lora.py {EXPERTS} {SHORT} {ON_HOST}"),
    Row("20b-lora-1k-v5p", "20b LoRA of attention, 1,024 tokens, embedding and layers' inputs on "
        "the host", "v5p:1x1x1",
        f"--config configs/20b_lora.py {SHORT} {ATTENTION} {ON_HOST} --model.remat offload"),
    Row("20b-lora-131k", "20b LoRA, experts too, 131,072 tokens", "h200",
        f"--config configs/20b_lora.py {EXPERTS} {LONG}"),
    Row("20b-lora-131k-h100", "20b LoRA, experts too, 131,072 tokens", "h100",
        f"--config configs/20b_lora.py {EXPERTS} {LONG}"),
    Row("20b-lora-131k-offload", "20b LoRA, experts too, 131,072 tokens, inputs on host", "h100",
        f"--config configs/20b_lora.py {EXPERTS} {LONG} --model.remat offload"),
    Row("20b-v5e-4x8", "20b full, float32 AdamW", "v5e:4x8",
        "--config configs/20b_v5e_4x8.py"),
    Row("20b-v5e-4x4", "20b full, bfloat16 moments, no copy", "v5e:4x4",
        f"--config configs/20b_v5e_4x8.py --mesh.fsdp 4 --data.batch_size 16 {BF16}"),
    Row("20b-v5p-2x2x2", "20b full, float32 AdamW", "v5p:2x2x2",
        "--config configs/20b_v5p_2x2x2.py"),
    Row("20b-h200x4", "20b full, float32 AdamW", "h200:4",
        "--config configs/20b.py --mesh.expert 4"),
    Row("20b-mlperf", "20b from scratch, MLPerf's recipe", "v5p:2x2x4",
        "--config configs/20b_mlperf.py"),
    Row("120b-h100", "120b sampling, 8,192 tokens", "h100",
        f"--config configs/120b.py {SAMPLE} {PACKED}"),
    Row("120b-v5p", "120b sampling, 8,192 tokens", "v5p:1x1x1",
        f"--config configs/120b.py {SAMPLE} {PACKED}"),
    Row("120b-lora-router-h200", "120b LoRA of attention and router, 4,096 tokens", "h200",
        "--config configs/120b_lora.py"),
    Row("120b-lora-h200", "120b LoRA, experts too, 4,096 tokens", "h200",
        f"--config configs/120b_lora.py {EXPERTS}"),
    Row("120b-lora-1k", "120b LoRA of attention, rank 16, 1,024 tokens, embedding on the host",
        "h200", f"--config configs/120b_lora.py {SHORT} {ATTENTION} {ON_HOST}"),
    Row("120b-lora-1k-experts", "120b LoRA, experts too, rank 8, 1,024 tokens, embedding on the "
        "host", "h200", f"--config configs/120b_lora.py {EXPERTS} {SHORT} {ON_HOST}"),
    Row("120b-h200x8", "120b full, Adafactor, no copy", "h200:8",
        "--config configs/120b_h200x8.py"),
    Row("120b-v5p-4x4x4", "120b full, float32 AdamW", "v5p:4x4x4",
        "--config configs/120b_v5p_4x4x4.py"),
)  # fmt: skip


def main() -> None:
    """Compile what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description="Which chips each use takes.")
    parser.add_argument("--missing", action="store_true", help="compile rows without a result")
    parser.add_argument("--only", nargs="*", default=[], help="compile these rows anew")
    options = parser.parse_args()
    unknown = set(options.only) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no row {sorted(unknown)[0]}: {', '.join(row.name for row in ROWS)}")
    for row in ROWS:
        if row.name in options.only or (options.missing and row.name not in results()):
            measure(row)
    print(table(results()))


def results() -> dict[str, dict]:
    """Return the kept results by the rows' names."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def measure(row: Row) -> None:
    """Compile a row in a process of its own, and keep its result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [sys.executable, *row.command.split()[1:], "--json", str(file)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not file.is_file():
            print(f"{row.name}: exit code {done.returncode}, no result", file=sys.stderr)
            return
        keep(row, json.loads(file.read_text()))


def keep(row: Row, record: dict) -> None:
    """Add a result to the file."""
    kept = {**results(), row.name: {"command": row.command, **record}}
    order = [one.name for one in ROWS]
    kept = {name: kept[name] for name in order if name in kept}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def table(found: dict[str, dict]) -> str:
    """Return the table in Markdown."""
    lines = ["| use | target | GB a device, of | fits | compiled in |", "|---|---|---|---|---|"]
    for row in ROWS:
        record = found.get(row.name)
        if record is None:
            continue
        programs = record["programs"]
        peaks = [one["peak"] for one in programs]
        gb = "not said" if None in peaks else f"{max(peaks) / 1e9:.1f}"
        capacity = record["facts"]["memory"] / 1e9
        fits = "yes" if all(one["fits"] for one in programs) else "no"
        seconds = sum(one["compile_seconds"] + one["trace_seconds"] for one in programs)
        lines.append(
            f"| {row.use} | {row.target} | {gb} of {capacity:.1f} | {fits} | {seconds:,.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
