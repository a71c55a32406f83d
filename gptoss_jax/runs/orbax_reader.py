"""Arrays out of folders that orbax wrote, as they were written; and orbax kept off the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.errors import UserError
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs import checksums

# Of what orbax and tensorstore leave behind in other threads when one of many reads or writes
# fails: each of the others says later, in many lines, that nobody waited for it.
_ECHOES = ("Event loop is closed", "TensorStore", "tensorstore")


class DamagedError(UserError):
    """A checkpoint of which something is missing, cut short or changed."""


class UnreadableError(Exception):
    """What orbax said, in short; whether it can come of the files, rather than of the machine."""

    def __init__(self, error: Exception) -> None:
        said = (str(error).strip().splitlines() or [""])[0].split(" See full")[0][:160]
        super().__init__(f"{type(error).__name__}: {said}")
        machine = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
        self.is_damage = not isinstance(error, machine)


def read_items(
    folder: Path,
    targets: Mapping[str, Any],
    *,
    sums: Mapping[str, Mapping[str, int]] | None,
    resize: bool = False,
    expert_padding: int = 0,
) -> dict[str, Any]:
    """Read the items of a checkpoint, each as `read_arrays`, and hold them against checksums.

    Args:
        folder: The checkpoint's, with a folder an item.
        targets: By item, what `read_arrays` takes.
        sums: By item, `checksums` of what was written; None: unknown.
        resize: As `read_arrays`.
        expert_padding: What of experts in `targets` a mesh added.

    Raises:
        DamagedError: what is there is not what was written, or arrays of other shapes.
        UserError: it can't be read, for another reason. Each in one line, with the checkpoint.
    """
    restored: dict[str, Any] = {}
    for name, target in targets.items():
        if not processes.from_first((folder / name).is_dir):
            raise DamagedError(f"checkpoint {folder} has no {name}: it is not whole")
        read = partial(_read_item, folder, name, target, resize=resize)
        restored[name] = processes.together(read)
        if sums is not None:
            found = checksums.checksums(restored[name], expert_padding=expert_padding)
            wrong = checksums.differences(dict(sums.get(name, {})), found)
            if wrong:
                more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
                raise DamagedError(
                    f"checkpoint {folder}: its {name} is damaged: {wrong[0]}{more} is not what was "
                    "written, by its checksum"
                )
    return restored


def _read_item(folder: Path, name: str, target: Any, *, resize: bool) -> Any:
    try:
        return read_arrays(folder / name, target, resize=resize)
    except UnreadableError as error:
        where = f"checkpoint {folder}: its {name}"
        if error.is_damage:
            raise DamagedError(f"{where} is cut short or damaged ({error})") from None
        raise UserError(f"{where} can't be read ({error})") from None


def read_arrays(folder: Path, target: Any, *, resize: bool = False) -> Any:
    """Read a tree into the shapes, dtypes and shardings of `target` (by default the first device).

    Arrays of other shapes are an error; with `resize` they are cut short, or filled up with zeros.
    Each process of several reads what its own devices need, and waits for no other.

    Raises:
        UnreadableError: whatever goes wrong.
    """
    import orbax.checkpoint as ocp  # as long to import as jax, and a folder of weights needs none

    quiet()
    for _ in range(60):  # a network's file systems may show late what another host wrote
        if folder.is_dir() or processes.is_first():
            break
        time.sleep(1)
    # Kept from orbax's barriers: one process may find damage that the others do not see.
    me = processes.index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as reader:
            return reader.restore(folder, jax.tree.map(_abstract, target), strict=not resize)
    except Exception as error:
        raise UnreadableError(error) from None


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.local_devices()[0]
    )
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def quiet() -> None:
    """Keep off the terminal what orbax says, in this process; what is wrong is raised."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if not any(echo in str(unraisable.exc_value) for echo in _ECHOES):
            before(unraisable)

    if before.__module__ != __name__:
        sys.unraisablehook = show
