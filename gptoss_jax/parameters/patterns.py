"""Patterns of paths: which parameters are trained, and at which learning rate.

A pattern is a path of the parameter tree in which `*` stands for any characters, slashes too:

    embedding/weight            layers/attention/*          */q_weight          *bias

Brackets after `layers` or `experts` select along that axis of the stacked parameters, by numbers
from 0, ranges that include both ends, and open ranges:

    layers[0-11]/*              layers[12-15,20]/attention/*            layers[8-]/experts[0,3,7]/*

`experts[top4]` selects, in each layer, the four experts with the highest load on the user's data.
`experts[...]` selects the experts' own parameters only; the router's are `layers/router/*`.

A parameter is trained unless `optimizer.freeze` names it, or `optimizer.only` is given and does not
name it. Its learning rate is multiplied by the factor of the last pattern in
`optimizer.learning_rates` that names it (0 freezes it). Packed weights are never trained.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from gptoss_jax.config import OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import MXFP4, Params, Relaid

_BRACKETS = {"layers": "layers[0-3]", "experts": "experts[0,3]"}  # axis -> an example


class _Item(NamedTuple):
    """One item in brackets: a range that includes both ends (`last` None: open), or top experts."""

    first: int = 0
    last: int | None = None
    top: int = 0  # how many experts, by load; 0: the item is a range


@dataclass(frozen=True)
class _Pattern:
    field: str  # the config field, for messages
    text: str
    path: str  # without brackets
    chosen: dict[str, tuple[_Item, ...]]  # "layers" or "experts" -> items in brackets

    def matches(self, path: str) -> bool:
        """Return whether the pattern, without its brackets, matches a path."""
        return bool(re.fullmatch(".*".join(map(re.escape, self.path.split("*"))), path))

    def error(self, what: str) -> UserError:
        """Return an error about this pattern."""
        return UserError(f"{self.field} has {self.text!r}: {what}")


def needs_load(config: OptimizerConfig) -> bool:
    """Return whether a pattern selects experts by load, so that `masks` needs `load`.

    Raises:
        UserError: as `masks`, for errors that do not depend on the model.
    """
    rates = [p for p, _ in _learning_rates(config)]
    freeze, only = _parse("optimizer.freeze", config.freeze), _parse("optimizer.only", config.only)
    return any(_has_top(p) for p in (*freeze, *only, *rates))


def masks(
    params: Params, config: OptimizerConfig, *, load: Float[np.ndarray, "L E"] | None = None
) -> Params:
    """Return the learning-rate factor of each parameter, as a tree like `params`.

    A leaf is a float if one factor holds for the whole parameter (1.0: fully trained; 0.0: frozen,
    as packed weights are). Otherwise it is a float32 array that broadcasts to the parameter,
    [L, 1, ...] or [L, E, 1, ...].

    Args:
        params: Arrays, or their shapes.
        config: Only `freeze`, `only` and `learning_rates` are read.
        load: Each expert's share of the rows; required if `needs_load`. It decides which experts
            are selected, but not how many: to check patterns or to count, any load will do.

    Raises:
        UserError: a pattern that matches nothing (the message names the nearest path), brackets
            that can't be read, an index out of range, an axis that the parameter does not have,
            `only` or a learning rate for packed weights alone, a factor that is not a number of at
            least 0, or nothing left to train.
    """
    leaves = flatten(params)
    sizes = _sizes(leaves)
    rates = _learning_rates(config)
    freeze, only = _parse("optimizer.freeze", config.freeze), _parse("optimizer.only", config.only)
    for pattern in (*freeze, *only, *(p for p, _ in rates)):
        _check(pattern, leaves, sizes)

    flat: dict[str, float | np.ndarray] = {}
    for path, leaf in leaves.items():

        def chosen(pattern: _Pattern, path: str = path, ndim: int = leaf.ndim) -> np.ndarray:
            return _chosen(pattern, path, ndim, sizes=sizes, load=load)

        factor = np.ones((1,) * leaf.ndim, np.float32)
        for pattern, value in rates:
            factor = np.where(chosen(pattern), np.float32(value), factor)
        if only:
            wanted = [chosen(pattern) for pattern in only]
            factor = factor * np.any(np.broadcast_arrays(*wanted), axis=0)
        for pattern in freeze:
            factor = np.where(chosen(pattern), np.float32(0), factor)
        if isinstance(leaf, MXFP4 | Relaid) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            factor = np.zeros((1,) * leaf.ndim, np.float32)
        uniform = np.all(factor == factor.flat[0])
        flat[path] = float(factor.flat[0]) if uniform else factor.astype(np.float32)
    if not any(np.any(f) for f in flat.values()):
        raise UserError(
            "optimizer.freeze, only and learning_rates leave no parameter to train; `freeze` wins "
            "over `only`, and packed experts are never trained"
        )
    return nest(flat)


def frozen_paths(factors: Params) -> tuple[str, ...]:
    """Return the paths whose factor is 0 everywhere: for `optimizer.split_trainable`."""
    return tuple(path for path, factor in flatten(factors).items() if not np.any(factor))


def describe(params: Params, factors: Params) -> list[str]:
    """Return lines that say what is trained: one per parameter, the total, and selected experts.

    A packed weight counts the elements of the array that it stands for.
    """
    flat, rows = flatten(factors), []
    trained = total = 0
    for path, leaf in flatten(params).items():
        factor, size = np.asarray(flat[path]), math.prod(leaf.shape)
        count = np.count_nonzero(factor) * (size // factor.size)
        trained, total = trained + count, total + size
        packed = isinstance(leaf, MXFP4 | Relaid)
        note = "packed: never trained" if packed else _describe_factor(factor)
        rows.append((path, f"{count:,}", f"{size:,}", note))
    rows.append(("all", f"{trained:,}", f"{total:,}", ""))
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{p:<{wide[0]}}  {c:>{wide[1]}} of {s:>{wide[2]}}  {note}".rstrip()
        for p, c, s, note in rows
    ]
    return lines + _describe_experts(flat)


def named(
    field: str, texts: Mapping[str, str], paths: Sequence[str], *, otherwise: str
) -> list[str]:
    """Return those of `paths` that some pattern matches, whatever its brackets contain.

    Args:
        field: The config field of the patterns, for messages.
        texts: Pattern -> the text that the user wrote for it.
        paths: The paths to choose from.
        otherwise: The error message for a pattern that matches none of them.

    Raises:
        UserError: a pattern matches none of `paths`, or its brackets can't be read.
    """
    found = [dataclasses.replace(p, text=texts[p.text]) for p in _parse(field, list(texts))]
    for pattern in found:
        if not any(pattern.matches(path) for path in paths):
            raise pattern.error(otherwise)
    return [path for path in paths if any(pattern.matches(path) for pattern in found)]


def selected(
    field: str,
    texts: Mapping[str, str],
    leaves: Mapping[str, Any],
    *,
    load: Float[np.ndarray, "L E"] | None,
) -> dict[str, Bool[np.ndarray, "..."]]:
    """Return path -> a mask of what some pattern selects; it broadcasts to the parameter.

    `leaves` are all parameters of a model by path; the rest is as in `named` and `masks`.

    Raises:
        UserError: as `masks`.
    """
    flat = dict(leaves)
    sizes = _sizes(flat)
    found = [dataclasses.replace(p, text=texts[p.text]) for p in _parse(field, list(texts))]
    for pattern in found:
        _check(pattern, flat, sizes)
    every = {}
    for path, leaf in flat.items():
        where = [_chosen(p, path, leaf.ndim, sizes=sizes, load=load) for p in found]
        every[path] = np.any(np.broadcast_arrays(*where), axis=0)
    return every


def chooses_by_load(texts: Sequence[str]) -> bool:
    """Return whether a pattern has [top4] or the like. Raises UserError if one can't be read."""
    return any(_has_top(pattern) for pattern in _parse("patterns", texts))


