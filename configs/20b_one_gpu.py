"""gpt-oss-20b, full fine-tuning on one GPU: each layer is updated in the backward pass.

    python -m gptoss_jax.train --config configs/20b_one_gpu.py --init DIR --data.train FILE

Parameters and both moments of AdamW are bfloat16; updates are rounded stochastically. Gradients
exist for one layer at a time (`gptoss_jax/training/layerwise_step.py`), and are clipped per layer.
optimizer.fused excludes meshes of several devices, optimizer.accumulate, optimizer.ema,
train.on_nan skip and adapters.

Hardware: one H200. Compiled for it, a step of 8,192 tokens takes 127.3 of 139.4 GiB, 116.9 of them
parameters and moments: `python -m gptoss_jax.plan --config configs/20b_one_gpu.py --target h200`.
Result: not run.
"""

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="20b_one_gpu",
        model=ModelConfig(remat="full"),
        data=DataConfig(sequence_length=4096, batch_size=2),
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            warmup_steps=20,
            fused=True,
            masters="stochastic",
            moment_dtype="bfloat16",
            second_moment_dtype="bfloat16",
        ),
        train=TrainConfig(steps=1000),
    )
