"""The parser of sampled ids: known streams, and any ids at all."""

import importlib.util

import pytest

from gptoss_jax import harmony
from gptoss_jax.harmony import StreamParser, to_messages
from gptoss_jax.harmony.parser import Header, MessageEnd, MessageStart, TextDelta
from gptoss_jax.harmony.tokenizer import decode, get_tokenizer

ENCODING = get_tokenizer()
SMALL = get_tokenizer(1024)
USER = {"role": "user", "content": "hi"}
needs_harmony = pytest.mark.skipif(
    importlib.util.find_spec("openai_harmony") is None, reason="openai-harmony is not installed"
)


def ids_of(text, encoding=ENCODING):
    return encoding.encode(text, allowed_special="all")


def parse(ids, encoding=ENCODING, **options):
    parser = StreamParser(encoding, **options)
    events = [event for token in ids for event in parser.process(token)]
    return parser, events + parser.finish()


def check(parser, events, ids):
    """What holds for any ids: none is lost, and the events tell what the messages are."""
    assert [i for message in parser.messages for i in message.ids] + parser.pending == list(ids)
    ends = [event.message for event in events if isinstance(event, MessageEnd)]
    assert [(m.header, m.content, m.stop) for m in parser.messages] == [
        (m.header, m.content, m.stop) for m in ends
    ]
    open_header, text = None, ""
    for event in events:
        if isinstance(event, MessageStart):
            assert open_header is None
            open_header, text = event.header, ""
        elif isinstance(event, TextDelta):
            assert event.text
            text += event.text
        else:
            assert (event.message.header, event.message.content) == (open_header, text)
            open_header = None
    assert open_header is None


def test_a_turn_with_analysis():
    text = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>4"
    ids = ids_of(text + "<|return|>")
    parser, events = parse(ids)
    check(parser, events, ids)
    assert [(m.header, m.content, m.stop) for m in parser.messages] == [
        (Header(channel="analysis"), "So.", "<|end|>"),
        (Header(channel="final"), "4", "<|return|>"),
    ]
    assert events[0] == MessageStart(Header(channel="analysis"))
    assert to_messages(parser.messages) == [
        {"role": "assistant", "thinking": "So.", "content": "4"}
    ]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        " to=functions.f<|channel|>commentary <|constrain|>json",
    ],
)
def test_a_call_wherever_its_recipient_stands(header):
    ids = ids_of(header + '<|message|>{"x":1}<|call|>')
    parser, events = parse(ids)
    check(parser, events, ids)
    (message,) = parser.messages
    assert message.header == Header(
        "assistant", None, "commentary", "functions.f", "<|constrain|>json"
    )
    assert message.stop == "<|call|>"
    calls = [{"name": "f", "arguments": '{"x":1}'}]
    assert to_messages(parser.messages) == [{"role": "assistant", "tool_calls": calls}]


