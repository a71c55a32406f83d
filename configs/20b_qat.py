"""gpt-oss-20b, LoRA on attention and every expert, trained for export in MXFP4.

    python -m gptoss_jax.train --config configs/20b_qat.py --init DIR --data.train FILE

The experts compute with the sum of their packed weights and adapters, rounded to MXFP4. So merging
the adapters and writing 4 bits again loses nothing that was trained. The sum exists in full for a
layer at a time. Hardware: one GPU of 80 GB; compiled for an H100, a step takes 43.2 GiB. To train
all weights, on more GPUs: --model.experts dense --model.lora.targets.
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
        name="20b_qat",
        model=ModelConfig(
            experts="mxfp4",
            qat=True,
            remat="full",
            lora=LoRAConfig(targets=("attention", "experts"), rank=8, alpha=16.0),
        ),
        data=DataConfig(sequence_length=4096, batch_size=1),
        # Ten times the learning rate of full fine-tuning; no weight decay, as adapters stay small.
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(steps=1000),
    )
