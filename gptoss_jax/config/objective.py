"""The configuration of the objective: what a run optimises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gptoss_jax.config.model import check


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): see `dpo.py`."""

    beta: float = 0.1  # scale of the rewards; a lower beta lets the model move further away
    label_smoothing: float = 0.0  # assumed chance that chosen and rejected are swapped in a pair
    # Weight of the chosen answer's mean loss per token, which is added to the loss of its pair; 0
    # is off.
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check(self.beta > 0, f"objective.dpo.beta is {self.beta}: it must be positive")
        check(
            0 <= self.label_smoothing < 0.5,
            f"objective.dpo.label_smoothing is {self.label_smoothing}: it must be from 0 to less "
            "than 0.5",
        )
        check(
            self.sft_weight >= 0,
            f"objective.dpo.sft_weight is {self.sft_weight}: it must not be negative",
        )


@dataclass(frozen=True)
class DistillConfig:
    """Distillation from a teacher's logits (Hinton et al. 2015, arXiv:1503.02531)."""

    # Checkpoint folder of the teacher, which must have the same vocabulary. Distillation needs it.
    teacher: str | None = None
    temperature: float = 1.0  # number that the logits of student and teacher are divided by
    # Weight of the plain loss on the data's tokens; the teacher's divergence gets 1 minus this.
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a temperature or weight out of range."""
        check(
            self.temperature > 0,
            f"objective.distill.temperature is {self.temperature}: it must be positive",
        )
        check(
            0 <= self.nll_weight <= 1,
            f"objective.distill.nll_weight is {self.nll_weight}: it must be from 0 to 1",
        )


@dataclass(frozen=True)
class GRPOConfig:
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300): see `grpo.py`.

    A step takes data.batch_size / group_size questions of data.train, and samples group_size
    answers to each.
    """

    reward: str | None = None  # reward function, as FILE.py[:FUNCTION]; its default name is reward
    group_size: int = 8  # answers to each question, which are compared with each other
    max_tokens: int = 256  # most tokens in an answer
    temperature: float = 1.0  # temperature of sampling, and of the log-probabilities in the loss
    # How far a token's probability may fall below the sampler's, as a share of it, before its
    # gradient is clipped to 0.
    clip_low: float = 0.2
    # How far a token's probability may rise above the sampler's, as a share of it, before its
    # gradient is clipped to 0.
    clip_high: float = 0.2
    # Weight of the divergence from the reference, which is the model without its adapters. It needs
    # a run that trains adapters alone. 0 is off.
    kl: float = 0.0
    scale_by_std: bool = True  # divide advantages by the standard deviation of their group
    # Standard deviation of a group: over group_size answers (population), or over group_size - 1
    # (sample), as TRL and verl do. It scales all advantages by the same factor.
    std: Literal["population", "sample"] = "population"
    updates: int = 1  # training steps on each set of sampled answers

    def __post_init__(self) -> None:
        """Refuse a group of one answer, and values below their range."""
        check(
            self.group_size > 1,
            f"objective.grpo.group_size is {self.group_size}: answers are compared, so it must be "
            "at least 2",
        )
        for name in ("max_tokens", "updates", "temperature"):
            value = getattr(self, name)
            check(value > 0, f"objective.grpo.{name} is {value}: it must be positive")
        for name in ("clip_low", "clip_high", "kl"):
            value = getattr(self, name)
            check(
                0 <= value < float("inf"),
                f"objective.grpo.{name} is {value}: it must not be negative",
            )


class Kind(NamedTuple):
    """What the rest of a config needs to know about an objective."""

    records: Literal["examples", "pairs", "questions"]  # what data.train holds
    mixes: bool  # whether it takes data.weights
    one_forward: bool  # whether its loss needs one forward pass only, as optimizer.fused requires


_KINDS = {
    "sft": Kind("examples", mixes=True, one_forward=True),
    "dpo": Kind("pairs", mixes=False, one_forward=False),
    "distill": Kind("examples", mixes=True, one_forward=True),
    "grpo": Kind("questions", mixes=False, one_forward=False),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective that a run optimises, and on which kind of data."""

    # What the run optimises. sft: the likelihood of chats or plain texts, on the tokens that
    # data.train_on selects. dpo: a preference for the chosen answer of each pair. distill:
    # agreement with a teacher's next-token probabilities. grpo: a reward function of the answers
    # that the model samples.
    name: Literal["sft", "dpo", "distill", "grpo"] = "sft"
    # The reference of dpo, and of grpo with objective.grpo.kl: the model without its adapters.
    # start: the reference is the model that the run starts from, so --init must have no adapters.
    # base: --init may have adapters, and the reference is the base below them.
    reference: Literal["start", "base"] = "start"

    dpo: DPOConfig = field(default_factory=DPOConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    @property
    def kind(self) -> Kind:
        """What the rest of a config needs to know about the objective."""
        return _KINDS[self.name]

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch size that the objective can't divide. Raises UserError."""
        check(
            self.name != "grpo" or batch_size % self.grpo.group_size == 0,
            f"data.batch_size ({batch_size}) is no multiple of objective.grpo.group_size "
            f"({self.grpo.group_size})",
        )
