"""LoRA: the adapters of a model, what is trained beside them, and how they are folded in.

`adapters` says where they are in the parameter tree, what their initial values are and how layers
find them. `select` says what is trained. `fold` adds them to the weights. Imports: ops, parallel
and the rooms below them. The model, weights, loading and training import this room.
"""
