"""Which layers have to see the whole past: 1:1, 5:1, all, or none of them.

    python experiments/run.py layer_patterns

Hardware: any; about 10 minutes on two cores. Result: experiments/README.md.

The data: pairs of a letter and a symbol. A letter says from how many pairs back the symbol is
copied (x: from nowhere, it is drawn at random). The model is trained on every token, and the
question is from how far back each layer pattern can copy. A banded layer passes a token on by at
most window - 1 places, so six of them by 42.
"""

import json
import os
import random
from functools import cache
from pathlib import Path

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

VARIANTS = ("1:1", "5:1", "full", "banded")
CHANGES = ("model.layer_pattern",)

LAGS = {"a": 2, "b": 3, "c": 6, "d": 10, "e": 16, "f": 28}  # letter -> pairs back
SYMBOLS = "0123456789!#$%&*+-=?"
PAIRS = 63  # a record, 127 tokens with its end
DRAWN = 0.25  # share of symbols drawn at random, beside those at the start
DATA = Path(__file__).resolve().parents[2] / "runs" / "experiments" / "layer_patterns" / "data"


def get_config(variant: str = VARIANTS[0]) -> Config:
    """Return the config of a variant, with its data written if they are not there."""
    train, held_out = write_data()
    return Config(
        name="layer_patterns",
        init="random",
        model=ModelConfig(
            vocab_size=512,
            num_layers=6,
            d_model=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            num_experts=4,
            active_experts=2,
            d_expert=64,
            layer_pattern=variant,
            window=8,
            rope_factor=1.0,
            initial_context=128,
            context=128,
            dtype="float32",
            param_dtype="float32",
        ),
        data=DataConfig(train=(train,), held_out=(held_out,), sequence_length=128, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(
            steps=500, eval_every=25, eval_batches=0, eval_questions=0, checkpoint_every=500
        ),
    )


def draw_record(rng: random.Random) -> str:
    """Draw the text of one record: letters and symbols by turns, each a token of its own."""
    letters, symbols = "", ""
    for i in range(PAIRS):
        possible = [letter for letter, lag in LAGS.items() if lag <= i]
        if not possible or rng.random() < DRAWN:
            letters += "x"
            symbols += rng.choice(SYMBOLS)
        else:
            letters += rng.choice(possible)
            symbols += symbols[i - LAGS[letters[i]]]
    return "".join(map("".join, zip(letters, symbols, strict=True)))


@cache
def write_data() -> tuple[str, str]:
    """Write train.jsonl and held_out.jsonl where they are not there as they should be."""
    paths = []
    for name, seed, count in (("train", 0, 4_000), ("held_out", 1, 128)):
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
