"""Read a chat that is to be answered, and its tools, from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptoss_jax import harmony
from gptoss_jax.config import dates
from gptoss_jax.data import formats
from gptoss_jax.errors import UserError


def read(
    file: str | Path, tools_file: str | Path | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read a chat, for `harmony.render_prompt`.

    Args:
        file: JSON: a list of messages, or one record as training reads it (`data/formats.py`), such
            as {"messages": [...], "tools": [...]}. Of a prompt and completion, it is the prompt.
        tools_file: JSON: a list of tools, in any dialect that training reads.

    Returns:
        {"messages", "tools"?, "reasoning"?, "date"?}, where the date is a day as YYYY-MM-DD, and
        the names of the columns that nothing reads, among them a date in another form.

    Raises:
        UserError: a file can't be read or holds no such thing, both files have tools, or the chat
            ends with a message of the assistant, to which there is nothing to answer.
    """
    value = _load(file)
    record = {"messages": value} if isinstance(value, list) else value
    if not isinstance(record, dict):
        raise UserError(f"{file}: no chat: give a list of messages, or an object with messages")
    try:
        dated = dates.is_day(record.get(formats.DATE))
        chat, unused = formats.read(record, dated=dated, trained=False)[:2]
    except ValueError as error:
        raise UserError(f"{file}: {_without_advice(error)}") from None
    if "messages" not in chat:
        raise UserError(f"{file}: a text, and no chat: give a list of messages")
    if "given" in chat:
        chat = {**chat, "messages": chat["messages"][: chat["given"]]}
    if tools_file is not None:
        if chat.get("tools"):
            raise UserError(f"{file} has tools, and {tools_file} others: leave out one of them")
        chat = {**chat, "tools": read_tools(tools_file)}
    try:
        harmony.check(chat["messages"], chat.get("tools"))
    except UserError as error:
        raise UserError(f"{file}: {_without_advice(error)}") from None
    if chat["messages"][-1]["role"] == "assistant":
        raise UserError(
            f"{file}: the chat ends with a message of the assistant: end it with the message that "
            "is to be answered (user or tool)"
        )
    return chat, unused


def read_tools(file: str | Path) -> list[dict[str, Any]]:
    """Return the tools of a JSON file: a list, or an object with `tools`.

    Raises:
        UserError: the file can't be read, or a tool is wrong.
    """
    value = _load(file)
    if isinstance(value, dict):
        if "tools" not in value:
            raise UserError(f"{file}: no tools: give a list of tools, or an object with tools")
        value = value["tools"]
    try:
        tools = harmony.read_tools(value)
        harmony.check([{"role": "user", "content": ""}], tools)  # rendering reads names and types
        return tools
    except UserError as error:
        raise UserError(f"{file}: {_without_advice(error)}") from None


def _load(file: str | Path) -> Any:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        many = ": one chat, and no file of many" if error.msg == "Extra data" else ""
        raise UserError(
            f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno}){many}"
        ) from None


def _without_advice(error: Exception) -> str:
    """Return what is wrong, without the option of training that passes it over."""
    return str(error).partition(", or pass it over with data.ignore")[0]
