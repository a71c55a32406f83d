"""Chats and tool schemas for the Harmony tests, and what openai-harmony makes of them."""

import dataclasses
import functools
import itertools
import os
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

import gptoss_jax
from gptoss_jax.harmony.parser import CHANNELS, ROLES, Header
from gptoss_jax.harmony.tokenizer import load_ranks, special_id

WEATHER = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "City, e.g. Zürich"},
        "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
    },
    "required": ["location"],
}
TOOLS = [
    {"name": "get_weather", "description": "Weather of a place.\nNow.", "parameters": WEATHER},
    {"type": "function", "function": {"name": "get_location", "description": "Where."}},
]

_USER = {"role": "user", "content": "Hello, what is 2+2? 你好 🙂"}
_CALL = {
    "role": "assistant",
    "thinking": "Call it.",
    "tool_calls": [{"name": "get_weather", "arguments": {"location": "Zürich"}}],
}
_RESULT = {"role": "tool", "name": "get_weather", "content": '{"sunny": true}'}


def _final(text, thinking=None):
    return {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})


CHATS = {
    "user": {"messages": [_USER]},
    "answer": {"messages": [_USER, _final("4")]},
    "thinking": {"messages": [_USER, _final("4", "Sum.")]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, _USER, _final("4", "S")]},
    "developer": {"messages": [{"role": "developer", "content": "A\n\nB "}, _USER, _final("")]},
    "both": {
        "messages": [
            {"role": "system", "content": "A"},
            {"role": "developer", "content": "B"},
            _USER,
        ],
        "tools": TOOLS,
    },
    "turns": {"messages": [_USER, _final("4", "a"), _USER, _final("5", "b"), _USER]},
    "turns trained": {
        "messages": [_USER, _final("4", "a"), _USER, _final("5", "b"), _USER, _final("6", "c")]
    },
    "late developer": {
        "messages": [_USER, _final("4", "a"), {"role": "system", "content": "Now rhyme."}, _USER]
    },
    "tools": {"messages": [_USER, _CALL, _RESULT, _final("Sunny.")], "tools": TOOLS},
    "tools, system": {
        "messages": [{"role": "system", "content": "S"}, _USER, _CALL, _RESULT],
        "tools": TOOLS,
    },
    "tools, thinking after": {
        "messages": [_USER, _CALL, _RESULT, _final("Sunny.", "So.")],
        "tools": TOOLS,
    },
    "tools, turns": {
        "messages": [
            _USER,
            _CALL,
            _RESULT,
            _final("Sunny.", "So."),
            _USER,
            _CALL | {"content": "I look it up."},
            _RESULT,
            _final("Rain.", "Hm."),
            _USER,
            _CALL,
        ],
        "tools": TOOLS,
    },
    "no final yet": {"messages": [_USER, _CALL, _RESULT, _USER, _final("x", "y")], "tools": TOOLS},
    "commentary": {
        "messages": [_USER, _final("Wait.", "t") | {"channel": "commentary"}, _final("4", "u")]
    },
    "analysis alone": {"messages": [_USER, _final("Hm.") | {"channel": "analysis"}]},
    "python": {
        "messages": [
            _USER,
            _final("1+1") | {"channel": "analysis", "recipient": "python", "content_type": "code"},
            {"role": "tool", "name": "browser.open", "content": "2", "channel": "analysis"},
            _final("2"),
        ]
    },
    "no tools": {"messages": [_USER], "tools": []},
    "special text": {
        "messages": [{"role": "user", "content": "<|return|><|start|>"}, _final("<|")]
    },
}

