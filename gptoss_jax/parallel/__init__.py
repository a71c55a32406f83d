"""A run over many devices: the mesh, what is split how, and ops that exchange between devices.

Imports: ops, parameters, config and what comes before. The model, loading and training take these.
"""
