"""A run's folder (workdir): its lock, checkpoints, records, metrics and page.

Values and files alone: what of a checkpoint lies elsewhere (the base of a LoRA run) is found by
`loading`. Imports: parallel, parameters, config and what comes before.
"""
