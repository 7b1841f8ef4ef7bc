"""Layers of the other framework, and how their arrays go over to those of Flax."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jbn.convert._flax import Layer, describe_arrays

OPTIONAL = ("num_batches_tracked",)


@dataclasses.dataclass(frozen=True)
class Source:
    """A layer of the other framework.

    Attributes:
        name: its name there.
        arrays: its arrays by role, in that framework's words: weight, running_var, gamma, ...
        entries: the full name of each.
        kind: its class there, if known.
        config: its arguments there, if known.
    """

    name: str
    arrays: dict[str, np.ndarray]
    entries: dict[str, str]
    kind: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Name and arrays, for messages."""
        kind = f"{self.kind}: " if self.kind else ""
        return f"{self.name or 'the model'} ({kind}{describe_arrays(self.arrays)})"


def _same(value: np.ndarray) -> np.ndarray:
    return value


class Move(NamedTuple):
    """How one array goes over.

    Attributes:
        role: in Flax.
        source: the role in the other framework.
        forward: from there to Flax; returns an array of the same elements.
        backward: the inverse.
        layout: in words.
        is_transposed: whether it is that of a transposed convolution.
    """

    role: str
    source: str
    forward: Callable[[np.ndarray], np.ndarray] = _same
    backward: Callable[[np.ndarray], np.ndarray] = _same
    layout: str = ""
    is_transposed: bool = False

    def fits(self, layer: Layer, source: Source) -> bool:
        """Whether the array of the source then has the shape of the layer's."""
        try:
            shape = self.forward(source.arrays[self.source]).shape
        except ValueError:
            return False
        return shape == tuple(layer.arrays[self.role].shape)


class Pair(NamedTuple):
    """Two layers that are the same."""

    layer: Layer
    source: Source
    moves: Sequence[Move]
    matched: str

    @property
    def names(self) -> tuple[str, str]:
        """That in Flax and that in the other framework."""
        return self.layer.path, self.source.name

    @property
    def is_norm(self) -> bool:
        """Whether they are batch norms."""
        return self.layer.kind == "BatchNorm"


Moves = Callable[[Layer, Source], Iterable[Sequence[Move]]]


def fitting(layer: Layer, source: Source, moves: Moves) -> Sequence[Move] | None:
    """The first of the ways to convert the layer that fits, every array being used."""
    for candidate in moves(layer, source):
        used = [move.source for move in candidate]
        surplus = source.arrays.keys() - set(used) - set(OPTIONAL)
        if (
            not surplus
            and len(set(used)) == len(used)
            and source.arrays.keys() >= set(used)
            and {move.role for move in candidate} == layer.arrays.keys()
            and all(move.fits(layer, source) for move in candidate)
        ):
            return candidate
    return None
