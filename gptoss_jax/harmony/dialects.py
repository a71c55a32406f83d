"""Read messages and tools as other programs write them, and refuse what nothing here would read.

`read_message` and `read_tool` return the fields that `gptoss_jax.harmony` describes. A key whose
meaning is known becomes the field that means the same. A key that has no meaning in a rendering is
passed over. Any other key is refused by its name, because a text under a key that nobody reads
would be left out of the chat without a word. A key whose value is null counts as absent: a file
that was written from an Arrow table has one wherever another row had a value.

The dialects are those of OpenAI's chat completions (with `reasoning_content` or `reasoning`, as
vLLM, DeepSeek and OpenRouter answer), of the older `function_call`, and of MCP and Anthropic for
tools (`inputSchema`, `input_schema`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.schemas import from_json, read_parameters

FIELDS = frozenset(
    [
        *("role", "content", "thinking", "tool_calls", "channel", "recipient", "content_type"),
        *("name", "tool_call_id", "ids", "weight"),
    ]
)
THINKING = ("thinking", "reasoning_content", "reasoning")  # all mean the analysis
# Keys of answers as servers log them, which say nothing that a rendering has.
_UNREAD = frozenset({"id", "object", "created", "index", "finish_reason", "logprobs", "status"})
_EMPTY = ("annotations", "audio", "refusal", "function_call", "tool_calls", "images", "videos")
_TEXTS = ("text", "input_text", "output_text")  # types of content parts that are text

# Keys of a content part with text, which say nothing that a rendering has.
_PART = frozenset({"type", "text", "annotations", "cache_control", "index", "id", "logprobs"})

_CALL = frozenset({"id", "type", "index", "function", "name", "arguments", "content_type"})
_TOOL = frozenset({"type", "function", "name", "description", "parameters"})
# Keys of tools that say how to call or to cache them, and that Harmony's text has no place for.
_UNREAD_OF_TOOLS = frozenset(
    [
        *("strict", "title", "annotations", "outputSchema", "output_schema", "cache_control"),
        *("defer_loading", "return", "returns", "_meta", "icons"),
    ]
)
_SCHEMAS = ("parameters", "input_schema", "inputSchema")


def read_messages(
    messages: Any, where: str = "messages", *, ignore: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the messages of a chat with the fields of `gptoss_jax.harmony` alone.

    Raises UserError as `read_message` does, or if `messages` is empty or no list.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(f"{where} is {kind(messages)}: it must be a list")
    if not messages:
        raise UserError(f"{where} is empty")
    if "id" not in ignore:
        messages = with_call_ids(messages)
    return [read_message(m, f"{where}[{i}]", ignore=ignore) for i, m in enumerate(messages)]


def with_call_ids(messages: Sequence[Any]) -> list[Any]:
    """Return messages in which a tool's `id` is its `tool_call_id`, if an earlier call has it.

    Any other `id` is that of the message itself.
    """
    ids: list[Any] = []
    found = []
    for message in messages:
        if isinstance(message, dict):
            own, calls = message.get("id"), message.get("tool_calls")
            result = message.get("role") in ("tool", "function")
            if result and own is not None and message.get("tool_call_id") is None and own in ids:
                message = {**message, "tool_call_id": own}
            calls = calls if isinstance(calls, list) else []
            ids += [call.get("id") for call in calls if isinstance(call, dict)]
        found.append(message)
    return found


def read_message(message: Any, where: str, *, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Return a message with the fields of `gptoss_jax.harmony` alone.

    Args:
        message: the message, in any of the dialects.
        where: its place, for errors: "messages[2]".
        ignore: keys to pass over.

    Raises:
        UserError: it is no object; it has a key that nothing reads; two keys contradict each other;
            or a content part is no text.
    """
    if not isinstance(message, dict):
        raise UserError(f"{where} is {kind(message)}: it must be an object")
    given = {k: v for k, v in message.items() if not _is_null(v) and k not in ignore}
    read: dict[str, Any] = {k: v for k, v in given.items() if k in FIELDS and k != "thinking"}
    rest = [k for k in given if k not in FIELDS and k not in THINKING and k not in _UNREAD]
    if not isinstance(read.get("tool_calls", []), list):
        raise UserError(f"{where}.tool_calls is {kind(read['tool_calls'])}: it must be a list")
    if read.get("tool_calls") == []:
        del read["tool_calls"]
    if isinstance(read.get("content"), list):
        read["content"] = _join_parts(read["content"], f"{where}.content")
    if (thinking := _thinking(given, where)) is not None:
        read["thinking"] = thinking
    for name in rest:
        value = given[name]
        if name == "function_call" and isinstance(value, dict) and value:
            if "tool_calls" in read:
                raise UserError(f"{where} has tool_calls and function_call: leave out one of them")
            read["tool_calls"] = [value]
        elif name == "refusal" and isinstance(value, str) and value and not read.get("content"):
            read["content"] = value  # the answer, where OpenAI's server declines
        elif name in _EMPTY and value in ([], {}, ""):
            continue
        else:
            raise UserError(
                f"{where}.{name}: no field of a message; rename it if it means another one "
                f"({', '.join(sorted(FIELDS))}), or pass it over with data.ignore "
                f"messages.{name}"
            )
    if read.get("role") == "function":  # OpenAI's role of a result before there were tools
        read["role"] = "tool"
    return read


def _is_null(value: Any) -> bool:
    """Say whether a value is null, or an object of nulls alone, as Arrow writes a null struct."""
    inner = value.values() if isinstance(value, dict) else ()
    return value is None or (bool(inner) and all(map(_is_null, inner)))


