"""What a conversion did, entry by entry."""

import dataclasses
import io
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


class Row(NamedTuple):
    """One array that was converted.

    Attributes:
        source: its name in the other framework, such as `"conv1.weight"`.
        flax: its name in Flax, such as `"Conv_0/kernel"`.
        layout: what was done to it, such as `"OIHW to HWIO"`; empty if nothing.
        matched: by what the two belong together: `"names"`, `"equal names"`, `"shape"` where there
            is one layer of that kind and shape, or `"order"` where there are several.
    """

    source: str
    flax: str
    layout: str
    matched: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every entry; prints as the notes and tables.

    Attributes:
        framework: the one that is not Flax.
        used: what was converted, and so renamed.
        left: the entries of either side that were not converted, and why.
        arguments: for each batch norm layer of Flax, by its path, the arguments that it must have
            to compute what the other framework computes, as far as they are known.
        notes: what else to know; what may be wrong, such as layers paired by order alone, first.
    """

    framework: str
    used: tuple[Row, ...]
    left: dict[str, str]
    arguments: dict[str, dict[str, Any]]
    notes: tuple[str, ...]

    def __rich__(self) -> Group:
        """The notes, and tables of what was used and left."""
        used = Table(title="used")
        for header in (self.framework, "Flax", "layout", "matched by"):
            used.add_column(header, overflow="fold")
        for row in self.used:
            used.add_row(*map(Text, row))  # names may have brackets, which are no markup
        parts: list[Any] = [used]
        if self.left:
            left = Table(title="left")
            left.add_column("entry", overflow="fold")
            left.add_column("reason")
            for item in self.left.items():
                left.add_row(*map(Text, item))
            parts.append(left)
        if any(self.arguments.values()):
            arguments = Table(title="arguments")
            arguments.add_column("BatchNorm", overflow="fold")
            arguments.add_column("must have")
            for path, options in self.arguments.items():
                stated = ", ".join(f"{k}={v!r}" for k, v in options.items())
                arguments.add_row(Text(path), Text(stated))
            parts.append(arguments)
        return Group(*(Text(f"- {note}") for note in self.notes), *parts)

    def __str__(self) -> str:
        """The tables as text."""
        console = Console(file=io.StringIO(), width=120, markup=False, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


class Converted(NamedTuple):
    """The weights in the form of the other side, and the report.

    Attributes:
        weights: Flax variables in the structure of the template, or a dict from the other
            framework's names to NumPy arrays.
        report: what became of every entry.
    """

    weights: Any
    report: Report
