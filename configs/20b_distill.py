"""gpt-oss-20b learns from gpt-oss-120b on the user's chats: only adapters train, both are packed.

    python -m gptoss_jax.train --config configs/20b_distill.py --init DIR --data.train FILE \\
        --objective.distill.teacher DIR_OF_120B

Hardware: one H200. Compiled for it, the student's step takes 19.1 GiB; the teacher stays in memory
beside it and takes 61 GiB more. Not run on a GPU. The student learns on the tokens of FILE that
data.train_on selects. To teach the teacher's own answers, have it answer the questions first
(`gptoss_jax.sample`).
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
from gptoss_jax.config.objective import DistillConfig


def get_config() -> Config:
    return Config(
        name="20b_distill",
        model=ModelConfig(
            experts="mxfp4",
            remat="full",
            lora=LoRAConfig(targets=("attention", "experts"), rank=8, alpha=16.0),
        ),
        objective=ObjectiveConfig(name="distill", distill=DistillConfig(temperature=1.0)),
        data=DataConfig(sequence_length=4096, batch_size=4),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=20, weight_decay=0.0, accumulate=4
        ),
        train=TrainConfig(steps=1000),
    )
