"""The architecture: Linen modules that declare parameters and wire calls; maths is in `ops`."""

from gptoss_jax.model.transformer import Transformer as Transformer
