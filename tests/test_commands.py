"""The list of commands, how each is started, and that asking for help is quick."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gptoss_jax
import gptoss_jax.__main__ as commands
from gptoss_jax.errors import COMMON_OPTIONS, command_name, run_entry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptoss_jax"


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )


def test_every_command_is_listed_and_says_how_it_is_started():
    there = {}
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        if path.name != "__main__.py" and "    run_entry(main)" in text:
            there[path.stem] = ast.get_docstring(ast.parse(text)) or ""
    assert set(there) == set(commands.COMMANDS)
    for name, doc in there.items():
        assert f"python -m gptoss_jax.{name} " in doc


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands(argv, capsys):
    commands.main(argv)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: gptoss-jax COMMAND [OPTIONS]")
    assert all(f"  {name:<10}{what}\n" in shown for name, what in commands.COMMANDS.items())
    assert all(len(line) <= 100 for line in shown.splitlines())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smaple", "'smaple' is no command: did you mean sample?"),
        ("xyz", "'xyz' is no command: there are train, sample, convert, verify, inspect, plan"),
        ("--sample", "'--sample' is no command: did you mean sample?"),
    ],
)
def test_an_unknown_name_is_one_line_and_exit_code_2(name, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gptoss-jax", name])
    with pytest.raises(SystemExit) as stopped:
        run_entry(commands.main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith(f"error: {words}") and err.count("\n") == 1


def test_a_name_runs_its_command_with_the_rest(monkeypatch):
    module = importlib.import_module("gptoss_jax.report")
    seen = []
    monkeypatch.setattr(module, "main", seen.append)
    commands.main(["report", "a", "--out", "b"])
    assert seen == [["a", "--out", "b"]]


def test_help_names_the_command_as_it_was_started(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/gptoss-jax", "sample"])
    assert command_name("sample") == "gptoss-jax sample"
    monkeypatch.setattr("sys.argv", [str(PACKAGE / "sample.py")])
    assert command_name("sample") == "python -m gptoss_jax.sample"


def test_the_console_script_is_this():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["gptoss-jax"].partition(":")
    assert (module, getattr(commands, function)) == ("gptoss_jax.__main__", commands.run_script)


@pytest.mark.parametrize("name", [None, "sample", "convert", "verify", "inspect", "plan", "report"])
def test_help_waits_for_nothing_heavy(name):
    """Neither for JAX nor for what reads and writes; `train --help` needs the config's fields."""
    code = "import sys; from gptoss_jax.__main__ import main\n"
    code += "try: main(sys.argv[1:])\n"
    code += "except SystemExit as stop: assert stop.code == 0\n"
    code += "print(*sys.modules, file=sys.stderr)"
    done = python("-c", code, *([name] if name else []), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    loaded = set(done.stderr.split())
    heavy = {"jax", "flax", "optax", "orbax", "grain", "matplotlib", "pyarrow", "tiktoken", "tyro"}
    assert not heavy & loaded
    assert len(loaded) < 500  # jax, tyro and rich are 1,100


def test_a_config_file_finds_its_neighbours_from_the_console_script(tmp_path):
    """As with `python -m`, whose path begins with the current folder; the script's does not."""
    (tmp_path / "sizes.py").write_text("VOCABULARY = 700\n")
    (tmp_path / "mine.py").write_text(
        "from gptoss_jax.config import *\nfrom sizes import VOCABULARY\n"
        "def get_config(): return Config(model=ModelConfig(vocab_size=VOCABULARY))\n"
    )
    script = tmp_path / "bin" / "gptoss-jax"
    script.parent.mkdir()
    script.write_text("from gptoss_jax.__main__ import run_script\nrun_script()\n")
    done = python(str(script), "inspect", "--config", "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: there is no data.train: give --data.train FILE\n"


def test_nothing_is_reported_after_an_error():
    """Orbax's coroutines, which an error leaves behind, would be: "sys:1: RuntimeWarning"."""
    code = """
from gptoss_jax.errors import UserError, run_entry

left = []

async def save(): ...

def main(argv):
    left.append(save())
    raise UserError("the disk is full")

run_entry(main)
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (2, "error: the disk is full\n")


def test_the_package_lists_its_public_names():
    """They are imported on first use, and yet completion and `dir` know them."""
    names = dir(gptoss_jax)
    assert {"Config", "Sampler", "harmony", "load", "save", "__version__"} <= set(names)
    assert "importlib" not in names and set(gptoss_jax.__all__) <= set(names)
    assert all(hasattr(gptoss_jax, name) for name in names)


def test_every_package_that_the_tests_need_has_a_version_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().split()}

    def plain(name: str) -> str:  # PyPI reads "-", "_" and capitals alike
        return re.sub(r"[-_.]+", "-", name).lower()

    names = {plain(re.split(r"[<>=!\[ ]", requirement)[0]) for requirement in needed}
    assert names <= {plain(name) for name in pinned}


# --- Options of all commands -------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *commands.COMMANDS])
def test_every_command_says_its_version(name, capsys, monkeypatch):
    main = commands.main if name is None else importlib.import_module(f"gptoss_jax.{name}").main
    monkeypatch.setattr("sys.argv", ["gptoss-jax", "--version"])
    with pytest.raises(SystemExit) as stopped:
        run_entry(main)
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"gptoss-jax {gptoss_jax.__version__} (jax ")


@pytest.mark.parametrize("given", [["--log-level", "INFO"], ["--log_level=info"]])
def test_the_log_level_is_that_of_all_loggers(given):
    code = (
        "import sys, logging\n"
        "from gptoss_jax.errors import take_common_options\n"
        "rest = take_common_options(sys.argv[1:])\n"
        "for name in ('absl', 'orbax', 'gptoss_jax.ops'):\n"
        "    logging.getLogger(name).info('said by ' + name)\n"
        "    logging.getLogger(name).debug('never')\n"
        "print(rest)\n"
    )
    result = python("-c", code, "a", *given, "--out", "x")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['a', '--out', 'x']\n"
    assert result.stderr.count("said by") == 3 and "never" not in result.stderr


@pytest.mark.parametrize("given", [["--log-level", "loud"], ["--log-level"]])
def test_a_log_level_that_is_none_is_one_line(given, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gptoss-jax", "report", *given])
    with pytest.raises(SystemExit) as stopped:
        run_entry(commands.main)
    assert stopped.value.code == 2
    assert "it is one of debug, info, warning, error" in capsys.readouterr().err


def test_the_console_script_sets_the_level_before_jax_is_imported():
    """XLA reads the variable once, when JAX is imported, and the help says that it holds here."""
    code = (
        "import os, sys\n"
        "from gptoss_jax import __main__ as commands\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jax':\n"
        "            sys.exit(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "commands.run_script()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    result = python("-c", code, "train", "--log-level", "error", env=environment)
    assert result.stderr.strip() == "2"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_help_of_every_command_has_these_options(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"gptoss_jax.{name}").main(["--help"])
    assert COMMON_OPTIONS in capsys.readouterr().out


@pytest.mark.parametrize(("given", "level"), [([], "3"), (["--log-level", "warning"], "1")])
def test_a_plan_silences_xla_before_jax_is_imported(given, level):
    """XLA reads the variable once, when JAX is imported."""
    code = (
        "import os, sys\n"
        "from gptoss_jax import plan\n"
        "from gptoss_jax.errors import take_common_options\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jax':\n"
        "            print(os.environ.get('TF_CPP_MIN_LOG_LEVEL'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "take_common_options(sys.argv[1:])\n"
        "plan._keep_from_devices('h200')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    result = python("-c", code, *given, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [level]
