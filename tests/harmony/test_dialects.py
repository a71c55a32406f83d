"""Messages and tools as other programs write them: each renders as ours does, or is refused."""

from __future__ import annotations

import json

import pytest

from gptoss_jax import harmony
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.dialects import read_tools

ASKED = {"role": "user", "content": "How warm is it?"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Tell it.", "parameters": CITY}


def refused(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return str(error.value)


# --- Messages --------------------------------------------------------------------------------

CALL = {"name": "weather", "arguments": {"city": "Rome"}}
OURS = {"role": "assistant", "thinking": "I guess.", "content": "20 degrees"}
SAME = {
    "vLLM's and DeepSeek's thinking": (
        {"role": "assistant", "reasoning_content": "I guess.", "content": "20 degrees"},
        OURS,
    ),
    "OpenRouter's thinking": (
        {"role": "assistant", "reasoning": "I guess.", "content": "20 degrees"},
        OURS,
    ),
    "the same twice": (OURS | {"reasoning_content": "I guess.", "reasoning": ""}, OURS),
    "parts": (
        OURS | {"content": [{"type": "text", "text": "20 "}, {"type": "text", "text": "degrees"}]},
        OURS,
    ),
    "a server's answer": (
        OURS
        | {"id": "x", "refusal": None, "audio": None, "annotations": [], "function_call": None}
        | {"tool_calls": [], "name": None, "logprobs": None, "finish_reason": "stop"},
        OURS,
    ),
    "a null struct": (
        OURS | {"function_call": {}, "audio": {"id": None, "data": {"x": None}}},
        OURS,
    ),
    "a null call": (OURS | {"function_call": {"name": None, "arguments": None}}, OURS),
    "parts with keys that say nothing": (
        OURS
        | {
            "content": [
                {"type": "text", "text": "20 ", "cache_control": {"type": "x"}, "id": "1"},
                {"text": "degrees", "annotations": [], "image_url": {"url": None}, "more": ""},
            ]
        },
        OURS,
    ),
    "a refusal": (
        {"role": "assistant", "content": None, "refusal": "I can't."},
        {"role": "assistant", "content": "I can't."},
    ),
    "no thinking": (OURS | {"thinking": ""}, {"role": "assistant", "content": "20 degrees"}),
    "a call of before": (
        {"role": "assistant", "content": None, "function_call": CALL},
        {"role": "assistant", "tool_calls": [CALL]},
    ),
    "a call with nulls": (
        {"role": "assistant", "tool_calls": [{"id": None, "type": "function", "function": CALL}]},
        {"role": "assistant", "tool_calls": [CALL]},
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), SAME.values(), ids=SAME)
def test_a_message_of_another_dialect_renders_as_ours(theirs, ours):
    for tools in (None, [TOOL]):
        rendered = harmony.render([ASKED, theirs], tools)
        assert rendered == harmony.render([ASKED, ours], tools)
        assert any(rendered[1])


def test_a_result_of_a_function_is_a_tool_s():
    made = {"role": "assistant", "function_call": CALL}
    theirs = [ASKED, made, {"role": "function", "name": "weather", "content": "20"}]
    ours = [ASKED, made, {"role": "tool", "name": "weather", "content": "20"}]
    assert harmony.render_prompt(theirs) == harmony.render_prompt(ours)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"text": "20"}, "messages[1].text: no field of a message"),
        ({"response": "20", "content": "x"}, "messages[1].response: no field of a message"),
        ({"content": "x", "audio": {"id": "1"}}, "messages[1].audio: no field of a message"),
        (OURS | {"reasoning": "Other."}, "different texts in thinking and reasoning"),
        ({"content": "x", "reasoning": {"text": "y"}}, "messages[1].reasoning is an object"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "is a part of type 'image_url'"),
        ({"content": ["x"]}, "messages[1].content[0] is text"),
        ({"content": [{"text": "x", "thinking": "y"}]}, "messages[1].content[0].thinking: no fi"),
        ({"content": "x", "refusal": "y"}, "messages[1].refusal: no field of a message"),
        ({"tool_calls": [CALL], "function_call": CALL}, "tool_calls and function_call"),
        ({"tool_calls": [CALL | {"result": "20"}]}, "messages[1].tool_calls[0].result: no field"),
        ({"content": "x", "weight": -1}, "messages[1].weight is -1"),
        ({"content": "x", "weight": "0"}, "messages[1].weight is '0'"),
    ],
)
def test_what_nobody_reads_is_refused(message, named):
    messages = [ASKED, {"role": "assistant", **message}]
    for function in (harmony.render, harmony.render_prompt, harmony.check):
        assert named in refused(function, messages)


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "1", **CALL}, {"id": "2", "name": "wind", "arguments": {}}],
}


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (("2", "1"), ("wind", "weather")),
        (("1", "2"), ("weather", "wind")),
        (("msg-1", "msg-2"), ("weather", "wind")),
        (({"x": 1}, 5), ("weather", "wind")),
    ],
)
def test_a_result_s_id_is_that_of_its_call_if_one_has_it(ids, named):
    def rendered(key, values):
        results = [
            {"role": "tool", "content": v, key: v_id} for v, v_id in zip("xy", values, strict=True)
        ]
        chat = [ASKED, CALLED, *results]
        read = harmony.read_messages(chat)
        assert harmony.render_prompt(read) == harmony.render_prompt(chat)
        return harmony.render_prompt(chat)

    assert rendered("id", ids) == rendered("name", named)


