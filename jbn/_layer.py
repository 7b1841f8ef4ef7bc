"""What the Flax layers share: a call, given the layer's hyperparameters, parameters and state."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

import jbn
from jbn import _axes

Arrays = dict[str, jax.Array]


class Hyperparameters(Protocol):
    """The fields of a layer that its call depends on."""

    axis: int | Sequence[int]
    momentum: float | None
    epsilon: float
    axis_name: str | Sequence[str] | None
    axis_index_groups: Any
    activation: Callable[[jax.Array], jax.Array] | None
    unbiased: bool
    custom_vjp: bool


def feature_shape(layer: Hyperparameters, x: jax.Array) -> tuple[int, ...]:
    """The shape of the layer's parameters and statistics, from its input."""
    return _axes.check_axes(layer.axis, x).feature_shape(x.shape)


def normalize(
    layer: Hyperparameters,
    x: jax.Array,
    params: dict[str, jax.Array | None],
    stats: Arrays,
    *,
    use_running_average: bool,
    dtype: Any,
    mask: jax.Array | None,
    residual: jax.Array | None,
    mapped: bool = True,
) -> tuple[jax.Array, jbn.Moments | None]:
    """The output, and the moments of the batch where it is normalized by them.

    Args:
        layer: the hyperparameters.
        x: [..., C] floating or complex.
        params: scale and bias [C] or None.
        stats: the running mean and var [C], and count [C] if the layer keeps one.
        use_running_average: whether to normalize by `stats`.
        dtype: of the output.
        mask: how much each element counts in the moments.
        residual: added before the activation.
        mapped: whether the axis names are bound.

    Raises:
        ValueError: if `stats` have not the shape of the feature axes of `x`.
    """
    expected = feature_shape(layer, x)
    for name, value in stats.items():
        if value.shape != expected:
            raise ValueError(
                f"the running {name} must have the shape of the feature axes of x = "
                f"{_axes.describe(x)}, {expected}, got {_axes.describe(value)}: "
                "was the layer made (num_features), or its checkpoint saved, for another width?"
            )
    options: dict[str, Any] = {
        **params,
        "axis": layer.axis,
        "epsilon": layer.epsilon,
        "residual": residual,
        "activation": layer.activation,
        "dtype": dtype,
        "custom_vjp": layer.custom_vjp,
    }
    if use_running_average:
        return jbn.batch_norm_inference(x, stats["mean"], stats["var"], **options), None
    if mapped and layer.axis_name is not None:
        options |= {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}
    return jbn.batch_norm(x, mask=mask, **options)


def updated_stats(layer: Hyperparameters, stats: Arrays, moments: jbn.Moments) -> Arrays:
    """The running statistics after the moments of a batch, under the same names."""
    running = jbn.RunningStats(**{"count": jnp.zeros(stats["mean"].shape), **stats})
    running = jbn.update_running_stats(
        running, moments, momentum=layer.momentum, unbiased=layer.unbiased
    )
    return {name: getattr(running, name) for name in stats}


def mask_of(params: Any, stats: Any) -> Any:
    """The tree of `params` with True for a scale and bias beside a mean and var in `stats`."""
    found = {_names(path) for path, _ in jax.tree.leaves_with_path(stats)}

    def is_batch_norm(path: tuple[Any, ...], _: Any) -> bool:
        *layer, name = _names(path)
        return name in ("scale", "bias") and {(*layer, "mean"), (*layer, "var")} <= found

    return jax.tree.map_with_path(is_batch_norm, params)


def _names(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Names along a path in a tree, without what lies inside a box of metadata."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
