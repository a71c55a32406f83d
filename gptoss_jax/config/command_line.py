"""From a config file and the command line to a `Config`, and from a `Config` to JSON and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
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
from gptoss_jax.errors import UserError

_CONFIG_HELP = """A run: what get_config() of --config FILE returns, with every field an option.

  --config FILE         the file, such as configs/tiny.py; required, and shown here as the defaults
"""


def load(argv: Sequence[str], *, prog: str = "python -m gptoss_jax.train") -> Config:
    """Make the `Config` that a command line asks for.

    `--config FILE` names a Python file with `get_config()`; every other option overrides a field:
    `--model.num_layers 2`, `--data.train A B`. `-` and `_` are alike in names. `--help` prints the
    options with the config's own defaults and exits 0.

    Raises:
        UserError: no or no good config file, an unknown option, a value of the wrong type or out
            of its choices, or fields that do not fit each other.
    """
    path, overrides = _take_config_file(list(argv))
    wants_help = any(a in ("-h", "--help") for a in overrides)
    if path is None and not wants_help:
        raise UserError("no --config FILE was given; configs/tiny.py is one to start from")
    base = Config() if path is None else read_config_file(path)
    if not wants_help:
        _check_options(overrides)

    printed = io.StringIO()
    try:
        # Failures are reported by this module in one line, not by tyro's boxes.
        with contextlib.redirect_stderr(sys.stderr if wants_help else printed):
            return tyro.cli(
                Config, default=base, args=overrides, prog=prog, description=_CONFIG_HELP
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip(" │") for line in printed.getvalue().splitlines()]
        said = " ".join(line for line in lines if line and line[0] not in "╭╰─")
        raise UserError(said or "the options could not be read") from None


def load_make_model(argv: Sequence[str]) -> Callable[[ModelConfig], Any] | None:
    """Return the `make_model` of the config file that a command line names; None if it has none.

    Raises:
        UserError: as `load`, of the file.
    """
    path = _take_config_file(list(argv))[0]
    return None if path is None else read_make_model(path)


def read_make_model(path: str) -> Callable[[ModelConfig], Any] | None:
    """Return the `make_model` of a config file, which builds a model of one's own; None if none.

    Raises:
        UserError: no such file, an exception inside it, or a `make_model` that is no function.
    """
    with _errors_of(path):
        make_model = _run(path).get("make_model")
    if make_model is not None and not isinstance(make_model, types.FunctionType):
        raise UserError(
            f"{path}: make_model is a {type(make_model).__name__}: it has to be a function of a "
            "ModelConfig that returns the model"
        )
    return make_model


def read_config_file(path: str) -> Config:
    """Run the `get_config()` of a Python file.

    Raises:
        UserError: no such file, no `get_config`, an exception inside it (with its line), or
            something else than a `Config` returned.
    """
    with _errors_of(path):
        get_config = _run(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path} defines no get_config()")
        config = get_config()
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned a {type(config).__name__}, not a Config")
    return config


def _run(path: str) -> dict[str, Any]:
    """Run a config file, which may import what lies beside it or here; return what it defines."""
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file")
    for folder in (Path(path).resolve().parent, Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return runpy.run_path(path)


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Turn what a config file raises into a UserError with its line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        here = [frame.lineno for frame in frames if frame.filename == path]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
        where = line or (here[-1] if here else "?")
        raise UserError(f"{path}, line {where}: {type(error).__name__}: {error}") from None


def to_json(config: Config) -> str:
    """Write a config as JSON that `from_json` reads."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flat(config: Config) -> dict[str, Any]:
    """Return name -> value of every field, but for how processes find each other."""
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
    """Read a config from JSON; fields left out have their defaults.

    Raises:
        UserError: not JSON, an unknown field (with the nearest name), or a value of another type.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    return _from_record(Config, record, where=where, prefix="")


def print_config(config: Config, console: Console) -> None:
    """Print the resolved config, a block a section."""
    table = Table.grid(padding=(0, 2))
    top = {f: getattr(config, f) for f in ("name", "init", "workdir")}
    for section, part in (("run", top), *_sections(config)):
        text = Text()
        for name, value in part.items():
            shown = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            text.append(f"{name}=", style="dim").append(f"{shown}  ")
        table.add_row(Text(section, style="bold"), text)
    console.print(table)


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the suggestion "; did you mean X?" for a misspelt name, or nothing."""
    # A field alone ("stps") is compared with the fields' own names too.
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:
        last = {n.rsplit(".", 1)[-1]: n for n in names}
        found = difflib.get_close_matches(name.rsplit(".", 1)[-1].lstrip("-"), last, 1, 0.6)
        found = [last[n] for n in found]
    return f"; did you mean {found[0]}?" if found else ""


