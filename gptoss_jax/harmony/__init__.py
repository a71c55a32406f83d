"""Render chats as Harmony tokens, as openai-harmony 0.0.8 does, with a loss weight for each token.

A chat is a list of messages, each `{"role", "content"}` with the role system, developer, user,
assistant or tool. "system" and "developer" both mean a developer's instructions, as in Hugging
Face's template; Harmony's own system message (identity, date, reasoning effort, channels) is
generated. An assistant's message may have
- "thinking": its analysis, rendered as a separate message before it;
- "tool_calls": a list of `{"name", "arguments"}` or of OpenAI's
  `{"id", "function": {"name", "arguments"}}`. Arguments are JSON text or an object. A call without
  a "content_type" gets `<|constrain|>json`. "content" is then optional: the text before the calls;
- "channel": analysis, commentary or final. The default is final, or commentary if the message calls
  tools;
- "recipient" and "content_type": for calls of a tool that is not a function, such as python.
A tool's message has the result as its "content". It needs "name" or "tool_call_id" if results do
not come in the order of the calls. A name without a dot is a function's name, unless an earlier
call went to exactly that name. `check` says what is wrong with a chat, without rendering it.

A message is `<|start|>role[ to=recipient][<|channel|>channel][ type]<|message|>content<|end|>`.

Sampled messages are rendered with exactly the ids that were sampled. Many token sequences spell the
same text, and a model may sample other tokens than the tokenizer gives (and other headers than
openai-harmony renders), so a chat keeps the ids:

    prompt = render_prompt(messages)                        # ends in <|start|>assistant
    messages += to_messages(parse(ids), keep_ids=True)      # the ids that were sampled after it
    messages.append({"role": "user", "content": "And then?"})     # or a tool's result
    prompt = render_prompt(messages)

Each of these sampled messages is one Harmony message and has its tokens as "ids". The ids are
rendered instead of the other fields (remove "ids" from a message whose text you edit):
- If a chat ends in sampled messages, the result of `render` ends in exactly these ids.
- Once other messages follow, the `<|return|>` at the end of the turn becomes `<|end|>`, and a turn
  that broke off gets an `<|end|>`. `<|call|>` stays.
- Analysis is kept or dropped as whole messages, by the rule of `render_prompt` for text: all of it
  stays while the assistant's last message is a call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.channels import CHANNELS as CHANNELS
from gptoss_jax.harmony.channels import HISTORIES as HISTORIES
from gptoss_jax.harmony.channels import ROLES as ROLES
from gptoss_jax.harmony.channels import TURNS as TURNS
from gptoss_jax.harmony.channels import Weights, parse_train_on, weight_of
from gptoss_jax.harmony.dialects import read_messages as read_messages
from gptoss_jax.harmony.dialects import read_tools as read_tools
from gptoss_jax.harmony.messages import EFFORTS as EFFORTS
from gptoss_jax.harmony.messages import Message, Part, check_effort, expand
from gptoss_jax.harmony.messages import check as check
from gptoss_jax.harmony.parser import CONSTRAIN, ParsedMessage
from gptoss_jax.harmony.parser import StreamParser as StreamParser
from gptoss_jax.harmony.parser import parse as parse
from gptoss_jax.harmony.parser import to_messages as to_messages
from gptoss_jax.harmony.system import BUILTIN_TOOLS as BUILTIN_TOOLS
from gptoss_jax.harmony.system import chat_template as chat_template
from gptoss_jax.harmony.system import system_text
from gptoss_jax.harmony.system import template_rules as template_rules
from gptoss_jax.harmony.tokenizer import (
    encode,
    get_tokenizer,
    special_id,
    stop_ids,
)
from gptoss_jax.harmony.turns import borrowed, continues, drop_analysis, untrained_of
from gptoss_jax.harmony.turns import count_untrained as count_untrained
from gptoss_jax.harmony.turns import split_turns as split_turns

if TYPE_CHECKING:
    import tiktoken

_SPECIAL = (
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    *("<|constrain|>", "<|return|>", "<|call|>"),
)
_SPELLED = re.compile(
    "|".join(map(re.escape, (*_SPECIAL, "<|startoftext|>", "<|endoftext|>", "<|endofprompt|>")))
)


def render(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    reasoning: str = "medium",
    date: str | None = None,
    *,
    train_on: Sequence[str] = ("assistant",),
    turns: str = "all",
    history: str = "harmony",
    given: int = 0,
    identity: str | None = None,
    builtin_tools: Sequence[str] = (),
    tokenizer: tiktoken.Encoding | None = None,
) -> tuple[list[int], list[float]]:
    """Render a whole chat for training: its ids, and the loss weight of each id as a target.

    The last turn (all messages after the last user message) keeps its analysis. Everything before
    it is rendered as by `render_prompt`. So earlier analysis is dropped where `history` drops it,
    and the ids before the last turn are those of the prompt. A final answer at the very end ends in
    `<|return|>`, tool calls end in `<|call|>`, every other message ends in `<|end|>`. Sampled ids
    at the end stay as they are.

    `turns` says which turns of the assistant are trained: with "last", only the last one. With
    "all", every turn whose analysis is rendered, or that has none; a turn whose analysis is dropped
    would teach the model to answer without it, and has weight 0 (`split_turns` makes a chat of each
    turn instead).

    `train_on` has roles or role/channel pairs such as "assistant/final", with a weight if it is not
    1: "assistant/analysis=0.3" (see `channels.parse_train_on`). In an assistant's message, the
    tokens that the model samples get this weight: all after `<|start|>assistant`, the end token
    included. `<|start|>assistant` itself gets it too if the model continues after its own analysis
    or commentary. In a message of another role, all tokens after the role's name get it.

    The weight is always 0 for the `<|end|>` of an earlier final answer (there the model should
    sample `<|return|>`), for the `<|end|>` that was added to a sampled turn that broke off, for the
    first `given` messages, and for the generated system message. A message's own "weight"
    multiplies it.

    Raises UserError that names the message and the field.
    """
    encoding = tokenizer or get_tokenizer()
    parts = expand(messages, tools, encoding.n_vocab)
    trained = parse_train_on(train_on)
    before = parts[: len(expand(messages[:given], tools, encoding.n_vocab))] if given else []
    turn = 1 + max((i for i, part in enumerate(parts) if part.role == "user"), default=-1)
    kept = drop_analysis(parts[:turn], history) + parts[turn:]
    before += untrained_of(parts, kept, turn, turns)
    parts = kept
    named = identity, tuple(builtin_tools)
    tokens = list(_system(encoding, reasoning, date, bool(tools), *named))
    more, weights = _weigh(parts, encoding, trained, before)
    return tokens + more, [0.0] * len(tokens) + weights


def _weigh(
    parts: list[Part], encoding: tiktoken.Encoding, trained: Weights, before: list[Part]
) -> tuple[list[int], list[float]]:
    """Render messages for training; those in `before` have weight 0."""
    tokens: list[int] = []
    weights: list[float] = []
    end, end_of_turn = special_id(encoding, "<|end|>"), special_id(encoding, "<|return|>")
    goes_on = False
    for rendered in _render_parts(parts, encoding, to_answer=False):
        part, head, body = rendered.part, rendered.head, rendered.body
        final = part.role == "assistant" and part.channel == "final"
        if final and part.ids is None and part is parts[-1]:
            body[-1] = end_of_turn
        weight = weight_of(trained, part.role, part.channel) * part.weight
        if any(part is other for other in before):
            weight = 0.0
        tokens += head + body
        weights += [weight * goes_on] * len(head) + [weight] * len(body)
        if rendered.cut or (final and body[-1:] == [end]):
            weights[-1] = 0.0
        goes_on = part.role == "assistant" and not final and rendered.goes_on
    return tokens, weights


def spelled(text: str) -> int | None:
    """Return where a text spells a special token, such as `<|start|>`, or None."""
    found = _SPELLED.search(text)
    return None if found is None else found.start()


def read_rendering(
    text: str,
    *,
    train_on: Sequence[str] = ("assistant",),
    turns: str = "all",
    tokenizer: tiktoken.Encoding | None = None,
) -> tuple[list[int], list[float]]:
    """Return ids and loss weights of a text that is a whole chat, already rendered as Harmony.

    The ids are those that the text spells, with its own system message. The weights are those of
    `render`, but no analysis is dropped: with turns="all", every turn is trained as it stands. A
    final answer at the very end ends in `<|return|>`, even if the text has `<|end|>`.

    Raises:
        UserError: the text is not a row of whole messages, each `<|start|>...<|message|>...<|end|>`
            (or `<|call|>`, or `<|return|>` at the end of a turn), a header is not as Harmony writes
            it, a final answer is empty, or another special token is spelled in a message.
    """
    encoding = tokenizer or get_tokenizer()
    ids = encoding.encode(text.strip(), allowed_special=set(_SPECIAL), disallowed_special=())
    start, end = special_id(encoding, "<|start|>"), special_id(encoding, "<|end|>")
    between = special_id(encoding, "<|message|>")
    parts: list[Part] = []
    parsed = parse(ids, encoding, after_prompt=False)
    for i, message in enumerate(parsed):
        header, whole = message.header, message.ids
        at = message.span[0] - 1
        begins = whole[:1] == (start,) and whole[at : at + 1] == (between,)
        if not begins or message.stop is None or len(whole) != message.span[1] + 1:
            raise UserError(
                f"spells Harmony's special tokens, and its message {i + 1} is no whole one: give a "
                "chat as messages, or set data.plain_special_tokens if the tokens are meant as text"
            )
        if what := _what_is_wrong(message):
            raise UserError(
                f"is a rendered chat whose message {i + 1} {what}: mend it, or give a chat as "
                "messages"
            )
        author = header.name or "" if header.role == "tool" else ""
        final = header.role == "assistant" and header.channel == "final"
        if final and i + 1 == len(parsed) and whole[-1] == end:
            whole = (*whole[:-1], special_id(encoding, "<|return|>"))
        parts.append(
            Part(header.role, message.content, author, header.channel, header.recipient, ids=whole)
        )
    if not parts:
        raise UserError("holds no message")
    turn = 1 + max((i for i, part in enumerate(parts) if part.role == "user"), default=-1)
    return _weigh(
        parts, encoding, parse_train_on(train_on), untrained_of(parts, parts, turn, turns)
    )


def _what_is_wrong(message: ParsedMessage) -> str:
    """Say what is wrong with a whole message of a text that is to be trained; "" if nothing is."""
    header = message.header
    if header.irregular:
        return "has a header that is not as Harmony writes it"
    content_type = (header.content_type or "").removeprefix(CONSTRAIN)
    words = header.name, header.channel, header.recipient, content_type
    if any(spelled(text) is not None for text in (message.content, *filter(None, words))):
        return "spells another special token inside"
    answers = header.role == "assistant" and header.channel in (None, "final")
    if answers and not header.recipient and not message.content.strip():
        return "is an empty answer of the assistant"
    return ""


def render_prompt(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    reasoning: str = "medium",
    date: str | None = None,
    *,
    history: str = "harmony",
    identity: str | None = None,
    builtin_tools: Sequence[str] = (),
    tokenizer: tiktoken.Encoding | None = None,
) -> list[int]:
    """Render a chat as a prompt: its ids, up to and including `<|start|>assistant`.

    `history` says which analysis of earlier turns is left out:
    - "harmony", openai-harmony's rule: if the assistant's last message is a final answer, the
      analysis before the first final answer; else none.
    - "template", the rule of the chat template that OpenAI published with the weights: all analysis
      before the last final answer.

    The system message says `identity` in place of "You are ChatGPT, ...", and describes
    `builtin_tools`: "browser", "python". OpenAI's template calls it `model_identity`.

    Raises UserError that names the message and the field.
    """
    encoding = tokenizer or get_tokenizer()
    named = identity, tuple(builtin_tools)
    tokens = list(_system(encoding, reasoning, date, bool(tools), *named))
    parts = drop_analysis(expand(messages, tools, encoding.n_vocab), history)
    for rendered in _render_parts(parts, encoding, to_answer=True):
        tokens += rendered.head + rendered.body
    return [*tokens, special_id(encoding, "<|start|>"), *_short(encoding, "assistant")]


@lru_cache(maxsize=4096)
def _short(encoding: tiktoken.Encoding, text: str) -> tuple[int, ...]:
    """Encode a text that many chats repeat; the result is cached."""
    return tuple(encode(encoding, text))


@lru_cache(maxsize=256)
def _system(
    encoding: tiktoken.Encoding,
    reasoning: str,
    date: str | None,
    with_tools: bool,
    identity: str | None,
    builtin_tools: tuple[str, ...],
) -> tuple[int, ...]:
    """Return the ids of the generated system message."""
    check_effort(reasoning)
    text = system_text(
        reasoning, date, functions=with_tools, identity=identity, builtin_tools=builtin_tools
    )
    head, body = _render_part(Part("system", text), encoding)
    return (*head, *body)


@dataclass(frozen=True)
class _Rendered:
    """The ids of a message: `head` is `<|start|>` and the role's name, `body` is all the rest."""

    part: Part
    head: list[int]
    body: list[int]
    goes_on: bool  # the model samples the assistant's next message directly after this one
    cut: bool = False  # the message was sampled without an end token, and its `<|end|>` was added


