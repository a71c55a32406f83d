"""Find any checkpoint, read it, join it with its base and adapters, and return (model, params).

Imports: weights, runs, model, lora and what comes before. The commands, training, distillation and
planning use `load`, `read_config`, `read_rules`, `find_folder` and `ignoring`; training also uses
`resume` and `frozen_base`.
"""

from gptoss_jax.loading.checkpoint import load as load
from gptoss_jax.loading.folders import find_folder as find_folder
from gptoss_jax.loading.folders import read_config as read_config
from gptoss_jax.loading.rules import read_rules as read_rules
from gptoss_jax.weights.config_fields import ignoring as ignoring
