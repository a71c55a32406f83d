"""The sample command: what it prints, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gptoss_jax import harmony, sample, weights
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.harmony.tokenizer import get_tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.sampler import Sampled, Sampler
from gptoss_jax.sampler.printing import print_channels

CONFIG = ModelConfig(
    vocab_size=1024,
    num_layers=2,
    d_model=32,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    num_experts=5,
    active_experts=3,
    d_expert=64,
    window=8,
    context=512,
    dtype="float32",
    param_dtype="float32",
)
ENCODING = get_tokenizer(CONFIG.vocab_size)
PROMPT = "sort 3 1 2"


@pytest.fixture(scope="module")
def model_and_params():
    model = Transformer(CONFIG)
    random = np.random.default_rng(1)

    def leaf(path, x):
        return jnp.asarray(random.normal(size=x.shape) * 0.1 + ("norm" in str(path)), x.dtype)

    return model, jax.tree_util.tree_map_with_path(leaf, model.abstract_params())


@pytest.fixture(scope="module")
def folder(model_and_params, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "model"
    weights.save(path, *model_and_params)
    return path


def run(capsys, *argv: str) -> tuple[str, str]:
    sample.main(list(argv))
    return capsys.readouterr()


def special(name: str) -> int:
    return ENCODING.encode_single_token(name)


@pytest.mark.parametrize(
    "options",
    [[], ["--temperature", "0.9", "--top-p", "0.8", "--top-k", "50", "--seed", "3"]],
    ids=["greedy", "drawn"],
)
def test_json_is_one_object_with_what_the_sampler_gives(
    model_and_params, folder, capsys, options: list[str]
):
    out, _ = run(
        capsys, "--checkpoint", str(folder), "--prompt", PROMPT, "--max-tokens", "12",
        "--reasoning", "low", "--developer", "Be brief.", "--json", *options,
    )  # fmt: skip
    answer = json.loads(out)
    assert out.count("\n") == 1
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": PROMPT},
    ]
    ids = harmony.render_prompt(messages, reasoning="low", tokenizer=ENCODING)
    rules = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 3} if options else {}
    expected = Sampler(*model_and_params).generate([ids], max_tokens=12, **rules)
    assert answer["prompt_ids"] == ids
    assert answer["ids"] == expected.tokens[0]
    np.testing.assert_allclose(answer["logprobs"], expected.logprobs[0], atol=1e-5)
    assert answer["text"] == ENCODING.decode(expected.tokens[0])
    assert answer["tokens_per_second"] > 0
    assert [message["role"] for message in answer["messages"]]


@pytest.mark.parametrize("channel", ["commentary", "analysis"])
def test_json_has_the_calls_of_the_tools_and_says_what_was_irregular(channel: str):
    text = f"<|channel|>{channel} to=functions.a.b <|constrain|>json<|message|>{{}}<|call|>"
    ids = ENCODING.encode(text, allowed_special="all")
    out = SimpleNamespace(tokens=[ids], logprobs=[[]], tokens_per_second=1.0)
    sampler: Any = SimpleNamespace(generate=lambda *args, **options: out)
    chat = {"messages": CHAT, "tools": [{"name": "a.b"}]}
    answer = sample._answer(sampler, [], {}, encoding=ENCODING, chat=chat)
    calls = [{"name": "a.b", "arguments": "{}"}]
    assert answer["messages"] == [{"role": "assistant", "tool_calls": calls}]
    assert answer["irregular"] is (channel == "analysis")


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "weather in Oslo?"}]},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Look.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
]


@pytest.mark.parametrize("apart", [True, False], ids=["two files", "a record"])
def test_messages_and_tools_are_read_from_files(folder, capsys, tmp_path, apart: bool):
    """In OpenAI's dialect; a record says its reasoning effort, too, unless the option does."""
    record = CHAT if apart else {"messages": CHAT, "tools": TOOLS, "reasoning_effort": "high"}
    (tmp_path / "chat.json").write_text(json.dumps(record))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    given = ["--checkpoint", str(folder), "--max-tokens", "1", "--json"]
    given += ["--messages", str(tmp_path / "chat.json")]
    given += ["--tools", str(tmp_path / "tools.json")] if apart else []
    effort = "medium" if apart else "high"
    for options, reasoning in [([], effort), (["--reasoning", "low"], "low")]:
        out, _ = run(capsys, *given, *options)
        want = harmony.render_prompt(CHAT, TOOLS, reasoning=reasoning, tokenizer=ENCODING)
        assert json.loads(out)["prompt_ids"] == want
    text = ENCODING.decode(want)
    assert "namespace functions" in text and "rain" in text and "Be brief." in text


