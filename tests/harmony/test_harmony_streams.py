"""Any ids at all: the parser never raises, loses no id, and what it gives renders as it was."""

import importlib.util
import itertools

import pytest
from harmony_cases import chats, headers, oracle_render, turns, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax.harmony import StreamParser, parse, render, render_prompt, to_messages
from gptoss_jax.harmony.parser import MessageEnd, MessageStart, TextDelta
from gptoss_jax.harmony.tokenizer import STOPS, decode, get_tokenizer, special_id, special_tokens

ENCODINGS = get_tokenizer(), get_tokenizer(1024)
HAS_ORACLE = importlib.util.find_spec("openai_harmony") is not None
USER = {"role": "user", "content": "hi"}
ABSENT = [-1, 201_088, 2**31, 2**40]
TIERS = [
    pytest.param(300, id="fast"),
    pytest.param(800, id="slow", marks=pytest.mark.slow),
    pytest.param(
        10_000, id="exhaustive", marks=[pytest.mark.exhaustive, pytest.mark.timeout(3_600)]
    ),
]


def whole_streams(encoding):
    """Well-formed streams: sampled turns, chats that we render, and what openai-harmony does."""
    sampled = turns(encoding).map(lambda turn: turn[0])
    ours = chats().map(
        lambda chat: render(
            chat["messages"], chat["tools"], chat["reasoning"], chat["date"], tokenizer=encoding
        )[0]
    )
    # The generated messages before it would leave few mutations to the rest.
    ours = ours.map(lambda ids: ids[-200:])
    if HAS_ORACLE and encoding is ENCODINGS[0]:
        pairs = st.lists(st.tuples(headers(), words()), min_size=1, max_size=4)
        return sampled | sampled | ours | pairs.map(oracle_render)
    return sampled | sampled | ours


@st.composite
def mutated_streams(draw):
    """An encoding, and a stream of it with up to eight things done to it."""
    encoding = draw(st.sampled_from(ENCODINGS))
    names = special_tokens(encoding.n_vocab)
    special = st.sampled_from([i for name, i in names.items() if "reserved" not in name])
    token = special | st.integers(0, encoding.n_vocab - 1) | st.integers(0, 255)
    ids = list(draw(whole_streams(encoding)))
    place = st.integers(0, 2**16)
    for change in draw(st.lists(st.integers(0, 9), max_size=8)):
        a, b = sorted(draw(place) % (len(ids) + 1) for _ in range(2))
        if change == 0:
            ids = ids[:a]
        elif change == 1:
            ids = ids[a:]
        elif change == 2:
            del ids[a : a + 1 + draw(st.integers(0, 3))]
        elif change == 3:
            ids[a:a] = ids[a : min(b, a + 50)]
        elif change == 4 and b < len(ids):
            ids[a], ids[b] = ids[b], ids[a]
        elif change == 5:
            ids[a:a] = draw(st.lists(token, max_size=5))
        elif change == 6:
            ids[a:b] = draw(st.lists(special, max_size=8))
        elif change == 7:
            ids.insert(a, draw(st.sampled_from(ABSENT)))
        elif change == 8:
            other = draw(whole_streams(encoding))
            ids = ids[:a] + list(other[draw(place) % (len(other) + 1) :])
        else:  # a part of a character
            data = draw(st.characters(min_codepoint=0x80, codec="utf-8")).encode()
            piece = data[: draw(st.integers(1, len(data)))]
            ids[a:a] = [encoding.encode_single_token(piece[i : i + 1]) for i in range(len(piece))]
    return encoding, ids


def check_stream(ids, encoding, *, after_prompt, chunks):
    """Hold the parser to what it says, for any ids; return its messages."""
    parser = StreamParser(encoding, after_prompt=after_prompt)
    events, seen = [], []
    for token in ids:
        events += parser.process(token)
        seen.append(token)
        assert [i for m in parser.messages for i in m.ids] + parser.pending == seen
    events += parser.finish()
    messages = list(parser.messages)
    # No id is lost, none comes twice, and nothing is left.
    assert [i for m in messages for i in m.ids] == list(ids)
    assert parser.pending == []
    assert parser.finish() == []
    assert parser.messages == messages
    check_events(events, messages)
    start = special_id(encoding, "<|start|>")
    for message in messages:
        if after_prompt or message.ids[0] == start:
            check_message(message, encoding)
    # Chunks are as good as single ids.
    again = StreamParser(encoding, after_prompt=after_prompt)
    bounds = sorted({0, len(ids), *(c % (len(ids) + 1) for c in chunks)})
    fed = [e for a, b in itertools.pairwise(bounds) for e in again.feed(ids[a:b])]
    assert fed + again.finish() == events
    assert again.messages == messages == parse(ids, encoding, after_prompt=after_prompt)
    return messages