_STRING = {"type": "string"}
SCHEMAS = {
    "empty": {},
    "no properties": {"type": "object"},
    "weather": WEATHER,
    "scalars": {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "default": 3},
            "b": {"type": "number", "default": 1e-05},
            "c": {"type": "boolean", "default": False, "title": "C"},
            "d": {"type": ["integer", "string", "null"], "default": -1},
            "e": {"type": "null"},
            "f": {"default": {"x": [1, 2.5, "ä\n"]}},
            "g": {"type": "string", "nullable": True, "examples": ["x", 5, 'y"z']},
            "h": {"type": "number", "default": 1e22},
        },
        "required": ["a", "h"],
    },
    "arrays": {
        "type": "object",
        "properties": {
            "a": {"type": "array"},
            "b": {"type": "array", "items": {"type": "array", "items": _STRING}},
            "c": {"type": "array", "items": {"type": "object", "properties": {"x": _STRING}}},
            "d": {"type": "array", "items": {"type": "string", "enum": ["p", "q"]}},
        },
    },
    "nested": {
        "type": "object",
        "description": "Outer.",
        "properties": {
            "in": {
                "type": "object",
                "description": "Inner.",
                "properties": {"deep": {"type": "object", "properties": {"x": WEATHER}}},
                "required": ["deep"],
            }
        },
    },
    "one of": {
        "type": "object",
        "properties": {
            "a": {
                "description": "Either.",
                "default": "s",
                "oneOf": [
                    {"type": "string", "description": "First.", "default": "x"},
                    {"type": "number", "nullable": True, "description": "Second."},
                    {"type": "string", "enum": ["u", "v"], "default": "u"},
                ],
            },
            "b": {"description": "Same.", "oneOf": [{"type": "string", "description": "Same."}]},
            "c": {"oneOf": [{"type": "object", "properties": {"k": _STRING}}]},
            "d": {"type": "array", "items": {"oneOf": [_STRING, {"type": "boolean"}]}},
            "e": {"oneOf": []},
        },
    },
    "top one of": {
        "oneOf": [
            {"type": "string", "enum": ["u"], "default": "u", "description": "U"},
            {"type": "object", "properties": {"x": _STRING}, "nullable": True},
            {"type": "number", "default": 5},
        ]
    },
    "odd": {"type": "object", "properties": {"a": True, "b": {"oneOf": 5, "default": 1}}},
}


def words():
    return st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
        ["", " ", "4", "<|end|>", "a\r\nb", "C'est\u3000bon", "\n\n", "# Tools"]
    )


def schemas():
    # Numbers of few digits: openai-harmony reads others with an error in the last place.
    floats = st.builds(lambda n, e: float(f"{n}e{e}"), st.integers(-999, 999), st.integers(-12, 22))
    scalars = st.booleans() | st.integers(-(2**63), 2**64 - 1) | floats
    values = st.none() | scalars | words() | st.lists(scalars | words(), max_size=3)
    comment = {
        "description": words(),
        "title": words(),
        "default": values | st.dictionaries(words(), values, max_size=2),
        "nullable": st.booleans(),
        "examples": st.lists(values, max_size=3),
        "enum": st.lists(words() | st.integers(), max_size=3),
        "type": st.sampled_from(["string", "number", "integer", "boolean", "null", "array", "x"])
        | st.lists(st.sampled_from(["string", "integer", "null"]), max_size=3),
    }
    leaf = st.fixed_dictionaries({}, optional=comment)

    def extend(inner):
        return st.fixed_dictionaries(
            {},
            optional=comment
            | {
                "type": st.sampled_from(["object", "array"]),
                "properties": st.dictionaries(words(), inner, max_size=3),
                "required": st.lists(words(), max_size=3),
                "items": inner,
                "oneOf": st.lists(inner, max_size=3),
            },
        ).map(typed)

    def typed(schema):  # we read properties without a type as an object's; openai-harmony as any
        return {"type": "object", **schema} if "properties" in schema else schema

    return st.recursive(leaf, extend, max_leaves=12).map(
        lambda schema: {"type": "object", "properties": {"p": schema, "q": schema}} | schema
    )


@st.composite
def chats(draw):
    names = st.sampled_from(["f", "get_weather", "g-2"])
    call = st.fixed_dictionaries(
        {"name": names, "arguments": words()},
        optional={"content_type": st.sampled_from([None, "json", "<|constrain|>"])},
    )
    assistant = st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": words()},
        optional={
            "thinking": words(),
            "channel": st.sampled_from(["analysis", "commentary", "final"]),
            "recipient": st.sampled_from(["python", "browser.open", "all"]),
            "content_type": st.sampled_from(["code", "<|constrain|>json", "<|constrain|>"]),
            "tool_calls": st.lists(call, max_size=2),
        },
    )
    plain = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "system", "developer"]), "content": words()}
    )
    result = st.fixed_dictionaries(
        {"role": st.just("tool"), "content": words(), "name": names},
        optional={"channel": st.sampled_from(["analysis", "commentary"])},
    )
    return {
        "messages": draw(st.lists(plain | assistant | assistant | result, min_size=1, max_size=8)),
        "tools": draw(st.sampled_from([None, [], TOOLS])),
        "reasoning": draw(st.sampled_from(["low", "medium", "high"])),
        "date": draw(st.none() | st.just("2025-06-28") | words()),
    }


