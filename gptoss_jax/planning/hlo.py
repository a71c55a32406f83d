"""Read the collectives of a compiled program from its HLO text, with all trips of loops."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# The kinds of collectives, by the names in reports.
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # other dtypes have the number in their name
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'known_trip_count\W+n\W+?"?(\d+)')


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str  # the text between the parentheses
    is_root: bool


@dataclass(frozen=True)
class Collective:
    """One collective, and how often a run of the program executes it."""

    kind: str
    operand_bytes: float  # of each device's operand
    groups: tuple[tuple[int, ...], ...]  # which devices communicate; empty: all of them
    times: int

    @property
    def group_size(self) -> int:
        """The number of devices in the largest group."""
        return max((len(group) for group in self.groups), default=0)

    @property
    def sent_bytes(self) -> float:
        """The bytes that a device sends each time, in a ring: the least that the kind needs.

        An all-gather sends its operand to n - 1 others. A reduce-scatter and an all-to-all send
        (n-1)/n of theirs. An all-reduce is a reduce-scatter and then an all-gather. It is known
        only at run time how much a ragged all-to-all sends: its whole operand counts.
        """
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast", "ragged-all-to-all"):
            return self.operand_bytes
        if n < 2:
            return 0.0
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(self.kind, (n - 1) / n)
        return self.operand_bytes * share


@dataclass
class Reading:
    """The collectives of a program."""

    collectives: list[Collective] = field(default_factory=list)
    # Loops that hold collectives but whose number of trips is unknown; these count once.
    unknown_loops: list[str] = field(default_factory=list)


def read(text: str, *, num_devices: int = 0) -> Reading:
    """Find the collectives in a program's HLO text; those in a loop count once for each trip.

    The number of trips is what the compiler noted (`known_trip_count`), or else the constant that
    the loop's condition compares its counter with. A loop counts once if its trips are known only
    at run time, and `unknown_loops` names it if it holds a collective. All branches of a condition
    count. If a collective names no groups, all `num_devices` devices are one group.
    """
    computations, entry = parse(text)
    result = Reading()
    _walk(computations, entry, 1, result, num_devices)
    return result


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            inside = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        # Only the next header ends a computation: the text of kernels has braces too.
        elif inside is not None and (one := _instruction(line)):
            inside.append(one)
    return computations, entry


def shape_bytes(shape: str) -> float:
    """Return the bytes of a shape in HLO's notation; a tuple's are summed, layouts are ignored."""
    total = 0.0
    for dtype, sizes in _SHAPE.findall(shape):
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            if digits is None:
                continue
            bits = int(digits[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits / 8
    return total


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if name is None:
        return None
    rest = line[name.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.find("(")
    if opened < 0:
        return None
    closed = _closing(rest, opened)
    inner = rest[opened + 1 : closed]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    return Instruction(
        name[2], shape, rest[:opened], operands, rest[closed + 1 :], inner, bool(name[1])
    )


def _closing(text: str, start: int) -> int:
    """Return the position that closes the parenthesis opened at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text)


def _walk(
    computations: dict[str, list[Instruction]],
    name: str,
    times: int,
    result: Reading,
    num_devices: int,
) -> None:
    instructions = computations.get(name, [])
    shapes = {one.name: one.shape for one in instructions}
    overlapped: set[tuple[str, ...]] = set()
    for one in instructions:
        if one.opcode == "fusion":
            # On a TPU a collective may overlap with other work. It then appears in each of the
            # fusions that it spans, with the same marks.
            for inner in called(one):
                chains = {
                    _chain(part) for part in computations.get(inner, []) if _kind(part.opcode)
                }
                if not chains or not chains <= overlapped:
                    _walk(computations, inner, times, result, num_devices)
                overlapped |= {chain for chain in chains if chain[-1]}
            continue
        kind = _kind(one.opcode)
        if kind:
            groups = _groups(one, num_devices)
            size = _operand_bytes(one, shapes, kind, max(map(len, groups), default=1))
            result.collectives.append(Collective(kind, size, groups, times))
            continue
        if one.opcode.endswith(("-done", "-update")):
            continue
        runs = trips(computations, one) if one.opcode == "while" else 1
        found = len(result.collectives)
        for inner in called(one):
            _walk(computations, inner, times * (runs or 1), result, num_devices)
        if runs is None and len(result.collectives) > found:
            result.unknown_loops.append(one.name)


