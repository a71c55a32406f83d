"""Any checkpoint to (model, params): found, read, and joined with its base and adapters.

Imports: weights, runs, model, lora and what comes before. The commands, training, distillation and
planning take `load`, `read_config`, `find_folder`; training takes `resume` and `frozen_base` too.
"""

from gptoss_jax.loading.checkpoint import load as load
from gptoss_jax.loading.folders import find_folder as find_folder
from gptoss_jax.loading.folders import read_config as read_config
