"""The source code of a model that a config file defines with `make_model(config)`.

A run keeps a copy of each version of the source that trained it, and records the path of the config
file and a hash. No code is loaded out of a workdir: to resume such a run, sample from it or convert
it, the user gives the config file again.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.parallel.hosts import processes

FOLDER = "model_source"


class ModelSource(NamedTuple):
    """The config file that defines the model, and a hash of it and of the model's own files."""

    file: str
    sha256: str


def source_of(make_model: MakeModel, config: ModelConfig) -> ModelSource | None:
    """Return the source of the model that `make_model` builds; None for `Transformer` itself.

    Raises:
        UserError: `make_model` does not return a Linen module like `Transformer`.
    """
    if make_model is Transformer:
        return None
    files = _files(make_model, config)
    digest = hashlib.sha256()
    for name, file in files.items():
        text = file.read_bytes()
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return ModelSource(_config_file(make_model), digest.hexdigest())


def keep_copy(make_model: MakeModel, config: ModelConfig, workdir: Path) -> None:
    """Copy the model's source into the workdir, for people to read: `model_source/HASH/`."""
    source = source_of(make_model, config)
    if source is None:
        return
    for name, file in _files(make_model, config).items():
        copy = _copy(source, workdir) / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def check(
    recorded: ModelSource | None, make_model: MakeModel, config: ModelConfig, *, whose: str | Path
) -> None:
    """Refuse to build a run's model with other code; print a line if its source has changed.

    Raises:
        UserError: a config file defines the run's model and the caller gives no `make_model`, or
            the run's model is the package's own and the caller gives one.
    """
    given = source_of(make_model, config)
    if recorded is None and given is None:
        return
    if given is None and recorded is not None:
        raise UserError(
            f"{whose}: its model is built by make_model() of {recorded.file} (sha256 "
            f"{recorded.sha256[:12]}), and no code is loaded out of a workdir: give --config "
            f"{recorded.file}, or make_model= in Python"
        )
    if recorded is None and given is not None:
        raise UserError(
            f"{whose}: its model is the package's own, and {given.file} defines make_model(): give "
            "the config that the run was trained with, or none"
        )
    assert recorded is not None and given is not None
    if recorded.sha256 != given.sha256 and processes.is_first():
        copy = _copy(recorded, Path(whose))
        changed = _differences(_files(make_model, config), copy)
        print(
            f"note: {whose} was trained with another version of its model: the files of "
            f"make_model() in {given.file} have changed ({', '.join(changed)}); those of the run "
            f"are in {copy}",
            file=sys.stderr,
        )


def _copy(source: ModelSource, workdir: Path) -> Path:
    """Return the folder in a workdir that holds this version of the source."""
    return workdir / FOLDER / source.sha256[:12]


def _differences(files: dict[str, Path], copy: Path) -> list[str]:
    """Return the names of files that differ from the copy, or that are missing on one side."""
    copied = {str(path.relative_to(copy)): path for path in copy.rglob("*.py")}
    return [
        name
        for name in sorted(files.keys() | copied.keys())
        if name not in files
        or name not in copied
        or files[name].read_bytes() != copied[name].read_bytes()
    ]


def _config_file(make_model: MakeModel) -> str:
    code = getattr(make_model, "__code__", None)
    return str(code.co_filename if code else inspect.getsourcefile(make_model))


def _files(make_model: MakeModel, config: ModelConfig) -> dict[str, Path]:
    """Return name -> file: the config file, and all files of the package with the model's class.

    If the class is not in a package, these are the files in the folder of its module.
    """
    model: Any = make_model(config)
    if not (hasattr(model, "forward") and hasattr(model, "config")):
        raise UserError(
            f"{_config_file(make_model)}: make_model() returned an object of type "
            f"{type(model).__name__}, which lacks the interface of gptoss_jax.model.Transformer"
        )
    file = Path(_config_file(make_model))
    files = {file.name: file}
    module = sys.modules.get(type(model).__module__)
    if module is None or module.__name__.startswith("gptoss_jax.model"):
        return files
    folder = Path(str(module.__file__)).parent
    found = folder.rglob("*.py") if module.__package__ else folder.glob("*.py")
    return files | {f"{folder.name}/{path.relative_to(folder)}": path for path in sorted(found)}
