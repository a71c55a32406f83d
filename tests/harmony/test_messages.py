"""`harmony.check`: what `render` would refuse, and nothing else."""

import pytest
from harmony_cases import CHATS, TOOLS, chats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax import harmony
from gptoss_jax.errors import UserError

USER = {"role": "user", "content": "hi"}


def problem(function, *arguments):
    """What a function refuses its arguments for, None if it takes them."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


def test_good_chats_pass():
    for chat in CHATS.values():
        harmony.check(chat["messages"], chat.get("tools"), "low")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)
_FIELDS = ["role", "content", "thinking", "channel", "tool_calls", "name", "ids", "recipient"]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(chats(), st.integers(0, 99), st.sampled_from(_FIELDS), _JSON | st.just(...))
def test_check_refuses_what_render_refuses(chat, at, field, value):
    messages = [dict(message) for message in chat["messages"]]
    message = messages[at % len(messages)]
    message[field] = value
    if value is ...:
        del message[field]
    refused = problem(harmony.check, messages, chat["tools"], chat["reasoning"])
    for function in (harmony.render, harmony.render_prompt):
        assert problem(function, messages, chat["tools"], chat["reasoning"]) == refused
    if refused is not None:
        assert "\n" not in refused
        assert refused.startswith("messages[")


@pytest.mark.parametrize(
    ("messages", "tools", "reasoning", "named"),
    [
        ([USER], TOOLS, "huge", "reasoning is 'huge': it is one of low, medium, high"),
        ([USER], [{}], "low", "tools[0].name is missing"),
        ([{"role": "user", "content": None}], None, "low", "messages[0].content is missing"),
        (
            [{"role": "user", "content": ["a"]}],
            None,
            "low",
            "messages[0].content[0] is text: it must be a part",
        ),
        ([USER, USER | {"content": True}], None, "low", "messages[1].content is true or false"),
    ],
)
def test_what_is_wrong_is_named(messages, tools, reasoning, named):
    assert named in problem(harmony.check, messages, tools, reasoning)


CALL = {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"tool_calls": [CALL | {"name": "my tool"}]}, "tool_calls[0].name is 'my tool'"),
        ({"tool_calls": [CALL | {"name": ""}]}, "tool_calls[0].name is ''"),
        ({"tool_calls": [CALL | {"content_type": "a b"}]}, "content_type is 'a b'"),
        ({"content": "", "recipient": "a\nb"}, "messages[1].recipient is 'a\\nb'"),
        ({"content": "", "content_type": "<|constrain|> json"}, "messages[1].content_type"),
        ({"role": "tool", "content": "", "name": "a b"}, "messages[1].name is 'a b'"),
    ],
)
def test_a_word_of_a_header_is_one_word(message, named):
    refused = problem(harmony.check, [USER, {"role": "assistant"} | message])
    assert named in refused
    assert "without white space" in refused


def test_ids_are_held_to_the_vocabulary():
    messages = [USER, {"role": "assistant", "content": "", "ids": [1_500]}]
    harmony.check(messages)
    for ids in ([[1]], [[1], [1, 2]], ["a"], [0.5]):
        with pytest.raises(UserError, match=r"messages\[0\]\.ids has an item that is no integer"):
            harmony.check([messages[1] | {"ids": ids}])
    with pytest.raises(UserError, match=r"messages\[0\]\.ids: ids are object"):
        harmony.check([messages[1] | {"ids": [2**70]}])
    with pytest.raises(UserError, match=r"messages\[1\]\.ids: id 1500 at position 0"):
        harmony.check(messages, vocab_size=1_024)
