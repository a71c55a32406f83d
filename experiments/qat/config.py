"""What exporting to MXFP4 costs: quantised after training, or trained for it.

    python experiments/run.py qat

Hardware: any; about 5 minutes on two cores that do nothing else. Result: experiments/README.md.

The data: triples of two letters and a symbol that a table of 576 random entries says for the two.
Nothing can be copied, and nothing follows from anything else: the table has to be in the weights,
most of which are the experts'. Held out are other draws from the same table.

"float" learns the table from nothing. Both others go on from where it ended, with its seed, for as
many steps at a lower learning rate: "longer" as before, "qat" with the experts' weights as MXFP4
leaves them.
"""

import dataclasses
import json
import os
import random
from functools import cache
from pathlib import Path

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

VARIANTS = ("float", "longer", "qat")
CHANGES = ("model.qat", "optimizer.learning_rate")
STARTS_FROM = {"longer": "float", "qat": "float"}

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWX"
SYMBOLS = "0123456789!#$%&*+-=?"
TRIPLES = 21  # a record, 64 tokens with its end
DATA = Path(__file__).resolve().parents[2] / "runs" / "experiments" / "qat" / "data"


def get_config(variant: str = VARIANTS[0]) -> Config:
    """Return the config of a variant, with its data written if they are not there."""
    train, held_out = write_data()
    base = Config(
        name="qat",
        init="random",
        model=ModelConfig(
            vocab_size=512,
            num_layers=2,
            d_model=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            num_experts=4,
            active_experts=2,
            d_expert=32,
            window=16,
            rope_factor=1.0,
            initial_context=256,
            context=256,
            dtype="float32",
            param_dtype="float32",
        ),
        data=DataConfig(train=(train,), held_out=(held_out,), sequence_length=64, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
        train=TrainConfig(
            steps=600, eval_every=25, eval_batches=0, eval_questions=0, checkpoint_every=600
        ),
    )
    if variant == "float":
        return base
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, qat=variant == "qat"),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3),
    )


@cache
def table() -> dict[str, str]:
    """Return what is to be learned: two letters to a symbol."""
    rng = random.Random(7)
    return {a + b: rng.choice(SYMBOLS) for a in LETTERS for b in LETTERS}


def draw_record(rng: random.Random, triples: int = TRIPLES) -> str:
    """Draw the text of one record: two letters and their symbol, each a token of its own."""
    pairs = [rng.choice(LETTERS) + rng.choice(LETTERS) for _ in range(triples)]
    return "".join(pair + table()[pair] for pair in pairs)


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
