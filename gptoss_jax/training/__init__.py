"""The training loop's parts: the step, evaluation, spikes, what is logged and shown.

Imports: objectives, optimizer, loading, sampler and what comes before. `train.py` puts them
together.
"""
