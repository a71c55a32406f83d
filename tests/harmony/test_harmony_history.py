"""Chats that go on: sampled ids are fed back as they are, tool calls and results come back."""

import functools
import importlib.util
import json

import pytest
from harmony_cases import CHATS, TOOLS, oracle, oracle_parse, spelled, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax.harmony import parse, render, render_prompt, to_messages
from gptoss_jax.harmony.tokenizer import decode, get_tokenizer, special_id

ENCODING = get_tokenizer()
SMALL = get_tokenizer(1024)
USER = {"role": "user", "content": "hi"}
HAS_ORACLE = importlib.util.find_spec("openai_harmony") is not None
TIERS = [
    pytest.param(100, id="fast"),
    pytest.param(300, id="slow", marks=pytest.mark.slow),
]


def ids_of(text, encoding=ENCODING):
    return encoding.encode(text, allowed_special="all")


def kept(ids, encoding=ENCODING):
    """The messages of sampled ids, as a chat keeps them: in a file too."""
    return json.loads(json.dumps(to_messages(parse(ids, encoding), keep_ids=True)))


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("encoding", [ENCODING, SMALL], ids=["whole", "cut"])
def test_what_was_parsed_renders_again(name, encoding):
    chat = CHATS[name]
    tools = chat.get("tools")
    if chat["messages"][-1]["role"] != "assistant":
        chat = {"messages": [*chat["messages"], {"role": "assistant", "content": "Yes."}]}
    *history, _ = chat["messages"]
    prompt = render_prompt(history, tools, tokenizer=encoding)
    tokens, _ = render(chat["messages"], tools, tokenizer=encoding)
    if tokens[: len(prompt)] != prompt:
        pytest.skip("the prompt drops analysis that the last turn keeps")
    messages = parse(tokens[len(prompt) :], encoding)
    for keep_ids in (False, True):
        again = to_messages(messages, keep_ids=keep_ids)
        assert render([*history, *again], tools, tokenizer=encoding)[0] == tokens


# Sampled turns: Harmony messages (channel, text) in any tokens, the last one final or broken off.


@st.composite
def sampled_turns(draw, encoding):
    """For each turn its messages, (channel, ids); the first has its `<|start|>` from the prompt."""
    special = functools.partial(special_id, encoding)
    out = []
    for _ in range(draw(st.integers(1, 4))):
        turn = []
        channels = draw(st.lists(st.sampled_from(["analysis", "commentary"]), max_size=3))
        for channel in [*channels, draw(st.sampled_from(["final", "final", "commentary"]))]:
            pieces = draw(st.lists(st.integers(0, 99), max_size=5))
            ids = [special("<|start|>"), *spelled(encoding, "assistant", pieces)] if turn else []
            ids += [special("<|channel|>"), *spelled(encoding, channel, pieces)]
            ids += [special("<|message|>"), *spelled(encoding, draw(words()), pieces)]
            turn.append((channel, [*ids, special("<|end|>")]))
        turn[-1][1].pop()
        if draw(st.booleans()):
            turn[-1][1].append(special("<|return|>"))
        out.append(turn)
    return out


def user_ids(encoding):
    start, message, end = (special_id(encoding, f"<|{n}|>") for n in ("start", "message", "end"))
    return [start, *encoding.encode("user"), message, *encoding.encode("hi"), end]


def expected_history(turns, head, encoding):
    """The ids between the system message and the next `<|start|>assistant`, put together by hand.

    Analysis is dropped before the first final answer, if the last turn ended in one.
    """
    special = functools.partial(special_id, encoding)
    flat = [channel for turn in turns for channel, _ in turn]
    drops = flat[-1] == "final"
    expected = []
    for turn in turns:
        expected += user_ids(encoding)
        for i, (channel, ids) in enumerate(turn):
            if drops and channel == "analysis":
                continue
            drops = drops and channel != "final"
            expected += ids if i else [*head, *ids]
            if i + 1 == len(turn):
                if ids[-1] == special("<|return|>"):
                    expected.pop()
                expected.append(special("<|end|>"))
    return expected + user_ids(encoding)


