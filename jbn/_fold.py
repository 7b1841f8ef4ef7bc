"""Batch norm at inference folded into the linear layer before it."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.lib.array_utils import normalize_axis_tuple

from jbn import _axes
from jbn._complex import times
from jbn._graph import Call, Layer, Norm, Path

TRAINING = "it runs in training mode"


def fold_batch_norm(
    kernel: jax.Array | np.ndarray,
    bias: jax.Array | np.ndarray | None,
    mean: jax.Array | np.ndarray,
    var: jax.Array | np.ndarray,
    scale: jax.Array | np.ndarray | None = None,
    bn_bias: jax.Array | np.ndarray | None = None,
    *,
    epsilon: float | jax.Array = 1e-5,
    axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, jax.Array]:
    """Folds batch norm by running statistics into the linear layer whose output it normalizes.

        s = scale / sqrt(var + epsilon)
        kernel' = kernel * s
        bias' = (bias - mean) * s + bn_bias

    so that x kernel' + bias' = batch_norm(x kernel + bias) (Jacob et al. 2018, arXiv:1712.05877,
    section 3.2). A convolution is linear in its kernel, so this holds whatever its strides,
    dilation, groups and padding. It is computed in at least float32 and rounded once.

    Args:
        kernel: [..., C] floating or complex.
        bias: of the linear layer [C]; None for 0.
        mean: running mean [C].
        var: running variance [C], real.
        scale: gamma [C]; None for 1.
        bn_bias: beta [C]; None for 0.
        epsilon: added to the variance, 0 or more.
        axis: where the output features lie in the kernel: the last axis for Flax's Conv and Dense,
            -2 for a ConvTranspose with `transpose_kernel`, 0 for torch's Linear and Conv2d.

    Returns:
        The new kernel, in the shape and dtype of `kernel`, and the new bias [C], in the dtype of
        `bias` or, without one, of `kernel`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an axis is out of range or repeated, a shape is not [C], epsilon is
            negative, a mean is not finite, or a variance is negative or NaN.

    Example:
        >>> import jax.numpy as jnp, jbn
        >>> kernel, mean, var = jnp.ones((2, 1)), jnp.array([3.0]), jnp.array([4.0])
        >>> kernel, bias = jbn.fold_batch_norm(kernel, None, mean, var, epsilon=0.0)
        >>> kernel.tolist(), bias.tolist()
        ([[0.5], [0.5]], [-1.5])
    """
    kernel = _axes.check_float_array("kernel", kernel)
    axes = _check_axis(axis, kernel)
    given = {"bias": bias, "mean": mean, "var": var, "scale": scale, "bn_bias": bn_bias}
    features = {
        name: _check_features(name, value, kernel, axes)
        for name, value in given.items()
        if value is not None or name in ("mean", "var")
    }
    check_mean("mean", features["mean"])
    check_var("var", features["var"])
    return _fold(kernel, features, _axes.check_epsilon(epsilon), axes)


def _check_axis(axis: Any, kernel: jax.Array) -> tuple[int, ...]:
    try:
        return tuple(sorted(normalize_axis_tuple(axis, kernel.ndim)))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"axis must name each output-feature axis of kernel = {_axes.describe(kernel)} once, "
            f"got {axis!r}."
        ) from None


def _check_features(name: str, value: Any, kernel: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    value = _axes.check_float_array(name, value)
    expected = tuple(kernel.shape[a] for a in axes)
    if value.shape != expected:
        raise ValueError(
            f"{name} must have the shape of the output-feature axes {axes} of kernel = "
            f"{_axes.describe(kernel)}, {expected}, got {_axes.describe(value)}."
        )
    if name == "var" and jnp.iscomplexobj(value):
        raise TypeError(f"var must be real, got {_axes.describe(value)}: var is E|x - mean|^2.")
    return value


def check_mean(name: str, mean: jax.Array) -> None:
    """Checks that a running mean, where its values are known, is finite."""
    if _axes.is_traced(mean):
        return
    bad = ~np.isfinite(np.asarray(mean))
    if bad.any():
        raise ValueError(
            f"{name} must be finite, but is not at feature {np.argwhere(bad)[0].tolist()} "
            f"({bad.sum()} of {bad.size} are so): look at the training run or the checkpoint that "
            "it comes from."
        )


def check_var(name: str, var: jax.Array) -> None:
    """Checks that a running variance, where its values are known, is one."""
    if _axes.is_traced(var) or not var.size:
        return
    known = np.asarray(var, np.float64)
    bad = ~(known >= 0)
    if bad.any():
        raise ValueError(
            f"{name} must not be negative or NaN, got {known[bad][0]:g} at feature "
            f"{np.argwhere(bad)[0].tolist()} ({bad.sum()} of {bad.size} are so): "
            "look at the training run or the checkpoint that it comes from."
        )


@functools.partial(jax.jit, static_argnums=3)
def _fold(
    kernel: jax.Array, features: dict[str, jax.Array], epsilon: Any, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """`fold_batch_norm` of checked arguments."""
    scaled, shift = _affine(kernel, features, epsilon, axes)
    return _round(scaled, kernel), _round(shift, features.get("bias", kernel))


@functools.partial(jax.jit, static_argnums=3)
def _fold_embedding(
    table: jax.Array, features: dict[str, jax.Array], epsilon: Any, axes: tuple[int, ...]
) -> jax.Array:
    """The table whose rows are normalized: an embedding has no bias apart."""
    scaled, shift = _affine(table, features, epsilon, axes)
    return _round(_plus(scaled, _expand(shift, table, axes)), table)


def _affine(
    kernel: jax.Array, features: dict[str, jax.Array], epsilon: Any, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """kernel' and bias', in one precision of at least float32."""
    real = _axes.real_dtype(kernel.dtype, *(v.dtype for v in features.values()))
    kernel = _widen(kernel, real)
    wide = {name: _widen(v, real) for name, v in features.items()}
    s = lax.rsqrt(wide["var"] + jnp.asarray(epsilon, real))
    s = times(s, wide["scale"]) if "scale" in wide else s
    centred = _plus(wide["bias"], -wide["mean"]) if "bias" in wide else -wide["mean"]
    shift = times(s, centred)
    shift = _plus(shift, wide["bn_bias"]) if "bn_bias" in wide else shift
    return times(_expand(s, kernel, axes), kernel), shift


def _widen(v: jax.Array, real: np.dtype) -> jax.Array:
    """`v` in the precision of `real`, complex if it was."""
    return v.astype(_axes.compute_dtype(real, v.dtype))


def _expand(v: jax.Array, kernel: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return lax.expand_dims(v, [a for a in range(kernel.ndim) if a not in axes])


def _plus(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, where either may be complex."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(dtype) + y.astype(dtype)


def _round(v: jax.Array, like: jax.Array) -> jax.Array:
    """`v` in the dtype of `like`, unless that would drop an imaginary part."""
    drops = jnp.iscomplexobj(v) and not jnp.iscomplexobj(like)
    return v if drops else v.astype(like.dtype)


def feeder_of(norm: Norm) -> Layer:
    """The layer that a batch norm is folded into."""
    assert norm.feeder is not None
    assert norm.obstacle is None
    return norm.feeder


def fold_variables(norm: Norm, arrays: Mapping[Path, Any]) -> dict[str, jax.Array]:
    """The variables, by name, of the layer that a batch norm is folded into.

    Args:
        norm: one that may be folded.
        arrays: all variables of the model by path.

    Raises:
        ValueError: if the running variance is negative or NaN.
    """
    layer, feeder = norm.layer, feeder_of(norm)
    kernel_axes = feeder.call.kernel_axes
    assert kernel_axes is not None
    own = {name: jnp.asarray(arrays[v.path]) for name, v in layer.variables.items()}
    given = {name: jnp.asarray(arrays[v.path]) for name, v in feeder.variables.items()}
    check_mean(f"the running mean of {layer.name}", own["mean"])
    check_var(f"the running var of {layer.name}", own["var"])
    name = next(iter(feeder.variables))
    kernel, stacked = given.pop(name), feeder.variables[name].stacked
    axes = tuple(a + kernel.ndim - stacked for a in kernel_axes)
    shape = (*kernel.shape[:stacked], *(kernel.shape[a] for a in kernel_axes))
    where = (*range(stacked), *(p + stacked for p in layer.positions))
    features = {
        {"bias": "bn_bias"}.get(name, name): lax.broadcast_in_dim(v, shape, where)
        for name, v in own.items()
    }
    function: Any = _fold_embedding if name == "embedding" else _fold
    function = functools.partial(function, epsilon=layer.call.epsilon, axes=axes)
    for _ in range(stacked):
        function = jax.vmap(function)
    folded = function(kernel, {**features, **given})
    return {name: folded} if name == "embedding" else {name: folded[0], "bias": folded[1]}


def linear_call(
    layer: Any, path: Path, y: jax.Array, kernel_axes: tuple[int, ...], promote_dtype: Any
) -> Call:
    """A call of a linear layer, whose output features are its last axes."""
    axes = tuple(range(y.ndim - len(kernel_axes), y.ndim))
    hooks = (
        "dot_general",
        "dot_general_cls",
        "conv_general_dilated",
        "conv_general_dilated_cls",
    )
    jaxs_own = (None, lax.dot_general, lax.conv_general_dilated)
    others = [
        f"its {name} is not JAX's" for name in hooks if getattr(layer, name, None) not in jaxs_own
    ]
    if layer.promote_dtype is not promote_dtype:
        others.append("its promote_dtype is not Flax's")
    if np.size(getattr(layer, "batch_dims", ())) or getattr(layer, "batch_axis", ()):
        others.append("its kernel has batch axes")
    return Call(path, axes, kernel_axes, obstacle=next(iter(others), None))


def norm_call(layer: Any, path: Path, x: Any, uses_running_average: bool) -> Call:
    """A call of a batch norm."""
    axes = _axes.check_axes(layer.axis, jnp.asarray(x)).feature
    obstacle = None if uses_running_average else TRAINING
    return Call(path, axes, epsilon=float(layer.epsilon), obstacle=obstacle)


def after(
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] | None,
    residual: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """What is left of a folded batch norm: the residual, the activation and the output's dtype."""
    if activation is None and residual is None:
        return x.astype(dtype)
    residual = None if residual is None else _axes.check_residual(residual, x)
    real = _axes.real_dtype(x.dtype, *([] if residual is None else [residual.dtype]))
    z = _widen(x, real)
    z = z if residual is None else _plus(z, _widen(residual, real))
    return (z if activation is None else activation(z)).astype(dtype)


