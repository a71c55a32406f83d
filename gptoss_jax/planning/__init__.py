"""What a compiled program costs on a device that is not here: see `gptoss_jax.plan`."""