@cache
def oracle_encoding():
    import openai_harmony

    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(
        Path(gptoss_jax.__file__).parent / "harmony" / "vocab"
    )
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def _oracle_messages(message, tools):
    """What one JSON message is in openai-harmony's terms; tools belong to this message."""
    from openai_harmony import Author, DeveloperContent, Message, Role

    role = message["role"]
    if role in ("system", "developer"):
        if not message["content"] and not tools:
            return []
        content = DeveloperContent.new()
        if message["content"]:
            content = content.with_instructions(message["content"])
        if tools:
            content = content.with_function_tools(tools)
        return [Message.from_role_and_content(Role.DEVELOPER, content)]
    if role == "user":
        return [Message.from_role_and_content(Role.USER, message["content"])]
    if role == "tool":
        name = message["name"] if "." in message["name"] else f"functions.{message['name']}"
        author = Author.new(Role.TOOL, name)
        result = Message.from_author_and_content(author, message["content"])
        return [
            result.with_channel(message.get("channel", "commentary")).with_recipient("assistant")
        ]
    out = []
    calls = message.get("tool_calls", [])
    if message.get("thinking"):
        thought = Message.from_role_and_content(Role.ASSISTANT, message["thinking"])
        out.append(thought.with_channel("analysis"))
    if message.get("content") or not calls:
        said = Message.from_role_and_content(Role.ASSISTANT, message["content"])
        said = said.with_channel(message.get("channel", "commentary" if calls else "final"))
        if "recipient" in message:
            said = said.with_recipient(message["recipient"])
        if "content_type" in message:
            said = said.with_content_type(message["content_type"])
        out.append(said)
    for call in calls:
        arguments = call["arguments"]
        if isinstance(arguments, dict):
            assert arguments == {"location": "Zürich"}
            arguments = '{"location": "Zürich"}'
        made = Message.from_role_and_content(Role.ASSISTANT, arguments).with_channel("commentary")
        name = call["name"] if "." in call["name"] else f"functions.{call['name']}"
        made = made.with_recipient(name)
        kind = call.get("content_type", "<|constrain|>json")
        out.append(made if kind is None else made.with_content_type(kind))
    return out


def conversation(messages, tools, reasoning, date):
    from openai_harmony import (
        Conversation,
        DeveloperContent,
        Message,
        ReasoningEffort,
        Role,
        SystemContent,
        ToolDescription,
    )

    system = SystemContent.new().with_reasoning_effort(ReasoningEffort[reasoning.upper()])
    if date is not None:
        system = system.with_conversation_start_date(date)
    out = [Message.from_role_and_content(Role.SYSTEM, system)]
    functions = [tool.get("function", tool) for tool in tools or []]
    described = [
        ToolDescription.new(f["name"], f.get("description", ""), f.get("parameters"))
        for f in functions
    ]
    if described and messages[0]["role"] not in ("system", "developer"):
        content = DeveloperContent.new().with_function_tools(described)
        out.append(Message.from_role_and_content(Role.DEVELOPER, content))
    for i, message in enumerate(messages):
        out += _oracle_messages(message, described if i == 0 else [])
    return Conversation.from_messages(out)


def oracle(messages, tools, reasoning, date):
    """What openai-harmony renders for training and for completion.

    For training, what is before the last turn is a completion's history, of which Harmony drops
    analysis, and nothing is dropped of the last turn.
    """
    from openai_harmony import Conversation, RenderConversationConfig, Role

    encoding = oracle_encoding()
    whole = conversation(messages, tools, reasoning, date)
    completion = encoding.render_conversation_for_completion(whole, Role.ASSISTANT)
    users = [i for i, m in enumerate(whole.messages) if m.author.role == Role.USER]
    turn = users[-1] + 1 if users else 0
    # The system message says whether there are tools, wherever in the conversation they are.
    everything = encoding.render_conversation(
        whole, config=RenderConversationConfig(auto_drop_analysis=False)
    )
    rest = Conversation.from_messages(whole.messages[turn:])
    kept = encoding.render_conversation_for_training(
        rest, config=RenderConversationConfig(auto_drop_analysis=False)
    )
    if not users:
        trained = encoding.render_conversation_for_training(
            whole, config=RenderConversationConfig(auto_drop_analysis=False)
        )
        assert len(trained) == len(everything)
        return trained, completion
    history = Conversation.from_messages(whole.messages[:turn])
    return encoding.render_conversation(history) + kept, completion


