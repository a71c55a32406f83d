"""A run's folder (workdir): its lock, checkpoints, records, metrics and report page.

This package handles only values and the workdir's own files. The base of a LoRA run lies elsewhere:
`loading` finds it. Imports: parallel, parameters, config and what comes before.
"""
