"""Estimate from its HLO text how many bytes a compiled program moves between memory and chip."""

from __future__ import annotations

import re

from gptoss_jax.planning import hlo
from gptoss_jax.planning.hlo import Instruction, shape_bytes

# Instructions that move no data themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "while",
    "conditional",
    "call",
}
_SLICES = ("dynamic-slice", "slice", "gather")


def accessed_bytes(text: str) -> float:
    """Return the bytes that the program's instructions read and write, with all trips of loops.

    Each instruction outside a fusion reads its operands and writes its result. If an operand is
    sliced, or a slice is written into an array, only the slice counts. A kernel's operand that is
    the same in all trips of a loop counts once for the whole loop: so a stack of layers counts once
    if each trip reads one layer of it. Data that stay in caches count too, so the result is more
    than what really moves. A loop counts once if its number of trips is known only at run time.
    """
    computations, entry = hlo.parse(text)
    return _walk(computations, entry, 1, in_loop=False)


def _walk(
    computations: dict[str, list[Instruction]], name: str, times: int, *, in_loop: bool
) -> float:
    instructions = computations.get(name, [])
    shapes = {one.name: shape_bytes(one.shape) for one in instructions}
    fixed = _unchanged(instructions) if in_loop else set(_parameters(instructions))
    seen: set[str] = set()
    total = 0.0
    for one in instructions:
        if one.opcode == "while":
            trips = hlo.trips(computations, one) or 1
            body = re.search(r"body=%?([\w.\-]+)", one.attributes)
            if body:
                total += _walk(computations, body[1], times * trips, in_loop=True)
        elif one.opcode in ("call", "conditional"):
            for called in hlo.called(one):
                total += _walk(computations, called, times, in_loop=False)
        elif one.opcode.startswith("async") or one.opcode.endswith(("-done", "-update")):
            continue
        elif one.opcode not in _FREE:
            total += times * _own(computations, one, shapes, fixed)
            if one.opcode == "custom-call":
                for operand in one.operands:
                    if operand in fixed and operand not in seen:
                        seen.add(operand)
                        total += shapes[operand]
    return total


def _own(
    computations: dict[str, list[Instruction]],
    one: Instruction,
    shapes: dict[str, float],
    fixed: set[str],
) -> float:
    """Return the bytes that one instruction reads and writes each time."""
    if one.opcode in _SLICES:
        return 2 * shapes[one.name]
    if one.opcode == "dynamic-update-slice":
        return 2 * shapes.get(one.operands[1], 0.0)
    if one.opcode == "fusion":
        return _fusion(computations, one, shapes)
    operands = set(one.operands)
    if one.opcode == "custom-call":
        operands -= fixed
    return shapes[one.name] + sum(shapes.get(operand, 0.0) for operand in operands)


def _fusion(
    computations: dict[str, list[Instruction]], one: Instruction, shapes: dict[str, float]
) -> float:
    inside = computations.get(next(iter(hlo.called(one)), ""), [])
    sizes = {part.name: shape_bytes(part.shape) for part in inside}
    total = 0.0
    for part in inside:
        if part.opcode != "parameter" or not part.text.isdigit():
            continue
        users = [user for user in inside if part.name in user.operands]
        if users and all(
            user.opcode in _SLICES and user.operands[0] == part.name for user in users
        ):
            total += sum(sizes[user.name] for user in users)
        elif not users or not all(
            user.opcode == "dynamic-update-slice" and user.operands[0] == part.name
            for user in users
        ):
            total += sizes[part.name]
    into = [part for part in inside if part.opcode == "dynamic-update-slice"]
    written = sum(sizes.get(part.operands[1], 0.0) for part in into if len(part.operands) > 1)
    replaced = sum(sizes[part.name] for part in into)
    return total + written + max(0.0, shapes[one.name] - replaced)


def _parameters(instructions: list[Instruction]) -> list[str]:
    return [one.name for one in instructions if one.opcode == "parameter"]


def _unchanged(instructions: list[Instruction]) -> set[str]:
    """Return the values in a loop's body that all trips share: elements passed on unchanged."""
    root = next((one for one in instructions if one.is_root), None)
    if root is None or root.opcode != "tuple":
        return set()
    found = set()
    for one in instructions:
        index = re.search(r"index=(\d+)", one.attributes)
        if one.opcode == "get-tuple-element" and index and int(index[1]) < len(root.operands):
            parameter = one.operands[0] in _parameters(instructions)
            if parameter and root.operands[int(index[1])] == one.name:
                found.add(one.name)
    for one in instructions:
        if one.opcode == "bitcast" and one.operands and one.operands[0] in found:
            found.add(one.name)
    return found
