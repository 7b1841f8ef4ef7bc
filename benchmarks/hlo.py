"""Memory traffic and communication of a compiled program, read from its optimised HLO.

XLA compiles a program into kernels (fusions, reductions, copies, library calls), and each kernel
reads its operands from memory and writes its results there once. The bytes of all of them, added
up, are exact and the same on every machine, unlike a timing. So are the collectives, by which
devices exchange what they hold.
"""

import dataclasses
import math
import re
from typing import Any

BITS = {"pred": 8, "c64": 64, "c128": 128}  # the others end in their number of bits
FREE = {"parameter", "constant", "get-tuple-element", "bitcast", "tuple", "copy-done"}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
SLICES = ("slice", "dynamic-slice")
CASTS = ("bitcast", "convert")
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: of the value.
        type: of the value, as text.
        op: what computes it.
        arguments: as text.
        attributes: the rest of the line.
    """

    name: str
    type: str
    op: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the values that it takes."""
        return re.findall(r"%([\w.-]+)", self.arguments)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        op: its name in HLO, without the -start of its asynchronous form.
        shapes: of what each device contributes, as text, several if XLA combined them.
        group: number of devices that take part together.
        numbers: that each device contributes; a complex one is two.
        size: of these in bytes.
    """

    op: str
    shapes: tuple[str, ...]
    group: int
    numbers: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring, which no other algorithm undercuts.

        Chan et al. 2007, "Collective communication: theory, practice, and experience", section 3.
        """
        others = self.group - 1
        factors = {
            "all-gather": others,
            "all-reduce": 2 * others / self.group,
            "collective-broadcast": 1,
            "collective-permute": 1,
        }
        return self.size * factors.get(self.op, others / self.group) if others else 0.0


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a module by name, each by the name of its values, and the entry's."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            instruction = _instruction(found[1], found[2])
            computations[name][instruction.name] = instruction
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Splits `type op(operands), attributes`; a type may hold parentheses of its own."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    return Instruction(name, kind, rest[:start], rest[start + 1 : stop], rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text!r}")


def size(kind: str) -> int:
    """Bytes in main memory of a type as text; on a TPU, `S(1)` marks what is on the chip."""
    return sum(
        _length(dims) * _bits(dtype) // 8
        for dtype, dims, layout in SHAPE.findall(kind)
        if "S(1)" not in layout
    )


def _length(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.sub(r"\D*(\d+).*", r"\1", dtype) or 0)


def kernels(compiled: Any) -> dict[str, tuple[int, int]]:
    """Bytes read and written by each kernel of a compiled program, by the kernel's name."""
    computations, entry = parse(compiled.as_text())
    return _kernels(computations, entry)


def moved(compiled: Any) -> int:
    """Bytes read and written by all kernels of a compiled program."""
    return sum(read + written for read, written in kernels(compiled).values())


def _kernels(
    computations: dict[str, dict[str, Instruction]], name: str
) -> dict[str, tuple[int, int]]:
    """The same of one computation. Of a conditional, the kernels of the branch that moves least."""
    values = computations[name]
    found = {}
    for value in values.values():
        if value.op in FREE:
            continue
        if value.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", value.attributes)
            names = re.findall(r"%?([\w.-]+)", branches[1] if branches else value.attributes)
            found |= min(
                (_kernels(computations, n) for n in names if n in computations),
                key=lambda kernels: sum(map(sum, kernels.values())),
            )
            continue
        called = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", value.attributes)
        body = computations[called[1]] if called and value.op in ("fusion", "call") else {}
        read = sum(
            _read(body, i, size(values[operand].type)) for i, operand in enumerate(value.operands)
        )
        if value.op in SLICES:
            read = size(value.type)
        # A copy's start gives its destination, its source and a flag.
        first = SHAPE.search(value.type)
        written = size(first[0] if value.op == "copy-start" and first else value.type)
        found[value.name] = (read, written)
    return found


def _read(body: dict[str, Instruction], index: int, whole: int) -> int:
    """Bytes that a fusion reads of one operand: those of its slices, where it is only sliced."""
    names = {v.name for v in body.values() if v.op == "parameter" and v.arguments == str(index)}
    for v in body.values():  # in order, so that a cast comes after what it is of
        names |= {v.name} if v.op in CASTS and names & set(v.operands) else set()
    users = [v for v in body.values() if v.op not in CASTS and names & set(v.operands)]
    if users and all(v.op in SLICES for v in users):
        return sum(size(v.type) for v in users)
    return whole


def collectives(compiled: Any) -> list[Collective]:
    """Every collective of a compiled program, in all its computations.

    One in the body of a loop counts once, and of a conditional those of every branch count.
    """
    text = compiled.as_text()
    computations, _ = parse(text)
    header = text.partition("\n")[0]
    devices = math.prod(
        int(n) for n in re.findall(r"(?:replica_count|num_partitions)=(\d+)", header)
    )
    return [
        _collective(value, values, devices)
        for values in computations.values()
        for value in values.values()
        # An asynchronous one that calls a computation is the one in there.
        if value.op.removesuffix("-start") in COLLECTIVES and "calls=" not in value.attributes
    ]


def _collective(value: Instruction, values: dict[str, Instruction], devices: int) -> Collective:
    kinds = [shape for name in value.operands for shape in SHAPE.findall(values[name].type)]
    numbers = [_length(dims) * (2 if dtype in ("c64", "c128") else 1) for dtype, dims, _ in kinds]
    return Collective(
        value.op.removesuffix("-start"),
        tuple(f"{dtype}[{dims}]" for dtype, dims, _ in kinds),
        _group_size(value.attributes, devices),
        sum(numbers),
        sum(_length(dims) * _bits(dtype) // 8 for dtype, dims, _ in kinds),
    )


def _group_size(attributes: str, devices: int) -> int:
    """Size of the largest group, in each form that XLA writes; all devices if none is given."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return len(set(re.findall(r"\d+", pairs[1])))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # An axis is named whole, or as the part 'axis':(first)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(iota[1])
    groups = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if not groups:
        return devices
    return max(len(re.findall(r"\d+", group)) for group in groups[1].split("},{"))
