"""What attention sinks do: learned, fixed at zero, or none.

    python experiments/run.py sinks

Hardware: any; about 6 minutes on two cores. Result: experiments/README.md.

The data: pairs of a letter and a symbol. A letter says from how many pairs back the symbol is
copied; where the record does not reach back that far the symbol is ~, and where the letter is x it
is drawn at random. So heads that copy have something to attend to at some letters and nothing at
others. The softmax has to put its weight somewhere: on a sink, or, without one, on some token.
"""

import dataclasses
import json
import os
import random
from functools import cache
from pathlib import Path

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

VARIANTS = ("learned", "zero", "off")
CHANGES = ("model.sinks",)

LAGS = {"a": 3, "b": 7, "c": 14}  # letter -> pairs back; the last is out of the window
SYMBOLS = "0123456789!#$%&*+-=?"
NOTHING = "~"
PAIRS = 31  # a record, 63 tokens with its end
DRAWN = 0.3  # share of symbols drawn at random
DATA = Path(__file__).resolve().parents[2] / "runs" / "experiments" / "sinks" / "data"


def get_config(variant: str = VARIANTS[0]) -> Config:
    """Return the config of a variant, with its data written if they are not there."""
    train, held_out = write_data()
    base = Config(
        name="sinks",
        init="random",
        model=ModelConfig(
            vocab_size=512,
            num_layers=2,
            d_model=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            num_experts=4,
            active_experts=2,
            d_expert=64,
            window=16,
            rope_factor=1.0,
            initial_context=256,
            context=256,
            dtype="float32",
            param_dtype="float32",
        ),
        data=DataConfig(train=(train,), held_out=(held_out,), sequence_length=64, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(
            steps=800, eval_every=25, eval_batches=0, eval_questions=0, checkpoint_every=800
        ),
    )
    return dataclasses.replace(base, model=dataclasses.replace(base.model, sinks=variant))


def draw_record(rng: random.Random, pairs: int = PAIRS) -> str:
    """Draw the text of one record: letters and symbols by turns, each a token of its own."""
    letters, symbols = "", ""
    for i in range(pairs):
        letter = "x" if rng.random() < DRAWN else rng.choice(list(LAGS))
        if letter == "x":
            symbols += rng.choice(SYMBOLS)
        else:
            symbols += symbols[i - LAGS[letter]] if LAGS[letter] <= i else NOTHING
        letters += letter
    return "".join(map("".join, zip(letters, symbols, strict=True)))


@cache
def write_data() -> tuple[str, str]:
    """Write train.jsonl and held_out.jsonl where they are not there as they should be."""
    paths = []
    for name, seed, count in (("train", 0, 12_800), ("held_out", 1, 256)):
        rng = random.Random(seed)
        text = "".join(json.dumps({"text": draw_record(rng)}) + "\n" for _ in range(count))
        path = DATA / f"{name}.jsonl"
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            partly = path.with_suffix(f".{os.getpid()}")
            partly.write_text(text)
            os.replace(partly, path)  # two runs may start at once
        paths.append(str(path))
    return paths[0], paths[1]
