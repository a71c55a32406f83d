"""What a softcap on attention's logits costs where attention has to be sharp.

    python experiments/run.py softcap

Hardware: any; about 10 minutes on two cores. Result: experiments/README.md.

This file is the baseline, the package's own model: the variant `learned` of `sinks`, with its data
and fewer steps. The variant `softcap` is softcap.py, which brings a model of its own.
"""

import dataclasses

from experiments.sinks.config import get_config as get_sinks_config
from gptoss_jax.config import Config

VARIANTS = ("baseline", "softcap")
CHANGES = ()  # no field of the config
CONFIGS = {"softcap": "softcap.py"}  # a variant with a file of its own
STEPS = 500


def get_config(variant: str = VARIANTS[0]) -> Config:
    """Return the config, the same for both variants."""
    base = get_sinks_config("learned")
    train = dataclasses.replace(base.train, steps=STEPS, checkpoint_every=STEPS)
    return dataclasses.replace(base, name="softcap", train=train)
