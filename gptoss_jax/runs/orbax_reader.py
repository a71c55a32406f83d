"""Read arrays from folders that orbax wrote, check them, and keep orbax's logs off the terminal."""

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

# If one of many reads or writes fails, orbax and tensorstore leave the others behind in threads.
# Each of these later prints, in many lines, that nobody awaited it. These words mark such messages.
_ECHOES = ("Event loop is closed", "TensorStore", "tensorstore")


class DamagedError(UserError):
    """Part of a checkpoint is missing, cut short or changed."""


class UnreadableError(Exception):
    """An error of orbax, shortened. `is_damage`: its cause may be the files, not the machine."""

    def __init__(self, error: Exception) -> None:
        message = (str(error).strip().splitlines() or [""])[0].split(" See full")[0][:160]
        super().__init__(f"{type(error).__name__}: {message}")
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
    """Read each item of a checkpoint with `read_arrays`, and compare it with its checksums.

    Args:
        folder: The folder of the checkpoint; it holds one folder for each item.
        targets: The `target` of `read_arrays` for each item.
        sums: The `checksums` of each item as written; None if they are unknown.
        resize: As in `read_arrays`.
        expert_padding: The number of columns that a mesh added to experts in `targets`.

    Raises:
        DamagedError: the content differs from what was written, or arrays have other shapes.
        UserError: the item can't be read for another reason. Both messages are one line that names
            the checkpoint.
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
    """Read a tree into the shapes, dtypes and shardings of `target` (default: the first device).

    Arrays of other shapes are an error, unless `resize` is set: then they are cut, or padded with
    zeros. Each process reads only what its own devices need, and does not wait for the others.

    Raises:
        UnreadableError: reading fails for any reason.
    """
    import orbax.checkpoint as ocp  # slow to import, like jax; folders of weights do not need it

    quiet()
    for _ in range(60):  # a network file system may show late what another host wrote
        if folder.is_dir() or processes.is_first():
            break
        time.sleep(1)
    # Without orbax's barriers: one process may find damage that the others do not see.
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
    """Keep orbax's logs off the terminal, in this process; errors are still raised."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if not any(echo in str(unraisable.exc_value) for echo in _ECHOES):
            before(unraisable)

    if before.__module__ != __name__:
        sys.unraisablehook = show
