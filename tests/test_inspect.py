"""What `data.inspect` shows is what the batches hold, with and without colours."""

import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from gptoss_jax import inspect
from gptoss_jax.data.packing import Segment, fill
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer

VOCAB = 700
LEGEND = (
    "[[trained]] (the loss counts these tokens; [0.3[these]] by that factor)  other  <|special|>"
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
        " batch_size=3, pack_window=4)\n"
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
        "- segment 4: 19 tokens, 18 trained\na[[␛[31mb\n<|end|> & <b><|endoftext|>]]"
    )


def test_counts_are_those_of_the_batch(config_file, capsys):
    out = show(capsys, "--config", config_file, "--batches", "2")
    assert [int(n) for n in re.findall(r"=== batch (\d+)", out)] == [0, 1]
    assert [int(n) for n in re.findall(r"--- row (\d+): 1 segment", out)] == [0, 1, 2] * 2
    encoding = tokenizer.get_tokenizer(VOCAB)
    for text in re.findall(r"\[\[(<.channel.*?)\]\]", out):
        expected = len(encoding.encode(text, allowed_special="all"))
        assert f" tokens, {expected} trained" in out


@pytest.mark.parametrize("plain", [True, False])
def test_each_token_is_marked_as_the_loss_counts_it(plain):
    encoding = tokenizer.get_tokenizer(VOCAB)
    end = tokenizer.special_id(encoding, "<|end|>")
    ids = [97 - 33, 98 - 33, end, *encoding.encode_ordinary("xyz"), end]
    assert encoding.decode(ids[:2]) == "ab"
    weights = np.array([1, 1, 0, 0, 1, 1, 1], np.float32)
    assert len(ids) == 7
    segments = [Segment(np.array(ids, np.int32), weights), Segment(np.array(ids[:2]), weights[:2])]
    batch = fill([segments], 12)
    _, head, row, *shown = inspect.describe([batch], encoding, plain=plain)
    assert head.plain == "\n=== batch 0: 1 row of 12; 9 tokens, 5 trained, 3 padding"
    assert row.plain == "\n--- row 0: 2 segments, 9 tokens, 5 trained, 3 padding"
    assert shown[0].plain == "- segment 1: 7 tokens, 4 trained"
    assert shown[2].plain == "- segment 2: 2 tokens, 1 trained"
    text = shown[1]
    marked = "a[[b]]<|end|>x[[yz<|end|>]]"
    if plain:
        assert text.plain == marked and shown[3].plain == "a[[b]]"
        return
    assert text.plain == "ab<|end|>xyz<|end|>"
    said = "".join(
        f"[[{text.plain[s.start : s.end]}]]"
        if s.style in (inspect.TRAINED, inspect.TRAINED_SPECIAL)
        else text.plain[s.start : s.end]
        for s in text.spans
    )
    assert said.replace("]][[", "") == marked
    assert {s.style for s in text.spans if "<|" in text.plain[s.start : s.end]} == {
        inspect.SPECIAL,
        inspect.TRAINED_SPECIAL,
    }


@pytest.mark.parametrize("plain", [True, False])
def test_a_weight_other_than_1_is_said(plain):
    encoding = tokenizer.get_tokenizer(VOCAB)
    ids = np.array([ord(c) - 33 for c in "abxyz"], np.int32)
    assert encoding.decode(ids.tolist()) == "abxyz"
    weights = np.array([1, 0.3, 0.3, 0, 1], np.float32)
    batch = fill([[Segment(ids, weights)]], 8)
    *_, head, text = inspect.describe([batch], encoding, plain=plain)
    assert head.plain == "- segment 1: 5 tokens, 3 trained"
    assert text.plain == ("a[0.3[bx]]y[[z]]" if plain else "a0.3bxyz")
    assert plain or [text.plain[s.start : s.end] for s in text.spans if s.style == inspect.FACTOR]


def test_a_terminal_has_colours_and_no_brackets(config_file, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "Console", lambda: Console(force_terminal=True))
    out = show(capsys, "--config", config_file, "--rows", "1")
    assert "[[" not in out and "\x1b[" in out and "the loss counts these tokens" in out


def test_a_page_stands_alone(config_file, tmp_path, capsys):
    options = ("--data.train", tmp_path / "b.txt", "--data.train_on", "user")
    page = tmp_path / "page.html"
    out = show(capsys, "--config", config_file, *options, "--html", page)
    assert out.strip() == str(page)
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "http" not in text
    assert "&lt;|end|&gt; &amp; &lt;b&gt;" in text and "\x1b" not in text and "<b>" not in text
    said = html.unescape(re.sub(r"<[^>]*>", "", text.split("<pre>")[1].split("</pre>")[0]))
    assert "=== batch 0: 3 rows of 256" in said and "a␛[31mb\n<|end|> & <b><|endoftext|>" in said
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