def test_a_prompt_may_have_tools(folder, capsys, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps({"tools": TOOLS}))
    given = ["--checkpoint", str(folder), "--max-tokens", "1", "--json", "--prompt", PROMPT]
    out, _ = run(capsys, *given, "--tools", str(tmp_path / "tools.json"))
    chat = [{"role": "user", "content": PROMPT}]
    assert json.loads(out)["prompt_ids"] == harmony.render_prompt(chat, TOOLS, tokenizer=ENCODING)


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("chat", "options", "named"),
    [
        ("[{", "", "chat.json:1: not JSON"),
        ('{"messages": []}\n{"messages": []}', "", "chat.json:2: not JSON (Extra data"),
        ("3", "", "chat.json: no chat: give a list of messages"),
        ({"text": "once"}, "", "chat.json: a text, and no chat"),
        ({"question": "x"}, "", "chat.json: lacks messages"),
        ([], "", "chat.json: messages is empty"),
        ([{**USER, "mood": "good"}], "", "chat.json: messages[0].mood: no field of a message"),
        ([USER, {"role": "assistant", "content": "y"}], "", "ends with a message of the assistant"),
        ({"messages": [USER], "tools": TOOLS}, "--tools TOOLS", "has tools, and"),
        ([USER], "--tools CHAT", "chat.json: tools[0]"),
        ([USER], "--tools none.json", "none.json: can't be read (No such file"),
        ([USER], "--prompt x", "--prompt: not allowed with argument --messages"),
        (CHAT, "--developer y", "has instructions, and --developer others"),
        ([USER], "--tools NAMELESS", "nameless.json: tools[0]"),
        (None, "--prompt x --tools NAMELESS", "nameless.json: tools[0]"),
    ],
)
def test_a_bad_chat_is_refused_before_the_model_is_read(chat, options, named, tmp_path):
    """In a line with the file's name; none advises an option that `sample` lacks."""
    file, tools = tmp_path / "chat.json", tmp_path / "tools.json"
    nameless = tmp_path / "nameless.json"
    file.write_text(chat if isinstance(chat, str) else json.dumps(chat))
    tools.write_text(json.dumps(TOOLS))
    nameless.write_text(json.dumps([{"type": "function", "function": {"parameters": {}}}]))
    for name, path in (("TOOLS", tools), ("CHAT", file), ("NAMELESS", nameless)):
        options = options.replace(name, str(path))
    messages = [] if chat is None else ["--messages", str(file)]
    with pytest.raises(UserError) as caught:
        sample.main(["--checkpoint", "nowhere", *messages, *options.split()])
    said = str(caught.value)
    assert named in said and "\n" not in said and "data.ignore" not in said


def test_raw_text_and_ids_are_continued_as_they_are(folder, capsys):
    ids = ENCODING.encode_ordinary("roses are")
    given = ["--checkpoint", str(folder), "--max-tokens", "12"]
    as_text, _ = run(capsys, *given, "--prompt", "roses are", "--raw", "--json")
    as_ids, _ = run(capsys, *given, "--prompt-ids", ",".join(map(str, ids)), "--json")
    one, other = json.loads(as_text), json.loads(as_ids)
    assert one["prompt_ids"] == ids
    assert one["ids"] == other["ids"]
    assert "messages" not in one
    shown, said = run(capsys, *given, "--prompt", "roses are", "--raw")
    assert shown == one["text"] + "\n"
    assert said.startswith("12 tokens, ")


