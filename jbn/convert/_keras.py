"""From and to the files of Keras, without Keras."""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jbn.convert import _convert, _keras_files
from jbn.convert._flax import Layer
from jbn.convert._pairs import Move, Pair, Source
from jbn.convert._report import Converted

WITH_KERNEL = {"kernel": "kernel", "bias": "bias"}
ROLES = {
    "BatchNorm": {
        "scale": "gamma",
        "bias": "beta",
        "mean": "moving_mean",
        "var": "moving_variance",
    },
    "Embed": {"embedding": "embeddings"},
    "Dense": WITH_KERNEL,
    "Conv": WITH_KERNEL,
    "ConvTranspose": WITH_KERNEL,
}
KINDS = {  # of Keras's layers, those of Flax that they can be
    "BatchNorm": ("BatchNorm",),
    "Embed": ("Embed",),
    "Dense": ("Dense",),
    "Conv": ("Conv",),
    "DepthwiseConv": ("Conv",),
    "ConvTranspose": ("ConvTranspose", "Conv"),
}


def from_keras(
    path: str | os.PathLike[str],
    variables: Any,
    *,
    names: Mapping[str, str] | None = None,
    leave: Sequence[str] = (),
    transpose_kernel: Mapping[str, bool] | None = None,
) -> Converted:
    """Loads Keras's weights into the variables of a Flax model.

    Layers are paired as in `jbn.convert.from_torch`: as `names` says, by equal names, and the
    others by their order among layers of the same kind and shape. That is the model's order of
    layers in `.h5`, and in `.keras` unless the model is of a subclass. There and in `.weights.h5`
    the names are sorted and tell the order by their numbers alone. Keras orders a model with
    branches by depth and numbers its layers as they are made; where the two differ `names` must
    say. A layer `conv` of a model `part` within the model is called `part/conv`, and a
    SeparableConv2D `sep` is two layers in Flax, which are called `sep/depthwise` and
    `sep/pointwise` here.

    Layouts, for any number of spatial axes:

        Conv (grouped too), Dense, Embedding   as in Flax
        DepthwiseConv    [*K, I, M]  ->  [*K, 1, I M], for feature_group_count=I
        ConvTranspose    [*K, O, I]  ->  [*K, I, O], mirrored along K
                                         [*K, O, I] for transpose_kernel=True

    What differs between the layers of batch norm is in docs/migrating.md: above all Keras's epsilon
    is 1e-3. It and the momentum are in the files of whole models, and from there in the report. A
    `.weights.h5` does not say whether a single parameter of batch norm is its scale or its bias: it
    becomes the one that the Flax layer has.

    Args:
        path: a whole model or weights alone, `.keras`, `.h5`, `.hdf5` or `.weights.h5`.
        variables: the template: what a Linen model's `init` or `jax.eval_shape` of it returns; for
            an NNX model `nnx.state(model)`, to be loaded with `nnx.update(model, weights)`.
        names: from the path of a Flax layer to the name of Keras's.
        leave: layers or modules, of either side, that are not converted. Flax's keep the values of
            the template.
        transpose_kernel: by path, this argument of each `ConvTranspose` layer of Flax; needed only
            where its name is not Linen's own (`ConvTranspose_0`, taken as False) and its numbers
            of inputs and outputs are equal.

    Returns:
        The variables, bit for bit Keras's numbers in the structure and dtypes of the template, and
        the report.

    Raises:
        FileNotFoundError: if there is no such file.
        OrderError: if the order of layers does not pair them. A ValueError; `names` is a guess.
        TypeError, ValueError: if a layer of either side is without its equal, in number, shape or
            kind, holds NaN or infinities or a negative variance, or if the file is truncated or
            foreign.

    Example:
        >>> import h5py, jax, jax.numpy as jnp, jbn.convert, numpy as np, pathlib, tempfile
        >>> from flax import linen as nn
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name, "model.weights.h5")
        >>> with h5py.File(path, "w") as file:  # as Keras's model.save_weights(path) does
        ...     file["layers/dense/vars/0"] = np.ones((3, 2), np.float32)
        ...     file["layers/dense/vars/1"] = np.zeros(2, np.float32)
        >>> template = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
        >>> variables, report = jbn.convert.from_keras(path, template)
        >>> variables["params"]["bias"]
        Array([0., 0.], dtype=float32)
        >>> sorted((row.source, row.flax) for row in report.used)
        [('layers/dense/vars/0', 'kernel'), ('layers/dense/vars/1', 'bias')]
        >>> folder.cleanup()
    """
    sources, is_sorted, left = _keras_files.read(path)
    pairs, more = _convert.pair_layers(
        variables,
        sources,
        _moves,
        is_sorted=is_sorted,
        names=names,
        leave=leave,
        transpose_kernel=transpose_kernel,
    )
    notes = []
    if not all(pair.source.config for pair in pairs if pair.layer.kind == "BatchNorm"):
        notes = [
            "The file holds no epsilon and momentum of the batch norm layers: unless changed, "
            "Keras's are epsilon=1e-3, which is not Flax's default, and momentum=0.99."
        ]
    return _convert.into_flax("Keras", variables, pairs, left | more, _arguments, notes)


