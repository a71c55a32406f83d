"""Optimizers that see a parameter as matrices: Adafactor and Muon on stacked parameters.

A stack of layers and experts is many matrices, each with its own statistics. The table of
parameters says which axes are stacked, and which are a matrix's rows. Weights are [out..., in...]:
rows are outputs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, path_name
from gptoss_jax.types import Params


def scale_by_adafactor() -> optax.GradientTransformation:
    """Scale gradients by Adafactor's second moment, each matrix and vector by its own.

    For a matrix with both sides of at least 128, the second moment is stored as a row and a column
    (optax's rule); for other matrices and for vectors, in full. The update of each matrix is
    clipped to a root mean square of 1. There is no momentum, and no scaling by the parameter's
    size, so that AdamW's learning rates carry over.

    Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5, without relative steps; without
    the parameter's size as in Zhai et al. 2021, arXiv:2106.04560, section 3.4.
    """
    one = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    counted = (optax.FactoredState(count=None, v_row=0, v_col=0, v=0), optax.EmptyState())  # pyright: ignore[reportArgumentType]

    def init_leaf(path: tuple[Any, ...], param: jax.Array) -> Any:
        view, batch = _view(path, param)
        init = one.init
        for _ in range(batch):
            init = jax.vmap(init, out_axes=counted)
        return init(view)

    def init(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(init_leaf, params)

    def update_leaf(path: tuple[Any, ...], grad: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        view, batch = _view(path, grad)

        def update(grad: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            # The gradient stands in for the parameters: optax reads only their shapes and dtypes.
            return one.update(grad, state, grad)  # pyright: ignore[reportReturnType]

        for _ in range(batch):
            update = jax.vmap(update, in_axes=(0, counted), out_axes=(0, counted))
        scaled, state = update(view, state)
        return scaled.reshape(grad.shape), state

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        del params
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        states = tree.flatten_up_to(state)
        done = [update_leaf(path, g, s) for (path, g), s in zip(leaves, states, strict=True)]
        return tuple(jax.tree.unflatten(tree, part) for part in zip(*done, strict=True))  # pyright: ignore[reportReturnType]

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _groups(path: tuple[Any, ...]) -> tuple[int, int]:
    """Return how many axes of a parameter are stacked, and how many after them are rows."""
    row, part, _ = table.place(path_name(path))
    if part:  # a [stack..., inputs..., r] or b [stack..., r, outputs...]
        return len(row.lead), len(row.inputs) if part == "a" else 1
    stack, rows, _ = row.groups
    return len(stack), len(rows)


def _view(path: tuple[Any, ...], x: jax.Array) -> tuple[jax.Array, int]:
    """Return a parameter as [stack..., rows, columns] or [stack..., n], and how many axes stack."""
    stack, rows = _groups(path)
    sides = x.shape[stack : stack + rows], x.shape[stack + rows :]
    return x.reshape(*x.shape[:stack], *(math.prod(side) for side in sides if side)), stack


def scale_by_muon_or_adam(
    *, b1: float, b2: float, eps: float, moment_dtype: DTypeLike
) -> optax.GradientTransformation:
    """Scale the gradients of hidden matrices by Muon, and all others by Adam.

    Muon makes each layer's and each expert's momentum nearly orthogonal by five Newton-Schulz
    steps: q, k and v as [N*H, D] matrices, o as [D, N*H], the experts' gate, up and down as three
    matrices each. The result times 0.2 * sqrt(max(rows, columns)) has the root mean square that
    Adam's updates usually have, so that AdamW's learning rate and weight decay carry over (Liu et
    al. 2025, arXiv:2502.16982, section 2.2).

    As in Jordan 2024, https://kellerjordan.github.io/posts/muon, AdamW updates the embedding, the
    output head and vectors. Here it also updates the router, the head that chooses experts. `b1` is
    the momentum of both.
    """
    return optax.partition(
        {
            "muon": optax.chain(
                scale_by_muon(
                    beta=b1, mu_dtype=moment_dtype, weight_dimension_numbers=_dimension_numbers
                ),
                optax.stateless(lambda updates, _: _to_rms_of_adam(updates)),
            ),
            "adam": optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=moment_dtype),
        },
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if _uses_muon(table.place(path_name(path))) else "adam", params
        ),
    )


def has_matrix_for_muon(trained: Params) -> bool:
    """Return whether Muon updates any of these parameters; if not, all get AdamW."""
    return any(_uses_muon(table.place(path)) for path in flatten(trained))


def _uses_muon(place: table.Place) -> bool:
    """Return whether Muon updates a parameter; Adam updates adapters and the rest."""
    return place.row.muon and not place.part


def _dimension_numbers(params: Any) -> Any:
    """Return which axes of each matrix are its rows and columns; other axes are stacked."""

    def of_leaf(path: tuple[Any, ...], x: jax.Array) -> MuonDimensionNumbers:
        stack, rows = _groups(path)
        middle = stack + rows
        return MuonDimensionNumbers(
            reduction_axis=tuple(range(middle, x.ndim)), output_axis=tuple(range(stack, middle))
        )

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def _to_rms_of_adam(updates: Any) -> Any:
    def of_leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return 0.2 * math.sqrt(max(_view(path, x)[0].shape[-2:])) * x

    return jax.tree_util.tree_map_with_path(of_leaf, updates)