@pytest.mark.parametrize("channel", ["", "<|channel|>commentary", "<|channel|>comment"])
def test_a_call_in_no_known_channel_is_a_call(channel):
    parser, _ = parse(ids_of(f" to=functions.f{channel}<|message|>{{}}<|call|>"))
    call = {"name": "f", "arguments": "{}", "content_type": None}
    assert to_messages(parser.messages) == [{"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("text", "header", "content", "stop"),
    [
        ("<|channel|>final<|message|>cut", Header(channel="final"), "cut", None),
        ("<|channel|>final", Header(channel="final"), "", None),
        ("<|channel|>", Header(), "", None),
        ("<|return|>", Header(), "", "<|return|>"),
        ("The answer is 5.<|return|>", Header(), "The answer is 5.", "<|return|>"),
        ("<|channel|>final It is 5<|end|>", Header(channel="final"), "It is 5", "<|end|>"),
        ("<|message|>5<|return|>", Header(), "5", "<|return|>"),
        (
            "<|channel|>final<|channel|>x<|message|>5",
            Header(channel="x"),
            "5",
            None,
        ),
        (
            "<|channel|>final<|message|>a<|message|>b",
            Header(channel="final"),
            "a<|message|>b",
            None,
        ),
        (
            "<|channel|>commentary to=functions.f json<|message|>{}<|call|>",
            Header(channel="commentary", recipient="functions.f", content_type="json"),
            "{}",
            "<|call|>",
        ),
    ],
)
def test_broken_messages(text, header, content, stop):
    ids = ids_of(text)
    parser, events = parse(ids)
    check(parser, events, ids)
    (message,) = parser.messages
    assert (message.header, message.content, message.stop) == (header, content, stop)
    assert message.ids == tuple(ids)


def test_start_ends_a_message_and_strays_stay_with_the_one_before():
    text = "<|channel|>analysis<|message|>a<|start|>user<|message|>b<|end|> stray<|end|>"
    tail = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>c<|end|>"
    ids = ids_of(text + tail)
    parser, events = parse(ids)
    check(parser, events, ids)
    roles = [(m.header.role, m.header.name, m.content, m.stop) for m in parser.messages]
    assert roles == [
        ("assistant", None, "a", None),
        ("user", None, "b", "<|end|>"),
        ("tool", "functions.f", "c", "<|end|>"),
    ]
    assert decode(ENCODING, parser.messages[1].ids).endswith("b<|end|> stray<|end|>")


def test_characters_come_whole():
    ids = ids_of("<|channel|>final<|message|>") + ENCODING.encode(
        "né👩‍🚀🀄𐍈", allowed_special=set()
    )
    parser = StreamParser(ENCODING)
    deltas = [
        event.text
        for token in ids
        for event in parser.process(token)
        if isinstance(event, TextDelta)
    ]
    assert "".join(deltas) == "né👩‍🚀🀄𐍈"
    assert not any("\ufffd" in delta for delta in deltas)
    assert len(deltas) < len(ids) - 3  # some tokens ended within a character
    half = ENCODING.encode("🀄")[:1]
    parser, events = parse(ids_of("<|channel|>final<|message|>x") + half)
    check(parser, events, parser.messages[0].ids)
    assert parser.messages[0].content == "x\ufffd"


def test_ids_that_the_tokenizer_lacks_are_no_error():
    parser, events = parse([*ids_of("<|channel|>final<|message|>"), 201_088, -1, 2**40])
    check(parser, events, parser.messages[0].ids)
    assert parser.messages[0].content == "\ufffd" * 3


# --- What models get wrong -----------------------------------------------------------------------

CALLED = " to=functions.f<|channel|>{} <|constrain|>json<|message|>{{}}<|call|>"


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        ("<|channel|>final<|message|>4<|return|>", [("final", False)]),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>assistantfinal<|message|>4<|return|>",
            [("analysis", False), ("final", True)],
        ),
        (
            "<|channel|>analysis<|message|>x<|end|>"
            "<|start|>assistantassistant<|channel|>final<|message|>4<|return|>",
            [("analysis", False), ("final", True)],
        ),
        ("assistant<|channel|>final<|message|>4<|return|>", [("final", False)]),
        ("assistantfinal<|message|>4<|return|>", [("final", True)]),
        ("final<|message|>4<|return|>", [("final", True)]),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>final<|message|>4<|return|>",
            [("analysis", False), ("final", True)],
        ),
        (
            "<|channel|>analysis<|message|>x<|end|>"
            "<|start|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            [("analysis", False), ("final", True)],
        ),
        ("<|start|>assistant<|channel|>final<|message|>4<|return|>", [("final", True)]),
    ],
)
def test_what_is_clear_is_read_as_it_was_meant(text, headers):
    ids = ids_of(text)
    found = [message for message in harmony.parse(ids) if message.ids]
    assert [(m.header.channel, m.header.irregular) for m in found] == headers
    assert all(m.header.role == "assistant" and m.header.recipient is None for m in found)
    assert found[-1].content == "4" and found[-1].header.content_type is None
    assert [i for m in found for i in m.ids] == ids
    (message,) = to_messages(found)
    assert message == {"role": "assistant", "content": "4"} | (
        {"thinking": "x"} if len(headers) > 1 else {}
    )


