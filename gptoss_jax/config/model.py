"""The architecture as a value, and the form in which it computes."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gptoss_jax.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]


def check(ok: bool, message: str) -> None:
    """Refuse a field's value with a line that says what is wrong with it."""
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside weights that stay as they are: see `gptoss_jax/lora/select.py`."""

    # What gets one: q, k, v, o, attention (these four), gate_up, down, experts (both), router,
    # embedding, unembedding; gate_up[3,7], experts[top4] choose experts; or a pattern of paths as
    # in optimizer.only. Empty: nothing, the model itself is trained.
    targets: tuple[str, ...] = ()
    rank: int = 16  # of an adapter's two matrices
    alpha: float = 32.0  # an adapter's product counts alpha / rank times
    rslora: bool = False  # alpha / sqrt(rank) instead

    def __post_init__(self) -> None:
        """Refuse ranks and scales that adapt nothing."""
        check(self.rank > 0, f"model.lora.rank is {self.rank}: it must be positive")
        check(
            0 < self.alpha < float("inf"),
            f"model.lora.alpha is {self.alpha}: it must be positive",
        )

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, and the form in which it computes. The defaults are gpt-oss-20b."""

    vocab_size: int = 201_088  # V
    num_layers: int = 24  # L
    d_model: int = 2_880  # D
    num_heads: int = 64  # N, query heads
    num_kv_heads: int = 8  # K
    head_dim: int = 64  # H
    num_experts: int = 32  # E
    active_experts: int = 4  # A
    d_expert: int = 2_880  # F
    # Banded to full layers in each period, banded first ("1:1", "5:1"); "full", "banded"; or a
    # letter a layer, b or f ("bfbbf").
    layer_pattern: str = "1:1"
    window: int = 128  # W: keys that a banded layer sees, the query's own included
    sinks: Literal["learned", "zero", "off"] = "learned"  # a logit a head beside those of the keys
    norm: Literal["pre", "post"] = "pre"  # a sublayer's norm is on its input or its output
    qk_norm: bool = False  # normalise each head's queries and keys
    swiglu_limit: float = 7.0  # where the experts' activations are clamped
    rms_eps: float = 1e-5  # added to the mean square that a norm divides by
    rope_theta: float = 150_000.0  # base of RoPE's wavelengths
    # YaRN's factor; 1 is plain RoPE; "auto" is context / initial_context, at least 1.
    rope_factor: float | Literal["auto"] = 32.0
    rope_beta_fast: float = 32.0  # YaRN: pairs that turn more often are not stretched
    rope_beta_slow: float = 1.0  # YaRN: pairs that turn less often are, by all of it
    initial_context: int = 4_096  # YaRN: the longest sequence without it
    context: int = 131_072  # the longest sequence
    init_std: float = 0.02  # of random weights

    experts: Literal["dense", "mxfp4"] = "dense"  # the form of the experts' projections in memory
    dtype: DType = "bfloat16"  # of compute; float16 keeps a float32 residual stream
    param_dtype: DType = "bfloat16"  # of the parameters in memory, but for packed experts
    # What the backward pass recomputes: nothing, all but matmul outputs, or every layer; "offload"
    # is every layer, from inputs that wait in the host's memory.
    remat: Literal["none", "dots", "full", "offload"] = "none"
    # Experts compute with what MXFP4 makes of their weights, adapters folded in, and gradients are
    # as if it did not (straight-through): exporting to MXFP4 then changes nothing. A layer at a
    # time; with remat "none" every layer's copy is kept for the backward pass.
    qat: bool = False
    # The embedding table, where it is not trained, stays in the host's memory.
    embedding_on_host: bool = False
    # In training, rows an expert takes at most, as a multiple of the mean; the rest are dropped, by
    # microbatch. 0: none are. Evaluation and sampling never drop.
    capacity_factor: float = 0.0
    # Tokens at a time through the experts, intermediates made again in the backward pass: less
    # memory for long sequences. 0: all at once.
    expert_chunk: int = 0
    # How rows get to experts on other devices: every device gets all rows of its group (simplest,
    # best for up to 8 devices along mesh.expert), or each row goes where its experts are.
    expert_exchange: Literal["all_gather", "all_to_all"] = "all_gather"
    # Zero columns that d_expert is filled up with, so that packed blocks divide over mesh.tensor:
    # set from the mesh, and left out of what is saved.
    expert_padding: int = 0

    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        """Refuse sizes that no model has."""
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
        """The smallest p such that layer i and layer i + p are of one kind, for all layers."""
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
        """The fields that decide what function the model is; the rest say how it computes."""
        compute = {"experts", "dtype", "param_dtype", "remat", "init_std", "context"}
        compute |= {"capacity_factor", "expert_chunk", "expert_exchange", "expert_padding", "lora"}
        compute |= {"qat", "embedding_on_host"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {k: v for k, v in values.items() if k not in compute}
        values["rope_factor"] = self.yarn_factor
        values["layer_pattern"] = "".join("f" if w is None else "b" for w in self.layer_windows)
        return values
