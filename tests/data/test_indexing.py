"""The index of large files: the same in parallel and from the cache as read line by line."""

import json
import os
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from gptoss_jax.data import indexing, workers
from gptoss_jax.data.sources import Records
from gptoss_jax.errors import UserError


def records(count, *, bad=()):
    rng, found = random.Random(0), []
    for k in range(count):
        said = "é🦆" * rng.randrange(1, 40)
        chat = [{"role": "user", "content": f"{k}"}, {"role": "assistant", "content": said}]
        found.append({"messages": chat if k not in bad else "{", "id": k})
    return found


def open_records(*files, **options):
    return Records(files, field="data.train", stretch_bytes=1_000, **options)


def contents(found):
    listed = [(found.where(i), found[i].fields, found.hashes[i]) for i in range(len(found))]
    return listed, dict(found.unused), found.skip_summary()


@pytest.fixture
def files(tmp_path):
    rows = records(3_000, bad=(17, 1_717, 2_999))
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    text = [
        json.dumps(row, ensure_ascii=False) + "\n" + "\n" * (k % 5 == 0)
        for k, row in enumerate(rows)
    ]
    lines.write_text("".join(text))
    kept = [row for row in rows if row["messages"] != "{"]
    parquet.write_table(pa.Table.from_pylist(kept), table, row_group_size=100)
    listed = tmp_path / "c.json"
    listed.write_text(json.dumps(kept[:50]))
    document = tmp_path / "d.txt"
    document.write_text("a line of text\n" * 500)
    return [lines, table, listed, document]


def test_parts_and_processes_and_the_cache_change_nothing(files, tmp_path, monkeypatch):
    expected = contents(open_records(*files, skip_bad=True))
    assert expected[2].startswith("3 bad records left out, the first ")
    assert f"{files[0]}:22: " in expected[2]
    monkeypatch.setattr(indexing, "PART_BYTES", 5_000)
    assert contents(open_records(*files, skip_bad=True)) == expected
    monkeypatch.setattr(indexing, "PARALLEL_FROM", 1)
    monkeypatch.setattr(indexing, "CACHE_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert contents(open_records(*files, skip_bad=True)) == expected
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == len(files)

    monkeypatch.setattr(indexing, "index_part", None)  # nothing is read again
    assert contents(open_records(*files, skip_bad=True)) == expected
    with pytest.raises(UserError, match=r"a\.jsonl:22: messages is text"):
        open_records(*files)


def test_what_the_cache_holds_is_of_this_file_and_these_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "CACHE_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n')
    assert len(open_records(file)) == 1
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    times = file.stat()
    file.write_text('{"text": "two"}\n{"text": "three"}\n')
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert len(open_records(file)) == 2
    assert list((tmp_path / "cache").rglob("*.npz")) == [kept]
    kept.write_bytes(kept.read_bytes()[:50])  # cut off
    assert len(open_records(file)) == 2
    monkeypatch.setattr(indexing, "_code", lambda: "another version")
    read = []
    monkeypatch.setattr(
        indexing, "index_part", lambda part, f=indexing.index_part: read.append(part) or f(part)
    )
    assert len(open_records(file)) == 2 and len(read) == 1
    # A cache that can't be written is no error.
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert len(open_records(file)) == 2 and len(read) == 2


@pytest.mark.slow
def test_a_process_that_ends_is_an_error_and_what_it_raises_is_raised(tmp_path):
    with workers.processes(os._exit, 2) as run, pytest.raises(UserError, match="ended early"):
        list(run([3, 3, 3]))
    with workers.processes(os.listdir, 2) as run, pytest.raises(FileNotFoundError):
        list(run([str(tmp_path / "none")]))


def test_records_have_the_same_hash_in_all_formats(tmp_path):
    rows = [row | {"tools": None} for row in records(5)]
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), table)
    assert open_records(lines).hashes == open_records(table).hashes
