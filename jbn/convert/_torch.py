"""From and to the `state_dict` of torch, without torch."""

import functools
import itertools
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jbn import _axes
from jbn.convert import _convert, _flax, _match, _safetensors, _torch_layouts
from jbn.convert._flax import Layer
from jbn.convert._pairs import Move, Moves, Pair, Source
from jbn.convert._report import Converted

VARIANCE_IN = (
    "The running variances of torch average unbiased variances (over n - 1), Flax's biased ones "
    "(over n). A state_dict does not say n, so they are taken as they are, which is right for "
    "inference; to go on training as torch does, give jbn's layers unbiased=True."
)
VARIANCE_OUT = (
    "The running variances are written as they are: biased (over n), unless the layers had "
    "unbiased=True, where torch goes on with unbiased ones (over n - 1)."
)

REORDERED = (
    "which is v.reshape(C, H, W, -1).transpose(1, 2, 0, 3).reshape(v.shape) of each array v in "
    "torch."
)


def from_torch(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    variables: Any,
    *,
    names: Mapping[str, str] | None = None,
    leave: Sequence[str] = (),
    transpose_kernel: Mapping[str, bool] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
    epsilon: float | None = None,
    momentum: float | None = None,
) -> Converted:
    """Loads torch's weights into the variables of a Flax model.

    Layers are paired as `names` says, then by equal names (`block.conv1` and `block/conv1`; the
    `layers` of a Sequential, and what all names of one side begin with, may be missing), and the
    others by their order of appearance among layers of the same kind and shape; the report says
    which, and names those that only their order tells apart. The order is that of the state_dict,
    which is that of the definition, and that of `model.init`. Names that are sorted, as `jax.jit`,
    `jax.eval_shape`, NNX and safetensors sort them, say it only where numbers tell them apart,
    Conv_0, ..., Conv_9, Conv_10. In a sorted template these are taken for the order of the calls,
    which they are not in `Dense(2)(Dense(4)(x))`: Linen numbers the outer layer first. What is not
    known, and layers of one shape that are used in another order than they are defined in, must be
    given in `names`: the error has a guess to correct. The latter is found where numbers in the
    names or layers of other shapes show it, but not, say, of two equal branches: check what the
    report names first, or the output of the model.

    Layouts, for any number of spatial axes:

        Conv (grouped too)  [O, I / groups, *K]  ->  [*K, I / groups, O]
        ConvTranspose       [I, O, *K]           ->  [*K, I, O], mirrored along K
                                                     [*K, O, I] for transpose_kernel=True
        Linear              [O, I]               ->  [I, O]
        Embedding           [N, D]               ->  [N, D]

    What differs between the layers of batch norm is in docs/migrating.md.

    Args:
        state_dict: from names to arrays (tensors on the CPU, NumPy or JAX arrays), or the path of
            a `.safetensors` file. Never a pickle: `torch.load(path, weights_only=True)` reads one.
        variables: the template: what a Linen model's `init` or `jax.eval_shape` of it returns; for
            an NNX model `nnx.state(model)`, to be loaded with `nnx.update(model, weights)`.
        names: from the path of a Flax layer (`"block/Conv_0"`) to the prefix of torch's
            (`"block.conv1"`), where the rules above do not do.
        leave: layers, modules or single entries, of either side, that are not converted. Flax's
            keep the values of the template.
        transpose_kernel: by path, this argument of each `ConvTranspose` layer of Flax; needed only
            where its name is not Linen's own (`ConvTranspose_0`, taken as False) and its numbers
            of inputs and outputs are equal, since the layer then looks as a Conv does.
        flattened: by path, the shape (C, H, W) that torch flattens before this Dense layer, where
            Flax flattens (H, W, C). The report names layers whose inputs suggest it, and others
            that a flatten or a view as (C, H, W) may concern.
        epsilon: torch's `eps`, for the report: a state_dict does not hold it.
        momentum: torch's, the weight of the new statistics; the report has Flax's, 1 - momentum.

    Returns:
        The variables, bit for bit torch's numbers in the structure and dtypes of the template, and
        the report.

    Raises:
        OrderError: if the order of layers does not pair them. A ValueError; `names` is a guess.
        TypeError, ValueError: if a layer of either side is without its equal, in number, shape or
            kind, holds NaN or infinities or a negative variance, or if the file is a pickle,
            truncated or foreign.

    Example:
        >>> import jax, jax.numpy as jnp, jbn.convert, jbn.linen, numpy as np
        >>> state_dict = {"weight": np.ones(3), "bias": np.zeros(3), "running_mean": np.ones(3)}
        >>> state_dict |= {"running_var": np.full(3, 4.0), "num_batches_tracked": np.array(7)}
        >>> bn = jbn.linen.BatchNorm(use_running_average=True, epsilon=1e-5)
        >>> template = jax.eval_shape(bn.init, jax.random.key(0), jnp.ones((1, 3)))
        >>> variables, report = jbn.convert.from_torch(
        ...     {f"bn1.{name}": value for name, value in state_dict.items()},
        ...     template,
        ...     epsilon=1e-5,
        ...     momentum=0.1,
        ... )
        >>> variables["batch_stats"]["var"]
        Array([4., 4., 4.], dtype=float32)
        >>> report.arguments
        {'': {'epsilon': 1e-05, 'momentum': 0.9}}
        >>> list(report.left)
        ['bn1.num_batches_tracked']
    """
    options: dict[str, Any] = {}
    notes = [VARIANCE_IN]
    if epsilon is None:
        notes.append("epsilon is not in a state_dict: unless changed, torch's is 1e-5, as Flax's.")
    else:
        options["epsilon"] = _axes.check_epsilon(epsilon)
    if momentum is None:
        notes.append(
            "momentum is not in a state_dict: unless changed, torch's is 0.1, which weights the "
            "new statistics; in Flax that is momentum=0.9."
        )
    else:
        options["momentum"] = 1 - _axes.check_momentum(momentum)
    sources, is_sorted = _read(state_dict)
    pairs, left = _convert.pair_layers(
        variables,
        sources,
        functools.partial(_torch_layouts.moves, _check_flattened(flattened, variables)),
        is_sorted=is_sorted,
        names=names,
        leave=leave,
        transpose_kernel=transpose_kernel,
    )
    notes = notes if _convert.batch_norms(pairs) else []
    order = None if is_sorted else sources
    notes = [*_notes_of_order(pairs, flattened or {}, variables, order), *notes]

    def arguments(pair: Pair) -> dict[str, Any]:
        counted = {"momentum": None} if "count" in pair.layer.arrays else {}
        return options | counted

    return _convert.into_flax("torch", variables, pairs, left, arguments, notes)