def _thinking(given: Mapping[str, Any], where: str) -> str | None:
    """Return the analysis, which several keys may hold, or None."""
    found = {k: given[k] for k in THINKING if k in given}
    for name, value in found.items():
        if not isinstance(value, str):
            raise UserError(f"{where}.{name} is {kind(value)}: it must be text")
    texts = {value for value in found.values() if value}
    if len(texts) > 1:
        names = " and ".join(name for name, value in found.items() if value)
        raise UserError(f"{where} has different texts in {names}: leave out all but one")
    return texts.pop() if texts else None


def _join_parts(parts: list[Any], where: str) -> str:
    """Join content parts, such as {"type": "text", "text": ...}, into one text."""
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise UserError(f"{where}[{i}] is {kind(part)}: it must be a part with a type and text")
        part = {k: v for k, v in part.items() if not _is_null(v)}
        text = part.get("text")
        if part.get("type", "text") not in _TEXTS or not isinstance(text, str):
            raise UserError(
                f"{where}[{i}] is a part of type {part.get('type')!r}: only text is read "
                "(GPT-OSS takes no images, sounds or files)"
            )
        for name, value in part.items():
            if name not in _PART and value not in ([], {}, ""):
                raise UserError(f"{where}[{i}].{name}: no field of a part; it has type and text")
        texts.append(text)
    return "".join(texts)


def read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call as {"id"?, "name", "arguments", "content_type"?}, without null values.

    Raises:
        UserError: it is no object with a name, or has a key that nothing reads.
    """
    if not isinstance(call, dict):
        raise UserError(f"{where} is no object with a name and arguments")
    # null for the type of the arguments says that the call has none: nothing is dropped there.
    typed = [one for one in (call, call.get("function")) if isinstance(one, dict)]
    content_type = {k: one[k] for one in typed for k in ("content_type",) if k in one}
    call = {k: v for k, v in call.items() if v is not None}
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise UserError(f"{where} is no object with a name and arguments")
    function = {k: v for k, v in function.items() if v is not None}
    for name in [*call, *function]:
        if name not in _CALL:
            raise UserError(
                f"{where}.{name}: no field of a call; it has name and arguments, and an id, or "
                f"pass it over with data.ignore tool_calls.{name}"
            )
    read = {k: function[k] for k in ("name", "arguments") if k in function} | content_type
    return read | ({"id": call["id"]} if "id" in call else {})


# --- Tools -----------------------------------------------------------------------------------


def read_tools(tools: Any, where: str = "tools") -> list[dict[str, Any]]:
    """Return function tools as [{"name", "description"?, "parameters"?}]; [] for None.

    `tools` may be JSON text, as data sets have it whose tables can't hold schemas.

    Raises:
        UserError: a tool lacks a name, its parameters are no schema whose meaning is clear, or it
            has a key that nothing reads.
    """
    tools = from_json(tools, where)
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise UserError(f"{where} is {kind(tools)}: it must be a list")
    return [read_tool(tool, f"{where}[{i}]") for i, tool in enumerate(tools) if tool is not None]


def read_tool(tool: Any, where: str) -> dict[str, Any]:
    """Return one tool as {"name", "description"?, "parameters"?}; see `read_tools`."""
    if isinstance(tool, dict) and tool.get("type") not in (None, "function"):
        raise UserError(
            f"{where}.type is {tool['type']!r}: only functions are read; declare another tool in a "
            "developer's message"
        )
    function = tool
    if isinstance(tool, dict) and tool.get("function") is not None:
        function, beside = tool["function"], set(tool) - {"type", "function"} - _UNREAD_OF_TOOLS
        if beside:
            raise UserError(
                f"{where}.{min(beside)}: no field of a tool beside its function, or pass it over "
                f"with data.ignore tools.{min(beside)}"
            )
        where = f"{where}.function"
    if not isinstance(function, dict):
        raise UserError(f"{where} is no object with a name")
    function = {k: v for k, v in function.items() if v is not None}
    schemas = [name for name in _SCHEMAS if name in function]
    if len(schemas) > 1:
        raise UserError(f"{where} has {' and '.join(schemas)}: leave out all but one")
    for name in function:
        if name not in _TOOL and name not in schemas and name not in _UNREAD_OF_TOOLS:
            raise UserError(
                f"{where}.{name}: no field of a tool; it has name, description and parameters, or "
                f"pass it over with data.ignore tools.{name}"
            )
    read = {k: function[k] for k in ("name", "description") if k in function}
    if schemas:
        read["parameters"] = read_parameters(function[schemas[0]], f"{where}.{schemas[0]}")
    return read


def declared_arguments(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, of tools as `read_tools` returns them, each one's `parameters` by its name."""
    return {tool["name"]: tool.get("parameters") or {} for tool in tools if "name" in tool}


def without_null_arguments(arguments: Any, schema: Any) -> Any:
    """Drop arguments that are null, but for those that the tool's schema declares, at any depth."""
    if isinstance(arguments, list):
        inner = schema.get("items") if isinstance(schema, dict) else None
        return [without_null_arguments(item, inner) for item in arguments]
    if not isinstance(arguments, dict):
        return arguments
    properties = schema.get("properties") if isinstance(schema, dict) else None
    properties = properties if isinstance(properties, dict) else {}
    return {
        name: without_null_arguments(value, properties.get(name))
        for name, value in arguments.items()
        if value is not None or name in properties
    }


def kind(value: Any) -> str:
    """Name a JSON value's kind, for errors."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), "a number")
