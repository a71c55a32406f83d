"""Optimizers that see a parameter as matrices: Adafactor and Muon on stacked parameters.

A stack of layers and experts is many matrices, each with its own statistics. Which axes stack, and
which are a matrix's rows, the table of parameters says. Weights are [out..., in...]: rows are
outputs.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import path_name
from gptoss_jax.types import Params


def scale_by_adafactor() -> optax.GradientTransformation:
    """Scale gradients by Adafactor's second moment, each matrix and vector by its own.

    Of a matrix with both sides of at least 128 the second moment is kept as a row and a column
    (optax's rule); of others, and of vectors, in full. The update of each matrix is clipped to a
    root mean square of 1. There is no momentum, and no scaling by the parameter's size, so that
    AdamW's learning rates carry over.

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
            # optax looks at the parameters' shapes and dtypes alone.
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
    """Return how many axes of a parameter stack, and how many after them are rows."""
    row, part, _ = table.place(path_name(path))
    if part:  # a [stack..., inputs..., r] or b [stack..., r, outputs...]
        return len(row.lead), len(row.inputs) if part == "a" else 1
    stack, rows, _ = row.groups
    return len(stack), len(rows)


def _view(path: tuple[Any, ...], x: jax.Array) -> tuple[jax.Array, int]:
    """Return a parameter as [stacked..., rows, columns] or [stacked..., n], and how many stack."""
    stack, rows = _groups(path)
    sides = x.shape[stack : stack + rows], x.shape[stack + rows :]
    return x.reshape(*x.shape[:stack], *(math.prod(side) for side in sides if side)), stack


def scale_by_muon_or_adam(
    *, b1: float, b2: float, eps: float, moment_dtype: DTypeLike
) -> optax.GradientTransformation:
    """Scale gradients by Muon where they are hidden matrices, and by Adam elsewhere.

    Muon makes each layer's and each expert's momentum nearly orthogonal by five Newton-Schulz
    steps: q, k and v as [N*H, D] matrices, o as [D, N*H], the experts' gate, up and down as three
    matrices each. The result times 0.2 * sqrt(max(rows, columns)) has the root mean square that
    Adam's updates usually have, so that AdamW's learning rate and weight decay carry over (Liu et
    al. 2025, arXiv:2502.16982, section 2.2).

    Jordan 2024, https://kellerjordan.github.io/posts/muon: embedding, output head and vectors are
    AdamW's. So is the router here, the head that chooses experts. `b1` is both's momentum.
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
            lambda path, _: "muon" if _is_muons(table.place(path_name(path))) else "adam", params
        ),
    )


def _is_muons(place: table.Place) -> bool:
    """Say whether Muon updates a parameter; adapters and the rest are Adam's."""
    return place.row.muon and not place.part


def _dimension_numbers(params: Any) -> Any:
    """Say for each matrix which axes are its rows and which its columns; others are stacked."""

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
