"""Which layer of the other framework belongs to which of Flax."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jbn import _axes
from jbn.convert import _order
from jbn.convert._flax import Layer, known_names
from jbn.convert._order import Order
from jbn.convert._pairs import OPTIONAL, Move, Moves, Pair, Source, fitting


def match(
    layers: Mapping[str, Layer],
    sources: Mapping[str, Source],
    moves: Moves,
    names: Mapping[str, str],
    orders: tuple[Order, Order],
) -> list[Pair]:
    """Pairs all layers: as `names` says, then by equal names, then by order of appearance.

    An order that is not known, or that the names or the other layers deny, is refused.

    Args:
        layers: of Flax, by path.
        sources: by name.
        moves: how a layer can be converted.
        names: from the path of a layer to the name of its source.
        orders: what is known of the order of the layers, and of the sources.
    """
    given = [
        _pair(_named(path, layers, "Flax"), _named(name, sources, "source"), moves, "names")
        for path, name in names.items()
    ]
    _check_twice(given)
    equal = _by_equal_names(layers, sources, moves, names)
    # Equal names may be so by accident, as layers.2 of torch and layers_2 of Flax, where torch
    # counts activations too. Among layers that are not all so named, the order must confirm them.
    done = {pair.layer.path for pair in given + equal}
    doubtful = {_alike(layer) for path, layer in layers.items() if path not in done}
    sure = given + [pair for pair in equal if _alike(pair.layer) not in doubtful]
    unsure = dict(
        pair.names for pair in equal if _alike(pair.layer) in doubtful and not _is_vague(pair)
    )
    done, taken = {pair.layer.path for pair in sure}, {pair.source.name for pair in sure}
    groups = _by_order(
        [layer for path, layer in layers.items() if path not in done],
        [source for name, source in sources.items() if name not in taken],
        moves,
    )
    refused = list(_order.objections([[pair] for pair in sure] + groups, orders))
    refused += _order_against_names(groups, unsure)
    if refused:
        _, reason = refused[0]
        guess: dict[str, str] = {}
        for group, _ in refused:
            guess |= _guess(group, unsure)
        raise _order.error(reason, guess)
    return sure + [pair for group in groups for pair in group]


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
            _drop(sources, other, role)
            left[name] = "leave"
        path, _, role = name.rpartition("/")
        if path in layers and role in layers[path].arrays:
            _drop(layers, path, role)
            left[name] = "leave"
        elif not flax and not theirs and not entries:
            raise ValueError(
                f"leave names {name!r}, which is no layer: in Flax {known_names(layers)}, "
                f"in the source {known_names(sources)}."
            )
        for path in flax:
            left |= {f"{path}/{role}".lstrip("/"): "leave" for role in layers.pop(path).arrays}
        for other in theirs:
            left |= dict.fromkeys(sources.pop(other).entries.values(), "leave")
    return left


def _drop(table: dict[str, Any], name: str, role: str) -> None:
    """Takes an array out of a layer of either side, and the layer with its last."""
    arrays = {key: value for key, value in table[name].arrays.items() if key != role}
    if arrays:
        table[name] = dataclasses.replace(table[name], arrays=arrays)
    else:
        del table[name]


def _named(name: str, table: Mapping[str, Any], side: str) -> Any:
    if name not in table:
        raise ValueError(f"names give {name!r}, which is no {side} layer: {known_names(table)}.")
    return table[name]


def _pair(layer: Layer, source: Source, moves: Moves, matched: str) -> Pair:
    """Pairs two layers that shall belong together."""
    fit = fitting(layer, source, moves)
    if fit is None:
        raise ValueError(
            f"{layer} does not fit {source}: {_difference(layer, source, moves)}. The two are "
            f"matched by {matched}."
        )
    return Pair(layer, source, fit, matched)


def _check_twice(pairs: Sequence[Pair]) -> None:
    paths: dict[str, list[str]] = {}
    for pair in pairs:
        paths.setdefault(pair.source.name, []).append(pair.layer.path)
    for name, several in paths.items():
        if len(several) > 1:
            raise ValueError(f"names give {name!r} to several Flax layers: {', '.join(several)}.")


def _by_equal_names(
    layers: Mapping[str, Layer],
    sources: Mapping[str, Source],
    moves: Moves,
    names: Mapping[str, str],
) -> list[Pair]:
    """Pairs layers whose names are equal but for separators, then those whose short names are.

    Those that do not fit and may be equal by accident are left: short names, and names that end in
    a bare number, which differs where one side counts activations.
    """
    pairs: list[Pair] = []
    short = functools.partial(_short, _shared(layers)), functools.partial(_short, _shared(sources))
    for plain, plain_source in ((_plain, _plain), short):
        done = {*names, *(pair.layer.path for pair in pairs)}
        taken = {*names.values(), *(pair.source.name for pair in pairs)}
        ours = _unique(plain, (path for path in layers if path not in done))
        theirs = _unique(plain_source, (name for name in sources if name not in taken))
        for key in filter(theirs.__contains__, ours):
            layer, source = layers[ours[key]], sources[theirs[key]]
            may_differ = plain is not _plain or key[-1].isdigit()
            if not may_differ or fitting(layer, source, moves):
                pairs.append(_pair(layer, source, moves, "equal names"))
    return pairs


def _unique(
    plain: Callable[[str], tuple[str, ...]], names: Iterable[str]
) -> dict[tuple[str, ...], str]:
    """Those of the names by what they are in plain words, where no other is the same."""
    table: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        table.setdefault(plain(name), []).append(name)
    return {key: name for key, (name, *others) in table.items() if not others}


def _plain(name: str) -> tuple[str, ...]:
    """The words of a name, without the separators."""
    return tuple(re.split("[./_]", name))


def _short(shared: str, name: str) -> tuple[str, ...]:
    """Its words without what all names begin with, and without the `layers` of a Sequential."""
    words = _plain(name.removeprefix(shared))
    return tuple(
        word
        for word, after in itertools.zip_longest(words, words[1:], fillvalue="")
        if word != "layers" or not after.isdigit()
    )


def _shared(names: Iterable[str]) -> str:
    """The modules that all layers lie in, such as `module.` of torch's DataParallel."""
    parts = (re.split("(?<=[./])", name)[:-1] for name in names)
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return "".join(column[0] for column in columns)


