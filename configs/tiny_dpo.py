"""A tiny GPT-OSS that learns, from pairs of answers, to prefer the sorted one; only adapters train.

    python -m gptoss_jax.train --config configs/tiny_dpo.py

Its base is random, and prefers neither answer of a pair. To start from a trained model, give it
with --init. Hardware: any; a minute or two on two cores. Result: the share of held-out pairs in
which the sorted answer has the larger reward rises from 0.50 to 0.98 in 60 steps, and the margin
from 0 to 5.7.
"""

from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gptoss_jax.config.objective import DPOConfig
from gptoss_jax.data.demo import FOLDER


def get_config() -> Config:
    return Config(
        name="tiny_dpo",
        init="random",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=2,
            d_model=128,
            num_heads=8,
            num_kv_heads=2,
            head_dim=16,
            num_experts=4,
            active_experts=2,
            d_expert=96,
            window=32,
            rope_factor=1.0,
            initial_context=512,
            context=1024,
            dtype="float32",
            param_dtype="float32",
            lora=LoRAConfig(
                targets=("attention", "experts", "embedding", "unembedding"), rank=8, alpha=16.0
            ),
        ),
        objective=ObjectiveConfig(name="dpo", dpo=DPOConfig(beta=0.1)),
        data=DataConfig(
            train=(str(FOLDER / "pairs.jsonl"),),
            held_out=(str(FOLDER / "pairs_held_out.jsonl"),),
            sequence_length=896,  # three pairs
            batch_size=4,
            reasoning="low",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10, weight_decay=0.0),
        train=TrainConfig(
            steps=60, eval_every=20, checkpoint_every=60, eval_batches=0, eval_questions=0
        ),
    )
