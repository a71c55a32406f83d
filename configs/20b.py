"""gpt-oss-20b, full fine-tuning in bfloat16.

    python -m gptoss_jax.train --config configs/20b.py --init DIR --data.train FILE

Hardware: 16 bytes per parameter are 335 GB, so 4 H200, 32 v5e, 4 v5p or 16 v6e. With overrides that
shrink the model (--model.num_layers 2 ...) it runs anywhere. Result: it depends on your data.
"""

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="20b",
        model=ModelConfig(remat="full"),
        data=DataConfig(sequence_length=4096, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20),
        train=TrainConfig(steps=1000),
    )
