"""Write the demo data: chats that sort lists of digits, and pairs of a right and a wrong answer.

    python -m gptoss_jax.data.demo OUT [--seed 0] [--count 2400]

A tiny model can learn the rule. The command writes OUT/train.jsonl and OUT/held_out.jsonl. With the
default seed and count they equal the files that ship in data/demo/, byte for byte. It also writes
OUT/pairs.jsonl and OUT/pairs_held_out.jsonl: each record has one question, the sorted list as the
chosen answer, and the same digits in another order as the rejected answer.

No held-out list is in the training set, and neither is any list of the same digits in another
order. So a model that only memorises the training answers gains nothing.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError, run_entry

FOLDER = Path(__file__).parent / "demo"
SEED = 0
COUNT = 2_400  # training chats
HELD_OUT = 256  # held-out chats with one question each
PAIRS, PAIRS_HELD_OUT = 800, 192

LENGTHS = (4, 5, 6, 7, 8)  # digits in a list
TURNS = 6  # a training chat has at most this many questions

Record = dict[str, Any]


def generate(
    seed: int = SEED, count: int = COUNT, *, held_out: int = HELD_OUT
) -> tuple[list[Record], list[Record]]:
    """Generate `count` training chats and `held_out` chats of one question each from a seed.

    A training chat asks 1 to 6 questions, which share the tokens of one Harmony system message. A
    seed gives the same records on every machine. Raises UserError if a count is negative.
    """
    if count < 0 or held_out < 0:
        raise UserError(f"demo chats: counts are {count} and {held_out}: they can't be negative")
    rng = random.Random(seed)
    held: set[tuple[str, ...]] = set()
    questions = []
    while len(questions) < held_out:
        digits = _draw(rng)
        if tuple(sorted(digits)) not in held:
            held.add(tuple(sorted(digits)))
            questions.append(_chat([digits]))
    train = []
    for _ in range(count):
        lists = []
        for _ in range(rng.randint(1, TURNS)):
            digits = _draw(rng)
            while tuple(sorted(digits)) in held:
                digits = _draw(rng)
            lists.append(digits)
        train.append(_chat(lists))
    return train, questions


def write(
    folder: str | Path, *, seed: int = SEED, count: int = COUNT, held_out: int = HELD_OUT
) -> tuple[Path, Path]:
    """Write train.jsonl and held_out.jsonl into a folder and return their paths.

    The folder is created if it is missing.
    """
    return _write(Path(folder), generate(seed, count, held_out=held_out), "train", "held_out")


def write_pairs(
    folder: str | Path, *, seed: int = SEED, count: int = PAIRS, held_out: int = PAIRS_HELD_OUT
) -> tuple[Path, Path]:
    """Write pairs.jsonl and pairs_held_out.jsonl into a folder, as `write` does for chats."""
    sets = generate_pairs(seed, count, held_out=held_out)
    return _write(Path(folder), sets, "pairs", "pairs_held_out")


def generate_pairs(
    seed: int = SEED, count: int = PAIRS, *, held_out: int = PAIRS_HELD_OUT
) -> tuple[list[Record], list[Record]]:
    """Generate `count` training pairs and `held_out` held-out pairs of one question each.

    The rejected answer has the digits of the chosen answer in another order. A list whose digits
    are all equal has no other order, so it gives no pair.
    """
    questions = generate(seed, 0, held_out=count + held_out)[1]  # no two have the same digits
    rng = random.Random(seed + 1)
    pairs = []
    for record in questions:
        question, answer = record["messages"]
        digits = answer["content"].split(" ")
        shuffled = digits[:]
        while shuffled == digits and len(set(digits)) > 1:
            rng.shuffle(shuffled)
        if shuffled != digits:
            pairs.append(
                {
                    "prompt": [question],
                    "chosen": answer["content"],
                    "rejected": " ".join(shuffled),
                    "reasoning": record["reasoning"],
                }
            )
    return pairs[held_out:], pairs[:held_out]


def _write(folder: Path, sets: tuple[list[Record], list[Record]], *names: str) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"{names[0]}.jsonl", folder / f"{names[1]}.jsonl"
    for path, records in zip(paths, sets, strict=True):
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return paths


def _draw(rng: random.Random) -> list[str]:
    return [str(rng.randrange(10)) for _ in range(rng.choice(LENGTHS))]


def _chat(lists: list[list[str]]) -> Record:
    """Return a chat that asks for each list in turn and answers with the sorted list."""
    messages = []
    for digits in lists:
        messages.append({"role": "user", "content": f"sort {' '.join(digits)}"})
        messages.append({"role": "assistant", "content": " ".join(sorted(digits))})
    return {"messages": messages, "reasoning": "low"}


def main(argv: list[str]) -> None:
    """Write the demo chats and pairs of a seed into a folder."""
    parser = argparse.ArgumentParser(prog="python -m gptoss_jax.data.demo", description=__doc__)
    parser.add_argument("out", help="the folder to write into")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT, help="training chats")
    options = parser.parse_args(argv)
    chats = write(options.out, seed=options.seed, count=options.count)
    for path in (*chats, *write_pairs(options.out, seed=options.seed)):
        print(path)


if __name__ == "__main__":
    run_entry(main)
