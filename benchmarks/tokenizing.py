"""How fast records become batches, beside how fast the small model trains.

    python benchmarks/tokenizing.py [--seconds 5] [--vocab-size 1024 201088]

Data are made for it: chats of some sentences (30 to 400 tokens), the demo's chats, and running text
in a .txt file. For each, tokens a second, cold (nothing tokenised before, each record tokenised
once):
- render: `Examples.tokenise`, one record after another on one thread: reading, JSON, Harmony, BPE;
- loader: `train_batches` as a run takes it, packed batches off its background threads.
A .parquet file of the chats is read by the loader too. Prints a table and writes
benchmarks/results/tokenizing.json. A step of configs/tiny.py takes about 40,000 tokens a second on
two cores (`--train-rate`): the table says how many times that each is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from gptoss_jax import data
from gptoss_jax.config import Config, DataConfig, ModelConfig
from gptoss_jax.data import demo, examples
from gptoss_jax.data.examples import open_examples
from gptoss_jax.harmony import tokenizer

RESULTS = Path(__file__).parent / "results" / "tokenizing.json"
RECORDS = 4_000
BATCH, LENGTH = 8, 512  # those of configs/tiny.py


@cache
def dictionary() -> list[str]:
    """Return English words, and parts of words, of the vocabulary."""
    tokens = itertools.islice(tokenizer.load_ranks(), 40_000)
    texts = [token.decode("utf-8", "ignore") for token in tokens]
    return [text[1:] for text in texts if text.isascii() and text[:1] == " " and text[1:].isalpha()]


def words(rng: random.Random, count: int) -> str:
    """Make text of `count` words, with spaces and stops."""
    return " ".join(rng.choice(dictionary()) + "." * (rng.random() < 0.08) for _ in range(count))


def write_data(folder: Path) -> dict[str, Path]:
    """Write the data, which are the same for every run."""
    rng = random.Random(0)
    chats = []
    for _ in range(RECORDS):
        turns = []
        for _ in range(rng.randint(1, 4)):
            turns.append({"role": "user", "content": words(rng, rng.randint(5, 40))})
            turns.append({"role": "assistant", "content": words(rng, rng.randint(10, 60))})
        chats.append({"messages": turns})
    lines = "".join(json.dumps(chat) + "\n" for chat in chats)
    files = {name: folder / name for name in ("chats.jsonl", "chats.parquet", "text.txt")}
    files["chats.jsonl"].write_text(lines)
    pq.write_table(pa.Table.from_pylist(chats), files["chats.parquet"], row_group_size=1_000)
    files["text.txt"].write_text("\n".join(words(rng, 12) for _ in range(40_000)))
    return {"demo.jsonl": demo.FOLDER / "train.jsonl", **files}


def rate(
    make: Callable[[Config], Iterator[int]], config: Config, *, seconds: float
) -> dict[str, float]:
    """Run passes, each from scratch, for `seconds` or more; return the median pass's rate."""
    rates, began = [], time.perf_counter()
    while not rates or time.perf_counter() - began < seconds:
        counts = make(config)  # what is set up before the clock starts
        at = time.perf_counter()
        tokens = sum(counts)
        rates.append(tokens / (time.perf_counter() - at))
    return {"tokens_per_second": sorted(rates)[len(rates) // 2], "passes": len(rates)}


def render(config: Config) -> Iterator[int]:
    """Tokenise all records once, in turn."""
    examples._open.cache_clear()
    found = open_examples(config)
    return (len(s.tokens) for i in range(len(found)) for s in found.tokenise(i))


def loader(config: Config) -> Iterator[int]:
    """Take batches of about one epoch."""
    examples._open.cache_clear()
    batches = data.train_batches(config)

    def counts() -> Iterator[int]:
        tokens, limit = 0, open_examples(config).stats.tokens
        for batch in batches:
            n = int((batch.segment_ids > 0).sum())
            tokens += n
            yield n
            if tokens >= limit:
                break
        batches.close()

    return counts()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement; default: 5")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[1_024, 201_088])
    parser.add_argument("--train-rate", type=float, default=40_000, help="default: 40000")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    # Cold: what the survey or a pass before tokenised is tokenised again.
    examples.CACHE_TOKENS = 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder))
        for vocab_size, (name, file) in itertools.product(args.vocab_size, files.items()):
            config = Config(
                model=ModelConfig(vocab_size=vocab_size, num_experts=8, active_experts=2),
                data=DataConfig(train=(str(file),), batch_size=BATCH, sequence_length=LENGTH),
            )
            for way in (render, loader):
                if file.suffix == ".parquet" and way is render:
                    continue  # row after row in file order: the loader is what a run sees
                row = {"data": name, "vocab_size": vocab_size, "way": way.__name__}
                rows.append({**row, **rate(way, config, seconds=args.seconds)})
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "tiktoken": version("tiktoken"),
    }
    table = Table("data", "vocabulary", "way", "tokens/s", "times training")
    for row in rows:
        speed = row["tokens_per_second"]
        times = f"{speed / args.train_rate:.1f}"
        table.add_row(row["data"], f"{row['vocab_size']:,}", row["way"], f"{speed:,.0f}", times)
    Console().print(table)
    record = {"machine": machine, "train_tokens_per_second": args.train_rate, "rows": rows}
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
