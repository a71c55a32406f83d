"""gpt-oss-20b, direct preference optimisation of adapters over the packed MXFP4 weights.

    python -m gptoss_jax.train --config configs/20b_dpo.py --init DIR --data.train FILE

FILE has one pair per line: {"prompt": [messages], "chosen": TEXT or [messages], "rejected": ...}.
The reference is the model of --init, with the adapters switched off: there is no second copy of the
model. A step costs one forward pass more than that of configs/20b_lora.py. Hardware: one GPU of
24 GB; compiled for an H200, a step takes 15.0 GiB. Not run on a GPU.
"""

from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gptoss_jax.config.objective import DPOConfig


def get_config() -> Config:
    return Config(
        name="20b_dpo",
        model=ModelConfig(
            experts="mxfp4",
            remat="full",
            lora=LoRAConfig(targets=("attention",), rank=16, alpha=32.0),
        ),
        objective=ObjectiveConfig(name="dpo", dpo=DPOConfig(beta=0.1)),
        # 16 rows per step, one after the other. A row holds both answers of one or several pairs.
        data=DataConfig(sequence_length=4096, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=2e-5, warmup_steps=20, weight_decay=0.0, accumulate=16
        ),
        train=TrainConfig(steps=500, eval_questions=0),
    )
