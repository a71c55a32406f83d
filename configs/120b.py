"""gpt-oss-120b, full fine-tuning in bfloat16.

    python -m gptoss_jax.train --config configs/120b.py --init DIR --data.train FILE

Hardware: 16 bytes per parameter are 1.87 TB, so 16 H200, 32 v5p or 64 v6e. Result: it depends on
your data.
"""

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="120b",
        model=ModelConfig(num_layers=36, num_experts=128, remat="full"),
        data=DataConfig(sequence_length=4096, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20),
        train=TrainConfig(steps=1000),
    )