def _has_top(pattern: _Pattern) -> bool:
    return any(item.top for items in pattern.chosen.values() for item in items)


def _parse(field: str, texts: Sequence[str]) -> list[_Pattern]:
    found = []
    for text in texts:
        names, chosen = [], {}
        pattern = _Pattern(field, text, "", chosen)
        for segment in text.split("/"):
            match = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]*)\])?", segment)
            if match is None:
                raise pattern.error(f"the brackets of {segment!r} can't be read")
            name, inside = match.groups()
            names.append(name)
            if inside is None:
                continue
            if name not in _BRACKETS:
                examples = " and ".join(_BRACKETS.values())
                raise pattern.error(f"{name!r} has no axis to choose along, as in {examples}")
            chosen[name] = tuple(_parse_item(pattern, name, item) for item in inside.split(","))
        found.append(_Pattern(field, text, "/".join(names), chosen))
    return found


def _parse_item(pattern: _Pattern, axis: str, text: str) -> _Item:
    text = text.strip()
    if match := re.fullmatch(r"top(\d+)", text):
        if axis != "experts":
            raise pattern.error(f"[{text}] chooses experts by their load, not {axis}")
        if int(match[1]) == 0:
            raise pattern.error("[top0] chooses nothing")
        return _Item(top=int(match[1]))
    match = re.fullmatch(r"(\d+)(?:-(\d*))?", text)
    if match is None:
        kinds = "a number, 0-3, 8-" + (" or top4" if axis == "experts" else "")
        raise pattern.error(f"{text!r} in the brackets of {axis} is none of {kinds}")
    first = int(match[1])
    last = first if match[2] is None else int(match[2]) if match[2] else None
    if last is not None and last < first:
        raise pattern.error(f"the range {text} runs backwards")
    return _Item(first, last)


