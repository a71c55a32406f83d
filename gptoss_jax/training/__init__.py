"""Parts of the training loop: the step, evaluation, loss spikes, logging and terminal output.

Imports: objectives, optimizer, loading, sampler and what comes before. `train.py` combines the
parts.
"""
