"""Reward functions: Python files that say how good an answer is.

    def reward(answer, record):
        return float(answer.final == record["messages"][-1]["content"])

`objective.grpo.reward` names the file, and the function if it is not called `reward`:
FILE.py[:FUNCTION]. The function is called once per answer, with an `Answer` and the record from
data.train's file with all of its fields (from a .parquet file, those that are not null). It returns
a number: a float, an int or a bool. It runs in the training process, on the first host alone, so it
may be slow and need not be deterministic.
The file's folder is not on Python's path: the modules that it imports have to be installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptoss_jax import harmony
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

DEFAULT = "reward"  # the function that is called if none is named
_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Answer:
    """One sampled answer, as a reward function gets it."""

    final: str | None  # the final channel's text, stripped; None if there is none
    analysis: str  # the analysis channel's text; "" if there is none
    text: str  # everything that was sampled, special tokens included
    messages: list[dict[str, Any]]  # the same, parsed as in a chat's record, with tool calls
    tokens: list[int]  # the ids, as sampled
    finished: bool  # whether it ended its turn; False if max_tokens cut it off
    question: str  # the user's last message
    irregular: bool = (
        False  # whether a header is not as Harmony writes it, but its meaning is clear
    )


Reward = Callable[[Answer, dict[str, Any]], Any]  # returns a number, if it is correct


def read_answer(
    tokens: Sequence[int],
    *,
    question: str,
    encoding: Any,
    tools: list[dict[str, Any]] | None = None,
) -> Answer:
    """Parse sampled ids into channels. Never raises: any ids are an answer.

    `tools` are those that the prompt declares: their calls are `tool_calls` of the messages.
    """
    parsed = harmony.parse(tokens, encoding)
    final = [m.content for m in parsed if m.header.channel == "final"]
    thought = [m.content for m in parsed if m.header.channel == "analysis"]
    return Answer(
        final=final[-1].strip() if final else None,
        analysis="\n".join(thought),
        text=tokenizer.decode(encoding, tokens),
        messages=harmony.to_messages(parsed, tools=tools),
        tokens=list(tokens),
        finished=bool(tokens) and tokens[-1] in tokenizer.stop_ids(encoding),
        question=question,
        irregular=any(m.header.irregular for m in parsed),
    )


def load(spec: str | None) -> Reward:
    """Return the function that FILE.py[:FUNCTION] names.

    Raises:
        UserError: nothing is named, there is no such file or function, or the file can't be run.
    """
    field = "objective.grpo.reward"
    if not spec:
        raise UserError(f"{field} is not given: name a file, FILE.py[:FUNCTION]")
    file, _, name = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "")
    file, name = file or spec, name or DEFAULT
    path = Path(file).expanduser()
    if path.suffix != ".py":
        raise UserError(f"{field} is {spec!r}: it is FILE.py or FILE.py:FUNCTION")
    if not path.is_file():
        raise UserError(f"{field}: there is no file {file}")
    try:
        names = _run(path.resolve(), path.stat().st_mtime_ns)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit and asyncio.CancelledError are no `Exception`
        raise UserError(f"{field}: {file} can't be run: {_what(error, path)}") from error
    function = names.get(name)
    if not callable(function):
        there = sorted(k for k, v in names.items() if inspect.isfunction(v) and k[0] != "_")
        raise UserError(
            f"{field}: {file} has no function {name!r}; it has {', '.join(there) or 'none'}"
        )
    return function


@lru_cache(maxsize=1)
def _run(path: Path, _changed: int) -> dict[str, Any]:
    """Run a file, once per process unless it changes, and return what it defines."""
    spec = importlib.util.spec_from_file_location(f"gptoss_jax_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return vars(module)


def score(reward: Reward, answer: Answer, record: dict[str, Any], *, where: str) -> float:
    """Call a reward function on an answer to the question at `where`, which is file:line.

    Raises:
        UserError: it raised or returned no finite number; the message names the prompt.
    """
    prompt = " ".join(answer.question.split())
    prompt = prompt if len(prompt) <= _SHOWN else prompt[: _SHOWN - 3] + "..."
    name = getattr(reward, "__name__", "reward")
    try:
        value = reward(answer, record)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        file = getattr(getattr(reward, "__code__", None), "co_filename", None)
        what = _what(error, Path(file) if file else None)
        raise UserError(f"{where}: the reward of an answer to {prompt!r}: {what}") from error
    # Accept numbers, and scalars of numpy and jax; float() alone would accept strings, too.
    number = math.nan
    if isinstance(value, numbers.Real) or getattr(value, "shape", None) == ():
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise UserError(
            f"{where}: the reward of an answer to {prompt!r}: {name} returned {value!r}, "
            "which is no finite number"
        )
    return number


def _what(error: BaseException, file: Path | None) -> str:
    """Describe an exception in one line, with its place in the user's file."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if file is not None and Path(f.filename).name == file.name]
    return f"{text} ({inside[-1].filename}:{inside[-1].lineno})" if inside else text
