"""Which layer of the other framework belongs to which of Flax, and which array to which."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jbn import _axes
from jbn.convert._flax import Layer, describe_arrays, is_float, known_names, natural


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
    """

    role: str
    source: str
    forward: Callable[[np.ndarray], np.ndarray] = _same
    backward: Callable[[np.ndarray], np.ndarray] = _same
    layout: str = ""


class Pair(NamedTuple):
    """Two layers that are the same."""

    layer: Layer
    source: Source
    moves: Sequence[Move]
    matched: str


Moves = Callable[[Layer, Source], Iterable[Sequence[Move]]]
HidesOrder = Callable[[int, str, str], bool]
STATISTICS = {"mean", "var", "count"}
OPTIONAL = ("num_batches_tracked",)
FLAX, SOURCE = 0, 1  # the two sides
SORTED = {
    FLAX: "the variables are sorted by name, as jax.eval_shape, jax.jit and NNX sort them (pass "
    "what a Linen model's init returns)",
    SOURCE: "the source is sorted by name, as safetensors and some files of Keras are",
}


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
            and all(_fits(move, layer, source) for move in candidate)
        ):
            return candidate
    return None


def match(
    layers: Mapping[str, Layer],
    sources: Mapping[str, Source],
    moves: Moves,
    names: Mapping[str, str],
    hides_order: HidesOrder,
) -> list[Pair]:
    """Pairs all layers: as `names` says, then by equal names, then by order of appearance.

    An order that the names or the other layers speak against is refused.

    Args:
        layers: of Flax, by path.
        sources: by name.
        moves: how a layer can be converted.
        names: from the path of a layer to the name of its source.
        hides_order: of `FLAX` or `SOURCE` and two names there, whether these are in the order of
            their names, which is not that of the model.
    """
    pairs = []
    for matched, table in (("names", names), ("equal names", _equal_names(layers, sources, names))):
        for path, name in table.items():
            layer, source = _named(path, layers, "Flax"), _named(name, sources, "source")
            fit = fitting(layer, source, moves)
            if fit is None:
                raise ValueError(
                    f"{layer} does not fit {source}: {_difference(layer, source, moves)}. "
                    f"The two are matched by {matched}."
                )
            pairs.append(Pair(layer, source, fit, matched))
    given = [pair.source.name for pair in pairs]
    if len(set(given)) < len(given):
        twice = next(name for name in given if given.count(name) > 1)
        paths = [pair.layer.path for pair in pairs if pair.source.name == twice]
        raise ValueError(f"names give {twice!r} to several Flax layers: {', '.join(paths)}.")
    # Equal names may be so by accident, as layers.2 of torch and layers_2 of Flax, where torch
    # counts activations too. Among layers that are not all so named, the order must confirm them.
    done = {pair.layer.path for pair in pairs}
    doubtful = {_alike(layer) for path, layer in layers.items() if path not in done}
    unsure = {
        pair.layer.path: pair.source.name
        for pair in pairs
        if pair.matched == "equal names" and _alike(pair.layer) in doubtful
    }
    pairs = [pair for pair in pairs if pair.layer.path not in unsure]
    done, taken = {pair.layer.path for pair in pairs}, {pair.source.name for pair in pairs}
    by_order = _by_order(
        [layer for path, layer in layers.items() if path not in done],
        [source for name, source in sources.items() if name not in taken],
        moves,
        hides_order,
    )
    ordered = {pair.layer.path: pair.source.name for pair in by_order}
    for path, name in unsure.items():
        if ordered[path] != name:
            raise ValueError(
                f"{path} and {name} have equal names, but by the order of the layers of that kind "
                f"and shape it is {ordered[path]}, and not all of these have equal names: pair "
                "them in names."
            )
    _check_crossings(pairs + by_order, layers, sources, hides_order)
    return pairs + by_order


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


def as_array(name: str, value: Any) -> np.ndarray:
    """One entry of a source as a NumPy array of numbers."""
    if isinstance(value, Mapping):
        raise TypeError(
            f"the entry {name!r} is itself a mapping: pass the one that holds arrays, such as "
            f"checkpoint[{name!r}]."
        )
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the entry {name!r} cannot be a NumPy array ({error}): convert it first, a tensor of "
            "torch with tensor.detach().float().cpu().numpy()."
        ) from None
    if array.dtype.kind not in "fiubV" or (array.dtype.kind == "V" and not is_float(array)):
        raise TypeError(
            f"the entry {name!r} must be an array of numbers, got {_axes.describe(value)}."
        )
    return array


