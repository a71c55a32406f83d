"""The packages of a wheel: those of gptoss_jax/, and configs/ beside it, found there by name."""

from setuptools import find_packages, setup

CONFIGS = {"gptoss_jax.configs": "configs", "gptoss_jax.configs.rewards": "configs/rewards"}

setup(packages=[*find_packages(include=["gptoss_jax*"]), *CONFIGS], package_dir=CONFIGS)
