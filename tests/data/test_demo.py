"""The demo chats: true, new in the held-out set, and the same from the same seed."""

import json
import subprocess
import sys

import pytest

from gptoss_jax.data import demo
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import render
from gptoss_jax.harmony.tokenizer import get_tokenizer


def read(name):
    return [json.loads(line) for line in (demo.FOLDER / name).read_text().splitlines()]


def pairs(records):
    for record in records:
        messages = record["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            yield question["content"], answer["content"]


def test_the_shipped_files_are_what_the_seed_gives(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "gptoss_jax.data.demo", str(tmp_path / "new")],
        check=True,
        capture_output=True,
    )
    size = 0
    for name in ("train.jsonl", "held_out.jsonl", "pairs.jsonl", "pairs_held_out.jsonl"):
        shipped = (demo.FOLDER / name).read_bytes()
        assert (tmp_path / "new" / name).read_bytes() == shipped
        size += len(shipped)
    assert size < 1_000_000


def test_answers_are_the_sorted_questions():
    for name in ("train.jsonl", "held_out.jsonl"):
        for question, answer in pairs(read(name)):
            word, *digits = question.split(" ")
            assert word == "sort"
            assert len(digits) in demo.LENGTHS
            assert answer == " ".join(sorted(digits))


def test_no_held_out_answer_is_in_the_training_set():
    held = [answer for _, answer in pairs(read("held_out.jsonl"))]
    assert len(held) == len(set(held)) == demo.HELD_OUT
    assert not set(held) & {answer for _, answer in pairs(read("train.jsonl"))}


def test_seed_and_count_decide():
    train, held = demo.generate(5, 30, held_out=7)
    assert demo.generate(5, 30, held_out=7) == (train, held)
    assert (len(train), len(held)) == (30, 7)
    assert demo.generate(6, 30, held_out=7)[0] != train
    assert demo.generate(5, 20, held_out=7) == (train[:20], held)
    with pytest.raises(UserError, match="negative"):
        demo.generate(5, -1)


def test_pairs_are_a_sorted_answer_and_the_same_digits_in_another_order():
    sets = [read(name) for name in ("pairs.jsonl", "pairs_held_out.jsonl")]
    for record in (*sets[0], *sets[1]):
        (question,) = record["prompt"]
        digits = sorted(question["content"].removeprefix("sort ").split(" "))
        assert record["chosen"] == " ".join(digits) != record["rejected"]
        assert sorted(record["rejected"].split(" ")) == digits
    answers = [record["chosen"] for record in (*sets[0], *sets[1])]
    assert len(set(answers)) == len(answers) > 900  # so none of the held-out is in training
    assert len(sets[1]) == demo.PAIRS_HELD_OUT


def test_chats_fit_the_tiny_models_context():
    tokenizer = get_tokenizer(1024)
    longest = 0
    for record in read("train.jsonl"):
        tokens, weights = render(record["messages"], reasoning="low", tokenizer=tokenizer)
        longest = max(longest, len(tokens))
        assert sum(weights) > 0
        assert record["reasoning"] == "low"
    assert 200 < longest <= 512