@pytest.mark.parametrize("examples", TIERS)
@pytest.mark.parametrize("encoding", [ENCODING, SMALL], ids=["whole", "cut"])
def test_histories_keep_sampled_ids(encoding, examples):
    prompt = render_prompt([USER], tokenizer=encoding)
    head = prompt[-1 - len(encoding.encode("assistant")) :]
    before = prompt[: -len(head) - len(user_ids(encoding))]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(sampled_turns(encoding))
    def body(turns):
        messages = []
        for turn in turns:
            messages.append(USER)
            ids = [i for _, ids in turn for i in ids]
            messages += kept(ids, encoding)
            tokens, weights = render(messages, tokenizer=encoding)
            assert tokens[-len(head) - len(ids) :] == head + ids
            assert weights[-len(head) - len(ids) :] == [0.0] * len(head) + [1.0] * len(ids)
        follow = render_prompt([*messages, USER], tokenizer=encoding)
        assert follow == before + expected_history(turns, head, encoding) + head

    body()


def test_tokens_that_no_tokenizer_gives_are_kept_and_without_ids_are_not():
    letters = [ENCODING.encode_single_token(c.encode()) for c in "hello world"]
    sampled = ids_of("<|channel|>final<|message|>") + letters + ids_of("<|return|>")
    prompt = render_prompt([USER])
    assert render([USER, *kept(sampled)])[0] == prompt + sampled
    plain = to_messages(parse(sampled))
    assert plain == [{"role": "assistant", "content": "hello world"}]
    assert len(render([USER, *plain])[0]) < len(prompt + sampled) - 5
    follow = render_prompt([USER, *kept(sampled), USER])
    assert follow[: len(prompt + sampled) - 1] == (prompt + sampled)[:-1]
    # Whoever edits a message's text takes the ids out.
    (message,) = kept(sampled)
    edited = {key: value for key, value in message.items() if key != "ids"} | {"content": "Bye"}
    assert "<|message|>Bye<|end|>" in decode(ENCODING, render_prompt([USER, edited, USER]))


def test_analysis_of_earlier_turns_is_dropped_with_its_ids():
    first = ids_of(
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4"
        "<|return|>"
    )
    call = ids_of(
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary"
        " to=functions.get_weather <|constrain|>json<|message|>{}<|call|>"
    )
    messages = [USER, *kept(first), USER]
    text = decode(ENCODING, render_prompt(messages))
    assert "Hm." not in text
    assert "<|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user" in text
    # While a call is under way nothing is dropped, as in Harmony.
    messages += [*kept(call), {"role": "tool", "content": "Rain."}]
    text = decode(ENCODING, render_prompt(messages, TOOLS))
    assert "Hm." in text
    assert "Look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather" in text
    # After the next answer the first turn's is gone, the second's not: as in Harmony too.
    messages += [*kept(ids_of("<|channel|>final<|message|>Wet.<|return|>")), USER]
    text = decode(ENCODING, render_prompt(messages, TOOLS))
    assert "Hm." not in text
    assert "Look." in text


def test_a_sampled_call_keeps_its_ids_in_the_history():
    sampled = ids_of(
        "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.get_weather <|constrain|>json<|message|>{"location":  "X"}<|call|>'
    )
    result = {"role": "tool", "content": "Rain."}
    prompt = render_prompt([USER], TOOLS)
    follow = render_prompt([USER, *kept(sampled), result], TOOLS)
    assert follow[: len(prompt) + len(sampled)] == prompt + sampled
    assert decode(ENCODING, follow[len(prompt) + len(sampled) :]) == (
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>Rain.<|end|>"
        "<|start|>assistant"
    )
    tokens, weights = render([USER, *kept(sampled)], TOOLS)
    assert tokens == prompt + sampled
    assert weights == [0.0] * len(prompt) + [1.0] * len(sampled)


