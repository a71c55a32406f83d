"""Files, globs and folders to records, and the one line that each kind of bad input gets."""

import json
import os
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptoss_jax.data import indexing, reading
from gptoss_jax.data.sources import Records
from gptoss_jax.errors import UserError

ADVICE = "; fix it, or set data.on_bad_record=skip to leave out bad records"
GOOD = b'{"text": "fine"}\n'


def open_records(*files, **options):
    return Records(files, field="data.train", stretch_bytes=options.pop("stretch", 64), **options)


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def chat(*messages, **fields):
    return json.dumps({"messages": list(messages), **fields}).encode()


USER = {"role": "user", "content": "hi"}

BAD_LINES = {
    b'{"text": "a"': "not JSON (Expecting ',' delimiter at column 13)",
    b"hello": "not JSON (Expecting value at column 1)",
    b'{"text": "\xff"}': "not UTF-8 text (byte 11 of the line)",
    b"[" * 100_000: "not JSON that can be read (",
    b'{"a": ' + b"1" * 5_000 + b"}": "not JSON that can be read (",
    b"[1]": "a list, not an object with messages or text",
    b"null": "null, not an object with messages or text",
    b"3.5": "a number, not an object with messages or text",
    b"{}": "lacks messages (a chat) or text",
    b'{"message": []}': (
        "lacks messages (a chat) or text; its columns are message (docs/data.md lists the formats)"
    ),
    b'{"text": 7}': "text is a number: it must be text",
    b'{"text": ["a"]}': "text is a list: it must be text",
    b'{"messages": []}': "messages is empty",
    b'{"messages": "hi"}': "messages is text, and not JSON (",
    chat("hi"): "messages[0] is text: it must be an object",
    chat(USER, {"content": "x"}): (
        "messages[1].role is missing: it is one of system, developer, user, assistant, tool"
    ),
    chat(USER, {"role": "bot", "content": "x"}): (
        "messages[1].role is 'bot': it is one of system, developer, user, assistant, tool"
    ),
    chat(USER, {"role": ["user"], "content": "x"}): (
        "messages[1].role is ['user']: it is one of system, developer, user, assistant, tool"
    ),
    chat(USER, {"role": "assistant"}): "messages[1].content is missing",
    chat(USER, {"role": "assistant", "thinking": "x"}): "messages[1].content is missing",
    chat(USER, {"role": "assistant", "content": [1]}): (
        "messages[1].content[0] is a number: it must be a part with a type and text"
    ),
    chat(USER, {"role": "assistant", "content": "", "channel": "aside"}): (
        "messages[1].channel is 'aside': it is one of analysis, commentary, final"
    ),
    chat(USER, {"role": "assistant", "content": "", "thinking": True}): (
        "messages[1].thinking is true or false: it must be text"
    ),
    chat(USER, {"role": "assistant", "tool_calls": {}}): (
        "messages[1].tool_calls is an object: it must be a list"
    ),
    chat(USER, {"role": "assistant", "tool_calls": [{}]}): (
        "messages[1].tool_calls[0].name is missing"
    ),
    chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}): (
        "messages[1].tool_calls[0].arguments is missing, or neither JSON text nor an object"
    ),
    chat(USER, tools={}): "tools is an object: it must be a list",
    chat(USER, reasoning="hard"): "reasoning is 'hard': it is one of low, medium, high",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(UserError) as error:
        open_records(file)
    expected = f"{file}:3: {BAD_LINES[line]}"
    if expected.endswith("("):  # the rest is Python's own wording
        assert message(error).startswith(expected) and message(error).endswith(ADVICE)
    else:
        assert message(error) == expected + ADVICE

    records = open_records(file, skip_bad=True)
    assert [records.where(i) for i in range(len(records))] == [f"{file}:1", f"{file}:4"]
    assert records.skipped == 1
    assert records.skip_summary().startswith(f"1 bad record left out, the first {file}:3: ")