def _is_vague(pair: Pair) -> bool:
    """Whether their names are equal in short only, and end in a bare number."""
    words = _plain(pair.source.name)
    return words[-1].isdigit() and words != _plain(pair.layer.path)


def _order_against_names(
    groups: Iterable[Sequence[Pair]], names: Mapping[str, str]
) -> Iterator[tuple[Sequence[Pair], str]]:
    """The groups in which the order is not that of equal names, each with the reason."""
    for group in groups:
        for path, name in (pair.names for pair in group):
            if names.get(path, name) != name:
                yield (
                    group,
                    f"{path} and {names[path]} have equal names, but by the order of the layers of "
                    f"that kind and shape it is {name}, and not all of these have equal names: "
                    "pair them in names.",
                )
                break


def _guess(group: Sequence[Pair], names: Mapping[str, str]) -> dict[str, str]:
    """The group by equal names where they do not end in a bare number, the others by order."""
    paths, others = zip(*(pair.names for pair in group), strict=True)
    kept = {
        path: names[path]
        for path in paths
        if names.get(path) in others and not _plain(names[path])[-1].isdigit()
    }
    rest = (name for name in others if name not in kept.values())
    return {path: kept.get(path) or next(rest) for path in paths}


def _alike(layer: Layer) -> tuple[Any, ...]:
    """The kind and the shapes, by which layers are told apart."""
    shapes = sorted((role, tuple(value.shape)) for role, value in layer.arrays.items())
    return layer.kind, layer.transpose_kernel, tuple(shapes)


def _by_order(layers: list[Layer], sources: list[Source], moves: Moves) -> list[list[Pair]]:
    """Pairs layers of one kind and shape in their order, if there are as many on both sides."""
    alike: dict[Any, list[Layer]] = {}
    for layer in layers:
        alike.setdefault(_alike(layer), []).append(layer)
    groups, used = [], set()
    for group in alike.values():
        # A Conv of 4 to 8 features may have the shape of a ConvTranspose of 8 to 4.
        for ways in (functools.partial(_likely, moves), moves):
            fits = [source for source in sources if fitting(group[0], source, ways) is not None]
            if len(fits) == len(group):
                break
        else:
            raise ValueError(_miscount(group, [source.name for source in fits], sources))
        matched = "order" if len(group) > 1 else "shape"
        # Not the moves of the first layer for all: they may hold its path.
        pairs = [_pair(*two, moves, matched) for two in zip(group, fits, strict=True)]
        groups.append(pairs)
        for source in fits:
            if source.name in used:
                raise ValueError(_twice(source, [pair for pairs in groups for pair in pairs]))
            used.add(source.name)
    surplus = [str(source) for source in sources if source.name not in used]
    if surplus:
        raise ValueError(
            f"no Flax layer fits {'; '.join(surplus[:4])}{' ...' if len(surplus) > 4 else ''}: "
            "add the layers to the model, or name what shall not be converted in leave."
        )
    return groups


def _likely(moves: Moves, layer: Layer, source: Source) -> Iterable[Sequence[Move]]:
    """The first way to convert a layer."""
    return itertools.islice(moves(layer, source), 1)


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
        if not move.fits(layer, source):
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