def _render_parts(
    parts: list[Part], encoding: tiktoken.Encoding, *, to_answer: bool
) -> Iterator[_Rendered]:
    """Render messages; sampled ones verbatim, except for the token that ends their turn.

    With `to_answer`, this token is also changed if the turn is the last one. A sampled message
    belongs to the same turn as the next one if the ids of the next one begin with `<|start|>`: for
    the first message of a turn, `<|start|>` is in the prompt, not in its ids. It also does if its
    `<|start|>` is missing (`turns.borrowed`), unless the message before was dropped or edited.
    """
    start, end = special_id(encoding, "<|start|>"), special_id(encoding, "<|end|>")
    stops, call = stop_ids(encoding), special_id(encoding, "<|call|>")
    for i, part in enumerate(parts):
        if part.ids is None:
            head, body = _render_part(part, encoding)
            yield _Rendered(part, head, body, goes_on=body[-1] == end)
            continue
        before = parts[i - 1].ids if i else None
        if joined := continues(before, part.ids, encoding):
            head, body = [], list(part.ids)
        else:
            head, body = _split_ids(part, encoding)
        found = range(joined, len(body))
        at = next((k for k in found if body[k] == end or body[k] in stops), None)
        stop = None if at is None else body[at]
        following = parts[i + 1].ids if i + 1 < len(parts) else (() if to_answer else (start,))
        into_next = following is not None and (
            following[:1] == (start,) or bool(continues(part.ids, following, encoding))
        )
        if not into_next and at is None:
            body.append(end)
        elif not into_next and stop in stops and stop != call:
            body[at or 0] = end
        goes_on = stop == end or (stop is None and into_next)
        yield _Rendered(part, head, body, goes_on, cut=stop is None and not into_next)


