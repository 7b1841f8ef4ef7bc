"""How the arrays of each layer lie in torch."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jbn.convert._flax import Layer
from jbn.convert._pairs import Move, Source

WITH_KERNEL = {"kernel": "weight", "bias": "bias"}
ROLES = {
    "BatchNorm": {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "count": "num_batches_tracked",
    },
    "Embed": {"embedding": "weight"},
    "Dense": WITH_KERNEL,
    "Conv": WITH_KERNEL,
    "ConvTranspose": WITH_KERNEL,
}


def moves(
    flattened: Mapping[str, Sequence[int]], layer: Layer, _: Source | None = None
) -> Iterator[Sequence[Move]]:
    """The ways in which a layer may lie in torch."""
    roles = ROLES.get(layer.kind)
    if roles is None:
        return
    if "kernel" in roles:
        kernels = _kernels(layer, flattened.get(layer.path))
    elif "count" in layer.arrays:
        kernels = [_count(layer)]
    else:
        kernels = [None]
    for special in kernels:
        yield [
            special if special and role == special.role else Move(role, roles[role])
            for role in layer.arrays
        ]


def _kernels(layer: Layer, flattened: Sequence[int] | None) -> list[Move]:
    """The layouts that the kernel may have, the likely one first."""
    if layer.kind == "Dense":
        return [_flattened(flattened) if flattened else DENSE]
    if layer.transpose_kernel is None:
        return [CONV, MIRRORED]  # the latter only if nothing but a ConvTranspose has its shape
    return [CONV] if layer.transpose_kernel else [MIRRORED, CONV]


def _spatial_last(kernel: np.ndarray) -> np.ndarray:
    """[*K, A, B] -> [A, B, *K]."""
    return np.moveaxis(kernel, (-2, -1), (0, 1))


def _mirror(weight: np.ndarray) -> np.ndarray:
    """Reverses the spatial axes of [A, B, *K].

    torch's transposed convolution is the transpose of a cross-correlation with the weight; Flax's,
    unless transpose_kernel, is a cross-correlation of the dilated input.
    """
    return np.flip(weight, tuple(range(2, weight.ndim)))


CONV = Move(
    "kernel",
    "weight",
    lambda w: np.moveaxis(w, (0, 1), (-1, -2)),
    lambda k: np.swapaxes(_spatial_last(k), 0, 1),
    "(O, I, *K) to (*K, I, O)",
)
MIRRORED = Move(
    "kernel",
    "weight",
    lambda w: np.moveaxis(_mirror(w), (0, 1), (-2, -1)),
    lambda k: _mirror(_spatial_last(k)),
    "(I, O, *K) to (*K, I, O), mirrored along K",
    is_transposed=True,
)
DENSE = Move("kernel", "weight", lambda w: w.T, lambda k: k.T, "(O, I) to (I, O)")


def _flattened(shape: Sequence[int]) -> Move:
    """The kernel after a flatten: the features (C, *K) of torch are (*K, C) in Flax."""
    channels, *spatial = shape

    def forward(weight: np.ndarray) -> np.ndarray:
        weight = weight.reshape(-1, channels, *spatial)
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1).T

    def backward(kernel: np.ndarray) -> np.ndarray:
        kernel = kernel.T.reshape(-1, *spatial, channels)
        return np.moveaxis(kernel, -1, 1).reshape(len(kernel), -1)

    layout = f"(O, I) to (I, O), I from {tuple(shape)} to {(*spatial, channels)}"
    return Move("kernel", "weight", forward, backward, layout)


def _count(layer: Layer) -> Move:
    """The number of updates: one in torch, one for each feature in Flax."""
    shape = layer.arrays["count"].shape
    return Move(
        "count",
        "num_batches_tracked",
        lambda n: np.full(shape, n),
        lambda count: np.asarray(count.max(initial=0)),
        "() to (C,); back, the largest",
    )
