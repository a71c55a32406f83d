"""Make a `Config` from a config file and the command line; convert a `Config` to JSON and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.errors import COMMON_OPTIONS, Parser, UserError, command_name

_CONFIG_HELP = (
    """Start from get_config() of --config FILE; each option overrides one field.

  --config FILE         a file, or the name of a config that ships, such as tiny; required. The
                        defaults below are the values of that config

"""
    + COMMON_OPTIONS
)


def load(argv: Sequence[str], *, prog: str | None = None) -> Config:
    """Make the `Config` that a command line asks for.

    `--config FILE` names a Python file with `get_config()`, or a config that ships. Every other
    option overrides a field: `--model.num_layers 2`, `--data.train A B`. Option names may use `-`
    or `_`. `--help` prints the options with the config's own values as defaults, and exits with 0.

    Raises:
        UserError: a config file that is missing or broken, an unknown option, a value of the wrong
            type or not among the choices, or options or fields that contradict each other.
    """
    file, overrides = _given_config(argv)
    wants_help = any(a in ("-h", "--help") for a in overrides)
    if file is None and not wants_help:
        raise UserError("no --config FILE was given; configs/tiny.py is one to start from")
    base = Config() if file is None else read_config_file(file)
    if wants_help:
        prog = prog or command_name("train")
        return _parse(["--help"], base, show=True, prog=prog, description=_CONFIG_HELP)
    groups = _grouped(overrides)
    given = {_name(option) for option, *_ in groups}
    if {"--train.steps", "--train.epochs"} <= given:
        raise UserError("--train.steps and --train.epochs both say how long a run is: give one")
    if "--train.steps" in given:  # instead of the epochs that the config file may have
        overrides = [*overrides, "--train.epochs", "0"]
    try:
        return _parse(overrides, base)
    except SystemExit:
        raise UserError(_first_bad(groups, base)) from None


def load_make_model(argv: Sequence[str]) -> Callable[[ModelConfig], Any] | None:
    """Return `make_model` of the config file that a command line names, or None if it has none.

    Raises:
        UserError: as `read_make_model`.
    """
    given = _given_config(argv)[0]
    return None if given is None else read_make_model(given)


def read_make_model(given: str) -> Callable[[ModelConfig], Any] | None:
    """Return `make_model` of a config file, which builds the user's own model, or None.

    Raises:
        UserError: no such file, an exception inside it, or a `make_model` that is not a function.
    """
    path = find_config_file(given)
    make_model = _run(path).get("make_model")
    if make_model is not None and not isinstance(make_model, types.FunctionType):
        raise UserError(
            f"{path}: make_model is of type {type(make_model).__name__}: it has to be a function "
            "that takes a ModelConfig and returns the model"
        )
    return make_model


def _given_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of --config, and the other arguments."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    given, overrides = parser.parse_known_args(argv)
    return given.config, overrides


def find_config_file(given: str) -> str:
    """Return the path of a config, given as a file or as the name of one that ships, like tiny.

    Raises:
        UserError: it is neither; the message lists the configs that ship.
    """
    if Path(given).is_file():
        return given
    package = Path(__file__).parents[1]
    folder = package / "configs"  # in a wheel, see setup.py
    if not folder.is_dir():
        folder = package.parent / "configs"  # in a checkout
    path = folder / f"{given}.py"
    if path.parent == folder and path.is_file():
        return str(path)
    names = sorted(path.stem for path in folder.glob("*.py"))
    raise UserError(
        f"--config {given}: no such file{nearest(Path(given).stem, names)}; the configs that ship "
        f"are {', '.join(names)}"
    )


def read_config_file(given: str) -> Config:
    """Run `get_config()` of a config file, given by its path or as the name of one that ships.

    Raises:
        UserError: no such file, no `get_config`, an exception inside it (with its line), or a
            return value that is not a `Config`.
    """
    path = find_config_file(given)
    names = _run(path)
    if "get_config" not in names:
        raise UserError(f"{path} defines no get_config()")
    with _blaming(path):
        config = names["get_config"]()
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned a {type(config).__name__}, not a Config")
    return config


def _run(path: str) -> dict[str, Any]:
    """Run a config file and return the names it defines.

    It may import modules from its own folder and from the current one.
    """
    for folder in (Path(path).resolve().parent, Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    with _blaming(path):
        return runpy.run_path(path)


@contextlib.contextmanager
def _blaming(path: str) -> Iterator[None]:
    """Turn an exception in a config file into a `UserError` that names the file and the line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        here = [frame.lineno for frame in frames if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else None
        where = line or (here[-1] if here else "?")
        raise UserError(f"{path}, line {where}: {type(error).__name__}: {error}") from None


def to_json(config: Config) -> str:
    """Return a config as JSON, which `from_json` reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flat(config: Config) -> dict[str, Any]:
    """Map each field's name to its value, without the section `distributed`."""
    found: dict[str, Any] = {}

    def collect(record: dict[str, Any], prefix: str) -> None:
        for name, value in record.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    collect(dataclasses.asdict(config), "")
    return {name: value for name, value in found.items() if not name.startswith("distributed.")}


def from_json(text: str, *, where: str = "config.json") -> Config:
    """Read a config from JSON; missing fields get their defaults.

    Raises:
        UserError: not JSON, an unknown field (with the nearest name), or a value of the wrong type.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    try:
        return _from_record(Config, record)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def print_config(config: Config, console: Console) -> None:
    """Print the resolved config, one block per section."""
    table = Table.grid(padding=(0, 2))
    record = dataclasses.asdict(config)
    sections = {"run": {name: record[name] for name in ("name", "init", "workdir")}}
    sections |= {name: part for name, part in record.items() if isinstance(part, dict)}
    for section, part in sections.items():
        text = Text()
        for name, value in part.items():
            shown = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            text.append(f"{name}=", style="dim").append(f"{shown}  ")
        table.add_row(Text(section, style="bold"), text)
    console.print(table)


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the suggestion "; did you mean X?" for a misspelt name, or nothing."""
    # A name without its section ("stps") is also compared with the names without sections.
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:
        last = {n.rsplit(".", 1)[-1]: n for n in names}
        found = difflib.get_close_matches(name.rsplit(".", 1)[-1].lstrip("-"), last, 1, 0.6)
        found = [last[n] for n in found]
    return f"; did you mean {found[0]}?" if found else ""


def _parse(args: Sequence[str], base: Config, *, show: bool = False, **texts: Any) -> Config:
    return tyro.cli(Config, default=base, args=args, console_outputs=show, **texts)


def _option_types(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Map each option's name to its type. A bool has two names, x and no_x."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= _option_types(hint, f"{prefix}{name}.")
            continue
        found[f"--{prefix}{name}"] = hint
        if hint is bool:
            found[f"--{prefix}no_{name}"] = hint
    return found


def _name(option: str) -> str:
    return "--" + option[2:].partition("=")[0].replace("-", "_")


def _grouped(args: Sequence[str]) -> list[list[str]]:
    """Group each option with its values. Raises UserError for an unknown option."""
    groups: list[list[str]] = []
    names = list(_option_types())
    for arg in args:
        if not arg.startswith("--"):
            if not groups:
                raise UserError(f"{arg!r} belongs to no option: write values after their --option")
            groups[-1].append(arg)
        elif _name(arg) in names:
            groups.append([arg])
        else:
            given = arg.partition("=")[0]
            raise UserError(f"unknown option {given}{nearest(_name(arg), names)}")
    return groups


def _first_bad(groups: list[list[str]], base: Config) -> str:
    """Say in one line which option tyro refuses, and what that option expects."""
    for option, *values in groups:
        try:
            _parse([option, *values], base)
        except UserError:  # its value is valid, but only together with the other options
            continue
        except SystemExit:
            name, (_, equals, value) = _name(option), option.partition("=")
            given = " ".join([value, *values] if equals else values)
            hint = _option_types()[name]
            if hint is bool:
                on = re.sub(r"\bno_(\w+)$", r"\1", name)
                off = re.sub(r"(\w+)$", r"no_\1", on)
                return f"{name} takes no value: write {on} or {off}, not {given!r}"
            if not given:
                return f"{name} expects a value: {_expects(hint)}"
            return f"{name} expects {_expects(hint)}, not {given!r}"
    return "the options do not go together"  # each one is valid alone


def _expects(hint: Any) -> str:
    """Say in words which values a type allows."""
    kind, choices = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_expects, choices))
    if kind is Literal:
        return "one of " * (len(choices) > 1) + ", ".join(choices)
    if kind is tuple:
        return "a list of numbers" if choices[0] is float else "a list of texts"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(hint, "None")


def _is(hint: Any, value: Any) -> bool:
    """Say whether a JSON value has a field's type."""
    kind, choices = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_is(choice, value) for choice in choices)
    if kind is Literal:
        return value in choices
    if kind is tuple:
        return isinstance(value, list) and all(_is(choices[0], v) for v in value)
    return type(value) is hint or (hint is float and type(value) is int)


def _from_record(cls: Any, record: Any, *, prefix: str = "") -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the file'} is not a JSON object")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name not in hints:
            raise UserError(f"unknown field {prefix}{name}{nearest(name, list(hints))}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _from_record(hint, value, prefix=f"{prefix}{name}.")
        elif not _is(hint, value):
            raise UserError(f"{prefix}{name} is {json.dumps(value)}; expected {_expects(hint)}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