def test_a_key_may_be_passed_over():
    kept = harmony.read_messages([ASKED | {"stars": 5}], ignore=["stars"])
    assert kept == [ASKED]


def test_a_message_s_weight_multiplies_its_role_s():
    bad = {"role": "assistant", "content": "30 degrees", "weight": 0}
    chat = [ASKED, bad, {"role": "user", "content": "No."}, OURS]
    tokens, weights = harmony.render(chat, train_on=["assistant=2"])
    plain = [ASKED, {**bad, "weight": 1}, {"role": "user", "content": "No."}, OURS]
    same, more = harmony.render(plain, train_on=["assistant=2"])
    assert tokens == same and len(set(weights)) == 2
    first = next(i for i, w in enumerate(more) if w)
    left = [w for w in more if w]
    kept = [w for w in weights if w]
    assert weights[first] == 0 and more[first] == 2
    assert kept == left[len(left) - len(kept) :] and len(kept) < len(left)
    halved = harmony.render([ASKED, {**OURS, "weight": 0.5}])[1]
    assert set(halved) == {0.0, 0.5}


# --- Tools -----------------------------------------------------------------------------------

DIALECTS = {
    "OpenAI": {"type": "function", "function": {**TOOL, "strict": True}},
    "Responses": {"type": "function", **TOOL, "strict": None},
    "MCP": {"name": "weather", "description": "Tell it.", "inputSchema": CITY, "annotations": {}}
    | {"_meta": {"x": 1}, "icons": [{"src": "x"}]},
    "Anthropic": {"name": "weather", "description": "Tell it.", "input_schema": CITY},
    "JSON text": {**TOOL, "parameters": json.dumps(CITY)},
    "Gorilla": {**TOOL, "parameters": {**CITY, "type": "dict"}},
    "by name": {**TOOL, "parameters": {"city": {"type": "str"}}},
    "no type": {**TOOL, "parameters": {k: v for k, v in CITY.items() if k != "type"}},
    "Gemini": {
        **TOOL,
        "parameters": {**CITY, "type": "OBJECT", "properties": {"city": {"type": "STRING"}}},
    },
    "by name, with required": {
        **TOOL,
        "parameters": {"$schema": "x", "city": {"type": "string"}, "required": ["city"]},
    },
    "properties as JSON text": {
        **TOOL,
        "parameters": {**CITY, "properties": json.dumps(CITY["properties"])},
    },
    "properties as a list": {
        **TOOL,
        "parameters": {
            "type": "object",
            "properties": [{"name": "city", "type": "string", "required": True}],
        },
    },
    "nulls": {
        **TOOL,
        "parameters": {
            **CITY,
            "properties": {
                "city": {"type": "string", "enum": None, "items": None, "default": None},
                "unit": None,
            },
        },
    },
}


@pytest.mark.parametrize("tool", DIALECTS.values(), ids=DIALECTS)
def test_a_tool_of_another_dialect_renders_as_ours(tool):
    assert harmony.render([ASKED], [tool]) == harmony.render([ASKED], [TOOL])
    assert harmony.render([ASKED], json.dumps([tool])) == harmony.render([ASKED], [TOOL])


