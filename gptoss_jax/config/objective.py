"""What a run optimises, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gptoss_jax.config.model import check


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): see `dpo.py`."""

    beta: float = 0.1  # how far the model may go from the reference: the less, the farther
    label_smoothing: float = 0.0  # chance that a pair's sides are the wrong way round
    sft_weight: float = 0.0  # of the chosen side's plain loss, a token, added to that of a pair

    def __post_init__(self) -> None:
        """Refuse values that prefer nothing."""
        check(self.beta > 0, f"objective.dpo.beta is {self.beta}: it must be positive")
        check(
            0 <= self.label_smoothing < 0.5,
            f"objective.dpo.label_smoothing is {self.label_smoothing}: from 0 to less than 0.5",
        )
        check(self.sft_weight >= 0, f"objective.dpo.sft_weight is {self.sft_weight}: not negative")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation from a teacher's logits (Hinton et al. 2015, arXiv:1503.02531)."""

    teacher: str | None = None  # a checkpoint folder; it has to be given, and of this vocabulary
    temperature: float = 1.0  # both sides' logits are divided by it
    nll_weight: float = 0.0  # of the data's own tokens; 1 less that is the teacher's

    def __post_init__(self) -> None:
        """Refuse values that teach nothing."""
        check(
            self.temperature > 0,
            f"objective.distill.temperature is {self.temperature}: it must be positive",
        )
        check(
            0 <= self.nll_weight <= 1,
            f"objective.distill.nll_weight is {self.nll_weight}: from 0 to 1",
        )


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): see `grpo.py`.

    A step asks data.batch_size / group_size questions of data.train, group_size times each.
    """

    reward: str | None = None  # FILE.py[:FUNCTION], which is `reward` if not named
    group_size: int = 8  # answers to a question, which are compared with each other
    max_tokens: int = 256  # of an answer
    temperature: float = 1.0  # of sampling, and of the log-probabilities that are trained
    # How far a token's probability may fall under the sampler's, as a share, before its gradient
    # is cut.
    clip_low: float = 0.2
    # How far it may rise above it.
    clip_high: float = 0.2
    kl: float = 0.0  # weight of the divergence from the base: of a run with adapters alone
    scale_by_std: bool = True  # advantages are divided by the group's standard deviation
    updates: int = 1  # steps on each set of answers

    def __post_init__(self) -> None:
        """Refuse values that compare nothing."""
        check(
            self.group_size > 1,
            f"objective.grpo.group_size is {self.group_size}: answers are compared, so at least 2",
        )
        for name in ("max_tokens", "updates", "temperature"):
            value = getattr(self, name)
            check(value > 0, f"objective.grpo.{name} is {value}: it must be positive")
        for name in ("clip_low", "clip_high", "kl"):
            value = getattr(self, name)
            check(
                0 <= value < float("inf"), f"objective.grpo.{name} is {value}: it is not negative"
            )


class Kind(NamedTuple):
    """What the rest of a config has to know of an objective."""

    records: Literal["examples", "pairs", "questions"]  # what data.train holds
    mixes: bool  # takes data.weights
    one_forward: bool  # its loss is of one pass over the model, as optimizer.fused needs


_KINDS = {
    "sft": Kind("examples", mixes=True, one_forward=True),
    "dpo": Kind("pairs", mixes=False, one_forward=False),
    "distill": Kind("examples", mixes=True, one_forward=True),
    "grpo": Kind("questions", mixes=False, one_forward=False),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised, on what kind of data."""

    # sft: the likelihood of data.train's tokens that data.train_on names, of chats or plain texts.
    # dpo: of pairs of answers, that the chosen one is. distill: that of a teacher's next tokens.
    # grpo: a reward function of what the model answers.
    name: Literal["sft", "dpo", "distill", "grpo"] = "sft"
    # Of dpo, and of grpo with kl, which compare with the model without its adapters. start: the
    # model that the run begins with, so --init must have none; base: what is below those of --init.
    reference: Literal["start", "base"] = "start"

    dpo: DPOConfig = field(default_factory=DPOConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    @property
    def kind(self) -> Kind:
        """What the rest of a config has to know of the objective."""
        return _KINDS[self.name]

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch that the objective can't divide. Raises UserError."""
        check(
            self.name != "grpo" or batch_size % self.grpo.group_size == 0,
            f"data.batch_size ({batch_size}) is no multiple of objective.grpo.group_size "
            f"({self.grpo.group_size})",
        )