def to_keras(
    variables: Any,
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    leave: Sequence[str] = (),
    transpose_kernel: Mapping[str, bool] | None = None,
) -> Converted:
    """Writes the weights of a Flax model into a copy of a file of Keras: `from_keras` backwards.

    Args:
        variables: of a Linen model, or `nnx.state(model)`.
        path: the file to write; it may be `like` itself.
        like: a file of the same kind that Keras wrote of this model, with any weights. What is not
            converted, such as the state of the optimizer, stays as it is there.
        names: from the path of a Flax layer to the name of Keras's.
        leave: layers or modules that are not converted.
        transpose_kernel: as in `from_keras`.

    Returns:
        What was written, from the names in the file to NumPy arrays, and the report.

    Raises:
        FileNotFoundError: if there is no file `like`.
        TypeError, ValueError: as `from_keras`, before anything is written.

    Example:
        >>> import h5py, jax, jax.numpy as jnp, jbn.convert, numpy as np, pathlib, tempfile
        >>> from flax import linen as nn
        >>> folder = tempfile.TemporaryDirectory()
        >>> old, new = (pathlib.Path(folder.name, f"{name}.weights.h5") for name in ("old", "new"))
        >>> with h5py.File(old, "w") as file:  # as Keras's model.save_weights(old) does
        ...     file["layers/dense/vars/0"] = np.ones((3, 2), np.float32)
        >>> model = nn.Dense(2, use_bias=False, kernel_init=nn.initializers.zeros)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> weights, report = jbn.convert.to_keras(variables, new, like=old)
        >>> weights["layers/dense/vars/0"].sum()
        np.float32(0.0)
        >>> folder.cleanup()
    """
    suffix = pathlib.Path(like).suffix
    if pathlib.Path(path).suffix != suffix:
        raise ValueError(
            f"{pathlib.Path(path).name} must be a file {suffix}, the kind that like is."
        )
    sources, is_sorted, left = _keras_files.read(like)
    pairs, more = _convert.pair_layers(
        variables,
        sources,
        _moves,
        is_sorted=is_sorted,
        names=names,
        leave=leave,
        transpose_kernel=transpose_kernel,
    )
    converted = _convert.out_of_flax("Keras", pairs, left | more, [])
    _keras_files.write(path, like, converted.weights)
    return converted


def _arguments(pair: Pair) -> dict[str, Any]:
    """The arguments of a batch norm layer as far as the file holds them."""
    config = pair.source.config
    arguments = {name: config[name] for name in ("epsilon", "momentum") if name in config}
    axis = config.get("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    return arguments if axis == -1 else {**arguments, "axis": axis}


def _moves(layer: Layer, source: Source) -> Iterator[Sequence[Move]]:
    """The ways in which a layer may lie in Keras."""
    if layer.kind not in KINDS.get(source.kind, ROLES):
        return
    roles = {role: _held(source, ROLES[layer.kind].get(role, role)) for role in layer.arrays}
    if "kernel" not in roles:
        yield [Move(role, theirs) for role, theirs in roles.items()]
        return
    for kernel in _kernels(layer, source, roles["kernel"]):
        yield [kernel, *(Move(role, theirs) for role, theirs in roles.items() if role != "kernel")]


def _held(source: Source, role: str) -> str:
    """The role as it is called in a source that may not know which of two it holds."""
    return next((held for held in source.arrays if role in held.split(" or ")), role)


def _kernels(layer: Layer, source: Source, role: str) -> list[Move]:
    """The layouts that the kernel may have, the likely one first."""
    same = Move("kernel", role)
    if layer.kind == "Dense":
        return [same]
    layout = "(*K, O, I) to (*K, I, O), mirrored along K"
    mirrored = Move("kernel", role, _mirror, _mirror, layout, is_transposed=True)
    depthwise = _depthwise(source, role)
    if source.kind == "DepthwiseConv":
        return [depthwise]
    if source.kind == "Conv":
        return [same]
    if source.kind == "ConvTranspose" and layer.kind == "Conv" and _is_square(source, role):
        return []  # either argument would fit: it must be given
    if layer.transpose_kernel is None:
        return [same, mirrored] if source.kind else [same, depthwise, mirrored]
    return [same] if layer.transpose_kernel else [mirrored, same]


def _mirror(kernel: np.ndarray) -> np.ndarray:
    """Its own inverse: reverses the spatial axes and swaps the others.

    Keras's transposed convolution is the transpose of a cross-correlation with the kernel; Flax's,
    unless transpose_kernel, is a cross-correlation of the dilated input.
    """
    return np.flip(np.swapaxes(kernel, -1, -2), tuple(range(kernel.ndim - 2)))


def _depthwise(source: Source, role: str) -> Move:
    """Keras's multiplier counts outputs within their input, and so do Flax's groups."""
    shape = source.arrays[role].shape if role in source.arrays else ()
    return Move(
        "kernel",
        role,
        lambda kernel: kernel.reshape(*kernel.shape[:-2], 1, -1),
        lambda kernel: kernel.reshape(shape),
        "(*K, I, M) to (*K, 1, I M)",
    )


def _is_square(source: Source, role: str) -> bool:
    kernel = source.arrays.get(role)
    return kernel is not None and kernel.shape[-1] == kernel.shape[-2]
