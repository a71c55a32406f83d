"""Checkpoint files in and out, as streams: OpenAI's `original/` layout and Hugging Face's.

Imports: lora, parallel, parameters and what comes before. `convert` and `loading` take these;
others take `save`.
"""

from gptoss_jax.weights.write import save as save
