"""The architecture: Linen modules that declare parameters and wire calls; maths is in `ops`."""

from collections.abc import Callable

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer as Transformer

# What builds the model: `Transformer`, or the `make_model` of a config file.
MakeModel = Callable[[ModelConfig], Transformer]
