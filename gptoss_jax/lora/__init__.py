"""LoRA: the adapters of a model, what of it they leave trained, and how they are folded in.

`adapters` says where they live in the parameter tree, how they begin and how layers find them,
`select` what is trained, `fold` adds them to the weights. Imports: ops, parallel and what comes
before. The model, weights, loading and training take these.
"""