def test_parameters_by_name_say_which_are_needed():
    (tool,) = read_tools(
        [
            {
                "name": "f",
                "parameters": {
                    "a": {"type": "int", "description": "One."},
                    "b": {"type": "str, optional"},
                    "c": {"type": "float", "default": 2.5},
                    "d": {"type": "list", "items": {"type": "dict"}, "required": False},
                },
            }
        ]
    )
    assert tool["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "One."},
            "b": {"type": "string"},
            "c": {"type": "number", "default": 2.5},
            "d": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["a"],
    }


@pytest.mark.parametrize("name", ["type", "items", "description", "default", "title", "enum"])
def test_a_parameter_may_have_the_name_of_a_schema_s_key(name):
    parameters = {name: {"type": "string"}, "city": {"type": "string"}}
    (tool,) = read_tools([{**TOOL, "parameters": parameters}])
    assert tool["parameters"] == {
        "type": "object",
        "properties": parameters,
        "required": [name, "city"],
    }


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_types_and_properties_are_read_at_every_depth(depth):
    def around(inner):
        for _ in range(depth):
            array = {"type": "array", "items": {"type": "object", "properties": {"a": inner}}}
            inner = {"type": "object", "properties": {"in": array}}
        return {**TOOL, "parameters": inner}

    theirs = {"required": ["city"], "properties": json.dumps({"city": {"type": ["STR", "Null"]}})}
    ours = {**CITY, "properties": {"city": {"type": ["string", "null"]}}}
    assert harmony.render([ASKED], [around(theirs)]) == harmony.render([ASKED], [around(ours)])
    for lost in ({"type": "string"}, "string", {"x": {"type": "string"}}):
        for beside in ({"type": "object"}, {"type": "OBJECT", "properties": {}}):
            tool = around({**beside, "city": lost})
            assert "has 'city' beside its type" in refused(harmony.render, [ASKED], [tool])
    for name in ("title", "type"):
        lost = around({"properties": {"y": {name: {"type": "string"}}}})
        assert f"has {name!r} beside" in refused(harmony.render, [ASKED], [lost])


def test_a_default_may_be_null_but_not_what_a_table_fills_in():
    def parameters(**more):
        properties = {"default": {"type": "string", "default": None}, "b": {"default": 3, **more}}
        (tool,) = read_tools([{**TOOL, "parameters": {"properties": properties, "title": "x"}}])
        return tool["parameters"]["properties"]

    assert parameters() == {
        "default": {"type": "string", "default": None},
        "b": {"default": 3},
    }
    assert parameters(type=None) == {"default": {"type": "string"}, "b": {"default": 3}}


@pytest.mark.parametrize(
    ("tool", "named"),
    [
        ({**TOOL, "params": CITY}, "tools[0].params: no field of a tool"),
        ({**TOOL, "input_schema": CITY}, "tools[0] has parameters and input_schema"),
        ({"type": "web_search"}, "tools[0].type is 'web_search'"),
        ({"function": TOOL, "body": 1}, "tools[0].body: no field of a tool"),
        ({**TOOL, "parameters": ["city"]}, "tools[0].parameters is no JSON schema"),
        ({**TOOL, "parameters": "a city"}, "tools[0].parameters is text, and not JSON"),
        ({**TOOL, "parameters": {"city": "string"}}, "tools[0].parameters.city is no JSON schema"),
        ({**TOOL, "parameters": {"properties": {"city": "string"}}}, "properties.city is no JSON"),
        ({**TOOL, "parameters": {"title": "Of a book"}}, "tools[0].parameters.title is no JSON sc"),
        ({**TOOL, "parameters": {"properties": ["city"]}}, "properties[0] is no JSON schema with"),
        ({**TOOL, "parameters": {"properties": "city"}}, "properties is text, and not JSON"),
        (
            {**TOOL, "parameters": {"type": "object", "city": {"type": "string"}}},
            "tools[0].parameters has 'city' beside its type",
        ),
    ],
)
def test_tools_whose_meaning_is_not_clear_are_refused(tool, named):
    assert named in refused(harmony.render, [ASKED], [tool])


