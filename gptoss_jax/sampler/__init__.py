"""Sampling: prefill, a decode loop on the device, and the rules that choose a token."""

from gptoss_jax.sampler.rules import Rules as Rules
from gptoss_jax.sampler.sampler import Generation as Generation
from gptoss_jax.sampler.sampler import Sampled as Sampled
from gptoss_jax.sampler.sampler import Sampler as Sampler

__all__ = ["Generation", "Rules", "Sampled", "Sampler"]