def _render_part(part: Part, encoding: tiktoken.Encoding) -> tuple[list[int], list[int]]:
    head = [special_id(encoding, "<|start|>"), *_short(encoding, part.author or part.role)]
    body: list[int] = []
    if part.recipient not in (None, "all"):  # openai-harmony does not write the recipient "all"
        body += _short(encoding, f" to={part.recipient}")
    if part.channel is not None:
        body += [special_id(encoding, "<|channel|>"), *_short(encoding, part.channel)]
    if part.content_type is not None:
        if part.content_type.startswith(CONSTRAIN):
            body += [*_short(encoding, " "), special_id(encoding, CONSTRAIN)]
            body += _short(encoding, part.content_type.removeprefix(CONSTRAIN))
        else:
            body += _short(encoding, f" {part.content_type}")
    body.append(special_id(encoding, "<|message|>"))
    body += encode(encoding, part.content)
    body.append(special_id(encoding, "<|call|>" if part.calls else "<|end|>"))
    return head, body


def _split_ids(part: Part, encoding: tiktoken.Encoding) -> tuple[list[int], list[int]]:
    """Split the ids of a sampled message into head and rest.

    If the prompt already has the head, the rest is all of the ids.
    """
    head = [special_id(encoding, "<|start|>"), *_short(encoding, part.author or part.role)]
    ids = list(part.ids or ())
    taken = borrowed(ids, encoding)
    ids = ids[taken:]
    if ids[:1] != head[:1]:
        # Without a `<|start|>` of its own, it was sampled behind the prompt's.
        return head if taken else [head[0], *_short(encoding, "assistant")], ids
    size = len(head) if ids[: len(head)] == head else 1  # 1: the model sampled another header
    return ids[:size], ids[size:]
