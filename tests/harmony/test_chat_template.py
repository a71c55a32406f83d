"""The exported chat template, in the Jinja engines that serve models, against our own renderer.

Jinja2 runs in transformers and vLLM, minijinja in mistral.rs and Text Generation Inference,
@huggingface/jinja in transformers.js. The template keeps to what llama.cpp's own engine and minja
have too: see the list of what it may use below.
"""

import copy
import datetime
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from harmony_cases import CHATS, SCHEMAS, oracle_encoding

from gptoss_jax import harmony
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

WHOLE = tokenizer.get_tokenizer()
TODAY = "2031-02-03"
HISTORIES = ("harmony", "template")
USER = {"role": "user", "content": "hi"}


def _tools(*names):
    return [{"type": "function", "function": {"name": name, "description": "d"}} for name in names]


def _declares(name, **properties):
    schema = {"type": "object", "properties": properties}
    return [{"type": "function", "function": {"name": name, "parameters": schema}}]


def _call(call_id, name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def _calls(*calls, **fields):
    return {"role": "assistant", "content": "", "tool_calls": list(calls)} | fields


def _result(content, **fields):
    return {"role": "tool", "content": content} | fields


# Text that engines escape in different ways, and values that they space and sort differently.
ODD = {"z": [1, {"y": [], "x": {}, "w": True}], "a": "a'b<c>&\\u003c\\ \"é\t\r\n</s>"}
MORE_CHATS = {
    "dotted": (
        [
            USER,
            _calls(_call("a", "geometry.area", **ODD)),
            _result("4", tool_call_id="a"),
            _calls(_call("b", "browser.open", id=1)),
            _result("5", name="browser.open"),
            _calls(_call("c", "geometry.area"), thinking="Again."),
            _result("6", name="geometry.area"),
        ],
        _tools("geometry.area"),
    ),
    "results out of order": (
        [
            USER,
            _calls(_call("a", "f", x=1), _call("b", "g", x=True), _call("c", "f"), thinking="t"),
            _result("3", tool_call_id="c"),
            _result("2", tool_call_id="b"),
            _result("1", tool_call_id="a"),
        ],
        _tools("f", "g"),
    ),
    "results by name, then in order": (
        [
            USER,
            _calls(_call("a", "f"), _call("b", "g", x=2.5)),
            _result("2", name="g"),
            _result("1"),
        ],
        _tools("f", "g"),
    ),
    "equal messages": (
        [USER, {"role": "assistant", "content": "Yes.", "thinking": "t"}] * 3 + [USER],
        None,
    ),
    "reasoning_content": (
        [USER, {"role": "assistant", "content": "4", "reasoning_content": "Sum."}],
        None,
    ),
    "names that are also methods": (
        [
            USER,
            _calls(_call("a", "f", items=[1], keys={}, values=2, get="x", length=3, pop=[])),
            _result("1"),
        ],
        _declares("f", **{name: {"type": "string"} for name in ("items", "keys", "values", "get")}),
    ),
    "properties without a type": (
        [USER],
        [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "parameters": {"properties": {"a": {"properties": {"b": {"type": "string"}}}}},
                },
            }
        ],
    ),
    "nulls": (
        [USER, _calls(_call("a", "f", x=None, y=None, z=1)), _result("1")],
        _declares("f", x={"type": "string"}, w=None),
    ),
    "parts": (
        [
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "!"}],
            },
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "refusal": "No."},
            USER,
        ],
        None,
    ),
    "analysis of a tool": (
        [
            USER,
            {
                "role": "assistant",
                "content": "1+1",
                "channel": "analysis",
                "recipient": "python",
                "content_type": "code",
            },
            _result("2", name="python.run", channel="analysis"),
            {"role": "assistant", "content": "2"},
            USER,
        ],
        None,
    ),
}


def _schemas():
    for name, schema in SCHEMAS.items():
        schema = copy.deepcopy(schema)
        if name == "scalars":  # two numbers that each language writes in its own way
            del schema["properties"]["b"], schema["properties"]["h"]
        function = {"name": "f", "description": "A\r\nB\n\nC\n", "parameters": schema}
        yield f"schema {name}", [USER], [{"type": "function", "function": function}]


@cache
def cases():
    """Return (rule, variables of the template, expected ids) of each case."""
    chats = [(n, c["messages"], c.get("tools")) for n, c in CHATS.items() if n != "special text"]
    chats += [(name, *chat) for name, chat in MORE_CHATS.items()] + list(_schemas())
    found = []
    for history in HISTORIES:
        for i, (name, messages, tools) in enumerate(chats):
            effort, date = ("low", "medium", "high")[i % 3], (None, "2025-06-28")[i % 2]
            identity, known = (None, "I am {é}.")[i % 2], ((), ("python", "browser"))[i % 2]
            options = {"history": history, "identity": identity, "builtin_tools": known}
            given = {"messages": messages, "tools": tools, "reasoning_effort": effort}
            given |= {"date": date, "model_identity": identity, "builtin_tools": list(known)}
            given = {key: value for key, value in given.items() if value is not None}
            prompt = harmony.render_prompt(messages, tools, effort, date, **options)
            whole, _ = harmony.render(messages, tools, effort, date, **options)
            found.append((name, history, given | {"add_generation_prompt": True}, prompt))
            found.append((name, history, given | {"add_generation_prompt": False}, whole))
    return found


def check(render):
    """Compare what `render(rule, variables)` returns for each case, and its errors."""
    wrong = []
    for name, history, given, expected in cases():
        text = render(history, given)
        if WHOLE.encode(text, allowed_special="all") != expected:
            wrong.append(f"{name}, {history}: {text!r}, not {tokenizer.decode(WHOLE, expected)!r}")
    assert len(cases()) > 100
    assert not wrong, "\n".join(wrong[:3])


