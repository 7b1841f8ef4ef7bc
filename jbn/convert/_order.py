"""Whether layers that look alike come in the same order in both models, as far as that is known."""

import collections
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jbn.convert import _flax
from jbn.convert._pairs import Pair

# Of two layers, whether the first comes before the second in the model; None if that is not known.
IsBefore = Callable[[str, str], bool | None]
# A layer's place: for each part of its name what it is compared among, and its rank there.
Place = tuple[tuple[str, Any], ...]

AUTOMATIC = re.compile(r"[A-Z]\w*_\d+")  # Linen's name for a layer: its class and a number
SHOWN = 12  # names in a message


class OrderError(ValueError):
    """Layers of one kind and shape whose order is not known, or not the same in both models.

    Attributes:
        names: a guess at how they belong together, to be corrected and given as `names`.
    """

    names: dict[str, str]


def error(reason: str, names: dict[str, str]) -> OrderError:
    """The error with the guess, of which the message shows the beginning."""
    shown = ", ".join(f"{k!r}: {v!r}" for k, v in itertools.islice(names.items(), SHOWN))
    end = ", ...}, all of it in this error's attribute names" if len(names) > SHOWN else "}"
    made = OrderError(f"{reason} A guess by order, to be corrected: names={{{shown}{end}")
    made.names = names
    return made


class Order(NamedTuple):
    """What is known of the order of one side's layers.

    Attributes:
        is_before: of two names.
        unknown: why it may not be known.
        automatic: whether Linen may have numbered the layers, which it does as they are made.
    """

    is_before: IsBefore
    unknown: str
    automatic: bool = False


def of_source(names: Iterable[str], *, is_sorted: bool) -> Order:
    """The order of the other framework's layers: as they come, unless their names are sorted."""
    names = list(names)
    unknown = "the source is sorted by name, as safetensors and some files of Keras are"
    if is_sorted:
        return Order(_by_number(names), unknown)
    return Order(_comparing({name: (("", i),) for i, name in enumerate(names)}), unknown)


def of_flax(variables: Any) -> Order:
    """The order of Flax's layers: that in which a Linen model's `init` calls them, where it shows.

    It does not in variables, or a part of them, that are sorted by name: there numbers alone tell
    it. Layers are compared in a collection that holds both, params or else batch_stats.
    """
    trees = _flax.collections(variables)

    @functools.cache
    def is_sorted_at(module: tuple[str, ...]) -> bool:
        return all(_flax.is_sorted(functools.reduce(_flax.child, module, tree)) for tree in trees)

    def places(tree: Any) -> dict[str, Place]:
        ranks = collections.defaultdict[tuple[str, ...], dict[str, int]](dict)

        def rank(module: tuple[str, ...], name: str) -> tuple[str, Any]:
            if is_sorted_at(module):
                return _number(name)
            return "", ranks[module].setdefault(name, len(ranks[module]))

        layers = dict.fromkeys(path[:-1] for path, _ in _flax.walk(tree))
        return {
            "/".join(path): tuple(rank(path[:i], name) for i, name in enumerate(path))
            for path in layers
        }

    if _flax.is_nnx(variables):
        unknown = "the variables are sorted by name, as NNX sorts them"
    elif _flax.is_sorted(variables):
        unknown = (
            "the variables are sorted by name, as jax.eval_shape and jax.jit sort them (pass what "
            "a Linen model's init returns)"
        )
    else:
        unknown = "that part of the model is sorted by name, as nn.remat and nn.jit sort theirs"
    return Order(_comparing(*map(places, trees)), unknown, automatic=True)


def objections(
    groups: Sequence[Sequence[Pair]], orders: Sequence[Order]
) -> Iterator[tuple[Sequence[Pair], str]]:
    """The groups that should not have been paired by their order, each with the reason.

    A group is of one kind and shape. To be paired by order it must have the same order in both
    models, of which four things speak:

    1. Its own: on both sides it must be known, and numbers in the names must not deny it.
    2. Pairs that *cross*, one coming before the other in one model and after it in the other, as
       the shortcut of a residual block that one has first and the other last. Batch norms may cross
       other layers, since in torch often all convolutions are defined before all batch norms. But a
       pair of the group's own sort, batch norm or other, must cross none of the group, or all: then
       the order within the group does not depend on it. Numbers that confirm the group's order on
       both sides outweigh this, but not Linen's, which only count the calls.
    3. For batch norms, the layers that they follow: no two other layers may cross each other, but
       where one comes after all of the group in either model, so that none of the group follows it.
    4. The modules that its layers are in: one of `user` must not be paired with one of `item` where
       both models have a `user`. Names that end in a number do not speak, as the other model may
       count from another one.

    Args:
        groups: all pairs; those not paired by order are groups of their own.
        orders: of Flax and of the source.
    """
    if all(len(group) == 1 for group in groups):
        return
    crossings = {
        is_norm: [
            two
            for group, other in itertools.combinations(groups, 2)
            if group[0].is_norm == other[0].is_norm == is_norm
            for two in itertools.product(group, other)
            if _cross(*two, orders)
        ]
        for is_norm in (False, True)
    }
    for group in groups:
        if len(group) > 1:
            is_norm = group[0].is_norm
            reason = (
                _unknown(group, orders)
                or _crossed(group, crossings[is_norm], orders)
                or (_crossed_before(group, crossings[False], orders) if is_norm else "")
                or _in_another_module(group)
            )
            if reason:
                yield group, reason


