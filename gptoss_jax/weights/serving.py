"""What programs that serve an export ignore or do not read: the warnings of `convert --for`.

Each row is a fact from running the program on exports, or from its source. docs/export.md tells the
same facts to people.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from gptoss_jax.config import ModelConfig
from gptoss_jax.weights import config_io
from gptoss_jax.weights.names import Form, Layout

Program = Literal["vllm", "llama.cpp", "mlx"]
PROGRAMS: tuple[Program, ...] = get_args(Program)
_SWIGLU_LIMIT, _RMS_EPS = 7.0, 1e-5  # those of the published models


class Export(NamedTuple):
    """What is written: the model, the layout, the form of the experts, and the rules of prompts."""

    config: ModelConfig
    layout: Layout
    form: Form
    history: str = "harmony"  # `data.history`
    date: str = "today"  # `data.date`


class _Row(NamedTuple):
    """A fact about some programs: when it holds for an export, and what to say then."""

    programs: tuple[Program, ...]
    holds: Callable[[Export], bool]
    says: str  # may name fields of the model's config


def _alternates(config: ModelConfig) -> bool:
    """Whether layers are banded, full, banded, ..., as in the published models."""
    windows = [config.window if n % 2 == 0 else None for n in range(config.num_layers)]
    return list(config.layer_windows) == windows


_ROWS = (
    _Row(
        PROGRAMS,
        lambda x: x.layout != "hf",
        "does not read this layout: write --to hf",
    ),
    _Row(
        PROGRAMS,
        lambda x: x.config.swiglu_limit != _SWIGLU_LIMIT,
        "clamps SwiGLU at 7, whatever swiglu_limit says (here {swiglu_limit:g}): it computes "
        "another function",
    ),
    _Row(
        ("vllm", "llama.cpp"),
        lambda x: not _alternates(x.config),
        "ignores layer_types: it makes layers banded, full, banded, ... (here {layer_pattern}), "
        "which is another model",
    ),
    _Row(
        ("mlx",),
        lambda x: len(set(x.config.layer_windows)) == 1,
        "needs a banded and a full layer in layer_types (here {layer_pattern}): it stops with an "
        "error",
    ),
    _Row(
        ("vllm",),
        lambda x: x.config.rms_eps != _RMS_EPS,
        "adds 1e-5 in its norms, whatever rms_norm_eps says (here {rms_eps:g}): its outputs differ",
    ),
    _Row(
        ("llama.cpp",),
        lambda x: config_io.is_cut(x.config.vocab_size),
        "refuses the tokenizer of a cut vocabulary (here {vocab_size} tokens)",
    ),
    _Row(
        ("llama.cpp", "mlx"),
        lambda x: x.config.yarn_factor > 1,
        "ignores truncate: false of YaRN and rounds its bounds: logits differ by about 4e-4 on "
        "chats, those of OpenAI's checkpoints too",
    ),
    _Row(
        ("mlx",),
        lambda x: x.form != "mxfp4",
        "reads experts in MXFP4 only: write --experts mxfp4",
    ),
    _Row(
        ("vllm",),
        lambda x: x.history != "harmony" or x.date not in ("today", "record"),
        "writes prompts without the chat template: with today's date, and earlier analysis by "
        "openai-harmony's rule. The model was trained with data.date {date} and data.history "
        "{history}",
    ),
    _Row(
        ("vllm",),
        lambda x: x.form == "mxfp4",
        "needs AMX to run MXFP4 on a CPU: on a CPU without it, write --experts bf16 (GPUs need "
        "nothing)",
    ),
)


def warnings(program: Program, export: Export) -> list[str]:
    """Return a line for each thing of an export that a program does not serve as it is."""
    values = vars(export.config) | {"date": export.date, "history": export.history}
    return [
        f"{program} {row.says.format_map(values)}"
        for row in _ROWS
        if program in row.programs and row.holds(export)
    ]
