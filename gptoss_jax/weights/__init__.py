"""Checkpoints in and out: OpenAI's `original/` layout, the Hugging Face one, and workdirs."""

from __future__ import annotations

from gptoss_jax.weights.read import load, read_config
from gptoss_jax.weights.write import save

__all__ = ["load", "read_config", "save"]