def test_good_lines_are_read_at_random(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    rows = [
        {"text": "naïve 日本 🙂", "note": None},
        {"messages": [USER, {**USER, "role": "assistant", "channel": None}]},
        {"messages": [USER, call, {"role": "tool", "content": "1"}], "tools": [{"name": "f"}]},
        {"text": ""},
        {"messages": [{"role": "system", "content": "x"}, USER], "reasoning": "low", "tools": None},
    ]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in rows[:3]))
    b.write_text("\n\n" + "\n".join(json.dumps(r, ensure_ascii=False) for r in rows[3:]))
    records = open_records(a, b)
    assert len(records) == 5 and records.skipped == 0 and records.skip_summary() == ""
    for i in random.Random(3).sample(range(5), 5):
        assert records[i].columns == rows[i]
    assert [records[i].where for i in (0, 2, 3, 4)] == [f"{a}:1", f"{a}:3", f"{b}:3", f"{b}:4"]
    assert not any(records.running(i) for i in range(5)) and all(r.ends for r in records)


CHANGED = "put it back as it was and start again, which goes on from the last checkpoint"


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_a_file_that_changes_is_noticed(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    content = GOOD * 3
    if suffix == ".parquet":
        parquet.write_table(pa.table({"text": ["a", "b", "c"]}), file)
        content = file.read_bytes()
    file.write_bytes(content)
    records = open_records(file)
    stat = file.stat()
    size = len(content)

    def said():
        with pytest.raises(UserError) as error:
            _ = records[0]
        with pytest.raises(UserError) as again:
            records.check_unchanged()
        assert message(again) == message(error)
        return message(error)

    records.check_unchanged()
    file.write_bytes(content[:-1])
    how = f"it was {size:,} bytes, is {size - 1:,}"
    assert said() == f"{file}: changed while it was in use ({how}); {CHANGED}"
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    how = "it was written again, of the same size"
    assert said() == f"{file}: changed while it was in use ({how}); {CHANGED}"
    file.unlink()
    assert said() == f"{file}: changed while it was in use (it is gone); {CHANGED}"
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert records[0].where == f"{file}:1"


def test_a_change_that_no_time_shows_is_noticed_by_what_it_leaves(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 3)
    stat = file.stat()
    records = open_records(file)
    file.write_bytes(b"x" * len(GOOD * 3))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError) as error:
        _ = records[2]
    assert message(error).startswith(f"{file}:3: changed while it was in use (not JSON (")


def test_a_file_that_changes_while_it_is_indexed(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 3)
    check = reading.Reading.check

    def meddle(reading, columns):
        file.write_bytes(GOOD * 4)
        return check(reading, columns)

    monkeypatch.setattr(reading.Reading, "check", meddle)
    with pytest.raises(UserError, match="changed while it was in use"):
        open_records(file)


def test_no_record_at_all(tmp_path):
    empty, blank, bad = tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.jsonl"
    empty.write_bytes(b"")
    blank.write_bytes(b" \n\n")
    bad.write_bytes(b"{}\n{}\n")
    with pytest.raises(UserError) as error:
        open_records(empty, blank)
    assert message(error) == f"data.train holds no record: {empty}, {blank}"
    with pytest.raises(UserError) as error:
        open_records(bad, skip_bad=True)
    assert message(error) == (
        f"data.train holds no record: {bad} (2 bad records left out, the first {bad}:1: "
        "lacks messages (a chat) or text)"
    )


TEXTS = {
    "lines": "".join(f"line {i} of 日本 text\n" for i in range(60)),
    "one line": "日" * 211 + "🙂" * 97 + "é" * 130,
    "ascii": "x" * 1_000,
    "short": "a\n",
    "crlf": "one\r\n\r\ntwo\r\n" * 40,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_is_cut_into_stretches(tmp_path, name):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    for file in (a, b):
        file.write_bytes(TEXTS[name].encode())
    records = open_records(a, b, stretch=50)
    pieces = [r.fields["text"] for r in records]
    half = len(pieces) // 2
    assert "".join(pieces[:half]) == "".join(pieces[half:]) == TEXTS[name]
    assert max(len(p.encode()) for p in pieces) <= 100
    assert all(records.running(i) for i in range(len(records)))
    assert [i for i, r in enumerate(records) if r.ends] == [half - 1, 2 * half - 1]
    line = 1 + TEXTS[name].count("\n", 0, len("".join(pieces[: half - 1])))
    assert records.where(half - 1) == f"{a}:{line}"


def test_a_text_file_that_is_no_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"fine\nalso\nb\xffd\n")
    with pytest.raises(UserError) as error:
        open_records(file)
    assert message(error) == f"{file}:3: not UTF-8 text{ADVICE}"


def test_large_files_show_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(indexing, "PROGRESS_FROM", 1)
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 3)
    assert len(open_records(file)) == 3
    assert capsys.readouterr().out == ""