def to_torch(
    variables: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    like: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    names: Mapping[str, str] | None = None,
    leave: Sequence[str] = (),
    transpose_kernel: Mapping[str, bool] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
) -> Converted:
    """Gives the weights of a Flax model in torch's names and layouts: `from_torch` backwards.

    Args:
        variables: of a Linen model, or `nnx.state(model)`.
        path: of the `.safetensors` file to write, if any.
        like: a state_dict of the torch model, or its file, that gives the names and dtypes; layers
            are paired as in `from_torch`, and what they do not replace is kept. Without it a layer
            is called as `names` says, or by its path with dots.
        names: from the path of a Flax layer to the prefix of torch's.
        leave: layers or modules that are not converted.
        transpose_kernel: as in `from_torch`.
        flattened: as in `from_torch`.

    Returns:
        A dict of NumPy arrays, which `{k: torch.tensor(v) for k, v in weights.items()}` makes a
        state_dict, and the report. Of bfloat16, which torch does not take from NumPy, that is
        `torch.tensor(v.view("int16")).view(torch.bfloat16)`, or load the file that was written.

    Raises:
        TypeError, ValueError: as `from_torch`, before anything is written.

    Example:
        >>> import jax, jax.numpy as jnp, jbn.convert
        >>> from flax import linen as nn
        >>> variables = nn.Conv(8, (5, 3)).init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
        >>> weights, report = jbn.convert.to_torch(variables, names={"": "conv1"})
        >>> {name: value.shape for name, value in weights.items()}
        {'conv1.weight': (8, 2, 5, 3), 'conv1.bias': (8,)}
    """
    moves = functools.partial(_torch_layouts.moves, _check_flattened(flattened, variables))
    kept: dict[str, np.ndarray] = {}
    if like is None:
        _convert.check_mappings(names=names, transpose_kernel=transpose_kernel)
        layers = _flax.read_layers(variables, transpose_kernel or {})
        left = dict.fromkeys(_flax.other_entries(variables), _convert.NOT_FLOATING)
        left |= _match.split_left(leave, layers, {})
        pairs = _renamed(layers, moves, names or {})
        order = None
    else:
        sources, is_sorted = _read(like)
        order = None if is_sorted else sources
        kept = {s.entries[role]: v for s in sources for role, v in s.arrays.items()}
        pairs, left = _convert.pair_layers(
            variables,
            sources,
            moves,
            is_sorted=is_sorted,
            names=names,
            leave=leave,
            transpose_kernel=transpose_kernel,
        )
    notes = [VARIANCE_OUT] if _convert.batch_norms(pairs) else []
    notes = [*_notes_of_order(pairs, flattened or {}, variables, order), *notes]
    weights, report = _convert.out_of_flax("torch", pairs, left, notes)
    weights = kept | weights
    if path is not None:
        _safetensors.write(path, weights)
    return Converted(weights, report)


