"""Read the formats of records that data sets have, as one of three: a chat, a text or a pair.

`READERS` is the table of formats, in the order in which they are tried. `read` returns a record as

    {"messages": [...], "tools"?, "reasoning"?, "date"?, "given"?}
                                                              a chat; the first `given` messages are
                                                              the prompt, which is not trained
    {"text": ...}                                             plain text
    {"prompt": [...], "chosen": ..., "rejected": ...}         a pair (`data/preferences.py`)

and the names of the columns that it did not use. Messages and tools stay in the dialect that they
came in: `harmony.dialects` reads them.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from gptoss_jax.config import dates
from gptoss_jax.data import preferences
from gptoss_jax.data.preferences import SIDES
from gptoss_jax.harmony import EFFORTS
from gptoss_jax.harmony.dialects import kind

Fields = dict[str, Any]

DATE = "date"  # the column with the date of a chat's system message, for data.date=record
EFFORT = ("reasoning", "reasoning_effort")  # columns that name the reasoning effort
# Columns that belong to an answer that is text: its analysis, and what multiplies its loss weight.
ANSWERS = ("thinking", "reasoning_content", "weight")
LABEL = "label"  # false in TRL's data for KTO: the answer is bad
# Columns that a chat template would render, and that are not read here: to leave one out would
# train another chat than the data set has.
RENDERED = (
    *("model_identity", "builtin_tools", "documents", "system_prompt", "developer_prompt"),
    *("add_generation_prompt", "continue_final_message", "response_schema"),
)


class Read(NamedTuple):
    """A record in one of the three forms, its columns that nothing reads, and its format."""

    fields: Fields
    unused: tuple[str, ...]
    format: Reader


@dataclass(frozen=True)
class Reader:
    """One format: the columns that it needs, those that it may have, and how it is read."""

    name: str
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    read: Callable[[Fields], Fields]


def read(
    record: Fields,
    *,
    pairs: bool = False,
    ignore: Collection[str] = (),
    dated: bool = False,
    trained: bool = True,
) -> Read:
    """Read a record of any format; with `pairs`, one of chosen and rejected.

    `ignore` has columns that are passed over and not reported. With `dated`, the column `date` is
    read too. Unless its answers are `trained`, columns that rate them are not looked at.

    Raises:
        ValueError: no format has these columns, two columns contradict each other, or a column
            would change what is rendered and is not read.
    """
    there = {k: v for k, v in record.items() if v is not None and k not in ignore}
    for name in RENDERED:
        if there.get(name):
            raise ValueError(
                f"{name} would change what is rendered, and is not read: put it into a message of "
                f"role system, or pass it over with data.ignore {name}"
            )
    for reader in PAIRS if pairs else READERS:
        if all(name in there for name in reader.needs):
            if trained:
                _check_rating(there, reader)
            fields = _with_common(reader.read(there), there)
            beside = () if "text" in fields else (*_COMMON, *([DATE] if dated else []))
            used = {*reader.needs, *reader.may_have, *beside}
            unused = tuple(name for name in there if name not in used)
            if dated and DATE in there and "text" not in fields:
                fields[DATE] = _date(there[DATE])
            return Read(fields, unused, reader)
    if pairs:
        lacks = " and ".join(name for name in SIDES if name not in there)
        raise ValueError(f"lacks {lacks}: objective.name dpo trains on pairs of answers")
    if "chosen" in there:
        raise ValueError("lacks messages (a chat) or text; a pair is for objective.name dpo")
    names = ", ".join(map(str, list(there)[:8]))
    columns = f"; its columns are {names} (docs/data.md lists the formats)" if names else ""
    raise ValueError(f"lacks messages (a chat) or text{columns}")


_COMMON = ("tools", "functions", "system", "chat_template_kwargs", *EFFORT)


def _check_rating(there: Fields, reader: Reader) -> None:
    """Refuse a record whose answer is bad, or whose weight nothing reads."""
    if "text" in reader.needs:
        return
    weight = there.get("weight")
    if there.get(LABEL) is False and reader not in PAIRS:
        raise ValueError(
            "label is false, which marks the answer as bad: leave such records out, or train on "
            "them too with data.ignore label"
        )
    if isinstance(weight, int | float) and weight != 1 and "weight" not in reader.may_have:
        raise ValueError(
            "weight is read beside an answer that is text: put it into the messages that it is "
            "for, or pass it over with data.ignore weight"
        )


def _with_common(fields: Fields, there: Fields) -> Fields:
    """Add what every format of a chat may have: tools, a system message, the reasoning effort."""
    if "text" in fields:
        return fields
    tools = [name for name in ("tools", "functions") if there.get(name) not in (None, [], "")]
    if len(tools) > 1:
        raise ValueError("has tools and functions: leave out one of them")
    if tools:
        fields["tools"] = _json(there[tools[0]], tools[0])
    effort = _effort(there)
    if effort is not None:
        fields["reasoning"] = effort
    if there.get("system"):
        _add_system(fields, there["system"])
    return fields


def _effort(there: Fields) -> Any:
    options = there.get("chat_template_kwargs") or {}
    if isinstance(options, str):
        options = _json(options, "chat_template_kwargs")
    if not isinstance(options, dict):
        raise ValueError("chat_template_kwargs is no object")
    options = {k: v for k, v in options.items() if v is not None}
    for name in options:
        if name not in EFFORT:
            raise ValueError(f"chat_template_kwargs.{name} is not read")
    found = [there.get(name) for name in EFFORT] + [options.get(name) for name in EFFORT]
    efforts = {value if isinstance(value, str) else repr(value) for value in found if value}
    if len(efforts) > 1:
        raise ValueError(f"names several reasoning efforts: {', '.join(sorted(efforts))}")
    effort = efforts.pop() if efforts else None
    if effort is not None and effort not in EFFORTS:
        raise ValueError(f"reasoning is {effort!r}: it is one of {', '.join(EFFORTS)}")
    return effort


def _date(value: Any) -> str:
    """Return a date as YYYY-MM-DD; Arrow's date type gives a `datetime.date`."""
    text = value.isoformat() if type(value) is datetime.date else value
    if not dates.is_day(text):
        raise ValueError(f"date is {value!r}: with data.date=record it is a day as YYYY-MM-DD")
    return text