def _chain(one: Instruction) -> tuple[str, ...]:
    """Return the marks that all parts of one overlapped collective share."""
    marks = (r"channel_id=(\d+)", r'chain_id="(\d+)"')
    found = (re.search(mark, one.attributes) for mark in marks)
    return (one.opcode, *(mark[1] if mark else "" for mark in found))


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


def called(one: Instruction) -> Iterator[str]:
    """Yield the names of the computations that an instruction runs."""
    for single, several in _CALLED.findall(one.attributes):
        yield from [single] if single else re.findall(r"[\w.\-]+", several)


def _operand_bytes(one: Instruction, shapes: dict[str, str], kind: str, group: int) -> float:
    operands = one.operands[:1] if kind == "ragged-all-to-all" else one.operands
    known = [shapes[operand] for operand in operands if operand in shapes]
    if known:
        return sum(map(shape_bytes, known))
    written = shape_bytes(one.text)  # some compilers print the operands' shapes
    if written:
        return written
    size = shape_bytes(one.shape)
    return size / group if kind == "all-gather" else size


def trips(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """Return how often a loop's body runs; None if that is known only at run time."""
    noted = _TRIPS.search(loop.attributes)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    if condition is None:
        return None
    inside = list(computations.get(condition[1], []))
    for one in list(inside):  # the comparison may have been fused
        for inner in called(one):
            inside += computations.get(inner, [])
    compared = [one for one in inside if one.opcode == "compare"]
    constants = [one for one in inside if one.opcode == "constant" and one.text.isdigit()]
    if len(compared) == 1 and len(constants) == 1 and "direction=LT" in compared[0].attributes:
        return int(constants[0].text)
    return None


def _groups(one: Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices, from any of HLO's notations for them."""
    everyone = (tuple(range(num_devices)),) if num_devices else ()
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.attributes)
    if pairs:
        return tuple(_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1]))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", one.attributes)
    if listed:
        found = tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
        return found or everyone
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", one.attributes)
    if iota:
        return _iota(_numbers(iota[1]), _numbers(iota[2]), iota[3])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", one.attributes)
    if named:
        return _by_axes(named[1], named[2]) or everyone
    return everyone


def _by_axes(mesh: str, axes: str) -> tuple[tuple[int, ...], ...]:
    """Group devices along axes of a mesh, as in mesh['a'=2,'b'=4] {'b'}; () for other notations.

    Parts of an axis and an explicit order of devices also return (): the caller then takes all
    devices as one group.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    along = re.findall(r"'([^']+)'", axes)
    if ":" in axes or "device" in mesh or not set(along) <= set(sizes):
        return ()
    order = [name for name in sizes if name not in along] + along
    index = ",".join(str(list(sizes).index(name)) for name in order)
    width = math.prod(sizes[name] for name in along)
    return _iota((width,), tuple(sizes.values()), index)


def _iota(
    groups: tuple[int, ...], sizes: tuple[int, ...], order: str | None
) -> tuple[tuple[int, ...], ...]:
    """Number devices over axes of `sizes`, transpose the axes, and cut the result into groups."""
    axes = _numbers(order) if order else tuple(range(len(sizes)))
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ids = [0]
    for axis in axes:
        ids = [first + i * strides[axis] for first in ids for i in range(sizes[axis])]
    width = groups[-1]
    return tuple(tuple(ids[i : i + width]) for i in range(0, len(ids), width))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
