"""Rendering against openai-harmony, loss weights, bad messages; the parser has its own file."""

import importlib.util
import random
import time

import pytest
from harmony_cases import (
    CHATS,
    SCHEMAS,
    TOOLS,
    chats,
    conversation,
    oracle,
    oracle_encoding,
    schemas,
)
from hypothesis import HealthCheck, given, settings

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import render, render_prompt
from gptoss_jax.harmony.tokenizer import decode, encode, get_tokenizer, special_id
from gptoss_jax.harmony.tools import render_tools

ENCODING = get_tokenizer()
needs_harmony = pytest.mark.skipif(
    importlib.util.find_spec("openai_harmony") is None, reason="openai-harmony is not installed"
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def text_of(ids):
    return decode(ENCODING, ids)


def trained_text(tokens, weights, encoding=ENCODING):
    """The trained tokens, a `|` between the runs of them."""
    out, last = "", 0.0
    for token, weight in zip(tokens, weights, strict=True):
        out += (" | " if weight and not last and out else "") + (
            decode(encoding, [token]) if weight else ""
        )
        last = weight
    return out


@needs_harmony
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("reasoning", ["low", "medium", "high"])
def test_chats_are_token_exact(name, reasoning):
    chat = CHATS[name]
    date = "2025-06-28" if reasoning != "medium" else None
    training, completion = oracle(chat["messages"], chat.get("tools"), reasoning, date)
    tokens, weights = render(chat["messages"], chat.get("tools"), reasoning, date)
    assert text_of(tokens) == text_of(training)
    assert tokens == training
    assert len(weights) == len(tokens)
    prompt = render_prompt(chat["messages"], chat.get("tools"), reasoning, date)
    assert prompt == completion


@needs_harmony
@quick
@given(chats())
def test_random_chats_are_token_exact(chat):
    training, completion = oracle(chat["messages"], chat["tools"], chat["reasoning"], chat["date"])
    arguments = (chat["messages"], chat["tools"], chat["reasoning"], chat["date"])
    assert render(*arguments)[0] == training
    assert render_prompt(*arguments) == completion


@needs_harmony
@pytest.mark.parametrize("name", SCHEMAS)
def test_tool_schemas_are_exact(name):
    tools = [
        {"name": "f", "description": "Does f.\r\n\rWell.\n", "parameters": SCHEMAS[name]},
        *TOOLS,
    ]
    _, completion = oracle([{"role": "user", "content": "hi"}], tools, "medium", None)
    prompt = render_prompt([{"role": "user", "content": "hi"}], tools)
    assert text_of(prompt) == text_of(completion)
    assert prompt == completion


@needs_harmony
@quick
@given(schemas())
def test_random_schemas_are_exact(schema):
    tools = [{"name": "f", "description": "One\r\nTwo\n", "parameters": schema}]
    _, completion = oracle([{"role": "user", "content": "hi"}], tools, "medium", None)
    prompt = render_prompt([{"role": "user", "content": "hi"}], tools)
    assert text_of(prompt) == text_of(completion)


@needs_harmony
def test_single_turn_is_harmonys_training_rendering_without_drop():
    from openai_harmony import RenderConversationConfig

    messages = CHATS["thinking"]["messages"]
    keep = RenderConversationConfig(auto_drop_analysis=False)
    expected = oracle_encoding().render_conversation_for_training(
        conversation(messages, None, "medium", None), config=keep
    )
    assert render(messages)[0] == expected


def test_default_weights_of_a_turn():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "thinking": "Sum.", "content": "4"},
    ]
    assert trained_text(*render(messages)) == (
        "<|channel|>analysis<|message|>Sum.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


def test_earlier_analysis_is_dropped_and_an_earlier_final_is_not_taught_to_end_in_end():
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "thinking": "Sum.", "content": "4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "thinking": "Add.", "content": "6"},
    ]
    tokens, weights = render(messages)
    assert "Sum." not in text_of(tokens)
    assert "4<|end|><|start|>user" in text_of(tokens)
    last = (
        "<|channel|>analysis<|message|>Add.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>6<|return|>"
    )
    assert trained_text(tokens, weights) == last, "an answer without its analysis is not trained"
    prompt = render_prompt(messages[:3])
    assert tokens[: len(prompt)] == prompt
    del messages[1]["thinking"]
    same, weights = render(messages)
    assert same == tokens
    assert trained_text(tokens, weights) == f"<|channel|>final<|message|>4 | {last}"