def _add_system(fields: Fields, text: Any) -> None:
    """Put a column `system` before the messages, unless they begin with the same text."""
    if not isinstance(text, str):
        raise ValueError("system is no text")
    sides = [fields[name] for name in SIDES] if preferences.has_whole_chats(fields) else []
    name = "prompt" if "prompt" in fields else "messages"
    chats = sides or [fields.get(name)]
    chats = [[{"role": "user", "content": c}] if isinstance(c, str) else c for c in chats]
    for messages in chats:
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict) and first.get("role") in ("system", "developer"):
            if first.get("content") != text:
                raise ValueError("has a column system and a system message that differs from it")
            return
    new = [
        [{"role": "system", "content": text}, *messages] if isinstance(messages, list) else messages
        for messages in chats
    ]
    if sides:
        fields.update(zip(SIDES, new, strict=True))
    elif name in fields:
        fields[name] = new[0]
    if "given" in fields:
        fields["given"] += 1


# --- Formats ---------------------------------------------------------------------------------


def _chat(there: Fields) -> Fields:
    return {"messages": _in_roles(_json(there["messages"], "messages"), "messages")}


def _sharegpt(there: Fields) -> Fields:
    """Read {"from": "human", "value": ...}; or messages, which some data sets keep there."""
    turns = _json(there.get("conversations", there.get("conversation")), "conversations")
    return {"messages": _in_roles(turns, "conversations")}


def _in_roles(turns: Any, name: str) -> Any:
    """Return ShareGPT's turns as messages with a role; anything else as it is."""
    if isinstance(turns, dict) and _is_sharegpt([turns]):
        turns = [turns]
    if not _is_sharegpt(turns):
        return turns
    messages: list[Fields] = []
    for i, turn in enumerate(turns):
        where = f"{name}[{i}]"
        given = {k: v for k, v in turn.items() if v is not None}
        speaker, value = given.pop("from", None), given.pop("value", None)
        role = _SPEAKERS.get(speaker if isinstance(speaker, str) else "")
        if role is None:
            raise ValueError(
                f"{where}.from is {speaker!r}: it is one of {', '.join(sorted(_SPEAKERS))}"
            )
        message = {**given, "role": role}
        if speaker == "function_call":
            call = _json(value, f"{where}.value")
            message["tool_calls"] = call if isinstance(call, list) else [call]
        elif value is not None:
            message["content"] = value
        messages.append(message)
    return messages


