"""Every code block of README.md and docs/: Python runs, commands parse, JSON is read.

A block may say why it does not run: `<!-- not run: REASON -->` in the line before it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gptoss_jax import convert, inspect, plan, report, sample, verify, weights
from gptoss_jax.__main__ import COMMANDS
from gptoss_jax.chips import topologies
from gptoss_jax.config import LoRAConfig, command_line
from gptoss_jax.data.sources import Reading
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import nest
from gptoss_jax.weights import peft

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs that begin a line of a block of commands. Those in FOREIGN are not ours to check.
FOREIGN = {"pip", "xprof"}
PROGRAMS = {"python", "gptoss-jax", "make", "sbatch", "cp", "sed", *FOREIGN}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of its first line."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, without those that say why they do not run."""
    text = page.read_text()
    found = []
    for match in re.finditer(
        r"^(<!-- not run: \S.* -->\n)?```(\w*)\n(.*?)^```$", text, re.M | re.S
    ):
        if match[1] is None:
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(match[2], match[3], line))
    return found


def is_commands(block: Block) -> bool:
    return not block.language and block.text.split(maxsplit=1)[0] in PROGRAMS


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command of a block; a backslash joins lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def spans(page: Path) -> list[str]:
    """Return the inline code of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def _inspect(arguments: list[str]) -> None:
    own, rest = inspect._parser().parse_known_args(arguments)
    command_line.load([*rest, "--config", own.config])


def _plan(arguments: list[str]) -> None:
    own, rest = plan.parse(arguments)
    command_line.load(rest)
    topologies.split(own.target)


PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": command_line.load,
    "sample": sample._parser().parse_args,
    "convert": convert.parse,
    "verify": verify.parse,
    "inspect": _inspect,
    "plan": _plan,
    "report": report.parse,
}


def check(words: list[str]) -> None:
    """Parse a command as its program would. Raises an error for what would be refused."""
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        module = rest[1].removeprefix("gptoss_jax.")
        PARSERS[module](rest[2:])
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    elif program == "gptoss-jax":
        if rest != ["--version"]:
            PARSERS[rest[0]](rest[1:])
    elif program == "make":
        assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text()
        for argument in rest[1:]:
            assert argument.startswith("ARGS=") and rest[0] == "plan"
            _plan(shlex.split(argument.removeprefix("ARGS=")))
    elif program == "sbatch":
        assert '-m gptoss_jax.train "$@"' in (ROOT / rest[0]).read_text()
        command_line.load(rest[1:])
    elif program in ("cp", "sed"):
        subprocess.run(["bash", "-c", " ".join(words)], check=True)
    else:
        assert program in FOREIGN


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of the project's folder, as far as the pages name what is in it."""
    for name in ("gptoss_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:  # a page's own modules are not those of other tests
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def checkpoints(place):
    """Random checkpoints where the pages have theirs: tiny's model, but smaller."""
    tiny = command_line.read_config_file("tiny").model
    small = dataclasses.replace(
        tiny, num_layers=2, d_model=32, num_heads=4, head_dim=8, d_expert=32
    )
    model, rng = Transformer(small), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(x.dtype), model.abstract_params()
    )
    for folder in ("runs/demo", "runs/tiny_lora", "BASE"):
        weights.save(place / folder, model, params)
    adapted = dataclasses.replace(small, lora=LoRAConfig(targets=("attention",), rank=2))
    tree = nest(
        {
            f"{path}/{part}": np.ones(getattr(shape, part), np.float32)
            for path, shape in adapters.shapes(adapted).items()
            for part in "ab"
        }
    )
    (place / "PEFT_DIR").mkdir()
    (place / "PEFT_DIR" / peft.CONFIG).write_text(json.dumps(peft.config_of(adapted)))
    save_file(peft.tensors_of(adapted, tree), place / "PEFT_DIR" / peft.WEIGHTS)


def write_files(page: Path, place: Path) -> None:
    """Write the blocks of Python whose first line is a comment with a file's name."""
    for block in blocks(page):
        if block.language == "python" and (name := re.match(r"# (\S+\.py)\n", block.text)):
            (place / name[1]).write_text(block.text)


def test_every_command_of_the_program_has_a_parser_here():
    assert set(PARSERS) == set(COMMANDS)


def test_a_block_is_python_json_commands_or_what_a_command_prints():
    for page in PAGES:
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            assert block.language in ("", "python", "json"), where
            if not is_commands(block) and not block.language:
                begin = {line.partition(" ")[0] for line in block.text.splitlines()}
                assert not PROGRAMS & begin, f"{where}: a command amid other text"
                assert not {"import", "from"} & begin, f"{where}: Python without ```python"
    assert sum("<!-- not run" in page.read_text() for page in PAGES) <= 1


def named(pages: list[Path], slow: Container[str] = ()) -> list[Any]:
    """Return pages as cases; those in `slow` compile a training step."""
    marks = {page: [pytest.mark.slow] * (page.stem in slow) for page in pages}
    return [pytest.param(page, id=page.stem, marks=marks[page]) for page in pages]


@pytest.mark.parametrize(
    "page",
    named([p for p in PAGES if any(b.language == "python" for b in blocks(p))], slow={"python"}),
)
def test_python_runs(page: Path, place, checkpoints, monkeypatch):
    monkeypatch.setattr(table, "_ROWS", dict(table._ROWS))  # a page adds a row
    write_files(page, place)
    copy_files(page)
    names: dict[str, Any] = {"__name__": "pasted"}
    for block in blocks(page):
        if block.language == "python":
            where = "\n" * (block.line - 1)  # so that a traceback shows the page's line
            exec(compile(where + block.text, str(page), "exec"), names)


def copy_files(page: Path) -> None:
    """Run the commands of a page that copy and edit files."""
    for block in filter(is_commands, blocks(page)):
        for words in commands(block):
            if words[0] in ("cp", "sed"):
                check(words)


@pytest.mark.parametrize("page", named([p for p in PAGES if any(map(is_commands, blocks(p)))]))
def test_commands_are_parsed_by_their_own_parsers(page: Path, place):
    write_files(page, place)
    for block in filter(is_commands, blocks(page)):
        for words in commands(block):
            check(words)


def test_inline_commands_and_options_exist(place):
    options = command_line._option_types()
    for page in PAGES:
        write_files(page, place)
        copy_files(page)
        for span in spans(page):
            if span.startswith(("python -m gptoss_jax.", "gptoss-jax ")) and " --" in span:
                check(shlex.split(span))
        for option in re.findall(r"--[a-z]+\.[a-z][\w.-]*\w", page.read_text()):
            assert command_line._name(option) in options, f"{page.name}: {option}"


def test_json_is_a_record_that_is_read():
    found = [block for page in PAGES for block in blocks(page) if block.language == "json"]
    assert found
    for block in found:
        assert Reading().check(json.loads(block.text)).fields["messages"]