def split_left(
    leave: Sequence[str], layers: dict[str, Layer], sources: dict[str, Source]
) -> dict[str, str]:
    """Takes out of both, in place, what is named in `leave` or lies in it; returns the reasons."""
    if isinstance(leave, str):
        raise TypeError(f"leave must be a sequence of names, got the string {leave!r}.")
    left = {}
    for name in leave:
        within = re.compile(re.escape(name) + r"($|[./])")
        flax = [path for path in layers if within.match(path)]
        theirs = [other for other in sources if within.match(other)]
        entries = [
            (other, role)
            for other, source in sources.items()
            for role, entry in source.entries.items()
            if entry == name
        ]
        for other, role in entries:  # a single one, such as a parameter of the whole model
            source = sources[other]
            kept = {key: value for key, value in source.arrays.items() if key != role}
            sources[other] = dataclasses.replace(source, arrays=kept)
            left[name] = "leave"
            if not kept:
                del sources[other]
        if not flax and not theirs and not entries:
            raise ValueError(
                f"leave names {name!r}, which is no layer: in Flax {known_names(layers)}, "
                f"in the source {known_names(sources)}."
            )
        for path in flax:
            left |= {f"{path}/{role}".lstrip("/"): "leave" for role in layers.pop(path).arrays}
        for other in theirs:
            left |= dict.fromkeys(sources.pop(other).entries.values(), "leave")
    return left


def _named(name: str, table: Mapping[str, Any], side: str) -> Any:
    if name not in table:
        raise ValueError(f"names give {name!r}, which is no {side} layer: {known_names(table)}.")
    return table[name]


def _equal_names(
    layers: Mapping[str, Layer], sources: Mapping[str, Source], names: Mapping[str, str]
) -> dict[str, str]:
    """Layers whose names are equal but for the separators."""
    paths = _by_plain_name(path for path in layers if path not in names)
    theirs = _by_plain_name(name for name in sources if name not in names.values())
    return {
        path: theirs[plain][0]
        for plain, (path, *more) in paths.items()
        if not more and len(theirs.get(plain, ())) == 1
    }


def _by_plain_name(names: Iterable[str]) -> dict[str, list[str]]:
    """The names that are the same without their separators."""
    table: dict[str, list[str]] = {}
    for name in names:
        table.setdefault(re.sub(r"[./_]", " ", name), []).append(name)
    return table


def _alike(layer: Layer) -> tuple[Any, ...]:
    """The kind and the shapes, by which layers are told apart."""
    shapes = sorted((role, tuple(value.shape)) for role, value in layer.arrays.items())
    return layer.kind, layer.transpose_kernel, tuple(shapes)


def _by_order(
    layers: list[Layer], sources: list[Source], moves: Moves, hides_order: HidesOrder
) -> list[Pair]:
    """Pairs layers of one kind and shape in their order, if there are as many on both sides."""
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_alike(layer), []).append(layer)
    pairs, used = [], set()
    by_name = {source.name: source for source in sources}
    for group in groups.values():
        # A Conv of 4 to 8 features may have the shape of a ConvTranspose of 8 to 4.
        for ways in (functools.partial(_likely, moves), moves):
            fits = [s.name for s in sources if fitting(group[0], s, ways) is not None]
            if len(fits) == len(group):
                break
        else:
            raise ValueError(_miscount(group, fits, sources))
        paths = [layer.path for layer in group]
        for side, members in ((FLAX, paths), (SOURCE, fits)):
            steps = _steps(members)
            if any(
                _is_before_by_number(*two) is False for two in itertools.combinations(members, 2)
            ):
                raise ValueError(_out_of_order(members, "their numbers say another", paths))
            if any(
                step is None and hides_order(side, *two)
                for step, two in zip(steps, itertools.pairwise(members), strict=True)
            ):
                raise ValueError(_out_of_order(members, SORTED[side], paths))
        for layer, name in zip(group, fits, strict=True):
            # Not the first layer's moves: they may hold its path.
            fit = fitting(layer, by_name[name], moves)
            assert fit is not None
            matched = "order" if len(group) > 1 else "shape"
            pairs.append(Pair(layer, by_name[name], fit, matched))
            if name in used:
                raise ValueError(_twice(by_name[name], pairs))
            used.add(name)
    surplus = [str(source) for source in sources if source.name not in used]
    if surplus:
        raise ValueError(
            f"no Flax layer fits {'; '.join(surplus[:4])}{' ...' if len(surplus) > 4 else ''}: "
            "add the layers to the model, or name what shall not be converted in leave."
        )
    return pairs


