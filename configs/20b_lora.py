"""gpt-oss-20b, LoRA on attention and on every expert, over the packed MXFP4 weights.

    python -m gptoss_jax.train --config configs/20b_lora.py --init DIR --data.train FILE

The base stays as it came, 4 bits an expert's weight, and takes no memory of the optimizer.
Attention alone: --model.lora.targets attention --model.lora.rank 16.

Hardware: one GPU or TPU chip. What a step takes, as compiled for an H200 (docs/plan.md), with the
embedding table on the host (--model.embedding_on_host; 1.2 GB more without):

    attention alone, rank 16, rows of 1,024 tokens     13.6 GB (v5p, --model.remat offload: 14.4)
    and experts, rank 8, rows of 1,024 tokens          15.6 GB
    and experts, rows of 131,072 tokens                50.9 GB, the table on the device

Where rows are long, --model.expert_chunk 16384 takes experts through so many tokens at a time;
--model.remat offload keeps the layers' inputs in the host's memory: 32.8 GB for 50.9.
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
        name="20b_lora",
        model=ModelConfig(
            experts="mxfp4",
            remat="full",
            lora=LoRAConfig(targets=("attention", "experts"), rank=8, alpha=16.0),
        ),
        data=DataConfig(sequence_length=4096, batch_size=1),
        # Ten times the learning rate of full tuning, and no decay: what is small stays so.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000),
    )
