"""GPT-OSS in JAX: train the model, inspect it, convert it, sample from it.

The package imports its names on first use, so that `gptoss_jax.ops` and `gptoss_jax.model` need
only jax and flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_jax import harmony
    from gptoss_jax.config import Config as Config
    from gptoss_jax.config import ModelConfig as ModelConfig
    from gptoss_jax.errors import UserError as UserError
    from gptoss_jax.harmony import tokenizer
    from gptoss_jax.loading import load as load
    from gptoss_jax.model import Transformer as Transformer
    from gptoss_jax.sampler import Sampler as Sampler
    from gptoss_jax.training.step import make_train_step as make_train_step
    from gptoss_jax.weights import save as save

_HOME = {
    "Config": "config",
    "ModelConfig": "config",
    "UserError": "errors",
    "Transformer": "model",
    "Sampler": "sampler",
    "make_train_step": "training.step",
    "load": "loading",
    "save": "weights",
}

__version__ = "0.1.0"
_MODULES = {"harmony": "harmony", "tokenizer": "harmony.tokenizer"}
__all__ = [
    "Config",
    "ModelConfig",
    "Sampler",
    "Transformer",
    "UserError",
    "harmony",
    "load",
    "make_train_step",
    "save",
    "tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"gptoss_jax.{_MODULES[name]}")
    if name in _HOME:
        return getattr(importlib.import_module(f"gptoss_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gptoss_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
