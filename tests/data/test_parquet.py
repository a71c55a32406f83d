"""Parquet rows are what the same rows are as JSONL; bad ones are named."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from gptoss_jax import data
from gptoss_jax.config import Config, DataConfig, ModelConfig
from gptoss_jax.data import parquet
from gptoss_jax.data.sources import Records
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

ADVICE = "; fix it, or set data.on_bad_record=skip to leave out bad records"
USER = {"role": "user", "content": "hi"}
CALL = {"function": {"name": "f", "arguments": "{}"}, "id": "1"}
TOOL = {"type": "function", "function": {"name": "f", "description": "Do it."}}
CHATS = [
    {"messages": [USER, {"role": "assistant", "content": "naïve 日本 🙂", "thinking": "hm"}]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
    {"messages": [USER] * 3, "reasoning": "high"},
    {"messages": [{"role": "system", "content": "x"}, USER], "reasoning": "low"},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "?"}]},
]


def write(path, rows, row_group_size=2, **columns):
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    for name, column in columns.items():
        table = table.append_column(name, column)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def open_records(*files, **options):
    return Records(files, field="data.train", stretch_bytes=64, **options)


def test_rows_are_those_of_jsonl(tmp_path):
    rows = CHATS * 3
    extra = pa.array(range(len(rows)))
    table = write(tmp_path / "a.parquet", rows, id=extra)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = write(tmp_path / "b.parquet", [{"text": f"text {i}"} for i in range(5)])
    assert '"thinking": null' in json.dumps(pq.read_table(table).to_pylist()[1])
    records, expected = open_records(table, texts), open_records(lines)
    assert len(records) == len(rows) + 5
    for i in random.Random(2).sample(range(len(rows)), len(rows)):
        assert records[i].fields == expected[i].fields == rows[i]
        assert records[i].where == f"{table}:{i + 1}" and not records.running(i)
    assert records[len(rows) + 3].fields == {"text": "text 3"}
    assert records[len(rows) + 3].where == f"{texts}:4" and records[3].ends


def test_row_groups_are_read_once_for_neighbours(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", [{"text": str(i)} for i in range(12)], row_group_size=4)
    records = open_records(file)
    read, groups = parquet.read_group, []
    monkeypatch.setattr(
        parquet, "read_group", lambda *a, group: groups.append(group) or read(*a, group=group)
    )
    order = (1, 3, 0, 4, 7, 11, 2)
    assert [records[i].fields["text"] for i in order] == [str(i) for i in order]
    assert groups == [0, 1, 2, 0]


def test_files_with_like_row_groups_are_kept_apart(tmp_path):
    files = [
        write(tmp_path / f"{k}.parquet", [{"text": f"{k}.{i}"} for i in range(3)]) for k in "ab"
    ]
    records = open_records(*files)
    assert [records[i].fields["text"] for i in (0, 3, 1, 4)] == ["a.0", "b.0", "a.1", "b.1"]


def test_batches_are_those_of_jsonl(tmp_path):
    rows = CHATS * 7
    table = write(tmp_path / "a.parquet", rows)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = []
    for file in (table, lines):
        options = {"sequence_length": 512, "batch_size": 2, "pack_window": 9}
        options["train_on"] = ("user", "assistant")
        data_config = DataConfig(train=(str(file),), **options)
        config = Config(model=ModelConfig(vocab_size=700), data=data_config)
        batches = data.train_batches(config)
        taken.append([next(batches) for _ in range(6)])
        batches.close()
    for a, b in zip(*taken, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.weights, b.weights)
    encoding = tokenizer.get_tokenizer(700)
    text = encoding.decode(np.concatenate([b.tokens.ravel() for b in taken[0]]).tolist())
    # Each record's own reasoning, or the config's.
    assert all(f"Reasoning: {effort}\n" in text for effort in ("low", "medium", "high"))


@pytest.mark.parametrize(
    "rows, problem",
    {
        "no messages": ([CHATS[0], {"messages": None}], "lacks messages (a chat) or text"),
        "empty": ([CHATS[0], {"messages": []}], "messages is empty"),
        "no content": (
            [CHATS[0], {"messages": [USER, {"role": "user"}]}],
            "messages[1].content is missing",
        ),
        "reasoning": (
            [CHATS[2], {"messages": [USER], "reasoning": "hard"}],
            "reasoning is 'hard': it is one of low, medium, high",
        ),
        "text": ([{"text": "fine"}, {"text": None}], "lacks messages (a chat) or text"),
        "tools": (
            [{"messages": [USER], "tools": ["f"]}] * 2,
            "tools[0] is no object with a name",
        ),
        "kind": ([{"text": 3}] * 2, "text is a number: it must be text"),
        "bytes": ([{"text": b"x"}] * 2, "text is bytes: it must be text"),
    }.values(),
    ids=str,
)
def test_a_bad_row_is_named(tmp_path, rows, problem):
    file = write(tmp_path / "a.parquet", rows)
    number = 1 if rows[0] == rows[1] else 2
    with pytest.raises(UserError) as error:
        open_records(file)
    assert str(error.value) == f"{file}:{number}: {problem}{ADVICE}"
    if number == 2:
        records = open_records(file, skip_bad=True)
        assert len(records) == 1 and records[0].columns == parquet.drop_nulls(rows[0])
        assert records.skip_summary() == f"1 bad record left out, the first {file}:2: {problem}"


def test_text_that_is_not_utf8(tmp_path):
    data = pa.array([b"fine", b"b\xffd", b"too"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": data}), tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        open_records(tmp_path / "a.parquet")
    assert str(error.value) == f"{tmp_path / 'a.parquet'}:2: not UTF-8 text{ADVICE}"
    records = open_records(tmp_path / "a.parquet", skip_bad=True)
    assert [r.fields["text"] for r in records] == ["fine", "too"]


def test_columns_that_make_no_record(tmp_path):
    file = write(tmp_path / "a.parquet", [{"dialogue": "x", "id": 3}])
    with pytest.raises(UserError) as error:
        open_records(file, skip_bad=True)
    assert str(error.value) == (
        f"{file}: its columns are dialogue, id; a record has messages; or conversations; or "
        "conversation; or prompt and completion; or instruction and output; or text"
    )


def test_what_is_no_parquet_file(tmp_path):
    file = tmp_path / "a.parquet"
    for content in (b"", b"PAR1 and no more", b"x" * 999):
        file.write_bytes(content)
        with pytest.raises(UserError) as error:
            open_records(file)
        said = str(error.value)
        assert said.startswith(f"{file}: no parquet file that can be read (") and "\n" not in said
    whole = write(file, [{"text": "abc " * 99 + str(i)} for i in range(9)]).read_bytes()
    file.write_bytes(whole[:20] + b"\xff" * 40 + whole[60:])
    with pytest.raises(UserError, match=r"a\.parquet: no parquet file that can be read \("):
        open_records(file)
