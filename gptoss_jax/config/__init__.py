"""The configuration of a run: frozen dataclasses that check their values when they are made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gptoss_jax.config import dates
from gptoss_jax.config.model import DType as DType
from gptoss_jax.config.model import LoRAConfig as LoRAConfig
from gptoss_jax.config.model import ModelConfig as ModelConfig
from gptoss_jax.config.model import check as _check
from gptoss_jax.config.objective import ObjectiveConfig as ObjectiveConfig
from gptoss_jax.harmony.channels import parse_train_on


@dataclass(frozen=True)
class DataConfig:
    """Which data a run reads, and how it makes batches of them."""

    # Training data: .jsonl, .json, .parquet and .txt files, globs, folders (whose .json files are
    # skipped). Records with "messages" are chats, others have "text"; with objective.name dpo they
    # have "prompt", "chosen", "rejected". A .txt is plain text.
    # hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT] is a data set of the Hugging Face hub. NAME=ENTRY
    # names a source of a mixture.
    train: tuple[str, ...] = ()
    # Share of the training tokens for each entry of data.train. An entry that runs out starts
    # again. Empty: no mixture, all records are shuffled together.
    weights: tuple[float, ...] = ()
    held_out: tuple[str, ...] = ()  # data for held-out loss and exact match; empty: none
    sequence_length: int = 4_096  # tokens in a packed row (T)
    batch_size: int = 8  # rows per step, over all hosts and microbatches
    # What to do with a record longer than data.sequence_length.
    on_long: Literal["truncate", "refuse"] = "truncate"
    # What to do with a record that can't be read or rendered.
    on_bad_record: Literal["stop", "skip"] = "stop"
    # Columns of records that are passed over without a word, and keys of messages, tools and calls,
    # as messages.KEY, tools.KEY and tool_calls.KEY. Such a key is else refused if nothing reads it.
    ignore: tuple[str, ...] = ()
    # Whether a text that spells Harmony's special tokens, such as <|start|>, is meant as plain
    # text. If not, a whole rendered chat is trained as a chat, and any other text is refused.
    plain_special_tokens: bool = False
    # Messages that count in the loss: roles or role/channel pairs, each with =FACTOR if its weight
    # is not 1, such as assistant/final assistant/analysis=0.3. A pair overrides its role. All of a
    # plain text counts.
    train_on: tuple[str, ...] = ("assistant",)
    # Which of the assistant's turns in a chat are trained. A prompt leaves out the analysis of
    # earlier turns (data.history). all: every turn but those whose analysis is left out: they would
    # teach the model to answer without it. last: the last turn. split: every turn, each in a record
    # of its own with what it saw before.
    turns: Literal["all", "last", "split"] = "all"
    # Which analysis of earlier turns is left out, in training and when the run is sampled from.
    # harmony: as openai-harmony does, and servers that use it, such as vLLM. template: as the chat
    # template does that OpenAI published, which transformers and llama.cpp use.
    history: Literal["harmony", "template"] = "harmony"
    # Reasoning effort of a chat whose record does not name one.
    reasoning: Literal["low", "medium", "high"] = "medium"
    # Date in the system message of chats: none; today, the day on which the run begins; a day as
    # YYYY-MM-DD; or record, the "date" of each record. Prompts to the trained model and its
    # exported chat template follow it: with today and record they name the day of the prompt.
    date: str = "none"
    pack_window: int = 1_024  # records that are shuffled and packed into rows together

    def __post_init__(self) -> None:
        """Refuse sizes and weights that give no batches."""
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
        dates.check(self.date)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, and the parameters that it trains.

    `freeze`, `only` and `learning_rates` choose parameters by patterns of their paths. A pattern
    can choose layers and experts by index: see `gptoss_jax/parameters/patterns.py`.
    """

    # The optimizer. With muon, the matrices of attention and dense experts get Muon, and all other
    # parameters AdamW, adapters too.
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-5  # highest learning rate of the schedule
    warmup_steps: int = 20  # steps in which the learning rate rises linearly
    # Learning rate after the warm-up. wsd (warm-up, stable, decay) stays at
    # optimizer.learning_rate until optimizer.decay_share of the steps is left.
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    # Learning rate at the end of cosine and wsd, as a share of optimizer.learning_rate.
    final_learning_rate: float = 0.1
    # Share of the steps, at the end, in which the learning rate of wsd falls linearly.
    decay_share: float = 0.2
    # Decay of AdamW's first moment per step, and momentum of Muon. Adafactor has no first moment.
    b1: float = 0.9
    b2: float = 0.95  # decay of AdamW's second moment per step
    eps: float = 1e-8  # added to the square root of AdamW's second moment
    weight_decay: float = 0.1  # weight decay of matrices; norms, biases and sinks have none
    clip_norm: float = 1.0  # largest norm of the global gradient; 0 is off
    accumulate: int = 1  # microbatches per step (gradient accumulation)
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the first moment
    # Dtype in which AdamW stores the second moment.
    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    # How parameters of less than float32 are updated. "float32" keeps a float32 copy and updates
    # it; "stochastic" keeps no copy and rounds each update up or down at random, unbiased.
    masters: Literal["float32", "stochastic"] = "float32"
    # Update each layer in the backward pass as soon as its gradient is known, so that the gradients
    # of the whole model never exist together. Gradients are clipped per layer. It excludes
    # optimizer.accumulate, optimizer.ema and train.on_nan skip.
    fused: bool = False
    # Decay per step of an exponential moving average of the parameters, which evaluation then
    # uses; 0 is off.
    ema: float = 0.0
    freeze: tuple[str, ...] = ()  # patterns of parameters that are not trained
    # Patterns of the only parameters that are trained. Empty: all that optimizer.freeze leaves.
    only: tuple[str, ...] = ()
    # Factors on the learning rate, as PATTERN=FACTOR. The last pattern that matches counts.
    learning_rates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that can't train."""
        _check(
            self.accumulate > 0, f"optimizer.accumulate is {self.accumulate}: it must be positive"
        )
        for name in ("learning_rate", "weight_decay", "clip_norm", "warmup_steps", "eps"):
            value = getattr(self, name)
            _check(
                0 <= value < float("inf"), f"optimizer.{name} is {value}: it must not be negative"
            )
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            _check(
                0 <= value < 1,
                f"optimizer.{name} is {value}: it must be at least 0 and less than 1",
            )
        for name in ("final_learning_rate", "decay_share"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"optimizer.{name} is {value}: it must be a share, from 0 to 1")
        _check(
            self.name != "adafactor" or self.moment_dtype == "float32",
            "optimizer.moment_dtype is bfloat16, but optimizer.name adafactor has no first moment: "
            "leave it at float32",
        )
        coarse = self.second_moment_dtype == "bfloat16"
        _check(
            not coarse or (self.name == "adamw" and self.b2 <= 0.99),
            "optimizer.second_moment_dtype is bfloat16: it needs optimizer.name adamw, and "
            "optimizer.b2 of at most 0.99 (above that, a step changes the moment by less than the "
            "resolution of bfloat16, 1 in 256); make it float32",
        )
        _check(
            not self.fused or (self.accumulate == 1 and not self.ema),
            "optimizer.fused updates a layer before the gradient of the next one is known: it "
            "takes neither optimizer.accumulate nor optimizer.ema",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1_000  # steps of the whole run, each one update of the parameters
    # Passes over data.train, from which train.steps is computed; 0: train.steps is given. It may be
    # a fraction. A pass trains each record once.
    epochs: float = 0.0
    seed: int = 0  # seed of the initial weights, the order of records, and sampling
    balance_loss: float = 0.0  # coefficient of the routers' load-balancing loss; 0 is off
    z_loss: float = 0.0  # coefficient of the routers' z-loss; 0 is off
    # What a step adds to the router bias of an expert with less than its share of the tokens, and
    # subtracts from one with more, in place of the gradient's update; 0 is off.
    balance_bias: float = 0.0
    # What to do with a step whose loss or gradient is not finite.
    on_nan: Literal["stop", "skip"] = "stop"
    # What to do with a loss spike: a loss or gradient that is not finite, or a loss above
    # train.spike_factor times the median of the last train.spike_window losses. "rewind" goes back
    # to the last checkpoint and leaves out the batch of the spike, up to train.max_rewinds times;
    # one more spike stops the run. It takes precedence over train.on_nan.
    on_spike: Literal["ignore", "rewind"] = "ignore"
    spike_factor: float = 2.0  # a loss above this many times the median is a spike
    # Losses over which the median for train.on_spike is taken. There is no median before
    # there are 10 losses, or this many if that is fewer.
    spike_window: int = 50
    max_rewinds: int = 3  # rewinds in a run; one more spike stops it
    log_every: int = 1  # steps from one line of metrics to the next
    # Project at Weights & Biases that the metrics go to as well. It needs `pip install wandb` and a
    # login, or WANDB_MODE=offline in the environment.
    wandb: str | None = None
    eval_every: int = 100  # steps from one evaluation to the next
    # Batches of held-out data in an evaluation, each of data.batch_size rows; 0 is all of them.
    eval_batches: int = 16
    eval_questions: int = 64  # held-out chats answered greedily for exact match; 0 is off
    eval_max_tokens: int = 64  # most tokens in an answer of an evaluation
    eval_samples: int = 4  # answers of each evaluation that samples.jsonl keeps
    # Batches over which the load of the experts is measured, for patterns such as experts[top4].
    load_batches: int = 16
    checkpoint_every: int = 100  # steps from one checkpoint to the next
    # Newest checkpoints that are kept, besides the one with the best held-out loss.
    keep: int = 3
    # Peak TFLOP/s of one device, to compute MFU; 0 looks the device up.
    peak_tflops: float = 0.0
    profile_start: int = 0  # first step of a profile, written to <workdir>/profile; 0 is off
    profile_steps: int = 3  # steps that the profile covers

    def __post_init__(self) -> None:
        """Refuse intervals, counts and factors out of range."""
        positive = {"steps", "log_every", "eval_every", "checkpoint_every", "keep"}
        positive |= {"spike_window", "profile_steps", "load_batches"}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in positive:
                _check(value > 0, f"train.{f.name} is {value}: it must be positive")
            elif f.type in ("int", "float") and f.name != "seed":
                _check(
                    0 <= value < float("inf"), f"train.{f.name} is {value}: it must not be negative"
                )
        _check(
            self.spike_factor > 1,
            f"train.spike_factor is {self.spike_factor}: it must be more than 1",
        )
        _check(
            self.profile_start <= self.steps or self.epochs > 0,
            f"train.profile_start is {self.profile_start}: the run ends at step {self.steps}",
        )


@dataclass(frozen=True)
class MeshConfig:
    """How a run is sharded over its devices: the size of each axis of the device mesh.

    One size may be -1: it takes the devices that the other axes leave. If all are 1, the run uses
    the first device only. `gptoss_jax/parallel/sharding.py` says how each array is sharded.
    """

    data: int = 1  # shards of the batch's rows; the parameters are the same on all
    fsdp: int = 1  # shards of the batch's rows, of every parameter and of its optimizer state
    expert: int = 1  # shards of the batch's rows, and of the experts
    context: int = 1  # shards of each row's tokens; it also shards the parameters, as mesh.fsdp
    # Shards of the attention heads, of the experts' hidden dimension, and of the vocabulary.
    tensor: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that a mesh can't have."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in sizes.items():
            _check(
                value > 0 or value == -1,
                f"mesh.{name} is {value}: it must be positive, or -1 for what the others leave",
            )
        free = [name for name, value in sizes.items() if value == -1]
        _check(len(free) < 2, f"mesh: {' and '.join(free)} are both -1: only one may be")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run on several hosts find each other.

    On Cloud TPU, Slurm, Kubernetes and Open MPI leave all None: the environment has the values.
    Elsewhere give `coordinator`, `num_processes` and `process_id`. See
    `gptoss_jax/parallel/hosts/processes.py`.
    """

    coordinator: str | None = None  # HOST:PORT of process 0; the port is free and others reach it
    # Processes of the run. 1, given alone, makes a run of one process whatever the environment has.
    num_processes: int | None = None
    process_id: int | None = None  # index of this process, from 0
    wait_seconds: int = 300  # seconds that processes wait for each other when they start


@dataclass(frozen=True)
class Config:
    """A run. `configs/*.py` return one, and the command line overrides its fields."""

    # --help lists the fields in this order, so the fields that a user sets first come first.
    name: str = "20b"  # name of the run, which names its workdir
    # Checkpoint folder to start from, or "random" for random weights. A new run needs it. When a
    # LoRA run resumes, it says where the base is now.
    init: str | None = None
    workdir: str | None = None  # folder of the run; None is runs/<name>
    dry_run: bool = False  # print config, parameters, memory and FLOPs of a step, then stop
    # Folder of PEFT adapters from which the adapters of model.lora start. Its rank, alpha and
    # rslora must be those of model.lora, and its targets must be among model.lora.targets.
    init_adapters: str | None = None
    # Fields of a config.json, in --init and other folders, that no one knows and that are passed
    # over. They must not change what the model computes.
    ignore_config: tuple[str, ...] = ()

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other."""
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
            f"data.weights mixes sources, but objective.name {self.objective.name} takes no "
            "mixture: leave it out",
        )
        _check(
            not self.train.epochs or not self.data.weights,
            "train.epochs is a number of passes over data.train, but data.weights takes from each "
            "source at its own pace: give --train.steps, and --dry-run says how many epochs of "
            "each source that makes",
        )
        _check(
            self.optimizer.masters != "stochastic" or self.model.param_dtype != "float16",
            "optimizer.masters stochastic rounds to bfloat16, but model.param_dtype is float16: "
            "make that bfloat16, or optimizer.masters float32",
        )
        if self.optimizer.fused:
            _check_fused(self)

    @property
    def run_folder(self) -> str:
        """The folder of the run, its workdir."""
        return self.workdir or f"runs/{self.name}"


def _check_fused(config: Config) -> None:
    """Refuse options that `optimizer.fused` excludes: see `layerwise_step.py`."""
    model, name = config.model, config.objective.name
    where = "optimizer.fused updates a layer in the backward pass"
    _check(
        config.train.on_nan == "stop",
        f"{where}, before the whole gradient is known: make train.on_nan stop",
    )
    _check(
        not model.lora.targets,
        f"{where}, which adapters don't need: leave out model.lora.targets, or optimizer.fused",
    )
    _check(
        config.objective.kind.one_forward,
        f"{where} by its own pass over the model, but objective.name {name} needs passes of its "
        "own: leave out optimizer.fused",
    )
    _check(
        model.remat == "full",
        f"{where}, and recomputes the layer there: model.remat is {model.remat}, make it full",
    )
    _check(
        not model.embedding_on_host,
        f"{where}, the embedding too: leave out model.embedding_on_host",
    )
