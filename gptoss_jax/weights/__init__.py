"""Read and write checkpoint files as streams, in OpenAI's `original/` layout or Hugging Face's.

This package imports lora, parallel, parameters and what they import. `convert` and `loading` import
its modules; all other code imports `save` only.
"""

from gptoss_jax.weights.write import save as save
