"""What both frameworks share: from paired layers to the weights of either side, and the report."""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn import _axes
from jbn.convert import _flax, _match, _order
from jbn.convert._flax import Layer
from jbn.convert._pairs import Moves, Pair, Source
from jbn.convert._report import Converted, Report, Row

NOT_FLOATING = "not a floating point parameter or statistic"
UPSAMPLING = re.compile("(^|[^a-z])up|deconv|transpos")  # in the name of a layer
LINENS_CONV = re.compile(r"(.*/)?Conv_\d+")  # Linen's own name for one


def pair_layers(
    variables: Any,
    sources: Iterable[Source],
    moves: Moves,
    *,
    is_sorted: bool,
    names: Mapping[str, str] | None,
    leave: Sequence[str],
    transpose_kernel: Mapping[str, bool] | None,
) -> tuple[list[Pair], dict[str, str]]:
    """The layers that belong together, and what is left of either side, by reason.

    `is_sorted` says whether the sources are in the order of their names.
    """
    check_mappings(names=names, transpose_kernel=transpose_kernel)
    layers = _flax.read_layers(variables, transpose_kernel or {})
    by_name = {source.name: source for source in sources}
    left = dict.fromkeys(_flax.other_entries(variables), NOT_FLOATING)
    left |= _match.split_left(leave, layers, by_name)
    _check_statistics(layers.values(), by_name.values())
    orders = _order.of_flax(variables), _order.of_source(by_name, is_sorted=is_sorted)
    pairs = _match.match(layers, by_name, moves, names or {}, orders)
    for layer, source, used, _ in pairs:
        for move in used:
            value = source.arrays[move.source]
            if move.role != "count" and not _flax.is_float(value):
                raise TypeError(
                    f"{source.entries[move.source]} is {_axes.describe(value)}, and {move.role} of "
                    f"{layer} takes floating point numbers: give it dequantized, or name the "
                    "layer in leave."
                )
        unused = source.arrays.keys() - {move.source for move in used}
        left |= {
            source.entries[role]: "the Flax layer keeps no count of updates, as it would with "
            "momentum=None"
            for role in unused
        }
    order = {path: i for i, path in enumerate(layers)}
    return sorted(pairs, key=lambda pair: order[pair.layer.path]), left


def _check_statistics(layers: Iterable[Layer], sources: Iterable[Source]) -> None:
    """Checks that Flax has running statistics if the source has."""
    norms = [
        source.name for source in sources if any(role.endswith("_mean") for role in source.arrays)
    ]
    if norms and not any("mean" in layer.arrays for layer in layers):
        raise ValueError(
            f"the source has running statistics, of {norms[0] or 'the model'} first, and the "
            "variables have none: pass all of a Linen model's, params and batch_stats, or "
            "nnx.state(model) of an NNX model. If the model has no batch norm, name that of the "
            "source in leave."
        )


def check_mappings(**options: Any) -> None:
    """Checks those that are given by layer."""
    for name, value in options.items():
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} must map paths of Flax layers, got {_axes.describe(value)}.")


def into_flax(
    framework: str,
    variables: Any,
    pairs: Sequence[Pair],
    left: dict[str, str],
    arguments: Callable[[Pair], dict[str, Any]],
    notes: Iterable[str],
) -> Converted:
    """Flax variables that hold the numbers of the sources."""
    values: dict[str, dict[str, jax.Array]] = {}
    rounded = []
    for layer, source, moves, _ in pairs:
        for move in moves:
            entry = source.entries[move.source]
            value = source.arrays[move.source]
            check_value(source.name, entry, value, is_variance=move.role == "var")
            value, note = cast(move.forward(value), np.dtype(layer.arrays[move.role].dtype), entry)
            rounded += [note] if note else []
            values.setdefault(layer.path, {})[move.role] = jnp.asarray(value)
    weights = _flax.replace(variables, values)
    _check_concrete(weights)
    return Converted(weights, _report(framework, pairs, left, arguments, (*notes, *rounded)))


def out_of_flax(
    framework: str, pairs: Sequence[Pair], left: dict[str, str], notes: Iterable[str]
) -> Converted:
    """The arrays of the other framework, by their full names there."""
    weights: dict[str, np.ndarray] = {}
    rounded = []
    for layer, source, moves, _ in pairs:
        for move in moves:
            entry = source.entries[move.source]
            ours = f"{layer.path}/{move.role}".lstrip("/")
            if isinstance(layer.arrays[move.role], jax.ShapeDtypeStruct):
                raise TypeError(f"{ours} has a shape but no values: pass trained variables.")
            value = np.asarray(layer.arrays[move.role])
            check_value(layer.path, ours, value, is_variance=move.role == "var")
            value, note = cast(
                move.backward(value), np.dtype(source.arrays[move.source].dtype), ours
            )
            rounded += [note] if note else []
            # Not a view of the variables, and in C order: torch.tensor takes no mirrored view.
            weights[entry] = np.array(value, order="C")
    return Converted(weights, _report(framework, pairs, left, lambda _: {}, (*notes, *rounded)))