def templates():
    rules = {history: harmony.chat_template(history=history) for history in HISTORIES}
    return rules | {day: harmony.chat_template(date=day) for day in ("today", "2024-01-31")}


def _raise(message):
    raise ValueError(message)


def _hf_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)


@cache
def jinja2_environment(*, like_transformers):
    jinja2 = pytest.importorskip("jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, loader=jinja2.DictLoader(templates())
    )
    if like_transformers:
        environment.filters["tojson"] = _hf_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda _: TODAY}
    return environment


@pytest.mark.parametrize("like_transformers", [True, False])
def test_jinja2(like_transformers):
    environment = jinja2_environment(like_transformers=like_transformers)
    check(lambda rule, given: environment.get_template(rule).render(**given))


def test_minijinja():
    minijinja = pytest.importorskip("minijinja")
    environment = minijinja.Environment(
        templates=templates(), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.add_function("raise_exception", _raise)
    check(lambda rule, given: environment.render_template(rule, **given))


_JAVASCRIPT = """
let jinja;
try { jinja = require("@huggingface/jinja") } catch { process.exit(3) }
const {templates, cases} = JSON.parse(require("fs").readFileSync(0, "utf8"));
const parsed = {};
for (const [name, text] of Object.entries(templates)) parsed[name] = new jinja.Template(text);
console.log(JSON.stringify(cases.map(([rule, given]) => parsed[rule].render(given))));
"""


def test_huggingface_jinja_of_javascript():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    given = [(rule, variables) for _, rule, variables, _ in cases()]
    result = subprocess.run(
        [node, "--input-type=commonjs", "-e", _JAVASCRIPT],
        input=json.dumps({"templates": templates(), "cases": given}),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    if result.returncode == 3:
        pytest.skip("npm install @huggingface/jinja, here or in a folder that NODE_PATH names")
    assert result.returncode == 0, result.stderr
    texts = iter(json.loads(result.stdout))
    check(lambda rule, variables: next(texts))


def test_the_template_uses_only_what_every_engine_has():
    """Checked by hand in llama.cpp's engine and in minja; a new name needs the same check."""
    text = re.sub(r"\{#.*?#\}", "", harmony.chat_template(), flags=re.DOTALL)
    code = "\n".join(re.findall(r"\{[%{](.*?)[%}]\}", text, flags=re.DOTALL))
    code = re.sub(r'"(\\.|[^"\\])*"|\'(\\.|[^\'\\])*\'', "''", code)
    assert set(re.findall(r"\.(\w+)\(", code)) == {"replace", "split"}
    assert set(re.findall(r"\|\s*(\w+)", code)) == {"tojson"}
    tests = {"defined", "sequence", "string", "mapping", "true", "none"}
    assert set(re.findall(r"\bis (?:not )?(\w+)", code)) == tests
    loops = {"first", "last", "index", "index0"}
    assert set(re.findall(r"\bloop\.(\w+)", code)) == loops
    assert not re.search(r"\bfor .* if ", code)


def test_the_date_follows_the_rule_of_the_run():
    environment = jinja2_environment(like_transformers=True)

    def dated(rule, **given):
        text = environment.get_template(rule).render(messages=[USER], **given)
        found = re.search(r"Current date: (.*)\n", text)
        return found and found[1]

    assert dated("harmony") is None and dated("harmony", date="2020-02-02") == "2020-02-02"
    assert dated("today") == TODAY and dated("today", date="2020-02-02") == "2020-02-02"
    assert dated("2024-01-31") == "2024-01-31" and dated("today", date="") is None


def test_a_result_without_a_call_and_an_unknown_role_are_refused():
    environment = jinja2_environment(like_transformers=True)
    for messages, why in (
        ([USER, _result("4")], "no call awaits"),
        ([USER, _calls(_call("a", "f")), _result("4", tool_call_id="b")], "no call awaits"),
        ([{"role": "critic", "content": "x"}], "unknown role: critic"),
    ):
        with pytest.raises(ValueError, match=why):
            environment.get_template("harmony").render(messages=messages)


@pytest.mark.parametrize("builtin_tools", [[], ["python"], ["browser"], ["python", "browser"]])
@pytest.mark.parametrize("identity", [None, "", "I am {é}."])
def test_the_system_message_is_that_of_openai_harmony(builtin_tools, identity):
    from openai_harmony import Conversation, Message, Role, SystemContent

    system = SystemContent.new()
    if identity is not None:
        system = system.with_model_identity(identity)
    for name in builtin_tools:
        system = system.with_python_tool() if name == "python" else system.with_browser_tool()
    date = str(datetime.date(2025, 6, 28))
    system = system.with_conversation_start_date(date)
    theirs = oracle_encoding().render_conversation_for_completion(
        Conversation.from_messages(
            [
                Message.from_role_and_content(Role.SYSTEM, system),
                Message.from_role_and_content(Role.USER, "hi"),
            ]
        ),
        Role.ASSISTANT,
    )
    options = {"identity": identity, "builtin_tools": builtin_tools}
    assert harmony.render_prompt([USER], date=date, **options) == theirs
    assert harmony.render([USER], date=date, **options)[0] == theirs[:-2]


def test_a_built_in_tool_that_is_none_is_refused():
    with pytest.raises(UserError, match="builtin_tools has 'shell': it takes browser, python"):
        harmony.render_prompt([USER], builtin_tools=["shell"])
    with pytest.raises(UserError, match="history is 'none'"):
        harmony.chat_template(history="none")
