"""A student with half the layers and width learns to answer as the model of `make demo` does.

    make demo        (the teacher, in runs/demo)
    python -m gptoss_jax.train --config configs/tiny_distill.py

Any checkpoint with the same vocabulary can be the teacher: --objective.distill.teacher DIR.
Hardware: any; minutes on two cores. Result: of the questions that neither model saw, the student
answers 0.14 exactly after 200 steps and 0.73 after 600; the teacher answers 0.98. The divergence
falls from 6.97 nats per token to 0.03.
"""

from gptoss_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gptoss_jax.config.objective import DistillConfig
from gptoss_jax.data.demo import FOLDER


def get_config() -> Config:
    return Config(
        name="tiny_distill",
        init="random",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=2,
            d_model=64,
            num_heads=8,
            num_kv_heads=2,
            head_dim=16,
            num_experts=4,
            active_experts=2,
            d_expert=96,
            window=32,
            rope_factor=1.0,
            initial_context=512,
            context=512,
            dtype="float32",
            param_dtype="float32",
        ),
        objective=ObjectiveConfig(
            name="distill", distill=DistillConfig(teacher="runs/demo", temperature=1.0)
        ),
        data=DataConfig(
            train=(str(FOLDER / "train.jsonl"),),
            held_out=(str(FOLDER / "held_out.jsonl"),),
            sequence_length=512,
            batch_size=8,
            reasoning="low",
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(steps=600, eval_every=100, checkpoint_every=100, eval_questions=64),
    )
