"""Find a checkpoint's folder, and read the config of its model."""

from __future__ import annotations

import re
from pathlib import Path

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.runs import records
from gptoss_jax.weights.read import open_checkpoint


def is_hub_name(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint can be a name on the hub, OWNER/NAME, by its form alone.

    A relative path of two folders has this form too. "./DIR" and "../DIR" do not.
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(checkpoint)) is not None


def is_away(checkpoint: str | Path) -> bool:
    """Return whether a checkpoint is no folder here, and may be on the hub."""
    return is_hub_name(checkpoint) and not Path(checkpoint).is_dir()


def find_folder(checkpoint: str | Path) -> Path:
    """Return the folder of a checkpoint; fetch it first if `checkpoint` is a name on the hub.

    Raises UserError if there is no such folder, and the hub has no such name or can't be reached.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if not is_hub_name(checkpoint):
        raise UserError(f"{checkpoint}: there is no such folder")
    import huggingface_hub  # takes half a second, and only a name on the hub needs it

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        other = ["original/*", "metal/*"]
        return Path(
            huggingface_hub.snapshot_download(
                str(checkpoint), allow_patterns=wanted, ignore_patterns=other
            )
        )
    except Exception as error:  # the hub's own errors, and those of its HTTP client
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{checkpoint}: there is no such folder, and the hub did not give it: {why}"
        ) from error


def read_config(checkpoint: str | Path) -> ModelConfig:
    """Read the config of a checkpoint's model from its headers alone, without its weights.

    Raises UserError as `load`, except for wrong values.
    """
    folder = find_folder(checkpoint)
    if records.is_workdir(folder):
        return records.read_record(folder).config.model
    return open_checkpoint(folder).config
