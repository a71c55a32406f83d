"""gpt-oss-20b, full fine-tuning with float32 AdamW state on 32 v5e chips.

    python -m gptoss_jax.train --config configs/20b_v5e_4x8.py --init DIR --data.train FILE

Hardware: v5e:4x8. `python -m gptoss_jax.plan --config configs/20b_v5e_4x8.py --target v5e:4x8` says
13.7 of 15.75 GiB per chip. With bfloat16 moments and no float32 copy, half the chips are enough
(--optimizer.masters stochastic --optimizer.moment-dtype bfloat16 --optimizer.second-moment-dtype
bfloat16): v5e:4x4 with --mesh.fsdp 4 --data.batch-size 16 takes 13.8 GiB. Result: it depends on
your data.
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