def _sections(config: Config) -> list[tuple[str, dict[str, Any]]]:
    parts = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    return [(n, dataclasses.asdict(p)) for n, p in parts if dataclasses.is_dataclass(p)]  # pyright: ignore[reportArgumentType]


def _take_config_file(args: list[str]) -> tuple[str | None, list[str]]:
    path = None
    rest: list[str] = []
    i = 0
    while i < len(args):
        name, equals, value = args[i].partition("=")
        if name != "--config":
            rest.append(args[i])
        elif equals:
            path = value
        else:
            i += 1
            if i == len(args) or args[i].startswith("--"):
                raise UserError("--config expects a file, such as configs/tiny.py")
            path = args[i]
        i += 1
    return path, rest


def _field_types(cls: type, prefix: str = "--") -> dict[str, Any]:
    """Map each option's name to its type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if name not in {f.name for f in dataclasses.fields(cls)}:
            continue
        if dataclasses.is_dataclass(hint):
            found |= _field_types(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def _check_options(args: list[str]) -> None:
    """Refuse what no field takes, in one line that says which option and what it expects."""
    hints = _field_types(Config)
    i = 0
    while i < len(args):
        given, equals, value = args[i].partition("=")
        name = given.replace("-", "_")
        name = "--" + name[2:] if name.startswith("__") else name
        hint = hints.get(name)
        positive = name.replace(".no_", ".").replace("--no_", "--")
        if hint is None and hints.get(positive) is bool:
            name, hint = positive, bool
        if hint is None:
            if not given.startswith("--"):
                raise UserError(f"{args[i]!r} belongs to no option; values follow their --option")
            raise UserError(f"unknown option {given}{nearest(name, list(hints))}")
        i += 1
        values = [value] if equals else []
        if not equals:
            while i < len(args) and not args[i].startswith("--"):
                values.append(args[i])
                i += 1
        _check_values(name, hint, values)


def _check_values(name: str, hint: Any, values: list[str]) -> None:
    if hint is bool:
        if values:
            off = name.replace(".", ".no_", 1) if "." in name else name.replace("--", "--no_", 1)
            raise UserError(f"{name} takes no value: write {name} or {off}, not {values[0]!r}")
        return
    if typing.get_origin(hint) is tuple:
        bad = [v for v in values if not _fits(typing.get_args(hint)[0], v)]
        if bad:
            raise UserError(f"{name} expects {_expects(hint)}, not {bad[0]!r}")
        return
    if not values:
        raise UserError(f"{name} expects a value: {_expects(hint)}")
    if len(values) > 1:
        raise UserError(f"{name} expects one value, not {' '.join(values)!r}")
    if not _fits(hint, values[0]):
        raise UserError(f"{name} expects {_expects(hint)}, not {values[0]!r}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    unions = (Union, types.UnionType)
    return typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)


def _expects(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", types.NoneType: "None"}
    words[bool] = "true or false"
    said = []
    for one in _alternatives(hint):
        if typing.get_origin(one) is Literal:
            said.append("one of " * (len(typing.get_args(one)) > 1) + _listed(one))
        elif typing.get_origin(one) is tuple:
            numbers = typing.get_args(one)[0] is float
            said.append("a list of numbers" if numbers else "a list of texts")
        else:
            said.append(words[one])
    return " or ".join(said)


def _listed(literal: Any) -> str:
    return ", ".join(str(choice) for choice in typing.get_args(literal))


def _fits(hint: Any, text: str) -> bool:
    for one in _alternatives(hint):
        if typing.get_origin(one) is Literal:
            if text in typing.get_args(one):
                return True
        elif one in (int, float):
            with contextlib.suppress(ValueError):
                one(text)
                return True
        elif one is str or (one is types.NoneType and text == "None"):
            return True
    return False


def _is(hint: Any, value: Any) -> bool:
    """Say whether a JSON value is of a field's type."""
    for one in _alternatives(hint):
        if typing.get_origin(one) is Literal:
            ok = value in typing.get_args(one)
        elif typing.get_origin(one) is tuple:
            ok = isinstance(value, list) and all(_is(typing.get_args(one)[0], v) for v in value)
        elif one is float:
            ok = isinstance(value, int | float) and not isinstance(value, bool)
        else:
            ok = isinstance(value, one) and (one is bool or not isinstance(value, bool))
        if ok:
            return True
    return False


def _from_record(cls: type, record: Any, *, where: str, prefix: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} is not a JSON object")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name not in names:
            raise UserError(f"{where}: unknown field {prefix}{name}{nearest(name, names)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _from_record(
                typing.cast(type, hint), value, where=where, prefix=f"{prefix}{name}."
            )
        elif not _is(hint, value):
            raise UserError(
                f"{where}: {prefix}{name} is {json.dumps(value)}; expected {_expects(hint)}"
            )
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
