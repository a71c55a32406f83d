"""What the command shows is what the batches hold, with and without colours."""

import html
import json
import re
import subprocess
import sys

import pytest
from rich.console import Console

from gptoss_jax import inspect
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

VOCAB = 700
LEGEND = (
    "[[trained]] (the loss counts these tokens; [0.3[these]] with weight 0.3)  other  <|special|>"
    "  \u2039|spelled|\u203a (text that only looks like a special token)"
)


@pytest.fixture
def config_file(tmp_path):
    chat = [{"role": "user", "content": "née?"}, {"role": "assistant", "content": "oui 🙂"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "b.txt").write_text("a\x1b[31mb\n<|end|> & <b>")
    file = tmp_path / "config.py"
    file.write_text(
        "from gptoss_jax.config import *\n"
        "def get_config():\n"
        f"    data = DataConfig(train=({str(tmp_path / 'a.jsonl')!r},), sequence_length=256,"
        " batch_size=3, pack_window=4, plain_special_tokens=True)\n"
        f"    return Config(model=ModelConfig(vocab_size={VOCAB}), data=data)\n"
    )
    return file


def show(capsys, *argv):
    inspect.main(list(map(str, argv)))
    return capsys.readouterr().out


def test_a_batch_without_colours(config_file, tmp_path, capsys):
    options = ("--config", config_file, "--data.train", tmp_path / "a.jsonl", tmp_path / "b.txt")
    out = show(capsys, *options, "--data.weights", "1", "1", "--rows", "2")
    legend, head, *rows = out.split("\n\n", 2)
    rows = re.split(r"\n\n(?=--- )", rows[0].rstrip("\n"))
    assert legend == LEGEND and len(rows) == 2
    assert re.fullmatch(r"=== batch 0: 3 rows of 256; \d+ tokens, \d+ trained, \d+ padding", head)
    first, text = rows[0].split("\n", 2)[0], rows[0].split("\n", 2)[2]
    assert re.fullmatch(
        r"--- row 0, source a: 1 segment, (\d+) tokens, (\d+) trained, (\d+) padding", first
    )
    assert text.startswith("<|start|>system<|message|>You are ChatGPT")
    assert text.endswith(
        "<|end|><|start|>user<|message|>née?<|end|><|start|>assistant"
        "[[<|channel|>final<|message|>oui 🙂<|return|>]]"
    )
    assert rows[1].startswith("--- row 1, source b: 4 segments, ")
    # An escape is shown, not obeyed; text that spells a special token is plain text.
    assert rows[1].endswith(
        "- segment 4: 19 tokens, 18 trained\na[[␛[31mb\n\u2039|end|\u203a & <b><|endoftext|>]]"
    )


def test_counts_are_those_of_the_batch(config_file, capsys):
    out = show(capsys, "--config", config_file, "--batches", "2")
    assert [int(n) for n in re.findall(r"=== batch (\d+)", out)] == [0, 1]
    assert [int(n) for n in re.findall(r"--- row (\d+): 1 segment", out)] == [0, 1, 2] * 2
    encoding = tokenizer.get_tokenizer(VOCAB)
    for text in re.findall(r"\[\[(<.channel.*?)\]\]", out):
        expected = len(encoding.encode(text, allowed_special="all"))
        assert f" tokens, {expected} trained" in out


def test_a_terminal_has_colours_and_no_brackets(config_file, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console", lambda: Console(force_terminal=True))
    out = show(capsys, "--config", config_file, "--rows", "1")
    assert "[[" not in out and "\x1b[" in out and "the loss counts these tokens" in out


def test_a_page_stands_alone(config_file, tmp_path, capsys):
    options = ("--data.train", tmp_path / "b.txt", "--data.train_on", "user")
    page = tmp_path / "page.html"
    out = show(capsys, "--config", config_file, *options, "--html", page)
    assert out.strip() == str(page)
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "http" not in text
    assert "\u2039|end|\u203a &amp; &lt;b&gt;" in text and "\x1b" not in text and "<b>" not in text
    said = html.unescape(re.sub(r"<[^>]*>", "", text.split("<pre>")[1].split("</pre>")[0]))
    assert (
        "=== batch 0: 3 rows of 256" in said
        and "a␛[31mb\n\u2039|end|\u203a & <b><|endoftext|>" in said
    )
    with pytest.raises(UserError) as error:
        show(capsys, "--config", config_file, "--html", tmp_path / "no" / "page.html")
    assert str(error.value).startswith(f"--html {tmp_path / 'no' / 'page.html'}: No such file")


def test_held_out_batches_end(config_file, tmp_path, capsys):
    options = ("--config", config_file, "--held-out", "--batches", "9")
    with pytest.raises(UserError) as error:
        show(capsys, *options)
    assert str(error.value) == "there is no data.held_out: give --data.held_out FILE"
    out = show(capsys, *options, "--data.held_out", tmp_path / "a.jsonl")
    assert out.count("=== batch") == 1 and out.count("--- row") == 3
    assert "--- row 2: 0 segments, 0 tokens, 0 trained, 256 padding" in out


def test_bad_options_are_said_in_a_line(config_file, capsys):
    for argv, expected in {
        (): "no --config FILE was given; configs/tiny.py is one to start from",
        ("--config", config_file, "--rows", "0"): "--rows is 0: it must be positive",
        ("--config", config_file, "--batches", "-1"): "--batches is -1: it must be positive",
        ("--config", config_file, "--batches", "x"): (
            "argument --batches: invalid int value: 'x' (see --help)"
        ),
        ("--config", config_file, "--row", "1"): "unknown option --row",
        ("--config", config_file, "--data.sequence_length", "0"): (
            "data.sequence_length is 0: it must be positive"
        ),
    }.items():
        with pytest.raises(UserError) as error:
            show(capsys, *argv)
        assert str(error.value).startswith(expected)


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax.inspect", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "--held-out" in done.stdout and "gptoss_jax.train --help" in done.stdout
