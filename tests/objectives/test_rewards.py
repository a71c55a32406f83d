"""Reward functions: what is taken for one, what they are given, and what happens if they fail."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.objectives.reinforcement import rewards

SUMS = Path(__file__).parents[2] / "configs" / "rewards" / "sums.py"


def reward_file(folder: Path, body: str) -> str:
    file = folder / "judge.py"
    file.write_text(body)
    os.utime(file, ns=(1, hash(body) % 10**9))  # a file is run again when its time changes
    return str(file)


@pytest.mark.parametrize(
    ("spec", "body", "message"),
    [
        (None, "", "is not given"),
        ("gone.py", "", "there is no file gone.py"),
        ("judge.txt", "", "it is FILE.py"),
        ("judge.py", "def other(a, r): return 1", "no function 'reward'; it has other"),
        ("judge.py:best", "def reward(a, r): return 1", "no function 'best'; it has reward"),
        ("judge.py", "x = 1\nimport nothing_of_that_name", r"No module.*judge.py:2\)"),
        ("judge.py", "raise SystemExit(3)", "can't be run: SystemExit"),
    ],
)
def test_what_is_no_reward_function_is_refused(tmp_path, monkeypatch, spec, body, message):
    reward_file(tmp_path, body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        rewards.load(spec)


def an_answer(**more):
    fields = {"final": "7", "analysis": "", "text": "", "messages": [], "tokens": []}
    return rewards.Answer(**{**fields, "finished": True, "question": "3 + 4", **more})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\n    return record['lost']", r"KeyError: 'lost' \(.*judge.py:3\)"),
        ("return float('nan')", "reward returned nan, which is no finite number"),
        ("return float('inf')", "reward returned inf"),
        ("return None", "returned None"),
        ("return '1'", "returned '1'"),
        ("return [1.0]", "returned"),
        ("return 10 ** 400", "no finite number"),
        ("raise SystemExit", "SystemExit"),
        ("import asyncio\n    raise asyncio.CancelledError", "CancelledError"),
    ],
)
def test_a_reward_that_fails_names_the_prompt(tmp_path, body, message):
    file = reward_file(tmp_path, f"def reward(answer, record):\n    {body}\n")
    with pytest.raises(UserError, match=message) as error:
        rewards.score(rewards.load(file), an_answer(), {}, where="sums.jsonl:8")
    assert str(error.value).startswith("sums.jsonl:8: the reward of an answer to '3 + 4': ")
    assert "\n" not in str(error.value)


def test_numbers_of_many_kinds_are_rewards(tmp_path):
    body = "import numpy\ndef reward(a, r): return r['x'] if r['x'] else numpy.float32(0.5)\n"
    function = rewards.load(reward_file(tmp_path, body))
    for given, want in ((True, 1.0), (-2, -2.0), (0.25, 0.25), (None, 0.5)):
        assert rewards.score(function, an_answer(), {"x": given}, where="f:1") == want


def test_an_answer_says_what_was_irregular_and_calls_the_tools_of_its_chat():
    encoding = tokenizer.get_tokenizer(1024)
    for function, irregular in (("f", False), ("functions.f", False), ("functions.f", True)):
        text = f"<|channel|>{'analysis' if irregular else 'commentary'} to={function}"
        ids = encoding.encode(
            text + " <|constrain|>json<|message|>{}<|call|>", allowed_special="all"
        )
        answer = rewards.read_answer(
            ids,
            question="",
            encoding=encoding,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
        call = {"name": "f", "arguments": "{}"}
        assert answer.messages == [{"role": "assistant", "tool_calls": [call]}]
        assert answer.irregular is irregular


def test_an_answer_is_read_by_its_channels():
    encoding = tokenizer.get_tokenizer(1024)
    text = "<|channel|>analysis<|message|>3 and 4<|end|><|start|>assistant<|channel|>final"
    ids = encoding.encode(text + "<|message|> 7 <|return|>", allowed_special="all")
    whole = rewards.read_answer(ids, question="3 + 4", encoding=encoding)
    assert (whole.final, whole.analysis, whole.finished) == ("7", "3 and 4", True)
    assert whole.text == text + "<|message|> 7 <|return|>" and whole.tokens == ids
    assert whole.messages == [{"role": "assistant", "content": " 7 ", "thinking": "3 and 4"}]
    cut = rewards.read_answer(ids[:6], question="", encoding=encoding)
    assert cut.final is None and not cut.finished
    assert rewards.read_answer([], question="", encoding=encoding).final is None
    judge = rewards.load(str(SUMS))
    record = {"messages": [{"role": "assistant", "content": "7"}]}
    assert judge(whole, record) == 1 and judge(cut, record) == 0
    assert judge(dataclasses.replace(whole, finished=False), record) == 0