def check_events(events, messages):
    """The events tell what the messages are, one after the other."""
    header, text, ended = None, "", []
    for event in events:
        if isinstance(event, MessageStart):
            assert header is None
            header, text = event.header, ""
        elif isinstance(event, TextDelta):
            assert event.text
            text += event.text
        else:
            assert isinstance(event, MessageEnd)
            assert (event.message.header, event.message.content) == (header, text)
            ended.append(event.message)
            header = None
    assert header is None
    assert len(ended) == len(messages)
    for early, late in zip(ended, messages, strict=True):  # which may have got strays since
        assert (early.header, early.content, early.stop) == (late.header, late.content, late.stop)
        assert late.ids[: len(early.ids)] == early.ids
        assert late.span == early.span


def check_message(message, encoding):
    """The content is the text of its ids; what ends it and what stands before it is where it is."""
    begin, end = message.span
    assert 0 <= begin <= end <= len(message.ids)
    ends = [special_id(encoding, name) for name in ("<|end|>", *STOPS)]
    if message.stop is None:
        assert end == len(message.ids)
    else:
        assert message.ids[end] == special_id(encoding, message.stop)
    start, closed = special_id(encoding, "<|start|>"), special_id(encoding, "<|message|>")
    assert not {*ends, start} & set(message.content_ids)
    if closed in message.ids[:begin]:
        assert message.ids[begin - 1] == closed
        assert decode(encoding, message.content_ids) == message.content
    else:  # the content is what is no header, in its order
        assert begin == end
        text = iter(decode(encoding, message.ids[:begin]))
        assert all(character in text for character in message.content)


def check_history(messages, ids, encoding):
    """What was sampled is what is fed back, and closed where other messages follow."""
    plain = to_messages(messages)
    render_prompt([USER, *plain, USER], tokenizer=encoding)
    kept = to_messages(messages, keep_ids=True)
    assert [i for message in kept for i in message["ids"]] == list(ids)
    prompt = render_prompt([USER], tokenizer=encoding)
    if not kept or "user" in {message["role"] for message in kept}:
        return
    tokens, weights = render([USER, *kept], tokenizer=encoding)
    assert tokens == prompt + list(ids)
    assert len(weights) == len(tokens)
    assert not any(weights[: len(prompt)])
    said = [message for message in kept if message["role"] == "assistant"]
    # A model may break its own header off and go on with a tool's message: then it said nothing.
    final = bool(said) and not {"channel", "tool_calls"} & said[-1].keys()
    if final and "analysis" in {message.get("channel") for message in kept}:
        return  # it may be dropped
    follow = render_prompt([USER, *kept, USER], tokenizer=encoding)
    head = 1 + len(encoding.encode("assistant"))
    tail = render_prompt([USER, USER], tokenizer=encoding)[len(prompt) - head :]
    assert follow[-len(tail) :] == tail
    middle = follow[len(prompt) : -len(tail)]
    last = messages[-1]
    expected = list(ids)
    if last.stop is None:
        expected.append(special_id(encoding, "<|end|>"))
    elif last.stop in ("<|return|>", "<|endoftext|>"):
        at = len(ids) - len(last.ids) + last.span[1]
        expected[at] = special_id(encoding, "<|end|>")
    assert middle == expected


@pytest.mark.parametrize("examples", TIERS)
def test_mutated_and_truncated_streams(examples):
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))

    @quiet
    @given(mutated_streams(), st.lists(st.integers(0, 2**16), max_size=5), st.booleans())
    def body(stream, chunks, after_prompt):
        encoding, ids = stream
        messages = check_stream(ids, encoding, after_prompt=after_prompt, chunks=chunks)
        if after_prompt and not set(ABSENT) & set(ids):
            check_history(messages, ids, encoding)

    body()


def test_a_stream_without_a_message_of_the_assistant():
    for encoding in ENCODINGS:
        text = "<|channel|>comment<|start|>functions.f to=assistant<|message|>é<|call|>"
        ids = encoding.encode(text, allowed_special="all")
        messages = check_stream(ids, encoding, after_prompt=True, chunks=[])
        assert [message.header.role for message in messages] == ["tool"]
        check_history(messages, ids, encoding)


def test_every_truncation_of_a_stream():
    text = (
        "<|channel|>analysis<|message|>Söme 思考 🙂.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "é🀄"}<|call|>'
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>ok<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Dóne.<|return|>"
    )
    for encoding in ENCODINGS:
        ids = encoding.encode(text, allowed_special="all")
        for cut in range(len(ids) + 1):
            messages = check_stream(ids[:cut], encoding, after_prompt=True, chunks=[cut // 2])
            check_history(messages, ids[:cut], encoding)


def test_strays_between_messages_cost_no_more_than_others():
    # Each was once added to the tuple of the message before: quadratic, hours for this many.
    ids = [*ENCODINGS[0].encode("<|message|>a<|end|>", allowed_special="all"), *[64] * 500_000]
    (message,) = parse(ids)
    assert message.content == "a"
    assert len(message.ids) == len(ids)
