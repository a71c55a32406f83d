"""The configuration of the model: its architecture, and how it computes."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gptoss_jax.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]


def check(ok: bool, message: str) -> None:
    """Raise UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on frozen weights: see `gptoss_jax/lora/select.py`."""

    # Weights that get an adapter: q, k, v, o, attention (these four), gate_up, down, experts (these
    # two), router, embedding, unembedding. gate_up[3,7] and experts[top4] choose experts. A pattern
    # of paths works too, as in optimizer.only. Empty: no adapters, the model itself is trained.
    targets: tuple[str, ...] = ()
    rank: int = 16  # rank of the adapters
    alpha: float = 32.0  # scale of the adapters: the product of the matrices times alpha / rank
    rslora: bool = False  # use the scale alpha / sqrt(rank) instead

    def __post_init__(self) -> None:
        """Refuse a rank or scale that is not positive."""
        check(self.rank > 0, f"model.lora.rank is {self.rank}: it must be positive")
        check(
            0 < self.alpha < float("inf"),
            f"model.lora.alpha is {self.alpha}: it must be positive",
        )

    @property
    def scale(self) -> float:
        """The factor on the product of an adapter's two matrices."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, and how the model computes. The defaults are those of gpt-oss-20b."""

    vocab_size: int = 201_088  # tokens in the vocabulary (V)
    num_layers: int = 24  # layers (L)
    d_model: int = 2_880  # width of the residual stream (D)
    num_heads: int = 64  # query heads (N)
    num_kv_heads: int = 8  # key/value heads (K)
    head_dim: int = 64  # size of a head (H)
    num_experts: int = 32  # experts in a layer (E)
    active_experts: int = 4  # experts that the router chooses for each token (A)
    d_expert: int = 2_880  # hidden size of an expert (F)
    # Which layers have banded (sliding-window) and which full attention: the ratio of banded to
    # full layers in each period, banded first ("1:1", "5:1"); "full" or "banded" for all; or one
    # letter for each layer, b or f ("bfbbf").
    layer_pattern: str = "1:1"
    window: int = 128  # keys that a query of a banded layer sees, its own included (W)
    # Attention sinks: one extra logit per head in the softmax over the keys. It is learned, fixed
    # at zero, or left out.
    sinks: Literal["learned", "zero", "off"] = "learned"
    # Whether the norm of a sublayer is on its input (pre) or on its output (post).
    norm: Literal["pre", "post"] = "pre"
    qk_norm: bool = False  # normalise each head's queries and keys
    swiglu_limit: float = 7.0  # bound at which the experts' SwiGLU inputs are clamped
    rms_eps: float = 1e-5  # added to the mean square that a norm divides by
    rope_theta: float = 150_000.0  # base of RoPE's wavelengths
    # Factor by which YaRN stretches RoPE's wavelengths. 1 is plain RoPE; "auto" is model.context /
    # model.initial_context, at least 1.
    rope_factor: float | Literal["auto"] = 32.0
    # YaRN does not stretch pairs that turn more often than this in model.initial_context.
    rope_beta_fast: float = 32.0
    # YaRN stretches pairs that turn less often than this by the whole factor.
    rope_beta_slow: float = 1.0
    initial_context: int = 4_096  # tokens of the longest sequence without YaRN
    context: int = 131_072  # tokens of the longest sequence
    init_std: float = 0.02  # standard deviation of random weights

    # Form of the experts' weights in memory: arrays of model.param_dtype, or packed 4-bit MXFP4.
    experts: Literal["dense", "mxfp4"] = "dense"
    # Round dense experts of --init to MXFP4 even if that changes their values. A fine-tuning of
    # experts is mostly lost then, so it is else refused.
    requantise: bool = False
    # Dtype of compute. With float16 the residual stream stays in float32.
    dtype: DType = "bfloat16"
    param_dtype: DType = "bfloat16"  # dtype of the parameters in memory, except packed experts
    # What the backward pass recomputes: nothing (none), all but matmul outputs (dots), or every
    # layer (full). "offload" is full, with the inputs of layers kept in the host's memory.
    remat: Literal["none", "dots", "full", "offload"] = "none"
    # Quantisation-aware training: experts compute with their weights, adapters folded in, rounded
    # to MXFP4; gradients ignore the rounding (straight-through). Exporting to MXFP4 then changes
    # nothing. Layers are rounded one at a time; with model.remat none every layer's rounded copy is
    # kept for the backward pass.
    qat: bool = False
    # Keep the embedding table in the host's memory. The table must be frozen then.
    embedding_on_host: bool = False
    # Most rows that an expert takes in training, as a multiple of the mean over experts. The rest
    # are dropped, in each microbatch by itself. 0: none are dropped. Evaluation and sampling never
    # drop rows.
    capacity_factor: float = 0.0
    # Tokens that go through the experts at a time. The backward pass recomputes their
    # intermediates, which saves memory for long sequences. 0: all tokens at once.
    expert_chunk: int = 0
    # How rows get to experts on other devices. all_gather: every device gets all rows of its
    # group (simplest, best for up to 8 devices along mesh.expert). all_to_all: each row is sent to
    # the devices of its experts.
    expert_exchange: Literal["all_gather", "all_to_all"] = "all_gather"
    # Zero columns added to model.d_expert, so that packed blocks divide over mesh.tensor. It is set
    # from the mesh; the columns are not saved.
    expert_padding: int = 0

    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        """Refuse sizes that a model can't have."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and f.name not in ("expert_chunk", "expert_padding"):
                check(value > 0, f"model.{f.name} is {value}: it must be positive")
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads ({self.num_heads}) is no multiple of model.num_kv_heads "
            f"({self.num_kv_heads})",
        )
        check(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}: RoPE needs it even")
        check(
            self.active_experts <= self.num_experts,
            f"model.active_experts ({self.active_experts}) is more than model.num_experts "
            f"({self.num_experts})",
        )
        if self.experts == "mxfp4" or self.qat:
            asks = "model.experts=mxfp4" if self.experts == "mxfp4" else "model.qat"
            for name in ("d_model", "d_expert"):
                size = getattr(self, name)
                check(size % 32 == 0, f"model.{name} is {size}: {asks} needs a multiple of 32")
        for name in ("expert_chunk", "expert_padding"):
            value = getattr(self, name)
            check(value >= 0, f"model.{name} is {value}: it is 0 (off) or positive")
        check(
            0 <= self.capacity_factor < float("inf"),
            f"model.capacity_factor is {self.capacity_factor}: it is 0 (off) or positive",
        )
        if self.rope_factor != "auto":
            check(
                self.rope_factor >= 1, f"model.rope_factor is {self.rope_factor}: it is at least 1"
            )
        _ = self.layer_windows

    @cached_property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it sees the whole past."""
        pattern, n = self.layer_pattern, self.num_layers
        ratio = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
        if ratio:
            unit = "b" * int(ratio[1]) + "f" * int(ratio[2])
        elif pattern in ("full", "banded"):
            unit = pattern[0]
        elif re.fullmatch("[bf]+", pattern) and len(pattern) == n:
            unit = pattern
        else:
            raise UserError(
                f"model.layer_pattern is {pattern!r}: it is '1:1', '5:1' or the like (banded:full),"
                f" 'full', 'banded', or one letter b or f for each of the {n} layers"
            )
        kinds = (unit * n)[:n]
        return tuple(self.window if kind == "b" else None for kind in kinds)

    @cached_property
    def period(self) -> int:
        """The smallest p such that layers i and i + p are of the same kind, for all i."""
        w = self.layer_windows
        return next(p for p in range(1, len(w) + 1) if w[p:] == w[: len(w) - p])

    @property
    def yarn_factor(self) -> float:
        """YaRN's factor as a number, "auto" resolved."""
        if self.rope_factor == "auto":
            return max(1.0, self.context / self.initial_context)
        return float(self.rope_factor)

    @property
    def architecture(self) -> dict[str, Any]:
        """The fields that decide which function the model is; the others say how it is computed."""
        compute = {"experts", "dtype", "param_dtype", "remat", "init_std", "context"}
        compute |= {"capacity_factor", "expert_chunk", "expert_exchange", "expert_padding", "lora"}
        compute |= {"qat", "embedding_on_host", "requantise"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {k: v for k, v in values.items() if k not in compute}
        values["rope_factor"] = self.yarn_factor
        values["layer_pattern"] = "".join("f" if w is None else "b" for w in self.layer_windows)
        return values
