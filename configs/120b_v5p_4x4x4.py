"""gpt-oss-120b, full fine-tuning with float32 AdamW state on 64 v5p chips (v5p-128).

    python -m gptoss_jax.train --config configs/120b_v5p_4x4x4.py --init DIR --data.train FILE

Hardware: v5p:4x4x4. `python -m gptoss_jax.plan --config configs/120b_v5p_4x4x4.py --target
v5p:4x4x4` says 40.1 of 95.7 GiB per chip: parameters 3.4, moments and float32 copies 20.5,
gradients 3.4; the rest is activations and gathered arrays. Result: it depends on your data.
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
        name="120b_v5p_4x4x4",
        model=ModelConfig(num_layers=36, num_experts=128, remat="full"),
        data=DataConfig(sequence_length=4096, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20),
        train=TrainConfig(steps=1000),
        mesh=MeshConfig(fsdp=16, expert=4),
    )
