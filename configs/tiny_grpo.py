"""A tiny GPT-OSS that answers half of all sums with "no idea", until it is rewarded for right ones.

First it learns both kinds of answers from chats, then it trains with GRPO:

    python -m gptoss_jax.train --config configs/tiny_grpo.py --workdir runs/tiny_grpo_shy \
        --init random --objective.name sft --data.train gptoss_jax/data/demo/sums_shy.jsonl \
        --data.batch_size 8 --optimizer.learning_rate 3e-3 --optimizer.schedule constant \
        --train.steps 160
    python -m gptoss_jax.train --config configs/tiny_grpo.py --init runs/tiny_grpo_shy

Hardware: any; a minute or two on two cores for each command. Result: the mean reward, which is the
share of answers with the right sum, rises from 0.28 in the first step to 0.71 over the last ten of
60 steps.
"""

from pathlib import Path

from gptoss_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gptoss_jax.config.objective import GRPOConfig
from gptoss_jax.data.demo import FOLDER

REWARD = Path(__file__).parent / "rewards" / "sums.py"


def get_config() -> Config:
    return Config(
        name="tiny_grpo",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=2,
            d_model=64,
            num_heads=6,
            num_kv_heads=2,
            head_dim=16,
            num_experts=4,
            active_experts=2,
            d_expert=96,
            window=32,
            rope_factor=1.0,
            initial_context=512,
            context=512,
            dtype="float32",
            param_dtype="float32",
        ),
        objective=ObjectiveConfig(
            name="grpo",
            grpo=GRPOConfig(reward=str(REWARD), group_size=8, max_tokens=12, clip_high=0.28),
        ),
        data=DataConfig(
            train=(str(FOLDER / "sums.jsonl"),),
            sequence_length=512,
            batch_size=64,  # 8 answers to each of 8 questions
            reasoning="low",
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup_steps=5, schedule="cosine", weight_decay=0.0
        ),
        train=TrainConfig(steps=60, eval_every=1000, checkpoint_every=50, eval_questions=0),
    )
