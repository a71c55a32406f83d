"""gpt-oss-20b from scratch, by the recipe of MLPerf Training v6.0: C4 to log-perplexity 3.34.

    python -m gptoss_jax.train --config configs/20b_mlperf.py --init random \\
        --data.train C4/train/*.parquet --data.held_out C4/validation/*.parquet

The recipe: sequences of 8,192 tokens, AdamW with betas 0.9 and 0.95, eps 1e-5 and weight decay 0.1,
initial weights with a standard deviation of 0.008. It leaves batch size, learning rate, warm-up and
steps to a submission; those here are our choice.

Hardware: v5p:2x2x4, 16 chips. `python -m gptoss_jax.plan --config configs/20b_mlperf.py --target
v5p:2x2x4` says 32.3 of 95.7 GiB per chip, 17.0 of them the training state. Result: not run.
"""

from gptoss_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="20b_mlperf",
        init="random",
        model=ModelConfig(remat="full", init_std=0.008),
        data=DataConfig(sequence_length=8192, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=4e-4,
            warmup_steps=128,
            b1=0.9,
            b2=0.95,
            eps=1e-5,
            weight_decay=0.1,
        ),
        train=TrainConfig(steps=20_000, balance_loss=0.01, eval_questions=0),
        mesh=MeshConfig(fsdp=4, expert=4),
    )
