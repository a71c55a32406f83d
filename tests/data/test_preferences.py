"""Pairs: their formats, what of them is trained, how they share rows, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from gptoss_jax import data
from gptoss_jax.config import Config, DataConfig, ModelConfig, ObjectiveConfig, TrainConfig
from gptoss_jax.data import preferences, show
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.packing import Segment, fill
from gptoss_jax.data.windows import Windows
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

VOCAB, T = 700, 960
ADVICE = "; fix it, or set data.on_bad_record=skip to leave out bad records"
FIELDS = ("tokens", "targets", "weights", "segment_ids", "positions")


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def make_config(file, *, held_out=(), objective="dpo", seed=0, **options):
    options = {"sequence_length": T, "batch_size": 4, "pack_window": 8, **options}
    return Config(
        model=ModelConfig(vocab_size=VOCAB),
        data=DataConfig(train=(str(file),), held_out=tuple(map(str, held_out)), **options),
        train=TrainConfig(seed=seed, eval_max_tokens=8),
        objective=ObjectiveConfig(name=objective),
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def split_text(segment):
    """Return the text of a segment, what is trained in brackets."""
    return str(show._segment(*[x.tolist() for x in segment], ENCODING, plain=True))


def shared(message):
    """Return a message in ShareGPT's dialect."""
    return {"from": "human" if message["role"] == "user" else "gpt", "value": message["content"]}


