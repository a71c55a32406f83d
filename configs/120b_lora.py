"""gpt-oss-120b, LoRA on attention and on every expert, over the packed MXFP4 weights.

    python -m gptoss_jax.train --config configs/120b_lora.py --init DIR --data.train FILE

The base stays as it came, 4 bits an expert's weight, and takes no memory of the optimizer.
Attention alone: --model.lora.targets attention --model.lora.rank 16.

Hardware: one GPU of 80 GB or more. What a step takes, as compiled for an H200 (docs/plan.md), with
the embedding table on the host (--model.embedding_on_host; 1.2 GB more without):

    attention alone, rank 16, rows of 1,024 tokens     66.9 GB
    and experts, rank 8, rows of 1,024 tokens          76.0 GB
    as it stands here, the table on the device         79.8 GB
"""

from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        name="120b_lora",
        model=ModelConfig(
            num_layers=36,
            num_experts=128,
            experts="mxfp4",
            remat="full",
            lora=LoRAConfig(targets=("attention", "experts"), rank=8, alpha=16.0),
        ),
        data=DataConfig(sequence_length=4096, batch_size=1),
        # Ten times the learning rate of full tuning, and no decay: what is small stays so.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000),
    )