def _unknown(group: Sequence[Pair], orders: Sequence[Order]) -> str:
    """Says that one side's order is not known, or denied by numbers; empty if neither."""
    for order, names in zip(orders, _sides(group), strict=True):
        if _numbers_deny(names, order.automatic):
            why = "their numbers say another"
        elif None in itertools.starmap(order.is_before, itertools.pairwise(names)):
            why = order.unknown
        else:
            continue
        return (
            f"the order of {_listed(names)}, of one kind and shape, is not known, as {why}: pair "
            f"{_paths(group)} in names."
        )
    return ""


def _crossed(
    group: Sequence[Pair], crossings: Iterable[tuple[Pair, Pair]], orders: Sequence[Order]
) -> str:
    """Says which pair crosses a part of the group, if numbers do not confirm its order."""
    if all(map(_is_numbered, _sides(group), (order.automatic for order in orders))):
        return ""
    members = {pair.names for pair in group}
    crossed = collections.defaultdict[tuple[str, str], list[Pair]](list)
    for two in crossings:
        for pair, other in (two, two[::-1]):
            if pair.names in members:
                crossed[other.names].append(pair)
    for other, some in crossed.items():
        if len(some) < len(group):
            return (
                f"{' and '.join(some[0].names)} would be paired by the order of their kind and "
                f"shape, but the two models have different orders: {' and '.join(other)} come "
                f"before them in one, and after them in the other. Pair {_paths(group)} in names."
            )
    return ""


def _crossed_before(
    group: Sequence[Pair], crossings: Iterable[tuple[Pair, Pair]], orders: Sequence[Order]
) -> str:
    """Says which other layers cross each other that the batch norms of the group may follow."""
    for two in crossings:
        if not any(_is_after(pair, group, orders) for pair in two):
            first, second = (" and ".join(pair.names) for pair in two)
            return (
                f"{_paths(group)} would be paired by the order of batch norms of their shape, but "
                "the two models have different orders of the layers that these may follow: "
                f"{first} come before {second} in one, and after them in the other. Pair "
                f"{_paths(group)} in names."
            )
    return ""


def _in_another_module(group: Sequence[Pair]) -> str:
    """Says which pair is not of modules of one name, though others of the group are in both."""
    in_flax, in_source = (set().union(*map(_modules, names)) for names in _sides(group))
    for pair in group:
        ours, theirs = map(_modules, pair.names)
        for name in sorted(((ours - theirs) & in_source) | ((theirs - ours) & in_flax)):
            return (
                f"{' and '.join(pair.names)} would be paired by the order of their kind and shape, "
                f"but both models have layers of that kind in {name!r}: pair {_paths(group)} in "
                "names."
            )
    return ""


def _modules(name: str) -> set[str]:
    """The names of the modules that a layer lies in, but for those that end in a number."""
    return {part for part in _parts(name)[:-1] if not part[-1:].isdigit()}


def _cross(pair: Pair, other: Pair, orders: Sequence[Order]) -> bool:
    """Whether one is known to come before the other in one model, and after it in the other."""
    return {
        order.is_before(*names) for order, names in zip(orders, _sides([pair, other]), strict=True)
    } == {True, False}


def _is_after(pair: Pair, group: Sequence[Pair], orders: Sequence[Order]) -> bool:
    """Whether the pair is known to come after all of the group in one of the models."""
    return any(
        order.is_before(names[-1], name)
        for order, name, names in zip(orders, pair.names, _sides(group), strict=True)
    )


def _sides(pairs: Iterable[Pair]) -> list[tuple[str, ...]]:
    """The names in Flax and those in the source."""
    return list(zip(*(pair.names for pair in pairs), strict=True))


def _paths(group: Sequence[Pair]) -> str:
    return _listed([pair.layer.path for pair in group])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _comparing(*tables: Mapping[str, Place]) -> IsBefore:
    """Compares two layers in the first table that has both."""

    def is_before(name: str, other: str) -> bool | None:
        for table in tables:
            if name in table and other in table:
                for (among, rank), (others, its_rank) in zip(
                    table[name], table[other], strict=False
                ):
                    if among != others:
                        return None
                    if rank != its_rank:
                        return rank < its_rank
                return None
        return None

    return is_before


def _by_number(names: Iterable[str]) -> IsBefore:
    """Compares by the numbers where the names first differ, if all before these is equal."""
    return _comparing({name: tuple(map(_number, _parts(name))) for name in names})


def _is_numbered(names: Sequence[str], skip_automatic: bool) -> bool:
    """Whether numbers put each name before the next, Linen's automatic ones apart if so told."""
    if skip_automatic:
        names = ["/".join(AUTOMATIC.sub("", part) for part in _parts(name)) for name in names]
    return all(itertools.starmap(_by_number(names), itertools.pairwise(names)))


def _numbers_deny(names: Sequence[str], skip_automatic: bool) -> bool:
    """Whether names that differ in a number first are not in the order of these numbers.

    Linen's automatic ones are skipped if so told: in `Dense(2)(Dense(4)(x))` the layer that is made
    first, Dense_0, is called last.
    """
    latest: dict[tuple[str, ...], Any] = {}
    for name in names:
        parts = _parts(name)
        for i, part in enumerate(parts):
            if skip_automatic and AUTOMATIC.fullmatch(part):
                continue
            stem, number = _number(part)
            among = (*parts[:i], stem)
            if number < latest.get(among, number):
                return True
            latest[among] = number
    return False


def _parts(name: str) -> list[str]:
    return re.split("[./]", name)


def _number(part: str) -> tuple[str, Any]:
    """A part of a name without its number, and the number."""
    return re.sub(r"_?\d+$", "", part), _flax.natural(part)