@pytest.mark.parametrize("name", ["geometry.area", "functions.area"])
def test_what_is_declared_is_a_function_with_a_dot_in_its_name_too(name):
    tools = [{"name": name, "parameters": {"type": "object", "properties": {}}}]
    chat = [
        ASKED,
        {"role": "assistant", "tool_calls": [{"name": name, "arguments": {}}]},
        {"role": "tool", "name": name, "content": "4"},
    ]
    tokens = harmony.render_prompt(chat, tools)
    text = harmony.tokenizer.get_tokenizer().decode(tokens)
    assert f"assistant to=functions.{name}<|channel|>" in text
    assert f"<|start|>functions.{name} to=assistant" in text or f"functions.{name}<|" in text
    # And it is read back by that name.
    parsed = harmony.parse(tokens, after_prompt=False)
    back = harmony.to_messages(parsed[:-1], tools=tools)
    (call,) = next(m for m in back if "tool_calls" in m)["tool_calls"]
    assert call["name"] == name
    assert harmony.render_prompt([m for m in back if m["role"] != "system"], tools) == tokens


def test_arguments_that_are_null_stay_only_where_they_are_declared():
    tool = {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": ["string", "null"]},
                "b": {"type": "object", "properties": {"c": {"type": "string"}}},
            },
        },
    }
    arguments = {"a": None, "b": {"c": None, "x": None}, "city": None}
    call = {"name": "find", "arguments": arguments}
    written = {"name": "find", "arguments": '{"a": null, "b": {"c": null}}'}
    chat, ours = ([ASKED, {"role": "assistant", "tool_calls": [one]}] for one in (call, written))
    assert harmony.render(chat, [tool]) == harmony.render(ours, [tool])
    bare = [ASKED, {"role": "assistant", "tool_calls": [{**written, "arguments": '{"b": {}}'}]}]
    assert harmony.render(chat) == harmony.render(bare)


# --- Texts that are chats ----------------------------------------------------------------------


def decode(tokens) -> str:
    return harmony.tokenizer.get_tokenizer().decode(tokens)


RENDERED = {
    "turns": ([ASKED, {"role": "assistant", "content": "20"}, ASKED, OURS], None),
    "a call": ([ASKED, {"role": "assistant", "thinking": "Ask.", "tool_calls": [CALL]}], [TOOL]),
    "a result": (
        [
            ASKED,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "20"},
            OURS,
        ],
        [TOOL],
    ),
}


@pytest.mark.parametrize("train_on", [["assistant"], ["assistant/final=0.5", "user"]])
@pytest.mark.parametrize(("chat", "tools"), RENDERED.values(), ids=RENDERED)
def test_a_text_that_is_a_whole_rendering_is_that_chat(chat, tools, train_on):
    tokens, weights = harmony.render(chat, tools, train_on=train_on)
    assert harmony.read_rendering(decode(tokens), train_on=train_on) == (tokens, weights)


def test_a_final_answer_at_the_end_is_the_end_of_the_turn():
    tokens, weights = harmony.render([ASKED, OURS])
    text = decode(tokens).removesuffix("<|return|>")
    assert harmony.read_rendering(f"{text}<|end|>\n") == (tokens, weights)


def test_only_the_last_turn_of_a_rendering_is_trained_if_that_is_asked_for():
    tokens, weights = harmony.render(*RENDERED["turns"], turns="last")
    assert harmony.read_rendering(decode(tokens), turns="last") == (tokens, weights)
    assert harmony.read_rendering(decode(tokens))[1] != weights


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("assistantfinal<|message|>4<|return|>", "header"),
        ("assistant<|channel|>final<|channel|>final<|message|>4<|return|>", "header"),
        ("assistant<|start|>assistant<|channel|>final<|message|>4<|return|>", "header"),
        ("assistant<|channel|>final<|message|> <|return|>", "empty"),
        ("assistant<|message|><|return|>", "empty"),
        ("assistant<|channel|>final<|message|>4<|endoftext|><|return|>", "special token"),
        ("assistant<|channel|>final<|message|>4<|channel|>5<|return|>", "special token"),
        ("assistant<|channel|>final<|endoftext|><|message|>4<|return|>", "special token"),
        ("assistant<|endoftext|><|channel|>final<|message|>4<|return|>", "special token"),
    ],
)
def test_a_rendering_that_would_teach_a_broken_answer_is_refused(answer, message):
    text = f"<|start|>user<|message|>hi<|end|><|start|>{answer}"
    assert message in refused(harmony.read_rendering, text)


@pytest.mark.parametrize(
    "text",
    [
        "<|start|>user<|message|>hi",
        "hi <|start|>user<|message|>hi<|end|>",
        "<|start|>user<|message|>hi<|end|> and more",
        "<|start|>user hi<|end|>",
        "About <|channel|> and others",
    ],
)
def test_a_text_that_is_no_whole_rendering_is_refused(text):
    assert "special tokens" in refused(harmony.read_rendering, text)
