"""Demo chats: lists of digits to be sorted, which a tiny model learns to do by rule; and pairs.

    python -m gptoss_jax.data.demo OUT [--seed 0] [--count 2400]

writes OUT/train.jsonl and OUT/held_out.jsonl, byte for byte those that ship in data/demo/ where the
seed and the count are the default ones; and OUT/pairs.jsonl and OUT/pairs_held_out.jsonl, a
question each with the list sorted, which is chosen, and in another order, which is rejected.

No held-out list is in the training set, and neither is any list of the same digits in another
order: to know the training answers by heart does not help.
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
HELD_OUT = 256  # held-out chats, one question each
PAIRS, PAIRS_HELD_OUT = 800, 192

LENGTHS = (4, 5, 6, 7, 8)  # digits in a list
TURNS = 6  # most questions in a training chat

Record = dict[str, Any]


def generate(
    seed: int = SEED, count: int = COUNT, *, held_out: int = HELD_OUT
) -> tuple[list[Record], list[Record]]:
    """Return `count` training chats and `held_out` chats of one question, from a seed.

    A training chat asks 1 to 6 questions, so that Harmony's system message is paid for once. The
    records are the same for a seed on every machine. Raises UserError where a count is negative.
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
    """Write train.jsonl and held_out.jsonl into a folder, made if need be; return their paths."""
    return _write(Path(folder), generate(seed, count, held_out=held_out), "train", "held_out")


def write_pairs(
    folder: str | Path, *, seed: int = SEED, count: int = PAIRS, held_out: int = PAIRS_HELD_OUT
) -> tuple[Path, Path]:
    """Write pairs.jsonl and pairs_held_out.jsonl as `write` does the chats."""
    sets = generate_pairs(seed, count, held_out=held_out)
    return _write(Path(folder), sets, "pairs", "pairs_held_out")


def generate_pairs(
    seed: int = SEED, count: int = PAIRS, *, held_out: int = PAIRS_HELD_OUT
) -> tuple[list[Record], list[Record]]:
    """Return `count` training and `held_out` other pairs, as `generate` does chats of a question.

    The rejected answer has the digits of the chosen one in another order.
    """
    questions = generate(seed, 0, held_out=count + held_out)[1]  # no two of the same digits
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
    """Return a chat that has each list sorted in turn."""
    messages = []
    for digits in lists:
        messages.append({"role": "user", "content": f"sort {' '.join(digits)}"})
        messages.append({"role": "assistant", "content": " ".join(sorted(digits))})
    return {"messages": messages, "reasoning": "low"}


def main(argv: list[str]) -> None:
    """Write the demo chats of a seed into a folder."""
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
