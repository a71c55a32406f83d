"""gpt-oss-120b, LoRA on attention and the router, over the packed MXFP4 weights.

    python -m gptoss_jax.train --config configs/120b_lora.py --init DIR --data.train FILE

The base is frozen: the experts keep their 4-bit weights, and the base needs no optimizer state. An
MXFP4 export of the run keeps the experts' bytes; attention and router are bfloat16 in it. To adapt
every expert too, give --model.lora.targets attention router experts. Export such a run with
`--experts bf16` or `--to peft`: 4-bit experts would lose most of its updates (docs/export.md).

Hardware: one GPU of 80 GB or more. Memory of a step, compiled for an H200 (docs/plan.md), with the
embedding table on the host (--model.embedding_on_host; 1.2 GB more without):

    attention only, rank 16, rows of 1,024 tokens         66.9 GB
    attention and experts, rank 8, rows of 1,024 tokens   76.0 GB
    the same, rows of 4,096, with the table on the device 79.8 GB
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
            # With the experts: ("attention", "router", "experts"); see above for the export.
            lora=LoRAConfig(targets=("attention", "router"), rank=8, alpha=16.0),
        ),
        data=DataConfig(sequence_length=4096, batch_size=1),
        # Ten times the learning rate of full fine-tuning; no weight decay, as adapters stay small.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000),
    )
