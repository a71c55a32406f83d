"""Entries of data.train: files, globs, folders and data sets, and the names of their sources."""

import pytest

from gptoss_jax.data import hub
from gptoss_jax.data.entries import entries, resolve
from gptoss_jax.errors import UserError


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_files_globs_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "notes.md", "sub/c.txt", "sub/deep/d.parquet", ".git/e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def names(*patterns):
        return [str(p) for p in resolve(patterns)]

    assert names("b.jsonl", "a.jsonl", "b.jsonl") == ["b.jsonl", "a.jsonl"]
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("sub") == ["sub/c.txt", "sub/deep/d.parquet"]
    assert names(".") == ["a.jsonl", "b.jsonl", "sub/c.txt", "sub/deep/d.parquet"]
    assert names("b.jsonl", "sub/*.txt") == ["b.jsonl", "sub/c.txt"]


def test_what_names_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_bytes(b"")
    for patterns, expected in {
        (): (
            "data.train names no file: set it to .jsonl, .json, .parquet or .txt files, globs or "
            "folders"
        ),
        ("a.jsonl",): "data.train: there is no file or folder a.jsonl",
        ("x/*.jsonl",): "data.train: no file matches x/*.jsonl",
        ("empty",): "data.train: the folder empty holds no .jsonl or .parquet or .txt file",
        ("a.csv",): "data.train: a.csv is not .jsonl, .json, .parquet or .txt",
        ("*.c?v",): "data.train: a.csv is not .jsonl, .json, .parquet or .txt",
    }.items():
        with pytest.raises(UserError) as error:
            resolve(patterns)
        assert message(error) == expected
    with pytest.raises(UserError, match=r"^data\.held_out: there is no"):
        resolve(("a.jsonl",), field="data.held_out")


def test_sources_are_named_after_their_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a.jsonl", "b/a.txt", "b/my file.jsonl", "b/c/x.txt", "d=e.jsonl", "e.jsonl")
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(hub, "fetch", lambda text, field: [tmp_path / "e.jsonl"])

    def given(*patterns):
        return [entry.name for entry in entries(patterns)]

    assert given("a.jsonl", "b/a.txt", "b", "b/my file.jsonl") == ["a", "a_2", "b", "my_file"]
    assert given("b/*.txt", "b/**/*.txt", "./b/c/", "*.jsonl", "a.jsonl") == [
        "b",
        "b_2",
        "c",
        "data",
        "a",
    ]
    assert given("hf:me/set@v1:en:train", "hf:me/set") == ["set", "set_2"]
    # Given names come first, wherever they are; a file of the whole name is no name and path.
    assert given("a.jsonl", "a=b/a.txt", "x-1_Y=hf:me/set") == ["a_2", "a", "x-1_Y"]
    assert given("d=e.jsonl", "f=e.jsonl") == ["d_e", "f"]
    assert given(".") == [tmp_path.name.replace(".", "_")]
    found = entries(("d=b/a.txt", "b/a.txt", "d2=b"))
    assert [[str(p) for p in e.files] for e in found] == [
        ["b/a.txt"],
        ["b/a.txt"],
        ["b/a.txt", "b/c/x.txt", "b/my file.jsonl"],
    ]
    assert [str(p) for p in resolve(("d=b/a.txt", "b/a.txt", "e.jsonl"))] == ["b/a.txt", "e.jsonl"]


def test_bad_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    for patterns, expected in {
        ("x=a.jsonl", "x=a.jsonl"): "data.train: 2 entries are named 'x'",
        ("x=b.jsonl",): "data.train: there is no file or folder b.jsonl",
        ("x y=a.jsonl",): "data.train: there is no file or folder x y=a.jsonl",
        ("=a.jsonl",): "data.train: there is no file or folder =a.jsonl",
        ("x=hf:a",): (
            "data.train: hf:a is no name of a hub data set: hf:OWNER/NAME[@REVISION]"
            "[:[CONFIG:]SPLIT]"
        ),
    }.items():
        with pytest.raises(UserError) as error:
            entries(patterns)
        assert message(error) == expected