ENCODING = tokenizer.get_tokenizer(VOCAB)
PROMPT = [user("1+1?"), said("2"), user("And 2+2?")]
HEAD = "<|start|>user<|message|>1+1?<|end|><|start|>assistant<|channel|>final<|message|>2<|end|>"
HEAD += "<|start|>user<|message|>And 2+2?<|end|><|start|>assistant"
FORMATS = {
    "messages": {"prompt": PROMPT, "chosen": [said("4")], "rejected": [said("5")]},
    "the name messages": {"messages": PROMPT, "chosen": [said("4")], "rejected": [said("5")]},
    "one message": {"prompt": PROMPT, "chosen": said("4"), "rejected": said("5")},
    "texts": {"prompt": PROMPT, "chosen": "4", "rejected": "5"},
    "whole chats": {"chosen": [*PROMPT, said("4")], "rejected": [*PROMPT, said("5")]},
    "whole chats and a prompt": {
        "prompt": "1+1?",
        "chosen": [*PROMPT, said("4")],
        "rejected": [*PROMPT, said("5")],
    },
    "UltraFeedback's columns": {
        "prompt": "1+1?",
        "messages": [*PROMPT, said("4")],
        "chosen": [*PROMPT, said("4")],
        "rejected": [*PROMPT, said("5")],
    },
    "the same prompt twice": {"prompt": PROMPT, "messages": PROMPT, "chosen": "4", "rejected": "5"},
    "JSON text": {
        "chosen": json.dumps([*PROMPT, said("4")]),
        "rejected": json.dumps([*PROMPT, said("5")], indent=1),
    },
    "ShareGPT": {
        "prompt": [*map(shared, PROMPT)],
        "chosen": [shared(said("4"))],
        "rejected": shared(said("5")),
    },
    "ShareGPT's whole chats": {
        "chosen": [*map(shared, [*PROMPT, said("4")])],
        "rejected": [*map(shared, [*PROMPT, said("5")])],
    },
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_format_gives_the_same_two_segments(tmp_path, name, suffix):
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write(file, [FORMATS[name]])
    else:
        parquet.write_table(pa.Table.from_pylist([FORMATS[name]]), file)
    chosen, rejected = open_examples(make_config(file))[0]
    for segment, answer in ((chosen, "4"), (rejected, "5")):
        text = split_text(segment)
        # Of the answer alone, not of the assistant's words in the prompt.
        assert text.endswith(HEAD + f"[[<|channel|>final<|message|>{answer}<|return|>]]")
        assert text.count("[[") == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_column_system_is_before_the_prompt_of_every_format(tmp_path, name):
    record = {**FORMATS[name], "system": "Be brief."}
    sides = open_examples(make_config(write(tmp_path / "a.jsonl", [record])))[0]
    for segment, answer in zip(sides, "45", strict=True):
        text = split_text(segment)
        assert text.count("# Instructions\n\nBe brief.<|end|>" + HEAD) == 1
        assert text.endswith(f"[[<|channel|>final<|message|>{answer}<|return|>]]")


@pytest.mark.parametrize("text", ['[{"role": "user", "content": "x"}]', '[{"n": 1}]'])
def test_an_answer_may_be_text_that_is_json(tmp_path, text):
    record = {"prompt": "2+2?", "chosen": text, "rejected": "5", "label": False}
    chosen, _ = open_examples(make_config(write(tmp_path / "a.jsonl", [record])))[0]
    assert f"final<|message|>{text}<|return|>]]" in split_text(chosen)


def test_texts_alone_are_a_question_and_answers(tmp_path):
    record = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    pair = preferences.split(record)
    assert pair == ([user("2+2?")], [said("4")], [said("5")])


def test_answers_may_think_call_tools_and_have_turns(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    record = {
        "prompt": [user("Go.")],
        "chosen": [call, {"role": "tool", "content": "1"}, said("One.", thinking="Hm.")],
        "rejected": [said("No.", thinking="Nah."), user("Do!"), said("Ok.")],
        "tools": [{"name": "f", "description": "Do it."}],
        "reasoning": "high",
    }
    file = write(tmp_path / "a.jsonl", [record])
    options = {"train_on": ("assistant", "assistant/analysis=0.25")}
    chosen, rejected = map(split_text, open_examples(make_config(file, **options))[0])
    start = "<|start|>user<|message|>Go.<|end|><|start|>assistant"
    assert "Reasoning: high" in chosen and "Do it." in chosen and "Do it." in rejected
    assert chosen.endswith(
        start + "[[ to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>]]"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>1<|end|>"
        "<|start|>assistant[0.25[<|channel|>analysis<|message|>Hm.<|end|>]]"
        "[[<|start|>assistant<|channel|>final<|message|>One.<|return|>]]"
    )
    assert rejected.endswith(  # analysis of earlier turns is dropped, and they are not trained
        start + "<|channel|>final<|message|>No.<|end|><|start|>user<|message|>Do!<|end|>"
        "<|start|>assistant[[<|channel|>final<|message|>Ok.<|return|>]]"
    )


@pytest.fixture
def pairs(tmp_path):
    """29 pairs of answers of uneven lengths."""
    rows = [
        {"prompt": f"say {i}", "chosen": f"{i} " * (i % 7 + 1), "rejected": f"no {i} " * (i % 3)}
        for i in range(29)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def test_a_pair_is_two_neighbours_of_a_row(pairs):
    config = make_config(pairs)
    examples = open_examples(config)
    expected = {str(examples[i][0].tokens.tolist()): i for i in range(29)}
    windows = Windows(examples, seed=0)
    rows = [row for w in range(windows.per_round) for row in windows[w]]
    seen = []
    for row in rows:
        assert len(row) % 2 == 0 and sum(len(s.tokens) for s in row) <= T
        for k in range(0, len(row), 2):
            i = expected[str(row[k].tokens.tolist())]
            seen.append(i)
            for got, want in zip(row[k : k + 2], examples[i], strict=True):
                np.testing.assert_array_equal(got.tokens, want.tokens)
    assert sorted(seen) == list(range(29)) and max(map(len, rows)) > 2


def test_batches_resume_and_are_the_same_on_any_number_of_hosts(pairs):
    config = make_config(pairs)
    batches, states, whole = data.train_batches(config), [], []
    for _ in range(7):
        states.append(json.loads(json.dumps(batches.get_state())))
        whole.append(next(batches))
    batches.close()
    for batch in whole:
        assert (batch.segment_ids.max(1) % 2 == 0).all()
    resumed = data.train_batches(config, rows=(1, 3))
    resumed.set_state(states[4])
    for want in whole[4:]:
        got = next(resumed)
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field)[1:3])
    resumed.close()


def test_held_out_pairs_are_questions_with_the_chosen_answer(pairs):
    config = make_config(pairs, held_out=(pairs,))
    (first, *rest) = data.eval_batches(config)
    assert sum(int(b.segment_ids.max(1).sum()) for b in (first, *rest)) == 2 * 29
    questions = data.eval_questions(config, 3)
    for q in questions:
        i = int(q.name.rpartition(":")[2]) - 1
        assert q.answer == f"{i} " * (i % 7 + 1)
        assert ENCODING.decode(q.prompt).endswith(f"say {i}<|end|><|start|>assistant")


def lengths_after(a, b, capacity):
    segments = [Segment(np.arange(n), np.ones(n)) for n in (a, b)]
    return [len(s.tokens) for s in preferences.fit(*segments, capacity)]


def test_long_pairs_are_cut_to_share_a_row():
    assert lengths_after(30, 20, 50) == [30, 20]
    assert lengths_after(90, 80, 51) == [25, 26]  # both too long: half each
    assert lengths_after(10, 90, 50) == [10, 40]  # the longer one alone
    assert lengths_after(90, 10, 51) == [41, 10]


def test_long_pairs_are_truncated_never_to_nothing_or_refused(tmp_path):
    short = {"prompt": "q", "chosen": "a b", "rejected": "c"}
    long = {"prompt": "q", "chosen": "a " * 1500, "rejected": "c"}
    same = {"prompt": "q", "chosen": "a " * 1500, "rejected": "a " * 1500 + "b"}
    deep = {"prompt": "q " * 1500, "chosen": "a", "rejected": "c"}
    file = write(tmp_path / "a.jsonl", [short, long, same, deep])
    examples = open_examples(make_config(file))
    found = [examples[i] for i in range(4)]
    assert [len(x) for x in found] == [2, 2, 0, 0]  # cut alike, or with no answer left: left out
    assert sum(len(s.tokens) for s in found[1]) == T
    np.testing.assert_array_equal(found[1][1].tokens[-1], found[0][1].tokens[-1])  # <|return|>
    assert "3 truncated; 2 left out with nothing to train" in data.describe(make_config(file))
    with pytest.raises(UserError) as error:
        data.train_batches(make_config(file, on_long="refuse"))
    assert str(error.value).startswith(f"{file}:2: chosen and rejected, ")
    assert "tokens are longer than data.sequence_length (960)" in str(error.value)


def test_equal_sides_are_refused_or_skipped_and_counted(tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    file = write(tmp_path / "a.jsonl", [good, {**good, "rejected": "a"}, good])
    same = f"{file}:2: chosen and rejected are the same, as they are rendered"
    with pytest.raises(UserError) as error:
        data.train_batches(make_config(file))
    assert str(error.value) == same + ADVICE
    config = make_config(file, on_bad_record="skip")
    data.train_batches(config).close()
    assert data.describe(config).endswith(f"; 1 bad record left out, the first {same}")
    # Equal in what is rendered, though not as messages.
    thought = {"prompt": [user("q")], "chosen": "a", "rejected": [said("a", thinking="")]}
    file = write(tmp_path / "b.jsonl", [thought])
    with pytest.raises(UserError, match=r"b\.jsonl:1: chosen and rejected are the same"):
        data.train_batches(make_config(file))
    with pytest.raises(UserError, match=r"holds no record: .*\(1 bad record left out, .*b\.j"):
        data.train_batches(make_config(file, on_bad_record="skip"))


LACKED = (
    "chosen and rejected are whole chats, and prompt has a message that they lack: leave it out, "
    "or make them answers to it"
)
BAD = {
    "[1]": "a list, not an object with messages or text",
    '{"text": "a"}': "lacks chosen and rejected: objective.name dpo trains on pairs of answers",
    '{"prompt": "q", "chosen": "a"}': (
        "lacks rejected: objective.name dpo trains on pairs of answers"
    ),
    '{"chosen": "a", "rejected": "b"}': "lacks prompt (the chat that chosen and rejected answer)",
    '{"prompt": 3, "chosen": "a", "rejected": "b"}': (
        "prompt is neither text nor a message nor a list of messages"
    ),
    '{"prompt": "q", "chosen": [], "rejected": "b"}': "chosen is empty",
    '{"prompt": "q", "chosen": ["a"], "rejected": "b"}': (
        "chosen has an item that is no message (an object with a role)"
    ),
    '{"prompt": "q", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}': (
        "one of chosen and rejected is a whole chat, the other an answer"
    ),
    '{"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": "b"}': (
        "the chat with chosen: messages[1].content is missing"
    ),
    '{"prompt": "q", "chosen": "a", "rejected": [{"role": "tool", "content": "1"}]}': (
        "the chat with rejected: messages[1].name is missing, and no tool call before it awaits a "
        "result"
    ),
    json.dumps({"chosen": [user("a"), said("x")], "rejected": [user("b"), said("x")]}): (
        "chosen and rejected are whole chats that begin differently"
    ),
    json.dumps({"prompt": "q", "chosen": [user("a"), said("x")], "rejected": [user("a")]}): LACKED,
    json.dumps({"prompt": "q", "chosen": user("a"), "rejected": user("a")}): LACKED,
    json.dumps({"prompt": "q", "messages": [user("r")], "chosen": "x", "rejected": "y"}): (
        "has prompt and messages, which differ: leave out one of them"
    ),
    json.dumps({"prompt": "q", "chosen": "x", "rejected": "y", "weight": 2}): (
        "weight is read beside an answer that is text: put it into the messages that it is for, "
        "or pass it over with data.ignore weight"
    ),
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_what_is_no_pair_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        data.train_batches(make_config(file))
    assert str(error.value) == f"{file}:2: {BAD[line]}{ADVICE}"


def test_data_of_the_other_kind_are_refused(tmp_path, pairs):
    text = tmp_path / "a.txt"
    text.write_text("words")
    with pytest.raises(UserError, match=r"a\.txt: plain text, and objective.name dpo trains on pa"):
        data.train_batches(make_config(text))
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: .*; a pair is for objective.name dpo"):
        data.train_batches(make_config(pairs, objective="sft"))
    table = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"messages": [[user("x")]]}), table)
    with pytest.raises(UserError, match="a record has chosen and rejected"):
        data.train_batches(make_config(table))


def test_inspect_names_the_sides(pairs):
    examples = open_examples(make_config(pairs))
    batch = fill([[*examples[3], *examples[8]]], 2 * T)
    shown = [str(t) for t in show.describe([batch], ENCODING, plain=True, pairs=True)]
    names = [t.split(":")[0] for t in shown if t.startswith("- ")]
    sides = ("chosen", "rejected")
    assert names == [f"- pair {k}, {side}" for k in (1, 2) for side in sides]