def test_a_chat_is_printed_and_counted(folder, capsys):
    shown, said = run(capsys, "--checkpoint", str(folder), "--prompt", PROMPT, "--max-tokens", "12")
    assert shown.strip()
    assert said.startswith("12 tokens, ")


def test_channels_are_printed_apart(capsys):
    ids = [
        special("<|channel|>"), *ENCODING.encode_ordinary("analysis"), special("<|message|>"),
        *ENCODING.encode_ordinary("three, naïve [b]2[/b]"), special("<|end|>"),
        special("<|start|>"), *ENCODING.encode_ordinary("assistant"), special("<|channel|>"),
        *ENCODING.encode_ordinary("final"), special("<|message|>"),
        *ENCODING.encode_ordinary("1 2 3"), special("<|return|>"),
    ]  # fmt: skip
    console = Console(
        force_terminal=True, color_system="standard", markup=False, highlight=False, width=20
    )
    stream = [Sampled(token, -1.0) for token in ids]
    parser = print_channels(console, stream, encoding=ENCODING)
    out = capsys.readouterr().out
    assert "[analysis]" in out
    assert "\x1b[2m" in out  # dim
    assert out.endswith("\n1 2 3\n")  # as it is
    plain = Console(markup=False, highlight=False, width=20)
    print_channels(plain, stream, encoding=ENCODING)
    assert capsys.readouterr().out == "[analysis]\nthree, naïve [b]2[/b]\n1 2 3\n"
    assert [message.content for message in parser.messages] == ["three, naïve [b]2[/b]", "1 2 3"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--prompt", "x"], "--checkpoint"),
        (["--checkpoint", "DIR"], "--prompt"),
        (["--checkpoint", "DIR", "--prompt", "x", "--prompt-ids", "1"], "--prompt-ids"),
        (["--checkpoint", "DIR", "--prompt-ids", "1,b"], "--prompt-ids is '1,b'"),
        (["--checkpoint", "DIR", "--prompt-ids", "1,1024"], "id 1024"),
        (["--checkpoint", "DIR", "--prompt-ids", "1", "--raw"], "--raw"),
        (["--checkpoint", "DIR", "--prompt", "x", "--raw", "--system", "y"], "--developer"),
        (["--checkpoint", "DIR", "--prompt", "x", "--raw", "--tools", "y"], "--tools"),
        (["--checkpoint", "DIR", "--prompt", "x", "--raw", "--reasoning", "low"], "--reasoning is"),
        (["--checkpoint", "DIR", "--prompt-ids", "1", "--reasoning", "low"], "--reasoning is"),
        (["--checkpoint", "DIR", "--prompt", "", "--raw"], "prompt 0 is empty"),
        (["--checkpoint", "DIR", "--prompt", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["--checkpoint", "DIR", "--prompt", "x", "--top-k", "0"], "top_k is 0"),
        (["--checkpoint", "DIR", "--prompt", "x", "--temperature", "warm"], "--temperature"),
        (["--checkpoint", "DIR", "--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["--checkpoint", "DIR", "--prompt", "x", "--max-tokens", "999"], "model.context"),
        (["--checkpoint", "DIR", "--prompt", "x", "--reasoning", "vast"], "--reasoning"),
        (["--checkpoint", "DIR", "--prompt", "x", "--dtype", "int8"], "--dtype"),
        (["--checkpoint", "DIR", "--prompt", "x", "--temprature", "1"], "--temprature"),
        (["--checkpoint", "no/such/folder", "--prompt", "x"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder, capsys, monkeypatch, argv: list[str], named: str
):
    argv = [str(folder) if word == "DIR" else word for word in argv]
    monkeypatch.setattr(sys, "argv", ["sample", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_entry(sample.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert named in err
