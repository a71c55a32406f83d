"""A run over many devices: the mesh, how arrays are sharded, and ops that communicate.

This package imports ops, parameters, config and what they import. The model, loading and training
use it.
"""
