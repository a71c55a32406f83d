"""Plan a run for absent hardware: compile its real programs, and read their memory and work.

Imports: training, sampler and what comes before. `plan` and `train --dry-run` use this package.
"""
