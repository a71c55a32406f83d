"""What a run optimises: an objective is a file that says its data, its loss and its score.

Each also says what it refuses and what it compares the model with. Imports: sampler, loading, data,
lora, model and what comes before. `train` and planning take `make_objective`.
"""

from __future__ import annotations

from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.objectives import distill, dpo, grpo, sft
from gptoss_jax.objectives.objective import Objective as Objective
from gptoss_jax.objectives.token_loss import LossSums as LossSums

_FILES = {"sft": sft, "dpo": dpo, "distill": distill, "grpo": grpo}


def make_objective(config: Config) -> Objective:
    """Return what a config optimises.

    Raises:
        UserError: the config lacks what the objective needs.
    """
    return _FILES[config.objective.name].objective(config)


def check_start(config: Config, stored: ModelConfig | None) -> None:
    """Refuse to begin with adapters where the reference is the model without any.

    The run would be compared with what was there before these adapters, without a word.

    Args:
        config: Of a run that begins.
        stored: The model that --init holds; None where it holds none.

    Raises:
        UserError: there are adapters in --init or in --init-adapters, and `objective.reference`
            does not say that this is meant.
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
