"""The maths, as functions of arrays: no Flax, no configuration.

Each op has a `reference.py` that is plainly right, an XLA form, and kernels. Imports: types,
errors, chips. The model, `parallel` and `objectives` take these.
"""
