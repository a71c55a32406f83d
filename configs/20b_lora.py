"""gpt-oss-20b, LoRA on attention and the router, over the packed MXFP4 weights.

    python -m gptoss_jax.train --config configs/20b_lora.py --init DIR --data.train FILE

The base is frozen: the experts keep their 4-bit weights, and the base needs no optimizer state. An
MXFP4 export of the run keeps the experts' bytes; attention and router are bfloat16 in it. To adapt
every expert too, give --model.lora.targets attention router experts. Export such a run with
`--experts bf16` or `--to peft`: 4-bit experts would lose most of its updates (docs/export.md).

Hardware: one GPU or TPU chip. Memory of a step, compiled for an H200 (docs/plan.md), with the
embedding table on the host (--model.embedding_on_host; 1.2 GB more without):

    this config as it is, with the table on the device   15.7 GB (compiled for an H100)
    attention only, rank 16, rows of 1,024 tokens        13.6 GB (v5p, --model.remat offload: 14.4)
    attention and experts, rank 8, rows of 1,024 tokens  15.6 GB
    attention and experts, rows of 131,072 tokens        50.9 GB, with the table on the device

For long rows, --model.expert_chunk 16384 sends that many tokens at a time through the experts, and
--model.remat offload keeps the inputs of the layers in the host's memory: 32.8 GB instead of 50.9.
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
            # With the experts: ("attention", "router", "experts"); see above for the export.
            lora=LoRAConfig(targets=("attention", "router"), rank=8, alpha=16.0),
        ),
        data=DataConfig(sequence_length=4096, batch_size=1),
        # Ten times the learning rate of full fine-tuning; no weight decay, as adapters stay small.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000),
    )
