"""The parser against openai-harmony's on every well-formed stream, and where the two differ."""

import dataclasses
import importlib.util

import pytest
from harmony_cases import chats, headers, oracle_encoding, oracle_parse, oracle_render, turns, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax.harmony import parse, render, render_prompt
from gptoss_jax.harmony.parser import Header
from gptoss_jax.harmony.tokenizer import decode, get_tokenizer

ENCODING = get_tokenizer()
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openai_harmony") is None, reason="openai-harmony is not installed"
)
# How many of each kind, by tier.
TIERS = [
    pytest.param(100, id="fast"),
    pytest.param(400, id="slow", marks=pytest.mark.slow),
    pytest.param(
        10_000, id="exhaustive", marks=[pytest.mark.exhaustive, pytest.mark.timeout(3_600)]
    ),
]


def each(strategy, examples, body):
    """Run `body` on that many examples."""
    quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    quiet(given(strategy)(body))()


def ids_of(text):
    return ENCODING.encode(text, allowed_special="all")


def parsed(ids, **options):
    return [(message.header, message.content) for message in parse(ids, **options)]


@pytest.mark.parametrize("examples", TIERS)
def test_conversations_that_openai_harmony_renders(examples):
    def body(pairs):
        ids = oracle_render(pairs)
        assert parsed(ids, after_prompt=False) == pairs == oracle_parse(ids)

    each(st.lists(st.tuples(headers(), words()), max_size=6), examples, body)


@pytest.mark.parametrize("examples", TIERS)
def test_turns_in_any_tokens(examples):
    def body(turn):
        ids, expected = turn
        messages = parse(ids)
        assert [(m.header, m.content, m.stop) for m in messages] == expected
        pairs = [pair for *pair, _ in map(list, expected)]
        assert list(map(list, oracle_parse(ids, "assistant"))) == pairs

    each(turns(ENCODING), examples, body)


@pytest.mark.parametrize("examples", TIERS)
def test_chats_that_we_render(examples):
    def body(chat):
        arguments = chat["messages"], chat["tools"], chat["reasoning"], chat["date"]
        prompt = render_prompt(*arguments)
        for ids in (render(*arguments)[0], prompt[:-2]):
            theirs = oracle_parse(ids)
            assert [_as_read(*pair) for pair in parsed(ids, after_prompt=False)] == theirs

    each(chats(), examples, body)


def _as_read(header, content):
    """What openai-harmony reads where a content type has no recipient: see the next test."""
    if header.recipient is None and header.content_type is not None:
        header = dataclasses.replace(header, recipient=header.content_type, content_type=None)
    return header, content


# Where openai-harmony 0.0.8 errs on what it renders itself, by the smallest examples. First what
# we read, then what it reads; a text is a part of the error that it raises.
FINAL = Header(channel="final")
DIFFERENCES = {
    "a content type without a recipient is taken for a recipient": (
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|end|>",
        (dataclasses.replace(FINAL, content_type="<|constrain|>json"), "{}"),
        (dataclasses.replace(FINAL, recipient="<|constrain|>json"), "{}"),
    ),
    "a tool's message without a recipient": (
        "<|start|>functions.f<|channel|>commentary<|message|>1<|end|>",
        (Header("tool", "functions.f", "commentary"), "1"),
        "Unknown role: functions.f",
    ),
    "a participant's name": (
        "<|start|>user:ann<|message|>1<|end|>",
        (Header("user", "ann"), "1"),
        "Unknown role: user:ann",
    ),
    "a participant's name and a recipient": (
        "<|start|>user:ann to=bob<|message|>1<|end|>",
        (Header("user", "ann", None, "bob"), "1"),
        (Header("tool", "user:ann", None, "bob"), "1"),
    ),
    "the space of its own documentation's content type": (
        "<|start|>assistant to=f<|channel|>commentary <|constrain|> json<|message|>{}<|call|>",
        (Header("assistant", None, "commentary", "f", "<|constrain|>json"), "{}"),
        "unexpected tokens remaining in message header",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_openai_harmony_errs(name):
    text, ours, theirs = DIFFERENCES[name]
    ids = ids_of(text)
    assert parsed(ids, after_prompt=False) == [ours]
    if isinstance(theirs, str):
        with pytest.raises(Exception, match=theirs):
            oracle_parse(ids)
    else:
        assert oracle_parse(ids) == [theirs]


def test_the_text_of_a_special_token_in_a_name_is_text():
    header = Header("tool", "<|channel|>f", "commentary", "assistant")
    ids = oracle_render([(header, "1")])
    assert parsed(ids, after_prompt=False) == [(header, "1")]
    ((theirs, _),) = oracle_parse(ids)
    assert (theirs.name, theirs.channel) == ("to=assistant<|channel|>commentary", "f")


def test_everyone_as_recipient_is_not_named():
    header = Header(channel="final", recipient="all")
    ids = oracle_render([(header, "1")])
    assert decode(ENCODING, ids).endswith("<|channel|>final<|message|>1<|call|>")
    assert parsed(ids, after_prompt=False) == oracle_parse(ids) == [(FINAL, "1")]
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "1"}]
    messages[1] |= {"recipient": "all", "channel": "commentary"}
    assert decode(ENCODING, render(messages)[0]).endswith("commentary<|message|>1<|call|>")


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>commentary functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary functions.f json<|message|>{}<|call|>",
        "<|channel|>commentary functions.f<|message|>{}<|call|>",
        "assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>",
        " to=a<|message|>{}<|call|>",
    ],
)
def test_what_openai_harmony_forgives(text):
    assert parsed(ids_of(text)) == oracle_parse(ids_of(text), "assistant")


def test_lone_surrogates_are_replaced_where_openai_harmony_refuses_them():
    messages = [{"role": "user", "content": "a\ud800"}]
    assert parsed(render(messages)[0], after_prompt=False)[1] == (Header("user"), "a\ufffd")
    with pytest.raises(Exception, match="unexpected end of hex escape"):
        oracle_render([(Header("user"), "a\ud800")])


def test_the_oracle_reads_the_same_vocabulary():
    text = "Ünï 🀄 <|end|>"
    assert oracle_encoding().encode(text, disallowed_special=()) == ENCODING.encode_ordinary(text)
