"""Configuration as a value: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gptoss_jax.errors import UserError

DType = Literal["float32", "bfloat16", "float16"]


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters beside weights that stay as they are: see `gptoss_jax/adapters.py`."""

    # What gets one: q, k, v, o, attention (these four), gate_up, down, experts (both), router,
    # embedding, unembedding; gate_up[3,7], experts[top4] choose experts; or a pattern of paths as
    # in optimizer.only. Empty: nothing, the model itself is trained.
    targets: tuple[str, ...] = ()
    rank: int = 16
    alpha: float = 32.0  # an adapter's product counts alpha / rank times
    rslora: bool = False  # alpha / sqrt(rank) instead

    def __post_init__(self) -> None:
        """Refuse ranks and scales that adapt nothing."""
        _check(self.rank > 0, f"model.lora.rank is {self.rank}: it must be positive")
        _check(
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
    sinks: Literal["learned", "zero", "off"] = "learned"
    norm: Literal["pre", "post"] = "pre"
    qk_norm: bool = False
    swiglu_limit: float = 7.0
    rms_eps: float = 1e-5
    rope_theta: float = 150_000.0
    # YaRN's factor; 1 is plain RoPE; "auto" is context / initial_context, at least 1.
    rope_factor: float | Literal["auto"] = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    initial_context: int = 4_096
    context: int = 131_072  # the longest sequence
    init_std: float = 0.02

    experts: Literal["dense", "mxfp4"] = "dense"  # the form of the experts' projections in memory
    dtype: DType = "bfloat16"  # of compute; float16 keeps a float32 residual stream
    param_dtype: DType = "bfloat16"
    # What the backward pass recomputes: nothing, all but matmul outputs, or every layer.
    remat: Literal["none", "dots", "full"] = "none"
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
                _check(value > 0, f"model.{f.name} is {value}: it must be positive")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads ({self.num_heads}) is no multiple of model.num_kv_heads "
            f"({self.num_kv_heads})",
        )
        _check(self.head_dim % 2 == 0, f"model.head_dim is {self.head_dim}: RoPE needs it even")
        _check(
            self.active_experts <= self.num_experts,
            f"model.active_experts ({self.active_experts}) is more than model.num_experts "
            f"({self.num_experts})",
        )
        if self.experts == "mxfp4":
            for name in ("d_model", "d_expert"):
                size = getattr(self, name)
                _check(
                    size % 32 == 0,
                    f"model.{name} is {size}: model.experts=mxfp4 needs a multiple of 32",
                )
        for name in ("expert_chunk", "expert_padding"):
            value = getattr(self, name)
            _check(value >= 0, f"model.{name} is {value}: it is 0 (off) or positive")
        _check(
            0 <= self.capacity_factor < float("inf"),
            f"model.capacity_factor is {self.capacity_factor}: it is 0 (off) or positive",
        )
        if self.rope_factor != "auto":
            _check(
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
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {k: v for k, v in values.items() if k not in compute}
        values["rope_factor"] = self.yarn_factor
        values["layer_pattern"] = "".join("f" if w is None else "b" for w in self.layer_windows)
        return values


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    # Files, globs or folders of .jsonl and .parquet (chats if their records have "messages", else
    # {"text": ...}) or .txt; hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT] is a data set of the hub.
    # NAME=ENTRY names a source of a mixture.
    train: tuple[str, ...] = ()
    # Shares of the tokens that the entries of `train` get, each repeated as it runs out; empty: all
    # records alike, shuffled together.
    weights: tuple[float, ...] = ()
    held_out: tuple[str, ...] = ()  # what held-out loss and exact match are computed on
    sequence_length: int = 4_096  # T, tokens in a packed row
    batch_size: int = 8  # rows a step, over all hosts and microbatches
    on_long: Literal["truncate", "refuse"] = "truncate"  # records longer than sequence_length
    on_bad_record: Literal["stop", "skip"] = "stop"
    # What counts in the loss: roles, or role/channel pairs such as assistant/final.
    train_on: tuple[str, ...] = ("assistant",)
    reasoning: Literal["low", "medium", "high"] = "medium"  # where a record does not say
    pack_window: int = 1_024  # records that are shuffled into one packing plan

    def __post_init__(self) -> None:
        """Refuse sizes that make no batch."""
        for name in ("sequence_length", "batch_size", "pack_window"):
            value = getattr(self, name)
            _check(value > 0, f"data.{name} is {value}: it must be positive")
        _check(
            all(0 < w < float("inf") for w in self.weights),
            f"data.weights is {', '.join(map(str, self.weights))}: each must be positive",
        )
        _check(
            not self.weights or len(self.weights) == len(self.train),
            f"data.weights has {len(self.weights)} numbers for the {len(self.train)} entries of "
            "data.train: give one for each",
        )
        roles = {"system", "developer", "user", "assistant", "tool"}
        for item in self.train_on:
            _check(
                item.split("/")[0] in roles,
                f"data.train_on has {item!r}: a role is one of {', '.join(sorted(roles))}",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, and what it trains.

    `freeze`, `only` and `learning_rates` name parameters by patterns of their paths, in which
    layers and experts may be chosen by index: see `gptoss_jax/patterns.py`.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-5
    warmup_steps: int = 20
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    final_learning_rate: float = 0.1  # where cosine and wsd end, as a share of learning_rate
    decay_share: float = 0.2  # of the steps, at the end, in which wsd falls linearly
    b1: float = 0.9  # of AdamW, and of Muon's momentum; Adafactor has none
    b2: float = 0.95  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.1  # on matrices; never on norms, biases and sinks
    clip_norm: float = 1.0  # of the global gradient; 0 is off
    accumulate: int = 1  # microbatches a step
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment
    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"  # as stored, of AdamW
    # Of parameters kept in less than float32: "float32", a copy that is what is updated, or
    # "stochastic", no copy: updates are rounded up or down by chance, right on average.
    masters: Literal["float32", "stochastic"] = "float32"
    ema: float = 0.0  # decay a step of the averaged parameters, which are evaluated; 0 is off
    freeze: tuple[str, ...] = ()  # what stays as it is
    only: tuple[str, ...] = ()  # what alone is trained; empty: everything that is not frozen
    learning_rates: tuple[str, ...] = ()  # PATTERN=FACTOR on the learning rate; the last one counts

    def __post_init__(self) -> None:
        """Refuse values that can't train."""
        _check(self.accumulate > 0, f"optimizer.accumulate is {self.accumulate}: at least 1")
        for name in ("learning_rate", "weight_decay", "clip_norm", "warmup_steps", "eps"):
            value = getattr(self, name)
            _check(0 <= value < float("inf"), f"optimizer.{name} is {value}: not negative")
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optimizer.{name} is {value}: at least 0, less than 1")
        for name in ("final_learning_rate", "decay_share"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"optimizer.{name} is {value}: a share, from 0 to 1")
        _check(
            self.name != "adafactor" or self.moment_dtype == "float32",
            "optimizer.moment_dtype is bfloat16, of a first moment, and optimizer.name is "
            "adafactor, which has none: leave it out",
        )
        coarse = self.second_moment_dtype == "bfloat16"
        _check(
            not coarse or (self.name == "adamw" and self.b2 <= 0.99),
            "optimizer.second_moment_dtype is bfloat16: that is for optimizer.name adamw, b2 up to "
            "0.99 (beyond, a step changes it by less than bfloat16 can tell, 1 in 256); make it "
            "float32",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1_000
    seed: int = 0
    balance_loss: float = 0.0  # coefficient of the routers' load-balancing loss
    z_loss: float = 0.0  # coefficient of the routers' z-loss
    balance_bias: float = 0.0  # what a step adds to the router bias of an expert with too few rows
    on_nan: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is not finite
    # A loss or gradient that is not finite, or a loss above spike_factor times the median of the
    # last spike_window (once there are 10): "rewind" goes back to the last checkpoint and leaves
    # that batch out, max_rewinds times in a run; one more stops it. It goes before on_nan.
    on_spike: Literal["ignore", "rewind"] = "ignore"
    spike_factor: float = 2.0
    spike_window: int = 50
    max_rewinds: int = 3
    log_every: int = 1
    eval_every: int = 100
    eval_batches: int = 16  # held-out rows are data.batch_size a batch; 0 is all of them
    eval_questions: int = 64  # held-out chats answered greedily for exact match; 0 is off
    eval_max_tokens: int = 64  # tokens of an answer
    eval_samples: int = 4  # of the questions, answers kept in samples.jsonl
    load_batches: int = 16  # batches that a pattern's [top4] counts the experts' load over
    checkpoint_every: int = 100
    keep: int = 3  # newest checkpoints kept, beside the best by held-out loss
    peak_tflops: float = 0.0  # of a device, for MFU; 0 looks the device up
    profile_start: int = 0  # the step that a profile begins with, into <workdir>/profile; 0 is off
    profile_steps: int = 3

    def __post_init__(self) -> None:
        """Refuse intervals that never come."""
        positive = {"steps", "log_every", "eval_every", "checkpoint_every", "keep"}
        positive |= {"spike_window", "profile_steps", "load_batches"}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in positive:
                _check(value > 0, f"train.{f.name} is {value}: it must be positive")
            elif f.type in ("int", "float") and f.name != "seed":
                _check(0 <= value < float("inf"), f"train.{f.name} is {value}: not negative")
        _check(self.spike_factor > 1, f"train.spike_factor is {self.spike_factor}: more than 1")
        _check(
            self.profile_start <= self.steps,
            f"train.profile_start is {self.profile_start}: the run ends at step {self.steps}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over its devices: sizes of the mesh's axes, one of which may be -1.

    All 1: the first device alone. See `gptoss_jax/parallel/sharding.py` for what is spread how.
    """

    data: int = 1  # batch rows; parameters are the same on all
    fsdp: int = 1  # batch rows, and each parameter and its optimizer state in as many parts
    expert: int = 1  # batch rows, and the experts
    context: int = 1  # the tokens of each row, and parameters as fsdp does
    tensor: int = 1  # attention heads, the experts' hidden dimension, the vocabulary

    def __post_init__(self) -> None:
        """Refuse sizes that no mesh has."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in sizes.items():
            _check(
                value > 0 or value == -1,
                f"mesh.{name} is {value}: it is positive, or -1 for what the others leave",
            )
        free = [name for name, value in sizes.items() if value == -1]
        _check(len(free) < 2, f"mesh: {' and '.join(free)} are both -1: one may be")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other; all None: by the environment.

    Cloud TPU, Slurm, Kubernetes and Open MPI tell; elsewhere give the three. See
    `gptoss_jax/distributed.py`.
    """

    coordinator: str | None = None  # HOST:PORT of process 0, a free port that the others reach
    num_processes: int | None = None  # 1 alone: one process, whatever the environment says
    process_id: int | None = None  # of this process, from 0
    wait_seconds: int = 300  # that processes wait for each other when they start


@dataclass(frozen=True)
class Config:
    """A run: what `configs/*.py` return and the command line overrides."""

    name: str = "20b"
    # A checkpoint folder to start from, or "random"; None: it has to be given.
    init: str | None = None
    workdir: str | None = None  # None is runs/<name>
    dry_run: bool = False  # print config, parameters, memory and FLOPs of a step, and stop
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        _check(
            self.data.sequence_length <= self.model.context,
            f"data.sequence_length ({self.data.sequence_length}) is longer than model.context "
            f"({self.model.context})",
        )
        _check(
            self.data.batch_size % self.optimizer.accumulate == 0,
            f"data.batch_size ({self.data.batch_size}) is no multiple of optimizer.accumulate "
            f"({self.optimizer.accumulate})",
        )
        _check(
            self.optimizer.masters != "stochastic" or self.model.param_dtype != "float16",
            "optimizer.masters is stochastic, which rounds to bfloat16, and model.param_dtype is "
            "float16: make it bfloat16, or masters float32",
        )

    @property
    def run_folder(self) -> str:
        """Where the run lives."""
        return self.workdir or f"runs/{self.name}"