class FoldedNorm(NamedTuple):
    """What became of a batch norm.

    Attributes:
        path: of the batch norm in the model.
        into: path of the layer it was folded into; None if it was left.
        reason: why it was left; None if it was folded.
    """

    path: str
    into: str | None
    reason: str | None


class FoldReport(tuple[FoldedNorm, ...]):
    """A `FoldedNorm` for each batch norm; `print` shows a line for each."""

    def __str__(self) -> str:
        width = max(len(norm.path) for norm in self)
        return "\n".join(
            f"{norm.path:{width}}  "
            + (f"left: {norm.reason}" if norm.into is None else f"folded into {norm.into}")
            for norm in self
        )


def report(norms: Iterable[Norm], uncalled: Collection[str]) -> FoldReport:
    """The report of what was analysed, and of batch norms whose call was not seen.

    Raises:
        ValueError: if there is none.
    """
    entries = [
        FoldedNorm(
            norm.layer.name,
            norm.feeder.name if norm.feeder and norm.obstacle is None else None,
            norm.obstacle,
        )
        for norm in norms
    ]
    reason = "the model does not call it with these arguments, or its class is derived"
    entries += [FoldedNorm(path, None, reason) for path in uncalled]
    if not entries:
        raise ValueError(
            "the model has no batch norm to fold: it is looked for among the layers of the classes "
            "jbn.linen.BatchNorm, jbn.nnx.BatchNorm and Flax's own. Linen layers, also those under "
            "nnx.bridge.ToNNX, are for jbn.linen.fold of the Linen model."
        )
    return FoldReport(entries)