def test_tool_calls_are_trained_and_results_are_not():
    tokens, weights = render(CHATS["tools"]["messages"], TOOLS)
    assert trained_text(tokens, weights) == (
        "<|channel|>analysis<|message|>Call it.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json"
        '<|message|>{"location": "Zürich"}<|call|>'
        " | <|channel|>final<|message|>Sunny.<|return|>"
    )


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ((), ""),
        (("assistant/final",), "<|start|>assistant<|channel|>final<|message|>4<|return|>"),
        (("assistant/analysis",), "<|channel|>analysis<|message|>Sum.<|end|>"),
        (("user",), "<|message|>2+2?<|end|>"),
        (("system",), "<|message|># Instructions\n\nBe brief.<|end|>"),
        (("developer",), "<|message|># Instructions\n\nBe brief.<|end|>"),
        (("tool", "assistant/commentary"), ""),
        (
            ("assistant", "assistant/analysis=0"),
            "<|start|>assistant<|channel|>final<|message|>4<|return|>",
        ),
    ],
)
def test_train_on(train_on, expected):
    assert trained_text(*render(ANALYSED, train_on=train_on)) == expected


ANALYSED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "thinking": "Sum.", "content": "4"},
]


@pytest.mark.parametrize(
    ("train_on", "analysis", "final", "user"),
    [
        (("assistant=0.5",), 0.5, 0.5, 0),
        (("assistant/final", "assistant/analysis=0.3"), 0.3, 1, 0),
        (("assistant/analysis=0.3", "assistant", "user=2"), 0.3, 1, 2),
        (("assistant/final=1e-2", "user"), 0, 0.01, 1),
    ],
)
def test_train_on_with_weights(train_on, analysis, final, user):
    tokens, weights = render(ANALYSED, train_on=train_on)
    spelled = [  # by hand: text, and the weight of each of its tokens
        ("<|start|>user", 0),
        ("<|message|>2+2?<|end|>", user),
        ("<|start|>assistant", 0),
        ("<|channel|>analysis<|message|>Sum.<|end|>", analysis),
        ("<|start|>assistant<|channel|>final<|message|>4<|return|>", final),
    ]
    encoded = [(ENCODING.encode(text, allowed_special="all"), w) for text, w in spelled]
    expected = [w for ids, w in encoded for _ in ids]
    assert tokens[-len(expected) :] == [i for ids, _ in encoded for i in ids]
    assert weights[-len(expected) :] == expected
    assert not any(weights[: -len(expected)])


def test_given_messages_are_not_trained():
    chat = [*ANALYSED, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]
    tokens, weights = render(chat, given=4)
    assert (tokens, trained_text(tokens, weights)) == (
        render(chat)[0],
        "<|channel|>final<|message|>6<|return|>",
    )


def test_text_of_special_tokens_is_plain_text():
    messages = [{"role": "user", "content": "<|return|> <|start|>assistant"}]
    prompt = render_prompt(messages)
    assert prompt.count(special_id(ENCODING, "<|start|>")) == 3
    assert special_id(ENCODING, "<|return|>") not in prompt


def test_cut_vocabulary_gives_the_same_text():
    small = get_tokenizer(1024)
    for chat in CHATS.values():
        whole, weights = render(chat["messages"], chat.get("tools"))
        cut, cut_weights = render(chat["messages"], chat.get("tools"), tokenizer=small)
        assert max(cut) < 1024
        assert decode(small, cut) == text_of(whole)
        assert trained_text(cut, cut_weights, small) == trained_text(whole, weights)


USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages is empty"),
        ("hi", "messages is empty or no list"),
        (["hi"], "messages[0] is text: it must be an object"),
        ([{"role": "bot", "content": "x"}], "messages[0].role is 'bot'"),
        ([USER, {"content": "x"}], "messages[1].role is missing"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role is ['user']"),
        ([USER, {"role": "assistant"}], "messages[1].content is missing"),
        ([{"role": "user", "content": 5}], "messages[0].content is a number: it must be text"),
        ([USER | {"thinking": "x"}], "messages[0].thinking"),
        ([USER | CALL | {"role": "user"}], "messages[0].tool_calls"),
        ([USER | {"channel": "final"}], "messages[0].channel"),
        ([USER, {"role": "assistant", "content": "", "channel": "x"}], "messages[1].channel"),
        ([USER, {"role": "assistant", "content": "", "thinking": 1}], "messages[1].thinking"),
        ([USER, CALL | {"tool_calls": "f"}], "messages[1].tool_calls is text: it must be a list"),
        ([USER, CALL | {"tool_calls": ["f"]}], "messages[1].tool_calls[0]"),
        ([USER, CALL | {"tool_calls": [{"name": "f"}]}], "tool_calls[0].arguments is missing"),
        ([USER, CALL | {"tool_calls": [{"arguments": "f"}]}], "tool_calls[0].name is missing"),
        ([USER, {"role": "tool", "content": "5"}], "messages[1].name is missing"),
        ([USER, CALL | {"ids": [1, 201_088]}], "messages[1].ids: id 201088 at position 1"),
        ([USER, CALL | {"ids": 5}], "messages[1].ids is no list"),
        ([USER, CALL | {"thinking": "x", "ids": [5]}], "messages[1].ids"),
    ],
)
def test_bad_messages_are_named_in_one_line(messages, named):
    with pytest.raises(UserError) as error:
        render(messages)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ([{"description": "x"}], "tools[0].name"),
        ([*TOOLS, {"type": "function", "function": "f"}], f"tools[{len(TOOLS)}].function"),
        ([{"name": "f", "description": 5}], "tools[0].description"),
        ([{"name": "f", "parameters": "x"}], "tools[0].parameters"),
        ({"name": "f"}, "tools is an object: it must be a list"),
    ],
)
def test_bad_tools_are_named(tools, named):
    with pytest.raises(UserError) as error:
        render_prompt([USER], tools)
    assert named in str(error.value)


def test_bad_choices_are_named():
    with pytest.raises(UserError, match="reasoning is 'huge'"):
        render([USER], reasoning="huge")
    with pytest.raises(UserError, match="train_on has 'bot'"):
        render([USER], train_on=("bot",))
    with pytest.raises(UserError, match="train_on has 'assistant/finals'"):
        render([USER], train_on=("assistant/finals",))
    for number in ("", "x", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"has 'user={number}': the weight is a number, and no"):
            render([USER], train_on=(f"user={number}",))
    with pytest.raises(UserError, match="has 'system=2', and another weight for the same before"):
        render([USER], train_on=("developer", "system=2"))


def test_tool_results_answer_calls_by_name_id_or_order():
    calls = [
        {"id": "a", "function": {"name": "f", "arguments": {"x": "é"}}},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    turn = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    by_order = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    by_id = [by_order[0] | {"tool_call_id": "a"}, by_order[1] | {"tool_call_id": "b"}]
    by_name = [by_order[0] | {"name": "f"}, by_order[1] | {"name": "functions.g"}]
    prompts = [render_prompt(turn + results) for results in (by_order, by_id, by_name)]
    assert prompts[0] == prompts[1] == prompts[2]
    assert '<|message|>{"x": "é"}<|call|>' in text_of(prompts[0])
    assert "<|start|>functions.g to=assistant<|channel|>commentary<|message|>2" in text_of(
        prompts[0]
    )


def test_tools_without_a_schema_take_no_argument():
    text = render_tools([{"name": "now"}, {"function": {"name": "any", "parameters": {}}}])
    assert "type now = () => any;" in text
    assert "type any = (_: any) => any;" in text


def test_thousands_of_chats_render_in_seconds():
    rng = random.Random(0)
    chat = [{"role": "user", "content": " ".join(str(rng.random()) for _ in range(8))}]
    render(chat)
    begin = time.perf_counter()
    for _ in range(2_000):
        render([*chat, {"role": "assistant", "thinking": "So.", "content": "Yes."}])
    assert time.perf_counter() - begin < 5  # about 0.1 s on one quiet core


def test_roles_are_encoded_apart_from_what_follows():
    tokens, _ = render(CHATS["tools"]["messages"], TOOLS)
    pieces = encode(ENCODING, "assistant") + encode(ENCODING, " to=functions.get_weather")
    joined = ",".join(map(str, tokens))
    assert ",".join(map(str, pieces)) in joined