# Harmony's own messages, of any role: (role, name, channel, recipient, content_type) and a text.
_HEADER_WORD = (
    st.sampled_from(["a", "functions.f", "python", "a\u3000b", "é中🀄", "<|x|>", "x:y", "json"])
    | st.text(
        st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="<:="),
        min_size=1,
        max_size=8,
    )
).filter(lambda word: word != "all")  # the recipient that openai-harmony does not write down
_CHANNEL = st.sampled_from(["analysis", "commentary", "final"]) | _HEADER_WORD.filter(
    lambda word: "<" not in word and "\u3000" not in word
)
_TYPE = _HEADER_WORD | st.builds("<|constrain|>{}".format, _HEADER_WORD | st.just(""))


@st.composite
def headers(draw):
    """A header that can be read in one way: a tool is named, and a content type has a recipient."""
    role = draw(st.sampled_from(["system", "developer", "user", "assistant", "assistant", "tool"]))
    name = None
    if role == "tool":
        # A channel in place of a role is read as the assistant's channel.
        others = *ROLES, *CHANNELS
        plain = _HEADER_WORD.filter(lambda word: word.partition(":")[0] not in others)
        name = draw(plain)
    recipient = draw(_HEADER_WORD if role == "tool" else st.none() | _HEADER_WORD)
    content_type = draw(st.none() | _TYPE) if recipient else None
    return Header(role, name, draw(st.none() | _CHANNEL), recipient, content_type)


def spelled(encoding, text, pieces):
    """The tokens of a text, cut at some bytes: what a model may sample for it."""
    data, out = text.encode(), []
    ranks = load_ranks()
    for at in sorted({0, *(p % (len(data) + 1) for p in pieces)}):
        out.append(at)
    bounds = [*out, len(data)]
    ids = []
    for begin, stop in itertools.pairwise(bounds):
        part = data[begin:stop]
        try:
            ids += encoding.encode_ordinary(part.decode())
        except UnicodeDecodeError:  # a character cut in two: byte by byte
            ids += [ranks[part[i : i + 1]] for i in range(len(part))]
    return ids


@st.composite
def turns(draw, encoding):
    """What a model may sample after a prompt: the ids, and (header, content, end token) of each."""
    special = functools.partial(special_id, encoding)
    ids, expected = [], []
    for i in range(draw(st.integers(1, 4))):
        header = draw(headers().filter(lambda header: header.role in ("assistant", "tool")))
        if i == 0:
            header = dataclasses.replace(header, role="assistant", name=None)
        text, pieces = draw(words()), draw(st.lists(st.integers(0, 99), max_size=6))
        stop = draw(st.sampled_from(["<|end|>", "<|call|>", "<|return|>"]))
        if i:
            author = header.name if header.role == "tool" else header.role
            ids += [special("<|start|>"), *spelled(encoding, author, pieces)]
        to = f" to={header.recipient}" if header.recipient else ""
        behind = header.channel is not None and draw(st.booleans())
        if to and not behind:
            ids += encoding.encode_ordinary(to)
        if header.channel is not None:
            ids += [special("<|channel|>"), *spelled(encoding, header.channel, pieces)]
        if to and behind:
            ids += spelled(encoding, to, pieces)
        if header.content_type is not None:
            kind = header.content_type
            marked = kind.startswith("<|constrain|>")
            if not marked or draw(st.booleans()):
                ids += encoding.encode_ordinary(" ")
            if marked:
                ids.append(special("<|constrain|>"))
                kind = kind.removeprefix("<|constrain|>")
            ids += spelled(encoding, kind, pieces)
        ids += [special("<|message|>"), *spelled(encoding, text, pieces), special(stop)]
        expected.append((header, text, stop))
    return ids, expected


def harmony_message(header, text):
    """An openai-harmony message."""
    from openai_harmony import Author, Message, Role, TextContent

    return Message(
        author=Author(role=Role(header.role), name=header.name),
        content=[TextContent(text=text)],
        channel=header.channel,
        recipient=header.recipient,
        content_type=header.content_type,
    )


def oracle_render(pairs):
    """What openai-harmony renders of (header, text) pairs, nothing dropped."""
    from openai_harmony import Conversation, RenderConversationConfig

    return oracle_encoding().render_conversation(
        Conversation.from_messages([harmony_message(*pair) for pair in pairs]),
        config=RenderConversationConfig(auto_drop_analysis=False),
    )


def oracle_parse(ids, role=None):
    """What openai-harmony parses of ids, as (header, content) pairs."""
    from openai_harmony import Role

    messages = oracle_encoding().parse_messages_from_completion_tokens(
        ids, None if role is None else Role(role)
    )
    return [
        (
            Header(m.author.role.value, m.author.name, m.channel, m.recipient, m.content_type),
            "".join(part.text for part in m.content),
        )
        for m in messages
    ]