def _read(state_dict: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[list[Source], bool]:
    """The layers of a state_dict, in its order, and whether that is the order of their names."""
    is_file = isinstance(state_dict, str | os.PathLike)
    entries = _safetensors.read(state_dict) if is_file else state_dict
    if not isinstance(entries, Mapping):
        raise TypeError(
            "state_dict must map names to arrays, or be the path of a .safetensors file, got "
            f"{_axes.describe(entries)}: of a torch module pass module.state_dict()."
        )
    sources: dict[str, Source] = {}
    for entry, value in entries.items():
        name, _, role = str(entry).rpartition(".")
        source = sources.setdefault(name, Source(name, {}, {}))
        source.arrays[role] = _as_array(str(entry), value)
        source.entries[role] = str(entry)
    # A safetensors file, and so what its own loaders return, is sorted by dtype and name; torch
    # puts a weight before its bias.
    by_dtype: dict[Any, list[str]] = {}
    for source in sources.values():
        for role, value in source.arrays.items():
            by_dtype.setdefault(value.dtype, []).append(source.entries[role])
    place = {str(entry): i for i, entry in enumerate(entries)}
    is_sorted = is_file or all(
        sorted(names) == sorted(names, key=place.__getitem__) for names in by_dtype.values()
    )
    order = sorted(sources, key=_flax.natural) if is_sorted else list(sources)
    return [sources[name] for name in order], is_sorted


def _as_array(name: str, value: Any) -> np.ndarray:
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
    if array.dtype.kind not in "fiubV" or (array.dtype.kind == "V" and not _flax.is_float(array)):
        raise TypeError(
            f"the entry {name!r} must be an array of numbers, got {_axes.describe(value)}."
        )
    return array


def _renamed(layers: Mapping[str, Layer], moves: Moves, names: Mapping[str, str]) -> list[Pair]:
    """Pairs each layer with the torch layer that is made for it."""
    for path in names:
        if path not in layers:
            raise ValueError(
                f"names give {path!r}, which is no Flax layer: {_flax.known_names(layers)}."
            )
    made: dict[str, Pair] = {}
    for path, layer in layers.items():
        candidates = list(moves(layer, Source("", {}, {})))
        if not candidates:
            raise ValueError(f"{layer} is of a kind that is not converted: name it in leave.")
        name = names.get(path, path.replace("/", "."))
        if name in made:
            raise ValueError(f"{made[name].layer.path} and {path} would both be called {name!r}.")
        matched = "names" if path in names else "equal names"
        made[name] = Pair(layer, _made(name, layer, candidates[0]), candidates[0], matched)
    return list(made.values())


def _made(name: str, layer: Layer, moves: Sequence[Move]) -> Source:
    """The torch layer, without its numbers."""
    arrays = {
        move.source: move.backward(np.zeros(layer.arrays[move.role].shape, _dtype(layer, move)))
        for move in moves
    }
    return Source(name, arrays, {role: f"{name}.{role}".lstrip(".") for role in arrays})


def _dtype(layer: Layer, move: Move) -> np.dtype:
    return np.dtype(np.int64 if move.role == "count" else layer.arrays[move.role].dtype)


def _check_flattened(
    flattened: Mapping[str, Sequence[int]] | None, variables: Any
) -> Mapping[str, Sequence[int]]:
    """Checks that each shape has as many elements as its Dense layer has inputs."""
    _convert.check_mappings(flattened=flattened)
    layers = _flax.read_layers(variables, {}) if flattened else {}
    for path, shape in (flattened or {}).items():
        if path not in layers or layers[path].kind != "Dense":
            dense = [p for p, layer in layers.items() if layer.kind == "Dense"]
            raise ValueError(
                f"flattened names {path!r}, which is no Dense layer: {_flax.known_names(dense)}."
            )
        inputs = layers[path].arrays["kernel"].shape[0]
        is_shape = isinstance(shape, Sequence) and all(
            isinstance(n, numbers.Integral) and n > 0 for n in shape
        )
        if not is_shape or len(shape) < 2 or math.prod(shape) != inputs:
            raise ValueError(
                f"flattened gives {path} the shape {shape!r}, and it has {inputs} inputs: give "
                "(C, H, W) of what torch flattens before it."
            )
    return flattened or {}


def _notes_of_order(
    pairs: Sequence[Pair],
    flattened: Mapping[str, Sequence[int]],
    variables: Any,
    sources: Sequence[Source] | None,
) -> list[str]:
    """Notes of layers with features in torch's order of (C, H, W), which is not Flax's.

    `sources` are torch's layers in the order of the model, None if that is not known.
    """
    is_ordered = not _flax.is_sorted(variables)
    orders = [pairs] if is_ordered else []
    if sources is not None:
        place = {source.name: i for i, source in enumerate(sources)}
        orders.append(sorted(pairs, key=lambda pair: place[pair.source.name]))
    return [*_unflattened(pairs, flattened, is_ordered=is_ordered), *_viewed(orders or [pairs])]


def _unflattened(
    pairs: Sequence[Pair], flattened: Mapping[str, Sequence[int]], *, is_ordered: bool
) -> Iterator[str]:
    """Notes of Dense layers that may follow a flatten of which `flattened` does not say.

    Their number of inputs is a multiple of a convolution's channels, and no other layer's features;
    where the pairs are in the order of the model, no earlier layer's. A batch norm has those of the
    layer before it, or of the flatten: then it is named too.
    """
    channels = set[int]().union(*(_features(p) for p in pairs if "Conv" in p.layer.kind))
    for i, pair in enumerate(pairs):
        if pair.layer.kind != "Dense":
            continue
        path, inputs = pair.layer.path, pair.layer.arrays["kernel"].shape[0]
        others = pairs[:i] if is_ordered else [*pairs[:i], *pairs[i + 1 :]]
        is_suspect = any(1 < c < inputs and inputs % c == 0 for c in channels) and not any(
            inputs in _features(other) for other in others if not other.is_norm
        )
        if path not in flattened and not is_suspect:
            continue
        if path not in flattened:
            yield (
                f"{path} has {inputs} inputs, which no convolution or Dense layer before has as "
                "its features: if torch flattens (C, H, W) before it, give "
                f"flattened={{{path!r}: (C, H, W)}}, or its inputs are in another order than in "
                "Flax."
            )
        norms = [p.layer.path for p in others if p.is_norm and inputs in _features(p)]
        if norms:
            yield (
                f"{', '.join(norms)} may be between a flatten and {path}, whose inputs are as many "
                f"as the features: if so, these are in another order than in Flax, {REORDERED}"
            )


def _viewed(orders: Iterable[Sequence[Pair]]) -> Iterator[str]:
    """Notes of Dense layers whose outputs may become the (C, H, W) of a convolution after them."""
    noted = set()
    for pairs in orders:
        layers = [pair.layer for pair in pairs if not pair.is_norm]
        for dense, conv in itertools.pairwise(layers):
            if dense.kind != "Dense" or "Conv" not in conv.kind or dense.path in noted:
                continue
            outputs = dense.arrays["kernel"].shape[-1]
            inputs = conv.arrays["kernel"].shape[-1 if conv.transpose_kernel else -2]
            if 1 < inputs < outputs and outputs % inputs == 0:
                noted.add(dense.path)
                yield (
                    f"{dense.path} has {outputs} outputs, a multiple of the {inputs} inputs of "
                    f"{conv.path}: if torch views them as (C, H, W) between the two, they and the "
                    "features of a batch norm there are in another order than in Flax, "
                    f"{REORDERED}"
                )


def _features(pair: Pair) -> set[int]:
    """The last axes of the arrays of the Flax layer."""
    return {value.shape[-1] for value in pair.layer.arrays.values()}
