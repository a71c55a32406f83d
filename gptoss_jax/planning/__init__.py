"""What a run takes on hardware that is not here: the real programs, compiled and measured.

Imports: training, sampler and what comes before. `plan` and `train --dry-run` take these.
"""
