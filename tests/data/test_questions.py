"""Chats as questions: which, in what order, and how a stream of them goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from gptoss_jax import harmony
from gptoss_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from gptoss_jax.config.objective import GRPOConfig
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.questions import Questions
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

GRPO = GRPOConfig(group_size=3, max_tokens=5)


def config(file: str, *, seed: int = 0, grpo: GRPOConfig = GRPO, **data) -> Config:
    """Two questions a step; a prompt has some 190 tokens of this vocabulary."""
    data = {"sequence_length": 256, "batch_size": 6, "reasoning": "low", **data}
    return Config(
        model=ModelConfig(vocab_size=320, context=512),
        data=DataConfig(train=(file,), **data),
        objective=ObjectiveConfig(name="grpo", grpo=grpo),
        train=TrainConfig(seed=seed),
    )


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def chat(i: int, **more) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"count to {i}"},
            {"role": "assistant", "content": f"{i}!", "thinking": "so many"},
        ],
        **more,
    }


def rounds(questions: Questions, count: int) -> list[tuple[int, list[str]]]:
    return [
        (r.number, [q.where for q in r.questions]) for r in (next(questions) for _ in range(count))
    ]


def test_rounds_are_a_function_of_the_seed_and_go_on_from_any_step(tmp_path):
    file = write(tmp_path / "a.jsonl", [chat(i, key=i) for i in range(5)])
    c = config(file, grpo=dataclasses.replace(GRPO, updates=2), seed=3)
    whole = rounds(Questions(c), 12)
    assert [number for number, _ in whole] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    asked = [where for _, group in whole[::2] for where in group]
    assert sorted(asked[:5]) == sorted(asked[5:10]) and len(set(asked[:5])) == 5  # epochs
    for steps in range(5):
        some = Questions(c)
        before = [next(some) for _ in range(steps)]
        if steps % 2:
            before[-1].answers = {"rewards": [0.1]}
        state = json.loads(json.dumps(some.get_state()))
        again = Questions(c)
        again.set_state(state)
        assert again.get_state() == state
        following = next(again)
        assert (following.answers is not None) == bool(steps % 2)
        assert [(following.number, [q.where for q in following.questions])] == whole[steps:][:1]
        assert rounds(again, 4) == whole[steps + 1 : steps + 5]
    assert rounds(Questions(config(file, seed=4)), 6) != whole[::2]


def test_a_question_is_the_chat_before_the_answer(tmp_path):
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and now?"},
    ]
    file = write(tmp_path / "a.jsonl", [{"messages": history, "answer": [4]}, chat(3, key="k")])
    by_key = {q.where[-1]: q for q in next(Questions(config(file))).questions}
    encoding = tokenizer.get_tokenizer(320)
    open_ended, answered = by_key["1"], by_key["2"]
    assert open_ended.record == {"messages": history, "answer": [4]}
    assert open_ended.question == "and now?"
    want = harmony.render_prompt(history, reasoning="low", tokenizer=encoding)
    assert open_ended.prompt == want
    assert answered.record == chat(3, key="k")
    want = harmony.render_prompt(chat(3)["messages"][:1], reasoning="low", tokenizer=encoding)
    assert answered.prompt == want


def test_a_parquet_file_asks_as_a_jsonl_file_does(tmp_path):
    """With all fields, which a reward function may look at; but for those that are null."""
    records = [chat(i, key=i, solution={"sums": [i, 2.5], "unit": "m"}) for i in range(4)]
    records += [{**records[0], "key": None}]
    table = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(records), table, row_group_size=2)

    def asked(file: str) -> list:
        questions = Questions(config(file))
        return [q for _ in range(3) for q in next(questions).questions][:5]  # an epoch

    del records[4]["key"]
    lines = asked(write(tmp_path / "a.jsonl", records))
    for got, want in zip(asked(str(table)), lines, strict=True):
        assert (got.prompt, got.question, got.record) == (want.prompt, want.question, want.record)
    plain = dataclasses.replace(config(str(table)), objective=ObjectiveConfig())
    (record,) = {tuple(open_examples(plain).records[i].fields) for i in range(5)}
    assert record == ("messages",)  # what no one asks for is not read


def test_questions_that_do_not_fit_are_left_out_or_refused(tmp_path):
    long = {"messages": [{"role": "user", "content": "xy" * 80}]}
    file = write(tmp_path / "a.jsonl", [chat(1), long, chat(2)])
    asked = rounds(Questions(config(file)), 4)
    assert {where[-1] for _, group in asked for where in group} == {"1", "3"}
    with pytest.raises(UserError, match=r"a.jsonl:2: 3\d\d tokens and objective.grpo.max_tokens"):
        Questions(config(file, on_long="refuse"))  # before any round is asked
    with pytest.raises(UserError, match="has no question"):
        Questions(config(write(tmp_path / "b.jsonl", [long, long])))
    answer = {"messages": [{"role": "assistant", "content": "to nothing"}]}
    for name, bad in {"t": {"text": "so"}, "u": answer}.items():
        file = write(tmp_path / f"{name}.jsonl", [*map(chat, range(40)), bad])
        with pytest.raises(UserError, match=rf"{name}.jsonl:41: no chat with a question"):
            Questions(config(file))  # before any round is asked
    with pytest.raises(UserError, match="leaves no room"):
        Questions(
            config(
                write(tmp_path / "c.jsonl", [chat(1)]),
                grpo=dataclasses.replace(GRPO, max_tokens=256),
            )
        )