def test_an_end_that_was_not_sampled_is_not_trained():
    sampled = ids_of("<|channel|>final<|message|>4")
    answer = {"role": "assistant", "content": "5"}
    tokens, weights = render([USER, *kept(sampled), USER, answer])
    assert "<|message|>4<|end|><|start|>user" in decode(ENCODING, tokens)
    begin = len(render_prompt([USER]))
    assert weights[begin : begin + len(sampled) + 1] == [1.0] * len(sampled) + [0.0]
    tokens, weights = render([USER, *kept(sampled)])  # nor taught to end here
    assert tokens[begin:] == sampled
    # A commentary that broke off, and then another turn: its <|start|>assistant is the prompt's.
    broken = ids_of("<|channel|>commentary<|message|>Wait")
    tokens, weights = render([USER, *kept(broken), *kept(sampled)])
    joint = begin + len(broken)
    assert decode(ENCODING, tokens[joint : joint + 3]) == "<|end|><|start|>assistant"
    assert weights[joint - 1 : joint + 4] == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_a_message_that_start_cut_short_goes_on_as_sampled():
    sampled = ids_of(
        "<|channel|>analysis<|message|>Hm<|start|>assistant<|channel|>commentary<|message|>So"
        "<|end|> stray<|start|>assistant<|channel|>commentary<|message|>4<|end|>"
    )
    prompt = render_prompt([USER])
    tokens, weights = render([USER, *kept(sampled)])
    assert tokens == prompt + sampled
    assert weights[len(prompt) :] == [1.0] * len(sampled)
    assert render_prompt([USER, *kept(sampled), USER])[: len(tokens)] == tokens


@pytest.mark.parametrize("encoding", [ENCODING, SMALL], ids=["whole", "cut"])
def test_a_message_shorter_than_a_header_has_its_end(encoding):
    sampled = ids_of("<|channel|>commentary<|message|>a<|end|><|start|><|end|>", encoding)
    prompt = render_prompt([USER, *kept(sampled, encoding), USER], tokenizer=encoding)
    assert "a<|end|><|start|><|end|><|start|>user<|message|>" in decode(encoding, prompt)


def test_a_start_right_after_the_prompt_is_kept():
    sampled = ids_of("<|start|>assistant<|channel|>final<|message|>4<|return|>")
    assert render([USER, *kept(sampled)])[0] == render_prompt([USER]) + sampled
    assert to_messages(parse(sampled)) == [{"role": "assistant", "content": "4"}]


def test_a_header_that_nobody_renders_keeps_its_ids():
    sampled = ids_of("<|message|>a<|end|><|start|> weird<|channel|>x<|message|>b<|end|>")
    assert kept(sampled)[1]["name"] == "weird"
    assert render_prompt([USER, *kept(sampled)])[-len(sampled) - 2 : -2] == sampled


def test_empty_analysis_is_not_lost():
    sampled = ids_of(
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>4"
        "<|return|>"
    )
    tokens, _ = render([USER, *to_messages(parse(sampled))])
    assert tokens == render_prompt([USER]) + sampled


# Tool calls and results.


@st.composite
def tool_chats(draw):
    """Chats in the form that `to_messages` gives, of one turn with calls, after others without."""
    some = words().filter(bool)
    values = st.none() | st.booleans() | st.integers() | words() | st.floats(allow_nan=False)
    arguments = st.dictionaries(words(), values | st.lists(values, max_size=2), max_size=3)
    call = st.fixed_dictionaries(
        {
            "name": st.sampled_from(["f", "get_weather", "g-2", "functions.a.b", "é"]),
            "arguments": arguments.map(functools.partial(json.dumps, ensure_ascii=False))
            | arguments.map(functools.partial(json.dumps, indent=1))
            | words(),
        },
        optional={"content_type": st.sampled_from([None, "json", "<|constrain|>", "code"])},
    )
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "developer", "content": draw(some)})
    for _ in range(draw(st.integers(0, 2))):
        messages.append({"role": "user", "content": draw(words())})
        messages.append({"role": "assistant", "content": draw(words())})
    messages.append({"role": "user", "content": draw(words())})
    for _ in range(draw(st.integers(0, 3))):
        calls = draw(st.lists(call, min_size=1, max_size=3))
        step = {"role": "assistant", "tool_calls": calls}
        for field in ("thinking", "content"):
            if draw(st.booleans()):
                step[field] = draw(some)
        messages.append(step)
        for made in calls:
            name = made["name"] if "." in made["name"] else f"functions.{made['name']}"
            messages.append({"role": "tool", "content": draw(words()), "name": name})
    if draw(st.booleans()):
        final = {"role": "assistant", "content": draw(words())}
        messages.append(final | draw(st.just({}) | st.builds(dict, thinking=some)))
    return messages, draw(st.sampled_from([TOOLS, TOOLS, None]))


