"""Which parameters a model has, and how code refers to them.

`table` describes each parameter, `tree` handles the parameter tree and its paths, and `patterns`
selects parameters by path. Imports: types, errors, chips, config. Every room that handles
parameters imports this one.
"""