def cast(value: np.ndarray, dtype: Any, name: str) -> tuple[np.ndarray, str]:
    """The value in another dtype, and a note if that changed it."""
    if value.dtype == dtype:
        return value, ""
    with np.errstate(over="ignore"):
        result = value.astype(dtype)
    if not np.isfinite(result).all():
        raise ValueError(
            f"{name} is too large for {np.dtype(dtype).name}: its numbers go up to "
            f"{np.abs(value).max():g} in {value.dtype.name}. Give the layer a wider param_dtype."
        )
    if (result.astype(value.dtype) == value).all():
        return result, ""
    return result, f"{name} was rounded from {value.dtype.name} to {np.dtype(dtype).name}."


def check_value(layer: str, entry: str, value: np.ndarray, *, is_variance: bool) -> None:
    """Checks that the numbers are finite, and not negative if they are variances."""
    bad = int(value.size - np.isfinite(value).sum())
    if bad:
        raise ValueError(
            f"layer {layer}: {bad} of the {value.size} numbers in {entry} are NaN or infinite. "
            "The model had diverged when it was saved: take an earlier checkpoint."
        )
    if is_variance and (value < 0).any():
        raise ValueError(
            f"layer {layer}: {int((value < 0).sum())} of the {value.size} variances in {entry} "
            f"are negative, down to {value.min():g}. The file is damaged or not of batch norm: "
            "take another, or calibrate the layer anew."
        )


def batch_norms(pairs: Iterable[Pair]) -> list[Layer]:
    """The batch norm layers among them."""
    return [pair.layer for pair in pairs if pair.layer.kind == "BatchNorm"]


def _report(
    framework: str,
    pairs: Sequence[Pair],
    left: dict[str, str],
    arguments: Callable[[Pair], dict[str, Any]],
    notes: Iterable[str],
) -> Report:
    used = tuple(
        Row(
            pair.source.entries[move.source],
            f"{pair.layer.path}/{move.role}".lstrip("/"),
            move.layout,
            pair.matched,
        )
        for pair in pairs
        for move in pair.moves
    )
    notes = [*_doubts(pairs), *notes]
    options = {p.layer.path: arguments(p) for p in pairs if p.layer.kind == "BatchNorm"}
    return Report(framework, used, left, options, tuple(notes))


def _doubts(pairs: Sequence[Pair]) -> Iterator[str]:
    """Notes of what names and shapes leave open."""
    by_order = [f"{p.layer.path} with {p.source.name}" for p in pairs if p.matched == "order"]
    if by_order:
        yield (
            "Paired by their order alone, among others of the same kind and shape, which is wrong "
            f"if they are defined and called in different orders: {', '.join(by_order)}. Check "
            "them, or give names."
        )
    transposed = {_size(p) for p in pairs if any(move.is_transposed for move in p.moves)}
    for pair in pairs:
        name = " and ".join(pair.names)
        if _may_be_transposed(pair, transposed):
            yield (
                f"{name} are taken as a Conv, since with as many inputs as outputs they look as "
                "one. If they are a ConvTranspose, give "
                f"transpose_kernel={{{pair.layer.path!r}: False}}, or True as the layer has it."
            )
        elif pair.layer.kind == "ConvTranspose" and pair.layer.is_default and _is_square(pair):
            yield (
                f"{name} are taken as a ConvTranspose of transpose_kernel=False, Flax's default. "
                "With as many inputs as outputs they fit the other setting too: if the layer has "
                f"it, give transpose_kernel={{{pair.layer.path!r}: True}}."
            )


def _may_be_transposed(pair: Pair, sizes: Container[tuple[int, ...]]) -> bool:
    """Whether what was taken as a Conv may be a ConvTranspose.

    Names may say so. If neither they nor the source's kind say that it is none, so may the size of
    the kernel: an even one, or one of `sizes`, those of the ConvTransposes that were told.
    """
    if pair.layer.kind != "Conv" or pair.source.kind or not _is_square(pair):
        return False
    if any(UPSAMPLING.search(_own_name(name).lower()) for name in pair.names):
        return True
    is_even = all(n % 2 == 0 for n in _size(pair))
    return not LINENS_CONV.fullmatch(pair.layer.path) and (is_even or _size(pair) in sizes)


def _own_name(name: str) -> str:
    """The last part of a layer's name that is no bare number, as "ups" of "decoder.ups.0"."""
    return next((part for part in reversed(re.split("[./]", name)) if not part.isdigit()), name)


def _size(pair: Pair) -> tuple[int, ...]:
    """That of a kernel, without its features."""
    return tuple(pair.layer.arrays["kernel"].shape[:-2])


def _is_square(pair: Pair) -> bool:
    """Whether a kernel has as many inputs as outputs."""
    *_, a, b = pair.layer.arrays["kernel"].shape
    return a == b


def _check_concrete(weights: Any) -> None:
    """Checks that what was left had values in the template."""
    for path, leaf in jax.tree.leaves_with_path(weights):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is left as it is in the template, which has a shape "
                "there but no values: pass what model.init returns, not jax.eval_shape of it."
            )
