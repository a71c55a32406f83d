"""Configuration as a value: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gptoss_jax.config.model import DType as DType
from gptoss_jax.config.model import LoRAConfig as LoRAConfig
from gptoss_jax.config.model import ModelConfig as ModelConfig
from gptoss_jax.config.model import check as _check
from gptoss_jax.config.objective import ObjectiveConfig as ObjectiveConfig
from gptoss_jax.harmony.channels import parse_train_on


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    # Files, globs or folders of .jsonl and .parquet: records with "messages" are chats, others
    # have "text"; with objective.name dpo they have "prompt", "chosen" and "rejected". A .txt is
    # plain text. hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT] is a data set of the hub. NAME=ENTRY
    # names a source of a mixture.
    train: tuple[str, ...] = ()
    # Shares of the tokens that the entries of `train` get, each repeated as it runs out; empty: all
    # records alike, shuffled together.
    weights: tuple[float, ...] = ()
    held_out: tuple[str, ...] = ()  # what held-out loss and exact match are computed on
    sequence_length: int = 4_096  # T, tokens in a packed row
    batch_size: int = 8  # rows a step, over all hosts and microbatches
    on_long: Literal["truncate", "refuse"] = "truncate"  # records longer than sequence_length
    on_bad_record: Literal["stop", "skip"] = "stop"  # a record that can't be read or rendered
    # What counts in the loss: roles or role/channel pairs, with a factor where that is not 1:
    # assistant/final assistant/analysis=0.3. A pair goes before its role. Texts count as a whole.
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
        parse_train_on(self.train_on, field="data.train_on")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, and what it trains.

    `freeze`, `only` and `learning_rates` name parameters by patterns of their paths, in which
    layers and experts may be chosen by index: see `gptoss_jax/parameters/patterns.py`.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"  # muon: of matrices; the rest get AdamW
    learning_rate: float = 1e-5  # the highest of the schedule
    warmup_steps: int = 20  # in which the learning rate rises linearly
    # After the warm-up: wsd stays at learning_rate until decay_share of the steps is left.
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    final_learning_rate: float = 0.1  # where cosine and wsd end, as a share of learning_rate
    decay_share: float = 0.2  # of the steps, at the end, in which wsd falls linearly
    b1: float = 0.9  # decay of the first moment: AdamW's, and Muon's momentum; Adafactor has none
    b2: float = 0.95  # decay of AdamW's second moment
    eps: float = 1e-8  # added to the root of AdamW's second moment
    weight_decay: float = 0.1  # on matrices; never on norms, biases and sinks
    clip_norm: float = 1.0  # of the global gradient; 0 is off
    accumulate: int = 1  # microbatches a step
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment
    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"  # as stored, of AdamW
    # For parameters kept in less than float32: "float32" updates a copy of them in float32;
    # "stochastic" keeps no copy and rounds updates up or down by chance, right on average.
    masters: Literal["float32", "stochastic"] = "float32"
    # Update each layer in the backward pass, as soon as its gradient is there, so that those of the
    # whole model never are: clips per layer; without accumulate, on_nan skip, ema.
    fused: bool = False
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
            "adafactor, which has none: leave it at float32",
        )
        coarse = self.second_moment_dtype == "bfloat16"
        _check(
            not coarse or (self.name == "adamw" and self.b2 <= 0.99),
            "optimizer.second_moment_dtype is bfloat16: that is for optimizer.name adamw, b2 up to "
            "0.99 (beyond, a step changes it by less than bfloat16 can tell, 1 in 256); make it "
            "float32",
        )
        _check(
            not self.fused or (self.accumulate == 1 and not self.ema),
            "optimizer.fused updates a layer before the gradient of the next is there: it takes "
            "neither optimizer.accumulate nor optimizer.ema",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1_000  # updates of the parameters, in all
    seed: int = 0  # of initial weights, of the order of records, and of sampling
    balance_loss: float = 0.0  # coefficient of the routers' load-balancing loss
    z_loss: float = 0.0  # coefficient of the routers' z-loss
    balance_bias: float = 0.0  # what a step adds to the router bias of an expert with too few rows
    on_nan: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is not finite
    # A spike is a loss or gradient that is not finite, or a loss above spike_factor times the
    # median of the last spike_window. "rewind" goes back to the last checkpoint and leaves that
    # batch out, max_rewinds times in a run; one more stops it. It goes before on_nan.
    on_spike: Literal["ignore", "rewind"] = "ignore"
    spike_factor: float = 2.0  # a loss above this many times the median is a spike
    spike_window: int = 50  # losses that the median is of, once there are 10
    max_rewinds: int = 3  # rewinds in a run; one more spike stops it
    log_every: int = 1  # steps from one line of metrics to the next
    eval_every: int = 100  # steps from one evaluation to the next
    eval_batches: int = 16  # held-out rows are data.batch_size a batch; 0 is all of them
    eval_questions: int = 64  # held-out chats answered greedily for exact match; 0 is off
    eval_max_tokens: int = 64  # tokens of an answer
    eval_samples: int = 4  # of the questions, answers kept in samples.jsonl
    load_batches: int = 16  # batches that a pattern's [top4] counts the experts' load over
    checkpoint_every: int = 100  # steps from one checkpoint to the next
    keep: int = 3  # newest checkpoints kept, beside the best by held-out loss
    peak_tflops: float = 0.0  # of a device, for MFU; 0 looks the device up
    profile_start: int = 0  # the step that a profile begins with, into <workdir>/profile; 0 is off
    profile_steps: int = 3  # steps that the profile covers

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
    `gptoss_jax/parallel/hosts/processes.py`.
    """

    coordinator: str | None = None  # HOST:PORT of process 0, a free port that the others reach
    num_processes: int | None = None  # 1 alone: one process, whatever the environment says
    process_id: int | None = None  # of this process, from 0
    wait_seconds: int = 300  # that processes wait for each other when they start