def _learning_rates(config: OptimizerConfig) -> list[tuple[_Pattern, float]]:
    """Return the patterns of `learning_rates` with their factors."""
    found = []
    for text in config.learning_rates:
        name, equals, value = text.rpartition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = math.nan
        if not equals or not 0 <= factor < math.inf:
            raise UserError(
                f"optimizer.learning_rates has {text!r}: it is PATTERN=FACTOR, the factor a number "
                "of at least 0, as in embedding/weight=0.1"
            )
        found.append((_parse("optimizer.learning_rates", [name])[0], factor))
    return found


def _check(pattern: _Pattern, leaves: dict[str, Any], sizes: dict[str, int]) -> None:
    """Refuse a pattern that matches no leaf, or that selects what does not exist or train."""
    matched = [path for path in leaves if pattern.matches(path)]
    if not matched:
        raise pattern.error(
            f"it names no parameter; did you mean {_nearest(pattern.path, leaves)}?"
        )
    for axis, items in pattern.chosen.items():
        size = sizes[axis]
        for item in items:
            highest = item.first if item.last is None else item.last
            if item.top > size:
                raise pattern.error(f"top{item.top} of {size} experts")
            if not item.top and highest >= size:
                raise pattern.error(f"there is no {highest}: the {axis} are 0 to {size - 1}")
    trains = pattern.field in ("optimizer.only", "optimizer.learning_rates")
    if trains and all(isinstance(leaves[path], MXFP4 | Relaid) for path in matched):
        raise pattern.error(
            "all that it names is packed (MXFP4), which is never trained; "
            "--model.experts dense unpacks it"
        )


def _nearest(path: str, leaves: dict[str, Any]) -> str:
    """Return the existing path, or branch of paths, that is most similar to an unknown one."""
    known = dict.fromkeys(leaves)
    for leaf in leaves:
        names = leaf.split("/")
        known |= dict.fromkeys("/".join(names[:i]) + "/*" for i in range(1, len(names)))
        known["*/" + names[-1]] = None
    return difflib.get_close_matches(path, list(known), n=1, cutoff=0.0)[0]


