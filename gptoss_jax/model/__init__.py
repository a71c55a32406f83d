"""The architecture: Linen modules that declare parameters and call the maths in `ops`."""

from collections.abc import Callable

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.transformer import Transformer as Transformer

# A function that builds the model: `Transformer`, or the `make_model` of a config file.
MakeModel = Callable[[ModelConfig], Transformer]
