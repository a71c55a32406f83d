"""gpt-oss-20b, GRPO on adapters of attention, over the packed MXFP4 weights.

    python -m gptoss_jax.train --config configs/20b_grpo.py --init DIR --data.train FILE \
        --objective.grpo.reward FILE.py

FILE has chats as questions; a Python function judges the answers: see docs/grpo.md. A step asks
8 questions, 8 times each. Answers have up to 3,072 tokens, questions the rest of 4,096.

Hardware: one GPU of 48 GB or more. Compiled for an H200 (python -m gptoss_jax.plan), the training
step takes 18.5 GiB and decoding 64 answers 20.3 GiB. Packed experts are kept in two layouts, which
adds 9.5 GiB to both. Prefill takes more memory for longer questions. By the data sheet, training on
full rows takes at least 8 s per step, and decoding 3,072 tokens at least 12 s. Not run on a GPU.
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
from gptoss_jax.config.objective import GRPOConfig


def get_config() -> Config:
    return Config(
        name="20b_grpo",
        model=ModelConfig(
            experts="mxfp4",
            remat="full",
            lora=LoRAConfig(targets=("attention",), rank=16, alpha=32.0),
        ),
        objective=ObjectiveConfig(
            name="grpo",
            # The upper clipping bound of DAPO, which lets unlikely tokens become likely.
            grpo=GRPOConfig(group_size=8, max_tokens=3072, clip_high=0.28),
        ),
        data=DataConfig(sequence_length=4096, batch_size=64, reasoning="low"),
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            warmup_steps=5,
            schedule="constant",
            weight_decay=0.0,
            accumulate=16,  # microbatches of 4 rows
        ),
        # Evaluate rarely: answers to held-out questions take long, and there is no loss to compare.
        train=TrainConfig(steps=200, eval_every=50, checkpoint_every=25, eval_max_tokens=3072),
    )
