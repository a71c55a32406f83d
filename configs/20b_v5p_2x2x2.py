"""gpt-oss-20b, full fine-tuning with float32 AdamW state on 8 v5p chips (v5p-16).

    python -m gptoss_jax.train --config configs/20b_v5p_2x2x2.py --init DIR --data.train FILE

Hardware: v5p:2x2x2. `python -m gptoss_jax.plan --config configs/20b_v5p_2x2x2.py --target
v5p:2x2x2` says 52.3 of 95.7 GiB per chip, 34.1 of them the training state.
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
        name="20b_v5p_2x2x2",
        model=ModelConfig(remat="full"),
        data=DataConfig(sequence_length=4096, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20),
        train=TrainConfig(steps=1000),
        mesh=MeshConfig(fsdp=2, expert=4),
    )
