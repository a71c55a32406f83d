"""What keeps the routers balanced: an auxiliary loss, the bias moved by the load, or what else.

    python experiments/run.py balancing

Hardware: any; about half a minute a run on two cores. Result: with nothing, two or three of the 16
experts of a layer get nearly all tokens within 30 steps; with the auxiliary loss or router-bias
updates all are used alike.

The collapse is provoked: the routers' biases learn 200 times as fast as all else, and so part
faster than the weights learn to tell tokens apart. All tokens then agree on the same experts, and
since the weights are a softmax over the chosen experts alone, the others get no gradient that could
bring them back.
"""

import dataclasses

from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptoss_jax.data.demo import FOLDER

VARIANTS = ("none", "balance_loss", "balance_bias", "z_loss", "capacity", "bias_capacity")
CHANGES = ("train.balance_loss", "train.balance_bias", "train.z_loss", "model.capacity_factor")


def get_config(variant: str = VARIANTS[0]) -> Config:
    """Return the config of a variant."""
    base = Config(
        name="balancing",
        init="random",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=2,
            d_model=48,
            num_heads=4,
            num_kv_heads=2,
            head_dim=12,
            num_experts=16,
            active_experts=2,
            d_expert=32,
            window=32,
            rope_factor=1.0,
            initial_context=512,
            context=512,
            init_std=0.05,
            dtype="float32",
            param_dtype="float32",
        ),
        data=DataConfig(
            train=(str(FOLDER / "train.jsonl"),),
            held_out=(str(FOLDER / "held_out.jsonl"),),
            sequence_length=256,
            batch_size=4,
            reasoning="low",
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-3, warmup_steps=10, learning_rates=("layers/router/bias=200",)
        ),
        train=TrainConfig(
            steps=200,
            log_every=10,
            eval_every=50,
            eval_batches=0,
            eval_questions=0,
            checkpoint_every=200,
        ),
    )
    train, model = base.train, base.model
    if variant == "balance_loss":
        train = dataclasses.replace(train, balance_loss=1.0)
    elif variant in ("balance_bias", "bias_capacity"):
        train = dataclasses.replace(train, balance_bias=0.2)
    elif variant == "z_loss":
        train = dataclasses.replace(train, z_loss=1e-3)
    elif variant not in ("none", "capacity"):
        raise ValueError(f"variant is {variant!r}: there are {', '.join(VARIANTS)}")
    if variant in ("capacity", "bias_capacity"):
        model = dataclasses.replace(model, capacity_factor=1.25)
    return dataclasses.replace(base, train=train, model=model)
