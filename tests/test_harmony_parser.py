"""The parser of sampled ids: known streams, and any ids at all."""

import importlib.util
import random

import pytest
from harmony_cases import CHATS, TOOLS, chats, oracle_encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax.harmony import StreamParser, render, render_prompt, to_messages
from gptoss_jax.harmony_parser import (
    Header,
    MessageEnd,
    MessageStart,
    ParsedMessage,
    TextDelta,
)
from gptoss_jax.tokenizer import decode, get_tokenizer

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
            Header(channel="final<|channel|>x"),
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
    assert parser.messages == [ParsedMessage(header, content, stop, tuple(ids))]


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


@needs_harmony
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(chats())
def test_whole_chats_parse_as_openai_harmony_parses_them(chat):
    from openai_harmony import StreamableParser

    tokens, _ = render(chat["messages"], chat["tools"], chat["reasoning"], chat["date"])
    theirs = StreamableParser(oracle_encoding(), role=None)
    for token in tokens:
        theirs.process(token)
    parser, events = parse(tokens, after_prompt=False)
    check(parser, events, tokens)
    for ours, message in zip(parser.messages, theirs.messages, strict=True):
        assert ours.header == Header(
            message.author.role.value,
            message.author.name,
            message.channel,
            message.recipient,
            message.content_type,
        )
        assert ours.content == message.content[0].text


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("encoding", [ENCODING, SMALL], ids=["whole", "cut"])
def test_what_was_parsed_renders_again(name, encoding):
    chat = CHATS[name]
    tools = chat.get("tools")
    if chat["messages"][-1]["role"] != "assistant":
        chat = {"messages": [*chat["messages"], {"role": "assistant", "content": "Yes."}]}
    *history, answer = chat["messages"]
    prompt = render_prompt(history, tools, tokenizer=encoding)
    tokens, _ = render(chat["messages"], tools, tokenizer=encoding)
    if tokens[: len(prompt)] != prompt:
        pytest.skip("the prompt drops analysis that the last turn keeps")
    parser, _ = parse(tokens[len(prompt) :], encoding)
    for keep_ids in (False, True):
        again = to_messages(parser.messages, keep_ids=keep_ids)
        assert render([*history, *again], tools, tokenizer=encoding)[0] == tokens
    assert parser.messages[-1].content in (
        answer.get("content"),
        '{"location": "Zürich"}',
    )


def test_a_sampled_call_keeps_its_ids_in_the_history():
    sampled = ids_of(
        "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"location":  "X"}<|call|>'
    )
    parser, _ = parse(sampled)
    result = {"role": "tool", "content": "Rain."}
    prompt = render_prompt([USER], TOOLS)
    kept = to_messages(parser.messages, keep_ids=True)
    follow = render_prompt([USER, *kept, result], TOOLS)
    assert follow[: len(prompt) + len(sampled)] == prompt + sampled
    assert decode(ENCODING, follow[len(prompt) + len(sampled) :]) == (
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>Rain.<|end|>"
        "<|start|>assistant"
    )
    tokens, weights = render([USER, *kept], TOOLS)
    assert tokens == prompt + sampled
    assert weights == [0.0] * len(prompt) + [1.0] * len(sampled)


def test_a_sampled_answer_ends_in_end_in_the_history():
    sampled = ids_of("<|channel|>final<|message|>4<|return|>")
    parser, _ = parse(sampled)
    kept = to_messages(parser.messages, keep_ids=True)
    assert render([USER, *kept])[0][-1] == sampled[-1]
    text = decode(ENCODING, render_prompt([USER, *kept, USER]))
    assert "<|message|>4<|end|><|start|>user" in text
    cut, _ = parse(sampled[:-1])
    kept = to_messages(cut.messages, keep_ids=True)
    assert "<|message|>4<|end|><|start|>user" in decode(
        ENCODING, render_prompt([USER, *kept, USER])
    )


def test_a_header_that_nobody_renders_keeps_its_ids():
    sampled = ids_of("<|message|>a<|end|><|start|> weird<|channel|>x<|message|>b<|end|>")
    parser, _ = parse(sampled)
    kept = to_messages(parser.messages, keep_ids=True)
    assert kept[1]["name"] == "weird"
    assert render_prompt([USER, *kept])[-len(sampled) - 2 : -2] == sampled


def test_empty_analysis_is_not_lost():
    sampled = ids_of(
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>4"
        "<|return|>"
    )
    parser, _ = parse(sampled)
    tokens, _ = render([USER, *to_messages(parser.messages)])
    assert tokens == render_prompt([USER]) + sampled


def streams():
    """500 streams: random ids, mostly special ones, and good streams mutated and cut short."""
    rng = random.Random(7)
    good = [
        ids_of(
            "<|channel|>analysis<|message|>Söme 思考 🙂.<|end|><|start|>assistant"
            '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "é🀄"}<|call|>'
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>ok<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Dóne.<|return|>",
            encoding,
        )
        for encoding in (ENCODING, SMALL)
    ]
    for i in range(500):
        encoding = (ENCODING, SMALL)[i % 2]
        size = encoding.n_vocab
        special = range(size - 32, size) if encoding is SMALL else range(199_998, 200_020)
        if i % 5 == 0:
            ids = [rng.randrange(size) for _ in range(rng.randrange(40))]
        elif i % 5 == 1:
            ids = [rng.choice(special) for _ in range(rng.randrange(40))]
        else:
            ids = good[i % 2][: rng.randrange(1, 120)]
            for _ in range(rng.randrange(6)):
                at = rng.randrange(len(ids) + 1)
                new = [rng.choice(special), rng.randrange(size), rng.randrange(256)]
                ids[at : at + rng.randrange(3)] = new[: rng.randrange(4)]
        yield encoding, ids


def test_no_stream_raises_or_loses_an_id():
    kept_text = 0
    for encoding, ids in streams():
        for after_prompt in (True, False):
            parser, events = parse(ids, encoding, after_prompt=after_prompt)
            check(parser, events, ids)
            for keep_ids in (False, True):
                messages = to_messages(parser.messages, keep_ids=keep_ids)
                tokens = render_prompt([USER, *messages, USER], tokenizer=encoding)
                kept_text += decode(encoding, tokens).count("思考")
    assert kept_text > 100


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 201_087) | st.integers(199_998, 200_012), max_size=30))
def test_any_ids_parse(ids):
    parser, events = parse(ids)
    check(parser, events, ids)


def test_ids_that_the_tokenizer_lacks_are_no_error():
    parser, events = parse([*ids_of("<|channel|>final<|message|>"), 201_088, -1, 2**40])
    check(parser, events, parser.messages[0].ids)
    assert parser.messages[0].content == "\ufffd" * 3
