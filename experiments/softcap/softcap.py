"""The variant `softcap`: the same config, another model.

python -m gptoss_jax.train --config experiments/softcap/softcap.py
"""

from experiments.softcap.config import get_config as get_config
from experiments.softcap.model import Transformer
from gptoss_jax.config import ModelConfig


def make_model(config: ModelConfig) -> Transformer:
    """Build the model of the folder `model/` beside this file."""
    return Transformer(config)