@pytest.mark.parametrize("examples", TIERS)
def test_tool_calls_and_results_come_back(examples):
    # Half of them: each is rendered four times.
    @settings(max_examples=examples // 2, deadline=None, suppress_health_check=list(HealthCheck))
    @given(tool_chats())
    def body(chat):
        messages, tools = chat
        ids, _ = render(messages, tools)
        _, *parsed = parse(ids, after_prompt=False)  # all but the generated system message
        again = to_messages(parsed, tools=tools)
        if tools and messages[0]["role"] != "developer":
            assert again.pop(0) == {"role": "developer", "content": ""}  # of the tools alone
        assert again == messages
        assert render(again, tools)[0] == ids
        # Results answer the calls in their order, or by their names, or by their ids.
        nameless = [
            {k: v for k, v in m.items() if (m["role"], k) != ("tool", "name")} for m in messages
        ]
        assert render(nameless, tools)[0] == ids
        if HAS_ORACLE:
            training, completion = oracle(messages, tools, "medium", None)
            assert (ids, render_prompt(messages, tools)) == (training, completion)
            theirs = oracle_parse(ids)[1:]
            for message, (header, content) in zip(parsed, theirs, strict=True):
                assert (message.header, message.content) == (header, content)

    body()


def test_calls_of_one_turn_and_their_results_in_a_prompt():
    turn = {
        "role": "assistant",
        "thinking": "Both.",
        "content": "I look.",
        "tool_calls": [
            {"id": "1", "function": {"name": "get_weather", "arguments": '{"location":"A"}'}},
            {"id": "2", "function": {"name": "get_weather", "arguments": '{"location":"B"}'}},
            {"id": "3", "function": {"name": "get_location", "arguments": "{}"}},
        ],
    }
    results = [
        {"role": "tool", "content": "here", "tool_call_id": "3"},
        {"role": "tool", "content": "wet", "tool_call_id": "2"},
        {"role": "tool", "content": "dry"},
    ]
    prompt = render_prompt([USER, turn, *results], TOOLS)
    weather = "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json"
    location = "<|start|>assistant to=functions.get_location<|channel|>commentary <|constrain|>json"
    back = "to=assistant<|channel|>commentary<|message|>"
    assert decode(ENCODING, prompt).partition("<|start|>user")[2] == (
        "<|message|>hi<|end|><|start|>assistant<|channel|>analysis<|message|>Both.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f'{weather}<|message|>{{"location":"A"}}<|call|>'
        f'{weather}<|message|>{{"location":"B"}}<|call|>'
        f"{location}<|message|>{{}}<|call|>"
        f"<|start|>functions.get_location {back}here<|end|>"
        f"<|start|>functions.get_weather {back}wet<|end|>"
        f"<|start|>functions.get_weather {back}dry<|end|><|start|>assistant"
    )
    assert prompt.count(special_id(ENCODING, "<|call|>")) == 3
    _, _, _, *parsed = parse(prompt[:-2], after_prompt=False)
    plain = [{"name": c["function"]["name"], **c["function"]} for c in turn["tool_calls"]]
    assert to_messages(parsed)[0] == turn | {"tool_calls": plain}


def test_a_result_of_a_tool_that_is_no_function():
    call = ids_of("<|channel|>analysis to=python code<|message|>1+1<|call|>")
    first = {"role": "tool", "channel": "analysis", "content": "2"}
    second = first | {"name": "python"}  # of the same call: it is not functions.python
    text = decode(ENCODING, render_prompt([USER, *kept(call), first, second]))
    result = "<|start|>python to=assistant<|channel|>analysis<|message|>2<|end|>"
    assert text.endswith(f"<|call|>{result}{result}<|start|>assistant")
    function = {"role": "assistant", "tool_calls": [{"name": "python", "arguments": "{}"}]}
    text = decode(ENCODING, render_prompt([USER, function, second]))
    assert "<|call|><|start|>functions.python to=assistant" in text


def test_a_developers_own_text_on_tools_is_kept():
    by_hand = (
        "Be brief.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n} // namespace functions"
    )
    messages = [{"role": "developer", "content": by_hand}, USER]
    for tools in (None, TOOLS):
        _, *parsed = parse(render(messages, tools)[0], after_prompt=False)
        assert to_messages(parsed, tools=tools) == messages
