"""What parameters a model has, and how one speaks of them.

`table` says all that there is to say of each one, `tree` has the parameter tree and its paths,
`patterns` chooses among them. Imports: types, errors, chips, config. Every room that handles
parameters takes these.
"""
