"""Read and write checkpoint files as streams, in OpenAI's `original/` layout or Hugging Face's.

This package may import lora, parallel, parameters and the packages below them. `loading` and the
commands `convert` and `verify` import its modules; other code uses `save` only.
"""

from gptoss_jax.weights.write import save as save