def _likely(moves: Moves, layer: Layer, source: Source) -> Iterable[Sequence[Move]]:
    """The first way to convert a layer."""
    return itertools.islice(moves(layer, source), 1)


def _check_crossings(
    pairs: Sequence[Pair],
    layers: Mapping[str, Layer],
    sources: Mapping[str, Source],
    hides_order: HidesOrder,
) -> None:
    """Checks that pairs by order alone keep their place among all others, of whatever shape.

    Pairs cross if the two models make or call their layers in different orders, as where one has
    the shortcut of a residual block first, the other last. A batch norm may cross a linear layer
    that is in its place among its like: torch modules often have all convolutions before all batch
    norms. So it may where numbers tell the order on both sides, or in a module of that kind. What
    crosses all pairs of one kind and shape says nothing of the order among them.
    """
    # Layers without parameters come last in Linen's variables, wherever they are in the model.
    ours = [path for path, layer in layers.items() if not layer.arrays.keys() <= STATISTICS]
    places = ({path: i for i, path in enumerate(ours)}, {name: i for i, name in enumerate(sources)})

    def names(pair: Pair) -> tuple[str, str]:
        return pair.layer.path, pair.source.name

    def is_before(side: int, pair: Pair, other: Pair) -> bool | None:
        a, b = names(pair)[side], names(other)[side]
        if hides_order(side, a, b):
            return _is_before_by_number(a, b)
        return places[side][a] < places[side][b] if {a, b} <= places[side].keys() else None

    def cross(pair: Pair, other: Pair) -> bool:
        return {is_before(FLAX, pair, other), is_before(SOURCE, pair, other)} == {True, False}

    def is_hidden(pair: Pair, other: Pair) -> bool:
        """Whether both are in one module of Flax, and which of them comes first is not known."""
        together = _module(pair.layer.path) == _module(other.layer.path)
        return together and None in (is_before(FLAX, pair, other), is_before(SOURCE, pair, other))

    @functools.cache
    def is_out_of_place(i: int) -> bool:
        """Whether the pair crosses another of its like."""
        return any(
            _is_norm(other) == _is_norm(pairs[i]) and cross(pairs[i], other) for other in pairs
        )

    separate = _separating_modules(pairs, sources)
    by_order = (pair for pair in pairs if pair.matched == "order")
    for _, members in itertools.groupby(by_order, lambda pair: _alike(pair.layer)):
        group = list(members)
        numbered = all(None not in _steps(side) for side in zip(*map(names, group), strict=True))
        for i, other in enumerate(pairs):
            crossed = [pair for pair in group if cross(pair, other)]
            if not crossed and _is_norm(group[0]) and not _is_norm(other):
                crossed = [pair for pair in group if is_hidden(pair, other)]
                if len(crossed) < 2 or not is_out_of_place(i):
                    continue
            elif not crossed or len(crossed) == len(group):
                continue
            if _is_norm(other) == _is_norm(group[0]):
                denies = not numbered
            else:
                at = {_module(pair.source.name) for pair in (*crossed, other)}
                denies = is_out_of_place(i) or not (numbered or (len(at) == 1 and at <= separate))
            if denies:
                raise ValueError(
                    f"{crossed[0].layer.path} and {crossed[0].source.name} would be paired by the "
                    "order of their kind and shape, but the two models have different orders: "
                    f"{other.layer.path} and {other.source.name} come before them in one, and "
                    f"after them in the other. Pair {', '.join(p.layer.path for p in group)} in "
                    "names."
                )


def _is_norm(pair: Pair) -> bool:
    return pair.layer.kind == "BatchNorm"


def _module(name: str) -> str:
    """That which a layer of the source lies in."""
    return "".join(re.split("([./])", name)[:-2])


