"""The layers in a tree of Flax variables, of Linen or NNX."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jbn import _axes

COLLECTIONS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the model.

    Attributes:
        path: its place, without the collection: `"block/Conv_0"`.
        arrays: its arrays or their `jax.ShapeDtypeStruct`, by role: kernel, bias, scale, ...
        transpose_kernel: the argument of a ConvTranspose; None for a layer not known as one.
        is_default: whether that is Flax's default, and was not given.
    """

    path: str
    arrays: dict[str, Any]
    transpose_kernel: bool | None = None
    is_default: bool = False

    @property
    def kind(self) -> str:
        """The class of the layer, as far as its variables show it."""
        roles = self.arrays.keys()
        if {"mean", "var"} <= roles <= {"mean", "var", "count", "scale", "bias"}:
            return "BatchNorm"
        if roles == {"embedding"}:
            return "Embed"
        if "kernel" not in roles or not roles <= {"kernel", "bias"}:
            return "unknown"
        if len(self.arrays["kernel"].shape) == 2:
            return "Dense"
        return "Conv" if self.transpose_kernel is None else "ConvTranspose"

    def __str__(self) -> str:
        """Name, kind and arrays, for messages."""
        return f"{self.path or 'the model'} ({self.kind}: {describe_arrays(self.arrays)})"


def describe_arrays(arrays: Mapping[str, Any]) -> str:
    """Names, dtypes and shapes."""
    return ", ".join(f"{name} {_axes.describe(value)}" for name, value in arrays.items())


def read_layers(variables: Any, transpose_kernel: Mapping[str, bool]) -> dict[str, Layer]:
    """The layers that hold floating point numbers, in order of appearance."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            "variables must be what a Linen model's init returns, or of an NNX model "
            f"nnx.state(model), got {_axes.describe(variables)}."
        )
    arrays: dict[str, dict[str, Any]] = {}
    for path, leaf in _leaves(variables):
        value = _value(leaf)
        if is_float(value):
            *layer, role = path
            roles = arrays.setdefault("/".join(layer), {})
            if role in roles:
                raise ValueError(f"variables hold {'/'.join(path)} twice.")
            roles[role] = value
    unknown = [path for path in transpose_kernel if path not in arrays]
    if unknown:
        raise ValueError(f"transpose_kernel names {unknown[0]!r}, but {known_names(arrays)}.")
    return {
        path: Layer(path, roles, transpose_kernel[path])
        if path in transpose_kernel
        else Layer(path, roles, _default_transpose_kernel(path), is_default=True)
        for path, roles in arrays.items()
    }


def is_nnx(variables: Mapping[Any, Any]) -> bool:
    """Whether they are without Linen's collections."""
    return not any(name in variables for name in COLLECTIONS)


def collections(variables: Mapping[Any, Any]) -> list[Any]:
    """The trees of Linen's collections, or the one of NNX."""
    return [variables[name] for name in COLLECTIONS if name in variables] or [variables]


def is_sorted(variables: Any) -> bool:
    """Whether all names are in alphabetical order, in which JAX and NNX put them.

    A model's `init` gives the order in which it makes them: kernel, then bias. NNX has the layers
    of a list by their numbers.
    """
    if not isinstance(variables, Mapping):
        return True
    names = [name for name in variables if name not in COLLECTIONS]
    ordered = sorted(names, key=lambda name: (isinstance(name, str), name))
    return names == ordered and all(map(is_sorted, variables.values()))


def child(tree: Any, name: str) -> Any:
    """What a tree has by this name; nothing if it has none."""
    return next((child for key, child in tree.items() if str(key) == name), {})


def other_entries(variables: Any) -> list[str]:
    """Names of what is not a floating point parameter or statistic, such as the state of rngs."""
    return [
        "/".join(path)
        for path, leaf in walk(variables)
        if _strip(path, variables) is None or not is_float(_value(leaf))
    ]


def replace(variables: Any, values: Mapping[str, Mapping[str, jax.Array]]) -> Any:
    """The tree with the arrays of the layers replaced; boxes of metadata stay."""

    def visit(tree: Any, path: tuple[str, ...]) -> Any:
        if isinstance(tree, Mapping):
            make: Any = type(tree)
            return make({key: visit(child, (*path, str(key))) for key, child in tree.items()})
        stripped = _strip(path, variables)
        if stripped is None:
            return tree
        *layer, role = stripped
        new = values.get("/".join(layer), {}).get(role)
        return tree if new is None else jax.tree.unflatten(jax.tree.structure(tree), [new])

    return visit(variables, ())


def is_float(value: Any) -> bool:
    """Whether it is an array, or the shape of one, of floating point numbers."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def known_names(names: Any) -> str:
    """For an error: what there is."""
    names = list(names)
    shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"there are {shown}" if names else "there are none"


def natural(name: str) -> list[Any]:
    """A key that sorts Conv_2 before Conv_10."""
    parts = re.split(r"(\d+)", name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)]


def _default_transpose_kernel(path: str) -> bool | None:
    """Flax's default, for a layer that Linen named after its class."""
    return False if re.fullmatch(r"ConvTranspose_\d+", path.rpartition("/")[2]) else None


def _value(leaf: Any) -> Any:
    """The array in a leaf, which may be a box of metadata or an `nnx.Variable`."""
    held = jax.tree.leaves(leaf)
    return held[0] if len(held) == 1 else None


def _leaves(variables: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths without the collection, and leaves."""
    # Parameters first: not all layers have statistics.
    first = {name: variables[name] for name in COLLECTIONS if name in variables}
    for path, leaf in walk({**first, **variables}):
        stripped = _strip(path, variables)
        if stripped is not None:
            yield stripped, leaf


def _strip(path: tuple[str, ...], variables: Any) -> tuple[str, ...] | None:
    """The path without Linen's collection; None for collections not converted."""
    if is_nnx(variables):
        return path
    return path[1:] if path[0] in COLLECTIONS else None


def walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves in the order in which the model made them, as far as that is known.

    `model.init` keeps that order. `jax.jit` and `jax.eval_shape` sort by name, whence the numbers
    in the names must be read as such.
    """
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    children = {str(key): child for key, child in tree.items()}
    names = list(children)
    for name in sorted(names, key=natural) if names == sorted(names) else names:
        yield from walk(children[name], (*path, name))