@dataclass(frozen=True)
class Config:
    """A run: what `configs/*.py` return and the command line overrides."""

    # In the order of use, which is the order of --help: what one sets first comes first.
    name: str = "20b"  # of the run, for its workdir
    # A checkpoint folder to start from, or "random"; None: it has to be given. Of a LoRA run that
    # goes on: where its base is now.
    init: str | None = None
    workdir: str | None = None  # None is runs/<name>
    dry_run: bool = False  # print config, parameters, memory and FLOPs of a step, and stop
    # A folder of PEFT's adapters that those of model.lora begin as: rank, alpha and rslora have to
    # be its own, and what it adapts among the targets.
    init_adapters: str | None = None

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
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
        self.objective.check_batch_size(self.data.batch_size)
        _check(
            self.objective.kind.mixes or not self.data.weights,
            f"data.weights mixes sources, which objective.name {self.objective.name} does not",
        )
        _check(
            self.optimizer.masters != "stochastic" or self.model.param_dtype != "float16",
            "optimizer.masters is stochastic, which rounds to bfloat16, and model.param_dtype is "
            "float16: make it bfloat16, or masters float32",
        )
        if self.optimizer.fused:
            _check_fused(self)

    @property
    def run_folder(self) -> str:
        """Where the run lives."""
        return self.workdir or f"runs/{self.name}"


def _check_fused(config: Config) -> None:
    """Refuse what can't be with an update in the backward pass: see `layerwise_step.py`."""
    model, name = config.model, config.objective.name
    where = "optimizer.fused updates a layer in the backward pass"
    _check(
        config.train.on_nan == "stop",
        f"{where}, before all of a gradient is there: make train.on_nan stop",
    )
    _check(
        not model.lora.targets,
        f"{where}, which adapters don't need: leave out model.lora.targets, or optimizer.fused",
    )
    _check(
        config.objective.kind.one_forward,
        f"{where} by a pass of its own over the model, and objective.name {name} makes its own, "
        "too: leave out optimizer.fused",
    )
    _check(
        model.remat == "full",
        f"{where}, and runs it again for that: model.remat is {model.remat}, make it full",
    )
    _check(
        not model.embedding_on_host,
        f"{where}, the embedding too: leave out model.embedding_on_host",
    )
