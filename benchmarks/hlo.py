"""Memory traffic of a compiled program, read from its optimised HLO.

XLA compiles a program into kernels (fusions, reductions, copies, library calls), and each kernel
reads its operands from memory and writes its results there once. The bytes of all of them, added
up, are exact and the same on every machine, unlike a timing.
"""

import dataclasses
import math
import re
from typing import Any

BITS = {"pred": 8, "c64": 64, "c128": 128}  # the others end in their number of bits
FREE = {"parameter", "constant", "get-tuple-element", "bitcast", "tuple", "copy-done"}
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
    total = 0
    for dtype, dims, layout in SHAPE.findall(kind):
        if "S(1)" not in layout:
            bits = BITS.get(dtype) or int(re.sub(r"\D*(\d+).*", r"\1", dtype) or 0)
            total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


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