def _chosen(
    pattern: _Pattern,
    path: str,
    ndim: int,
    *,
    sizes: dict[str, int],
    load: np.ndarray | None,
) -> Bool[np.ndarray, "..."]:
    """Return a mask of what a pattern selects of a parameter; it broadcasts to the parameter."""
    if not pattern.matches(path):
        return np.zeros((1,) * ndim, bool)
    chosen = np.ones((1,) * ndim, bool)
    if items := pattern.chosen.get("layers"):
        layers = _in_ranges(items, sizes["layers"])
        chosen = chosen & layers.reshape(-1, *(1,) * (ndim - 1))
    if items := pattern.chosen.get("experts"):
        experts = _in_ranges(items, sizes["experts"])[None, :]
        if top := max(item.top for item in items):
            if load is None or load.shape != (sizes["layers"], sizes["experts"]):
                raise ValueError("load has to be given as [L, E]: see needs_load")
            rank = np.argsort(np.argsort(-load, axis=1, kind="stable"), axis=1)
            experts = experts | (rank < top)
        chosen = chosen & experts.reshape(*experts.shape, *(1,) * (ndim - 2))
    return chosen


def _in_ranges(items: tuple[_Item, ...], size: int) -> Bool[np.ndarray, " size"]:
    at = np.arange(size)
    ranges = [
        (at >= i.first) & (at <= (size if i.last is None else i.last)) for i in items if not i.top
    ]
    return np.any(ranges, axis=0) if ranges else np.zeros(size, bool)


def _describe_factor(factor: np.ndarray) -> str:
    """Say in a few words which layers and experts are trained, and at which learning rate."""
    if not np.any(factor):
        return "frozen"
    words = []
    if factor.ndim and factor.size > 1:
        table = (
            factor.reshape(*factor.shape[:2], -1)[:, :, 0] if factor.ndim > 1 else factor[:, None]
        )
        counts = np.count_nonzero(table, axis=1)
        if table.shape[1] > 1:
            some = sorted({int(c) for c in counts if c})
            words.append(f"{' or '.join(map(str, some))} of {table.shape[1]} experts")
        if not np.all(counts) or len(words) == 0:
            words.append(f"layers {_ranges(np.flatnonzero(counts))}")
    values = [f"{v:g}" for v in np.unique(factor[factor != 0])]
    if values != ["1"]:
        words.append("learning rate x " + " or ".join(values))
    return ", ".join(words)


def _describe_experts(flat: dict[str, Any]) -> list[str]:
    """Name the trained experts, in one line for all layers that train the same ones."""
    found: dict[str, list[int]] = {}
    for path, factor in flat.items():
        factor = np.asarray(factor)
        of_experts = path.startswith(("layers/experts/", "lora/layers/experts/"))
        if of_experts and factor.size > 1 and factor.shape[1] > 1:
            for layer, row in enumerate(factor.reshape(*factor.shape[:2])):
                if np.any(row) and not np.all(row):
                    layers = found.setdefault(_ranges(np.flatnonzero(row)), [])
                    if layer not in layers:
                        layers.append(layer)
    return [
        f"experts {experts} of layer{'s' * (len(layers) > 1)} {_ranges(sorted(layers))}"
        for experts, layers in found.items()
    ]


def _ranges(numbers: Sequence[int] | np.ndarray) -> str:
    """Format increasing numbers as in 0-3, 7."""
    runs: list[list[int]] = []
    for n in map(int, numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _sizes(leaves: dict[str, Any]) -> dict[str, int]:
    """Return the number of layers and of experts, each if the tree has such parameters."""
    sizes = {}
    for path, leaf in leaves.items():
        if path.startswith("layers/"):
            sizes["layers"] = leaf.shape[0]
        if path.startswith("layers/experts/"):
            sizes["experts"] = leaf.shape[1]
    return sizes