def _separating_modules(pairs: Sequence[Pair], sources: Mapping[str, Source]) -> set[str]:
    """Modules of the source that have several layers, and all batch norms after all others."""
    norms = {pair.source.name for pair in pairs if _is_norm(pair)}
    within: dict[str, str] = {}
    for name in sources:
        module = _module(name)
        within[module] = within.get(module, "") + ("n" if name in norms else "l")
    return {module for module, kinds in within.items() if re.fullmatch("ll+nn+|nn+ll+", kinds)}


def _steps(names: Sequence[str]) -> list[bool | None]:
    """For each name, whether its number puts it before the next."""
    return [_is_before_by_number(*pair) for pair in itertools.pairwise(names)]


def _is_before_by_number(name: str, other: str) -> bool | None:
    """Whether numbers put the first name before the other; None if more tells the two apart."""
    parts = zip(re.split("[./]", name), re.split("[./]", other), strict=False)
    first, second = next(((a, b) for a, b in parts if a != b), ("", ""))
    if first == second or re.sub(r"_?\d+$", "", first) != re.sub(r"_?\d+$", "", second):
        return None
    return natural(first) < natural(second)


def _out_of_order(names: Sequence[str], why: str, paths: Sequence[str]) -> str:
    """The message for layers of one kind and shape whose order is not known."""
    return (
        f"the order of {', '.join(names)}, of one kind and shape, is not known, as {why}: pair "
        f"{', '.join(paths)} in names."
    )


def _twice(source: Source, pairs: list[Pair]) -> str:
    paths = [pair.layer.path for pair in pairs if pair.source.name == source.name]
    return f"{source} fits layers of different kinds, {' and '.join(paths)}: say which in names."


def _miscount(group: list[Layer], fits: list[str], sources: list[Source]) -> str:
    """The message for unequal numbers of layers of one kind and shape."""
    wanted = ", ".join(layer.path for layer in group)
    if fits:
        return (
            f"the Flax layers {wanted} have one kind and shape, of which the source has "
            f"{', '.join(fits)}: {len(group)} against {len(fits)}. Pair them in names, or name "
            "what shall not be converted in leave."
        )
    others = "; ".join(map(str, sources[:4])) + (" ..." if len(sources) > 4 else "")
    return (
        f"no layer of the source fits {group[0]}. Not yet matched by name are: {others or 'none'}. "
        "Was it saved from a model of other sizes or arguments (use_bias, use_scale, "
        "transpose_kernel, feature_group_count)? Change the model, or name the layer in leave."
    )


def _difference(layer: Layer, source: Source, moves: Moves) -> str:
    """What does not fit."""
    likely = next(iter(moves(layer, source)), ())
    if not likely and source.kind == "ConvTranspose" and layer.kind == "Conv":
        return f"if {layer.path} is a ConvTranspose, say transpose_kernel={{{layer.path!r}: False}}"
    for move in likely:
        if move.source not in source.arrays:
            return f"the source has no {move.source} for {move.role}{_hint(move.role, False)}"
    for role in source.arrays:
        if likely and role not in (*OPTIONAL, *(move.source for move in likely)):
            return f"Flax has nothing for {role}{_hint(role, True)}"
    for move in likely:
        if not _fits(move, layer, source):
            ours, theirs = layer.arrays[move.role], source.arrays[move.source]
            return (
                f"{move.role} is {_axes.describe(ours)}, and {source.entries[move.source]} "
                f"{_axes.describe(theirs)} {move.layout}".rstrip()
            )
    return "they are of different kinds"


def _hint(role: str, use: bool) -> str:
    argument = {"scale": "use_scale", "weight": "use_scale", "gamma": "use_scale"}
    argument |= {"bias": "use_bias", "beta": "use_bias"}
    hint = f" (make the layer with {argument[role]}={use})" if role in argument else ""
    if role == "count":
        hint = " (make the layer with a momentum, not None)"
    if role in ("mean", "var"):
        hint = " (a layer with track_running_stats=False keeps none: calibrate the model)"
    return hint


def _fits(move: Move, layer: Layer, source: Source) -> bool:
    try:
        shape = move.forward(source.arrays[move.source]).shape
    except ValueError:
        return False
    return shape == tuple(layer.arrays[move.role].shape)