@pytest.mark.parametrize("channel", ["commentary", "analysis", "final"])
def test_a_call_on_any_channel_is_a_call(channel):
    ids = ids_of(CALLED.format(channel))
    (found,) = harmony.parse(ids)
    assert found.header.irregular == (channel != "commentary")
    (message,) = to_messages([found])
    assert message == {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    (kept,) = to_messages([found], keep_ids=True)
    assert kept["ids"] == ids


def test_the_end_of_a_text_ends_a_message_and_is_no_part_of_it():
    """A model that was trained on plain texts too may end an answer so; the sampler stops there."""
    parser, _ = parse(ids_of("<|channel|>final<|message|>4<|endoftext|>"))
    (message,) = parser.messages
    assert (message.content, message.stop) == ("4", "<|endoftext|>")
    chat = [USER, *to_messages([message], keep_ids=True), USER]
    texts = [USER, {"role": "assistant", "content": "4"}, USER]
    assert harmony.render_prompt(chat) == harmony.render_prompt(texts)


ANALYSIS = "<|channel|>analysis<|message|>t<|end|>"
HI = "<|channel|>final<|message|>Hi<|return|>"
CALL = "<|channel|>commentary to=functions.f"


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        (ANALYSIS + HI, True),
        (ANALYSIS + "assistant" + HI, True),
        (ANALYSIS + "<|end|>\n" + HI, True),
        (ANALYSIS + "assistantfinal<|message|>Hi<|return|>", True),
        (ANALYSIS + " So: assistantfinal<|message|>Hi<|return|>", True),
        (ANALYSIS + " So" + HI, True),
        (ANALYSIS + "<|message|>Hi<|return|>", True),
        (ANALYSIS + "<|channel|>final<|start|>assistant" + HI, True),
        ("<|channel|><|channel|>final<|message|>Hi<|return|>", False),
        ("<|channel|>analysis<|channel|>final<|message|>Hi<|return|>", False),
        ("<|channel|>final<|channel|><|message|>Hi<|return|>", False),
        (ANALYSIS + "<|start|>assistant<|start|>assistant" + HI, True),
        (ANALYSIS + "<|start|>assistant<|channel|>final<|start|>assistant" + HI, True),
        ("<|start|>assistant" + HI, False),
        ("assistant<|start|>assistant" + HI, False),
        (ANALYSIS + "<|start|>assistantassistantfinal<|message|>Hi<|return|>", True),
        (ANALYSIS + "<|start|>assistant assistant" + HI, True),
        (ANALYSIS + "<|start|>assistant final<|message|>Hi<|return|>", True),
    ],
)
@pytest.mark.parametrize("encoding", [ENCODING, SMALL], ids=["whole", "cut"])
def test_an_answer_after_a_broken_header_is_the_answer(text, thinking, encoding):
    ids = ids_of(text, encoding)
    parser, events = parse(ids, encoding)
    check(parser, events, ids)
    answer = {"role": "assistant", "content": "Hi"} | ({"thinking": "t"} if thinking else {})
    assert to_messages(parser.messages) == [answer]
    assert [m.header.irregular for m in parser.messages] == [False, True][1 - thinking :]
    # The chat keeps the ids, to the end and with more after it.
    kept = to_messages(parser.messages, keep_ids=True)
    prompt = harmony.render_prompt([USER], tokenizer=encoding)
    assert harmony.render([USER, *kept], tokenizer=encoding)[0] == prompt + ids
    after = harmony.render_prompt([USER, *kept, USER], tokenizer=encoding)
    assert after[: len(prompt)] == prompt
    spelled = decode(encoding, after[len(prompt) :])  # without the analysis, and with one header
    assert "analysis<|message|>" not in spelled and not spelled.startswith("<|end|>")
    assert "Hi<|end|><|start|>user<|message|>hi<|end|>" in spelled


def test_text_after_the_end_that_opens_no_message_stays_a_stray():
    for text in (ANALYSIS + "final: Hi<|end|>", "<|channel|>final<|message|>t<|return|>" + HI):
        parser, _ = parse(ids_of(text))
        (message,) = parser.messages
        assert (message.content, message.header.irregular) == ("t", False)


@pytest.mark.parametrize(
    "header",
    [
        f"{CALL}<|channel|>commentary<|constrain|>json",
        f"{CALL} <|constrain|>json<|constrain|>json",
        f"{CALL} <|constrain|>json{CALL} <|constrain|>json",
        f"<|channel|>analysis{CALL} <|constrain|>json",
    ],
)
def test_a_call_whose_header_repeats_is_that_call(header):
    (found,) = harmony.parse(ids_of(header + "<|message|>{}<|call|>"))
    assert found.header.irregular
    (message,) = to_messages([found])
    assert message == {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}


@pytest.mark.parametrize(
    ("header", "channel"),
    [
        ("assistantfinal", "final"),
        ("assistantanalysis", "analysis"),
        ("assistantcomment", None),
        ("assistantassistant", None),
        ("assistant assistant<|channel|>final", "final"),
        ("final", "final"),
    ],
)
def test_a_broken_header_that_breaks_off_is_the_assistants(header, channel):
    *_, found = harmony.parse(ids_of(f"{ANALYSIS}<|start|>{header}"))
    assert (found.header, found.content) == (Header(channel=channel), "")
    assert found.header.irregular


def test_a_call_of_a_declared_tool_without_its_namespace():
    tools = [{"name": name} for name in ("f", "geometry.area")]
    for name in ("f", "geometry.area"):
        text = f"<|channel|>commentary to={name} <|constrain|>json<|message|>{{}}<|call|>"
        parsed = harmony.parse(ids_of(text))
        call = {"name": name, "arguments": "{}"}
        assert to_messages(parsed, tools=tools) == [{"role": "assistant", "tool_calls": [call]}]
        assert "tool_calls" not in to_messages(parsed)[0]


def test_a_chat_without_the_assistant_keeps_a_tools_final_message():
    """A model may sample such a message; a prompt is rendered after it all the same."""
    result = {"role": "tool", "name": "f", "content": "1", "channel": "final"}
    spelled = decode(ENCODING, harmony.render_prompt([USER, result, USER]))
    assert "<|start|>functions.f to=assistant<|channel|>final<|message|>1<|end|>" in spelled
