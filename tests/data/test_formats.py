"""The formats of records: each is read as the chat that it is; what nobody reads is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gptoss_jax import harmony
from gptoss_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from gptoss_jax.data import describe
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.loader import eval_questions
from gptoss_jax.errors import UserError

Q, A = {"role": "user", "content": "sort 2 1"}, {"role": "assistant", "content": "1 2"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"name": "sort", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
CALL = {"name": "sort", "arguments": {"x": "2 1"}}

FORMATS = {
    "chat": ({"messages": [Q, A]}, [Q, A]),
    "prompt and completion": ({"prompt": "sort 2 1", "completion": "1 2"}, [Q, A]),
    "TRL's": ({"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, Q, A]),
    "a column system": ({"messages": [Q, A], "system": "Be brief."}, [SYSTEM, Q, A]),
    "a system that is there": ({"messages": [SYSTEM, Q, A], "system": "Be brief."}, [SYSTEM, Q, A]),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "sort 2 1", "weight": None},
                {"from": "gpt", "value": "1 2"},
            ]
        },
        [SYSTEM, Q, A],
    ),
    "ShareGPT's column system": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "sort 2 1"},
                {"from": "gpt", "value": "1 2"},
            ],
        },
        [SYSTEM, Q, A],
    ),
    "messages under conversations": ({"conversations": [Q, A]}, [Q, A]),
    "Alpaca": ({"instruction": "sort 2 1", "input": "", "output": "1 2"}, [Q, A]),
    "Alpaca with input": (
        {"instruction": "sort", "input": "2 1", "output": "1 2", "system": "Be brief."},
        [SYSTEM, {"role": "user", "content": "sort\n\n2 1"}, A],
    ),
    "Alpaca with history": (
        {"instruction": "sort 2 1", "output": "1 2", "history": [["sort 2 1", "1 2"]]},
        [Q, A, Q, A],
    ),
    "messages as JSON text": ({"messages": json.dumps([Q, A])}, [Q, A]),
    "a prompt as indented JSON": (
        {"prompt": json.dumps([SYSTEM, Q], indent=2), "completion": json.dumps([A])},
        [SYSTEM, Q, A],
    ),
    "ShareGPT's prompt": (
        {"prompt": [{"from": "human", "value": "sort 2 1"}], "completion": "1 2"},
        [Q, A],
    ),
    **{
        f"a completion that is JSON: {text}": (
            {"prompt": "sort 2 1", "completion": text},
            [Q, A | {"content": text}],
        )
        for text in ('[{"name": "Bob"}]', '[{"role": "user"}]', '[{"a": 1}] and more', '[{"a"')
    },
    "a prompt that is JSON": (
        {"prompt": '[{"n": 1}]', "completion": "x"},
        [Q | {"content": '[{"n": 1}]'}, A | {"content": "x"}],
    ),
    "an answer's columns": (
        {"prompt": "sort 2 1", "completion": "1 2", "thinking": "Hm.", "weight": 0.5},
        [Q, A | {"thinking": "Hm.", "weight": 0.5}],
    ),
    "Alpaca's columns of an answer": (
        {"instruction": "sort 2 1", "output": "1 2", "reasoning_content": "Hm.", "weight": 2},
        [Q, A | {"thinking": "Hm.", "weight": 2}],
    ),
    "what says nothing": (
        {"prompt": "sort 2 1", "completion": [A], "weight": 1, "thinking": "", "label": True},
        [Q, A],
    ),
}


def examples_of(folder: Path, *records, name: str = "a.jsonl", objective="sft", **options):
    path = folder / name
    text = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    path.write_text(text)
    config = Config(
        model=ModelConfig(vocab_size=201_088),
        data=DataConfig(train=(str(path),), sequence_length=512, **options),
        objective=ObjectiveConfig(name=objective),
    )
    return open_examples(config), config


@pytest.mark.parametrize(("record", "chat"), FORMATS.values(), ids=FORMATS)
def test_every_format_is_the_chat_that_it_is(record, chat, tmp_path):
    examples, _ = examples_of(tmp_path, {**record, "reasoning_effort": "high"})
    (segment,) = examples[0]
    tokens, weights = harmony.render(chat, reasoning="high")
    assert segment.tokens.tolist() == tokens
    if "prompt" in record or "history" not in record:
        assert segment.weights.tolist() == weights


def test_a_completion_alone_is_trained(tmp_path):
    prompt = [Q, A, Q]
    examples, _ = examples_of(tmp_path, {"prompt": prompt, "completion": [A]})
    (segment,) = examples[0]
    assert segment.weights.tolist() == harmony.render([*prompt, A], given=3)[1]


def test_calls_in_sharegpt(tmp_path):
    turns = [
        {"from": "human", "value": "sort 2 1"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "1 2"},
        {"from": "gpt", "value": "1 2"},
    ]
    examples, _ = examples_of(tmp_path, {"conversations": turns, "tools": json.dumps([TOOL])})
    ours = [
        Q,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "1 2"},
        A,
    ]
    assert examples[0][0].tokens.tolist() == harmony.render(ours, [TOOL])[0]


@pytest.mark.parametrize(
    "effort",
    [
        {"reasoning": "low"},
        {"reasoning_effort": "low"},
        {"chat_template_kwargs": {"reasoning_effort": "low"}},
        {"reasoning": "low", "reasoning_effort": "low"},
    ],
)
def test_the_reasoning_effort_has_several_names(effort, tmp_path):
    examples, _ = examples_of(tmp_path, {"messages": [Q, A], **effort})
    assert examples[0][0].tokens.tolist() == harmony.render([Q, A], reasoning="low")[0]


def nested(depth: int):
    return {"type": "object", "properties": {"a": nested(depth - 1)}} if depth else {}


CALLS = {"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "x"}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": [Q, A], "model_identity": "You are Bo."}, "model_identity would change"),
        ({"messages": [Q, A], "system_prompt": "Be brief."}, "system_prompt would change"),
        ({"messages": [SYSTEM, Q, A], "system": "Rhyme."}, "system message that differs"),
        ({"messages": [Q, A], "reasoning": "low", "reasoning_effort": "high"}, "several reasoning"),
        ({"messages": [Q, A], "tools": [TOOL], "functions": [TOOL]}, "tools and functions"),
        ({"messages": [Q, A], "chat_template_kwargs": {"date": "x"}}, "chat_template_kwargs.date"),
        ({"messages": [Q, A | {"score": 3}]}, "messages[1].score: no field of a message"),
        ({"messages": [Q, {"role": "assistant", "text": "1 2"}]}, "messages[1].text"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations[0].from is 'robot'"),
        ({"question": "x", "answer": "y"}, "its columns are question, answer (docs"),
        ({"prompt": "x"}, "its columns are prompt ("),
        ({"instruction": "x", "output": 3}, "output is a number: it must be text"),
        ({"messages": "no JSON"}, "messages is text, and not JSON"),
        (
            {"messages": [Q, A | {"content": "<|channel|>final"}]},
            "messages[1].content spells a spe",
        ),
        (
            {"messages": [Q | {"content": "a<|endoftext|>"}, A]},
            "messages[0].content spells a special",
        ),
        ({"text": "a<|endoftext|>b"}, "spells Harmony's special tokens"),
        ({"messages": [Q | {"name": "bob"}, A]}, "messages[0].name: only a tool has a name"),
        ({"messages": [Q, A | {"content": " "}]}, "messages[1].content is empty"),
        ({"messages": [Q, A | {"content": "", "thinking": "Hm"}]}, "messages[1].content is empty"),
        ({"prompt": "x", "completion": "", "response": "y"}, "messages[1].content is empty"),
        *(
            (record, f"(its messages are read from {columns})")
            for record, columns in (
                ({"prompt": "x", "completion": ""}, "prompt and completion"),
                ({"instruction": "x", "output": "<|end|>"}, "instruction and output"),
                ({"conversations": [{"from": "gpt", "value": 3}]}, "conversations"),
                ({"conversations": [Q, A | {"score": 3}]}, "conversations"),
            )
        ),
        (
            {"messages": [Q, CALLS, RESULT | {"tool_call_id": "2"}]},
            "messages[2].tool_call_id is '2'",
        ),
        ({"messages": [Q, A | {"thinking": "<|end|>"}]}, "messages[1].thinking spells a special"),
        ({"text": "<|start|>user<|message|>x"}, "spells Harmony's special tokens"),
        (
            {"messages": [Q, A], "tools": [TOOL | {"parameters": nested(350)}]},
            "nested too deeply to be read",
        ),
        (
            {"messages": [Q, A], "tools": [TOOL | {"description": "a<|end|>"}]},
            "tools[0].description spells a special token",
        ),
        (
            {
                "messages": [Q, A],
                "tools": [{"name": "f", "parameters": {"<|end|>": {"type": "x"}}}],
            },
            "tools[0].parameters (its key '<|end|>') spells a special token",
        ),
        ({"messages": [Q, A | {"name": "a b", "role": "tool"}]}, "it must be one word"),
        ({"messages": [Q, {"role": "tool", "content": "x"}]}, "no tool call before it"),
        ({"prompt": "x", "completion": "y", "label": False}, "label is false"),
        ({"messages": [Q, A], "label": False}, "label is false"),
        ({"messages": [Q, A], "weight": 0.5}, "weight is read beside an answer that is text"),
        ({"prompt": "x", "completion": "y", "weight": -1}, "messages[1].weight is -1"),
        ({"prompt": "x", "completion": [A], "weight": 2}, "has weight beside a completion of m"),
        ({"prompt": "x", "completion": [A], "thinking": "Hm."}, "has thinking beside a completion"),
        (
            {"prompt": "x", "completion": "y", "thinking": "a", "reasoning_content": "b"},
            "different texts in thinking and reasoning_content",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_line(record, named, tmp_path):
    with pytest.raises(UserError) as error:
        examples_of(tmp_path, {"messages": [Q, A]}, record)
    assert "a.jsonl:2: " in str(error.value) and named in str(error.value)
    examples, _ = examples_of(tmp_path, {"messages": [Q, A]}, record, on_bad_record="skip")
    assert len(examples) == 1 and examples.records.skipped == 1


def test_columns_that_nothing_reads_are_named_once(tmp_path):
    records = [{"messages": [Q, A], "id": i, "source": "web", "none": None} for i in range(3)]
    examples, config = examples_of(tmp_path, *records)
    assert examples.records.unused == {"id": 3, "source": 3}
    assert "columns not used: id, source" in describe(config)
    examples, config = examples_of(tmp_path, *records, ignore=("id", "source"))
    assert not examples.records.unused and "not used" not in describe(config)


def test_columns_of_a_chat_beside_a_text_are_named(tmp_path):
    beside = {"system": "Be brief.", "tools": [TOOL], "functions": [TOOL], "reasoning": "low"}
    beside |= {"weight": 0.5, "label": False, "thinking": "Hm."}
    beside |= {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}}
    examples, _ = examples_of(tmp_path, {"text": "plain", **beside})
    assert examples.records.unused == dict.fromkeys(beside, 1)


def test_a_question_s_record_may_be_rated_in_any_way(tmp_path):
    record = {"prompt": "x", "completion": "y", "label": False, "weight": "heavy"}
    examples, _ = examples_of(tmp_path, record | {"weight": 3}, objective="grpo")
    assert examples.records[0].columns["label"] is False


def test_a_key_of_messages_may_be_passed_over(tmp_path):
    record = {"messages": [Q, A | {"score": 3}]}
    examples, _ = examples_of(tmp_path, record, ignore=("messages.score",))
    assert examples[0][0].tokens.tolist() == harmony.render([Q, A])[0]


@pytest.mark.parametrize("nested", [True, False])
def test_a_key_of_tools_and_of_calls_may_be_passed_over(nested, tmp_path):
    def record(**more):
        call, tool = ({"function": x | more} if nested else x | more for x in (CALL, TOOL))
        answer = {"role": "assistant", "tool_calls": [call], "content": "x"}
        return {"messages": [Q, answer], "tools": json.dumps([tool])}

    (plain,) = examples_of(tmp_path, record())[0][0]
    with pytest.raises(UserError, match="score: no field of a tool"):
        examples_of(tmp_path, record(score=3), name="b.jsonl")
    ignore = ("tools.score", "tool_calls.score")
    (segment,) = examples_of(tmp_path, record(score=3), name="b.jsonl", ignore=ignore)[0][0]
    assert segment.tokens.tolist() == plain.tokens.tolist()


def test_a_rendered_chat_is_trained_as_a_chat_or_as_plain_text(tmp_path):
    tokens, weights = harmony.render([Q, A])
    encoding = harmony.tokenizer.get_tokenizer()
    text = encoding.decode(tokens)
    (segment,) = examples_of(tmp_path, {"text": text})[0][0]
    assert (segment.tokens.tolist(), segment.weights.tolist()) == (tokens, weights)
    (segment,) = examples_of(tmp_path, {"text": text}, plain_special_tokens=True)[0][0]
    assert segment.tokens[:-1].tolist() == encoding.encode_ordinary(text)
    assert segment.weights.all()
    turns, weights = harmony.render([Q, A, Q, A], turns="last")
    (segment,) = examples_of(tmp_path, {"text": encoding.decode(turns)}, turns="last")[0][0]
    assert (segment.tokens.tolist(), segment.weights.tolist()) == (turns, weights)
    spelled = {"messages": [Q, A | {"content": "<|end|>"}]}
    (segment,) = examples_of(tmp_path, spelled, plain_special_tokens=True)[0][0]
    assert segment.tokens.tolist() == harmony.render(spelled["messages"])[0]


def test_a_plain_file_that_spells_special_tokens_is_refused_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo <|channel|>\n")
    for plain in (False, True):
        data = DataConfig(train=(str(path),), sequence_length=64, plain_special_tokens=plain)
        config = Config(model=ModelConfig(vocab_size=201_088), data=data)
        if not plain:
            with pytest.raises(
                UserError, match=r"a\.txt:2: plain text that spells a special token"
            ):
                open_examples(config)
            continue
        ids = harmony.tokenizer.get_tokenizer().encode_ordinary(path.read_text())
        assert open_examples(config)[0][0].tokens[:-1].tolist() == ids


# --- Files -------------------------------------------------------------------------------------


def test_a_json_file_is_a_list_of_records(tmp_path):
    records = [{"messages": [Q, A]}, {"text": "Grüße [1, 2]"}, {"prompt": "x", "completion": "y"}]
    one, _ = examples_of(tmp_path, *records, name="a.json")
    other, _ = examples_of(tmp_path, *records)
    assert len(one) == 3
    for i in range(3):
        assert one.records[i].fields == other.records[i].fields
        assert one[i][0].tokens.tolist() == other[i][0].tokens.tolist()
    text = "\ufeff[\n" + ",\n\n".join(map(json.dumps, records)) + "\n]\n"
    (tmp_path / "b.json").write_text(text)
    config = DataConfig(train=(str(tmp_path / "b.json"),), sequence_length=512)
    examples = open_examples(Config(model=ModelConfig(vocab_size=201_088), data=config))
    assert [examples.records[i].fields for i in range(3)] == [
        one.records[i].fields for i in range(3)
    ]
    assert [examples.records.where(i)[-2:] for i in range(3)] == [":2", ":4", ":6"]


@pytest.mark.parametrize(
    "text",
    [
        *('{"messages": []}', '[{"text": "a"} {"text": "b"}]', '[{"text"'),
        *(f"[{'9' * 5_000}]", "[" * 100_000),
    ],
    ids=range(5),
)
def test_a_json_file_that_is_no_list_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    config = DataConfig(train=(str(tmp_path / "a.json"),))
    with pytest.raises(UserError, match=r"a\.json:1: not JSON"):
        open_examples(Config(data=config))


def test_parquet_rows_may_differ_in_format(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [Q, A], "text": None, "id": 1},
        {"messages": None, "text": "plain", "id": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    config = DataConfig(train=(str(tmp_path / "a.parquet"),), sequence_length=512)
    examples = open_examples(Config(model=ModelConfig(vocab_size=201_088), data=config))
    assert examples[0][0].tokens.tolist() == harmony.render([Q, A])[0]
    assert examples.records[1].fields == {"text": "plain"}
    assert set(examples.records.unused) == {"id"}


# --- Turns ---------------------------------------------------------------------------------------


def thought(text: str) -> dict[str, str]:
    return {"role": "assistant", "thinking": f"Hm {text}", "content": text}


CHAT = [Q, thought("one"), Q, thought("two"), Q, thought("three")]


def trained(segment) -> str:
    encoding = harmony.tokenizer.get_tokenizer()
    ids = [t for t, w in zip(segment.tokens.tolist(), segment.weights, strict=True) if w]
    return encoding.decode(ids)


def answer(text: str, end: str = "<|return|>") -> str:
    return (
        f"<|channel|>analysis<|message|>Hm {text}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{text}{end}"
    )


@pytest.mark.parametrize(
    ("history", "turns", "texts", "left"),
    [
        ("harmony", "all", [answer("two", "") + answer("three")], 1),
        ("template", "all", [answer("three")], 2),
        ("harmony", "last", [answer("three")], 0),
        ("template", "split", [answer("one"), answer("two"), answer("three")], 0),
        ("harmony", "split", [answer("one"), answer("two"), answer("three")], 0),
    ],
)
def test_which_turns_are_trained(history, turns, texts, left, tmp_path):
    options = {"history": history, "turns": turns}
    examples, config = examples_of(tmp_path, {"messages": CHAT}, **options)
    segments = examples[0]
    assert [trained(segment) for segment in segments] == texts
    assert examples.stats.turns == left
    assert ("not trained, as later turns" in describe(config)) == bool(left)
    # What is trained follows what the model is asked with.
    for segment, messages in zip(
        segments, ([Q], CHAT[:3], CHAT[:5])[-len(segments) :], strict=True
    ):
        prompt = harmony.render_prompt(messages, history=history)
        assert segment.tokens[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("role", ["developer", "system"])
def test_a_turn_that_is_split_off_ends_with_its_answer(role, tmp_path):
    between = {"role": role, "content": "Rhyme."}
    chat = [*CHAT[:2], between, *CHAT[2:4], between]
    examples, _ = examples_of(tmp_path, {"messages": chat}, turns="split")
    assert [trained(segment) for segment in examples[0]] == [answer("one"), answer("two")]
    assert examples[0][1].tokens.tolist() == harmony.render(chat[:5], turns="last")[0]


def test_what_a_prompt_keeps_of_the_history():
    encoding = harmony.tokenizer.get_tokenizer()
    call = {"role": "assistant", "thinking": "Hm call", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "1 2"}

    def kept(messages, history):
        text = encoding.decode(harmony.render_prompt(messages, history=history))
        return [word for word in ("one", "two", "call") if f"Hm {word}" in text]

    asked = CHAT[:4]
    assert kept([*asked, Q], "harmony") == ["two"]
    assert kept([*asked, Q], "template") == []
    assert kept([*asked, Q, call, result], "harmony") == ["one", "two", "call"]
    assert kept([*asked, Q, call, result], "template") == ["call"]


def test_only_turns_that_would_be_trained_are_counted(tmp_path):
    def turns(record, **options):
        objective = "dpo" if "chosen" in record else "sft"
        return examples_of(tmp_path, record, objective=objective, **options)[0].stats.turns

    assert turns({"messages": CHAT}) == 1
    assert turns({"prompt": CHAT[:4], "completion": CHAT[4:]}) == 0  # the prompt is not trained
    answer = [*CHAT[1:4], {"role": "assistant", "content": "other"}]
    assert turns({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": answer}) == 2
    assert turns({"prompt": CHAT[:5], "chosen": CHAT[5:], "rejected": answer[3:]}) == 0


def test_an_end_of_text_that_is_spelled_is_the_end_that_each_text_gets(tmp_path):
    spelled, plain = {"text": "one two<|endoftext|>"}, {"text": "one two"}
    (segment,) = examples_of(tmp_path, spelled)[0][0]
    (expected,) = examples_of(tmp_path, plain, name="b.jsonl")[0][0]
    assert segment.tokens.tolist() == expected.tokens.tolist()
    meant = examples_of(tmp_path, spelled, name="c.jsonl", plain_special_tokens=True)[0]
    assert len(meant[0][0].tokens) > len(expected.tokens)


def test_names_and_recipients_that_say_nothing(tmp_path):
    chat = [Q | {"name": "user"}, A | {"recipient": "all"}]
    (segment,) = examples_of(tmp_path, {"messages": chat})[0][0]
    assert segment.tokens.tolist() == harmony.render([Q, A])[0]
    named = [Q | {"name": "bob"}, CALLS, RESULT | {"name": "f"}, A]
    options = {"name": "b.jsonl", "ignore": ("messages.name",)}
    (segment,) = examples_of(tmp_path, {"messages": named}, **options)[0][0]
    assert segment.tokens.tolist() == harmony.render([Q, *named[1:]])[0]
    # An answer of no weight is not trained, so it may be empty.
    examples_of(tmp_path, {"messages": [Q, A | {"content": "", "weight": 0}, Q, A]})


def test_the_date_of_a_record_is_read_where_the_config_says_so(tmp_path):
    dated = [{"messages": [Q, A], "date": "2025-06-28"}, {"messages": [Q, A], "date": None}]
    dated.append({"prompt": "sort 2 1", "completion": "1 2", "date": "2024-02-29"})

    encoding = harmony.tokenizer.get_tokenizer()

    def headers(**options) -> list[bool]:
        examples, _ = examples_of(tmp_path, *dated, **options)
        texts = [encoding.decode(examples[i][0].tokens.tolist()) for i in range(3)]
        days = [f"Current date: {record['date'] or ''}" for record in dated]
        return [day in text for day, text in zip(days, texts, strict=True)]

    assert headers(date="record") == [True, False, True]
    assert headers() == [False] * 3
    fixed, _ = examples_of(tmp_path, *dated, date="2031-02-03")
    whole = harmony.render([Q, A], date="2031-02-03")[0]
    assert fixed[1][0].tokens.tolist() == whole
    assert fixed.records.unused["date"] == 2
    with pytest.raises(UserError, match=r"a\.jsonl:1: date is '28 June'.*YYYY-MM-DD"):
        examples_of(tmp_path, {"messages": [Q, A], "date": "28 June"}, date="record")
    _, config = examples_of(tmp_path, *dated[:2], date="record")
    data = dataclasses.replace(config.data, held_out=config.data.train)
    asked = eval_questions(dataclasses.replace(config, data=data), 2)
    prompts = {encoding.decode(question.prompt) for question in asked}
    assert len(prompts) == 2 and sum("Current date: 2025-06-28" in p for p in prompts) == 1
