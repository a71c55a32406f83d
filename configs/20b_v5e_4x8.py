"""gpt-oss-20b, full fine-tuning with float32 AdamW state on 32 v5e chips.

    python -m gptoss_jax.train --config configs/20b_v5e_4x8.py --init DIR --data.train FILE

Hardware: v5e:4x8, 15.75 GiB a chip. Not shown to fit: `python -m gptoss_jax.plan --config
configs/20b_v5e_4x8.py --target v5e:4x8` says 19.1 GiB (state 8.5, laid out 8.9; temporaries 10.1),
though the compiler accepted it. Result: not run.
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
        name="20b_v5e_4x8",
        model=ModelConfig(remat="full", expert_chunk=4096),
        data=DataConfig(sequence_length=4096, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=20),
        train=TrainConfig(steps=1000),
        mesh=MeshConfig(fsdp=8, expert=4),
    )
