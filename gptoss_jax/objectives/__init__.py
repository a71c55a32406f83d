"""What a run optimises: each objective is a file that defines its data, loss and score.

It also defines which configs it refuses, and which reference it compares the model with. Imports:
sampler, loading, data, lora, model and the rooms below them. `train` and planning call
`make_objective`.
"""

from __future__ import annotations

from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.objectives import distill, dpo, grpo, sft
from gptoss_jax.objectives.objective import Objective as Objective
from gptoss_jax.objectives.token_loss import LossSums as LossSums

_FILES = {"sft": sft, "dpo": dpo, "distill": distill, "grpo": grpo}


def make_objective(config: Config) -> Objective:
    """Return the objective of a config.

    Raises:
        UserError: the config lacks what the objective needs.
    """
    return _FILES[config.objective.name].objective(config)


def check_start(config: Config, stored: ModelConfig | None) -> None:
    """Refuse to start from adapters if the reference is the model without adapters.

    The reference would silently be the model below these adapters, not the one that the run starts
    from.

    Args:
        config: The config of a run that begins.
        stored: The config of the model in --init; None if it has none.

    Raises:
        UserError: there are adapters in --init or in --init-adapters, and `objective.reference`
            does not say that this is intended.
    """
    if config.objective.reference == "base" or not make_objective(config).compares_with_base:
        return
    name = config.objective.name
    if config.init_adapters is not None:
        raise UserError(
            f"--init-adapters is what this run starts from, and the reference of objective.name "
            f"{name} is the model without adapters: merge them first (python -m gptoss_jax.convert "
            f"SRC DST --adapters {config.init_adapters}) and give --init DST, or take the model "
            "below them as the reference with --objective.reference base"
        )
    if stored is not None and stored.lora.targets:
        raise UserError(
            f"--init {config.init} has adapters, and the reference of objective.name {name} is the "
            "model without any, so not what this run starts from: merge them (python -m "
            f"gptoss_jax.convert {config.init} OUT --to hf) and give --init OUT, or take the model "
            "below them as the reference with --objective.reference base"
        )
