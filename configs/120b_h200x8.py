"""gpt-oss-120b, full fine-tuning on one machine of 8 H200, with a small optimizer state.

    python -m gptoss_jax.train --config configs/120b_h200x8.py --init DIR --data.train FILE

Adafactor has no first moment and keeps the second as rows and columns. Parameters have no float32
copy; updates are rounded stochastically. So a parameter takes 2 bytes, and its gradient 2.

Hardware: h200:8. `python -m gptoss_jax.plan --config configs/120b_h200x8.py --target h200:8` says
63.7 of 139.4 GiB per GPU: parameters 27.2, gradients 27.2, activations and the update 9.3.
Result: it depends on your data.
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
        name="120b_h200x8",
        model=ModelConfig(num_layers=36, num_experts=128, remat="full", expert_chunk=8192),
        data=DataConfig(sequence_length=4096, batch_size=8),
        optimizer=OptimizerConfig(
            name="adafactor", masters="stochastic", learning_rate=1e-5, warmup_steps=20
        ),
        train=TrainConfig(steps=1000),
        mesh=MeshConfig(expert=8),
    )
