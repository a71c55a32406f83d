"""Read one record: which of the formats it has, and whether all of it can be rendered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gptoss_jax import harmony
from gptoss_jax.data import formats, preferences
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import EFFORTS
from gptoss_jax.harmony.dialects import kind
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE

SPELLS = (
    "spells a special token of the vocabulary: give a chat as messages, each with its own text, "
    "or set data.plain_special_tokens if the tokens are meant as text"
)


@dataclass(frozen=True)
class Reading:
    """How records are read: what kind they are, and what of them is passed over."""

    pairs: bool = False
    questions: bool = False  # chats with something to answer
    # Columns; keys of messages, tools and calls as messages.KEY, tools.KEY and tool_calls.KEY.
    ignore: tuple[str, ...] = ()
    plain_special_tokens: bool = False  # a text that spells Harmony's special tokens is plain text
    dated: bool = False  # the column `date` is the date of a chat's system message
    vocab_size: int = VOCAB_SIZE  # of the model: the "ids" of sampled messages are below it

    def read(self, columns: Any) -> formats.Read:
        """Return a record in one of the three forms, its messages with Harmony's fields alone.

        Raises ValueError, with a phrase for the reason, if it is none of them.
        """
        if not isinstance(columns, dict):
            raise ValueError(f"{kind(columns)}, not an object with messages or text")
        options: Any = {"ignore": self.ignore, "dated": self.dated}
        read = formats.read(columns, pairs=self.pairs, trained=not self.questions, **options)
        keys, of_tools, of_calls = map(self._ignored, ("messages", "tools", "tool_calls"))
        if of_tools and "tools" in read.fields:
            read.fields["tools"] = _without(read.fields["tools"], of_tools)
        chats = {"messages": read.fields.get("messages")}
        if self.pairs:
            chats = preferences.split(read.fields)._asdict()
        elif "text" in read.fields:
            if not self.plain_special_tokens:  # a text gets this token at its end anyway
                read.fields["text"] = read.fields["text"].removesuffix("<|endoftext|>")
            return read
        try:
            for name, chat in chats.items():
                chat = harmony.read_messages(chat, name, ignore=[k for k in keys if k != "name"])
                for message in chat:
                    if of_calls and "tool_calls" in message:
                        message["tool_calls"] = _without(message["tool_calls"], of_calls)
                read.fields[name] = [
                    _plain(message, f"{name}[{i}]", named="name" not in keys)
                    for i, message in enumerate(chat)
                ]
        except UserError as error:
            raise ValueError(_naming_columns(error, read.format)) from None
        return read

    def _ignored(self, of: str) -> list[str]:
        """Return the keys to pass over of `of`."""
        return [k.removeprefix(f"{of}.") for k in self.ignore if k.startswith(f"{of}.")]

    def check(self, columns: Any) -> formats.Read:
        """Return what `read` does; raise ValueError also for what can't be rendered."""
        read = self.read(columns)
        try:
            if self.pairs:
                preferences.check(read.fields, self._check_chat)
                _check_answers(preferences.question(read.fields))  # a rejected one may be empty
            elif self.questions and not before_answer(read.fields.get("messages", [])):
                raise ValueError("no chat with a question: there is nothing to answer")
            elif "messages" in read.fields:
                self._check_chat(read.fields)
                if not self.questions:
                    _check_answers(read.fields["messages"])
            elif self.is_rendering(read.fields["text"]):
                harmony.read_rendering(read.fields["text"])
        except (ValueError, UserError) as error:
            raise ValueError(_naming_columns(error, read.format)) from None
        return read

    def is_rendering(self, text: str) -> bool:
        """Whether a text is read as a rendered chat, because it spells special tokens."""
        return not self.plain_special_tokens and harmony.spelled(text) is not None

    def _check_chat(self, fields: dict[str, Any]) -> None:
        """Check all that the renderer needs, so that it refuses nothing during training."""
        messages, effort = fields["messages"], fields.get("reasoning") or EFFORTS[0]
        harmony.check(messages, fields.get("tools"), effort, vocab_size=self.vocab_size)
        tools = fields.get("tools")
        where = _spelled(messages, "messages") or _spelled(tools, "tools")
        if where and not self.plain_special_tokens:
            raise ValueError(f"{where} {SPELLS}")


def _naming_columns(error: Exception, reader: formats.Reader) -> str:
    """Return an error that also names the columns which a record has in place of messages."""
    text = str(error)
    named = "messages" in reader.needs or not text.startswith("messages[")
    return text if named else f"{text} (its messages are read from {' and '.join(reader.needs)})"


def _without(value: Any, keys: list[str]) -> Any:
    """Return tools or calls without some keys, also of their `function`."""
    if isinstance(value, list):
        return [_without(item, keys) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k not in keys}
    return kept | ({"function": _without(kept["function"], keys)} if "function" in kept else {})


def _plain(message: dict[str, Any], where: str, *, named: bool) -> dict[str, Any]:
    """Return a message of a data set without a recipient or a name that says nothing.

    With `named`, a name in a message of another role than a tool's is refused, as a rendering has
    no place for it. The renderer has both: a recipient "all" ends a message in `<|call|>`.
    """
    kept = {k: v for k, v in message.items() if k != "recipient" or v != "all"}
    if message.get("role") in ("system", "developer", "user", "assistant"):
        name = kept.pop("name", None)
        if named and name not in (None, "", message["role"]):
            raise UserError(
                f"{where}.name: only a tool has a name in a rendering; put the name into the text, "
                "or pass it over with data.ignore messages.name (which leaves the names of tools)"
            )
    return kept


def _check_answers(messages: list[dict[str, Any]]) -> None:
    """Refuse an answer without text, which would be trained: its text is perhaps elsewhere."""
    for i, message in enumerate(messages):
        says = message.get("tool_calls") or "ids" in message or message.get("weight") == 0
        if message["role"] == "assistant" and not says and not message["content"].strip():
            raise ValueError(f"messages[{i}].content is empty: the assistant answers nothing")


def _spelled(value: Any, where: str) -> str:
    """Return where a text in `value` spells a special token of Harmony; "" if none does."""
    if isinstance(value, str):
        return "" if harmony.spelled(value) is None else where
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = [(f"{where}.{k}", v) for k, v in value.items() if k not in ("ids", "content_type")]
        items += [(f"{where} (its key {k!r})", k) for k in value]
    elif isinstance(value, list):
        items = ((f"{where}[{i}]", v) for i, v in enumerate(value))
    return next(filter(None, (_spelled(v, place) for place, v in items)), "")


def before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a chat without the assistant's messages at its end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
