"""The mathematics as functions of arrays, without Flax and without configuration.

Each op has a simple `reference.py` to compare with, an XLA implementation, and kernels. This
package imports only types, errors and chips. The model, `parallel` and `objectives` use it.
"""