_SPEAKERS = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}


def _is_sharegpt(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and m.get("from") is not None for m in messages)
        and not any(m.get("role") is not None for m in messages)
    )


def _prompt_completion(there: Fields) -> Fields:
    """Read TRL's and OpenAI's prompt and completion: the loss counts the completion alone."""
    prompt = _messages(_written(there["prompt"]), "user", "prompt")
    completion = _written(there["completion"], answers=True)
    if isinstance(completion, str):
        answer = [_answer(there, completion)]
    else:
        answer = _messages(completion, "assistant", "completion")
        for name in ANSWERS:
            if there.get(name) not in (None, "") and not (name == "weight" and there[name] == 1):
                raise ValueError(f"has {name} beside a completion of messages: put it into them")
    return {"messages": [*prompt, *answer], "given": len(prompt)}


def _answer(there: Fields, text: str) -> Fields:
    """Return an answer, with the analysis and the weight that columns beside it give."""
    more = {k: there[k] for k in ANSWERS if k in there and not (k == "weight" and there[k] == 1)}
    return {"role": "assistant", "content": text, **more}


def _alpaca(there: Fields) -> Fields:
    """Read Alpaca's instruction, input and output; `history` has earlier pairs of both."""
    instruction, more = _text(there, "instruction"), there.get("input") or ""
    if not isinstance(more, str):
        raise ValueError("input is no text")
    messages: list[Fields] = []
    for i, pair in enumerate(there.get("history") or []):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"history[{i}] is no pair of a question and an answer")
        asked, answered = pair
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    question = f"{instruction}\n\n{more}" if more else instruction
    messages += [
        {"role": "user", "content": question},
        _answer(there, _text(there, "output")),
    ]
    return {"messages": messages}


def _plain(there: Fields) -> Fields:
    return {"text": _text(there, "text")}


def _pair(there: Fields) -> Fields:
    fields = {k: _written(there[k]) for k in ("prompt", "messages", *SIDES) if k in there}
    if any(isinstance(fields[k], str) for k in SIDES):  # then neither is a whole chat
        fields |= {k: _written(there[k], answers=True) for k in SIDES}
    fields = {k: _in_roles(value, k) for k, value in fields.items()}
    preferences.check_asked(fields)
    return fields


READERS = (
    Reader("chat", ("messages",), (), _chat),
    Reader("ShareGPT", ("conversations",), (), _sharegpt),
    Reader("ShareGPT", ("conversation",), (), _sharegpt),
    Reader("prompt and completion", ("prompt", "completion"), ANSWERS, _prompt_completion),
    Reader("Alpaca", ("instruction", "output"), ("input", "history", *ANSWERS), _alpaca),
    Reader("text", ("text",), (), _plain),
)
PAIRS = (Reader("pair", SIDES, ("prompt", "messages"), _pair),)
# All columns that some format reads: what is read of a parquet file.
COLUMNS = tuple(
    dict.fromkeys(
        name
        for reader in (*READERS, *PAIRS)
        for name in (*reader.needs, *reader.may_have, *_COMMON, *RENDERED, LABEL)
    )
)


def _text(there: Fields, name: str) -> str:
    if not isinstance(there[name], str):
        raise ValueError(f"{name} is {kind(there[name])}: it must be text")
    return there[name]


def _messages(value: Any, role: str, name: str) -> list[Fields]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    value = _in_roles(value, name)
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is neither text nor a message nor a list of messages")
    return messages


def _written(value: Any, *, answers: bool = False) -> Any:
    """Return messages that are written as JSON text, which is how some tables hold them.

    Any other value is returned as it is: a text may be JSON that is no chat. With `answers`, the
    messages must begin with an answer: else the text is one, such as a chat that was asked for.
    """
    if not (isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"', value)):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    speaks = [
        isinstance(item, dict) and ("role" in item or {"from", "value"} <= item.keys())
        for item in found
    ]
    if not all(speaks):
        return value
    first = found[0].get("role") or _SPEAKERS.get(str(found[0].get("from")))
    return value if answers and first not in ("assistant", "tool") else found


def _json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is text, and not JSON ({error})") from None
