"""Static facts about the arguments: axes, shapes, dtypes, and every check of them.

A call is checked as a whole before anything is computed from `x`. Values that are traced, unlike
their shapes and dtypes, are not checked.
"""

import dataclasses
import itertools
import math
import numbers
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Axes:
    """How the axes of `x` divide into features and elements to reduce.

    Attributes:
        feature: the feature axes, non-negative and increasing.
        reduced: all the others.
    """

    feature: tuple[int, ...]
    reduced: tuple[int, ...]

    def expand(self, v: jax.Array) -> jax.Array:
        """Gives a feature array [C] the rank of `x`, as [1, ..., C] or wherever its axes lie."""
        return jax.lax.expand_dims(v, self.reduced)

    def feature_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the feature arrays that belong to an `x` of this shape."""
        return tuple(shape[i] for i in self.feature)

    def reduced_size(self, shape: Sequence[int]) -> int:
        """N, the number of elements of `x` that each feature has."""
        return math.prod(shape[i] for i in self.reduced)

    def can_slice(self, x: jax.Array) -> bool:
        """Whether the reduced axes have known sizes and are whole on every device.

        Exported programs may have a symbolic batch, and a slice along an axis that is sharded
        over an Explicit mesh axis is an error.
        """
        spec = jax.typeof(x).sharding.spec
        return all(isinstance(x.shape[i], int) and spec[i] is None for i in self.reduced)


@dataclasses.dataclass(frozen=True)
class Batch:
    """How a batch is split over mapped axes.

    Attributes:
        exchanges: names of the mapped axes, those together that one collective covers; none if the
            batch is whole.
        axis_index_groups: indices along the one axis that form a batch of their own.
    """

    exchanges: tuple[tuple[Any, ...], ...] = ()
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None


def real_dtype(*dtypes: Any) -> np.dtype:
    """The real dtype to accumulate in: float64 if any of the dtypes has its width, or float32."""
    wide = any(jnp.finfo(dtype).bits == 64 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def compute_dtype(*dtypes: Any) -> np.dtype:
    """`real_dtype`, or the complex dtype of the same precision if any of the dtypes is complex."""
    real = real_dtype(*dtypes)
    is_complex = any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)
    return np.result_type(real, np.complex64) if is_complex else real


def describe(value: Any) -> str:
    """What came, for an error message: dtype[shape] of an array, else its type and value."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{type(value).__name__} {value!r:.80}"


def is_traced(value: Any) -> bool:
    """Whether the value is not known before the program runs."""
    return isinstance(value, Tracer)


def check_variables(variables: Any) -> None:
    """That they are arrays, not what `jax.eval_shape` gives in their place."""
    for path, leaf in jax.tree.leaves_with_path(variables):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"variables{jax.tree_util.keystr(path)} must be an array, got the shape of one, "
                f"{describe(leaf)}: pass the variables themselves."
            )


def check_array(name: str, value: Any) -> jax.Array:
    """Returns `value` as a jax.Array if it is an array of any kind."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if not is_array and not hasattr(value, "__jax_array__"):
        raise TypeError(
            f"{name} must be an array, got {describe(value)}. "
            f"Convert it first: jnp.asarray({name})."
        )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {describe(value)}.") from None


def check_float_array(name: str, value: Any) -> jax.Array:
    """Returns `value` as a jax.Array if its dtype is floating or complex."""
    value = check_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating point or complex, got {describe(value)}. "
            f"Cast it first: {name}.astype(jnp.float32)."
        )
    return value


def check_axes(axis: int | Sequence[int], x: jax.Array) -> Axes:
    """Resolves the `axis` argument against the rank of `x`."""
    try:
        given = tuple(operator.index(a) for a in (axis if np.iterable(axis) else (axis,)))
    except TypeError:
        raise TypeError(
            f"axis must be an int or ints, the feature axes, got {describe(axis)}."
        ) from None
    for a in given:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(
                f"axis {a} is out of range for x = {describe(x)}: "
                f"a feature axis lies between {-x.ndim} and {x.ndim - 1}."
                if x.ndim
                else f"x = {describe(x)} has no axes, so it cannot have the feature axis {a}: "
                "give x at least one axis."
            )
    feature = tuple(sorted(a % x.ndim for a in given))
    if len(set(feature)) < len(feature):
        raise ValueError(
            f"axis = {axis!r} names an axis of x = {describe(x)} twice: "
            "name each feature axis once."
        )
    return Axes(feature, tuple(i for i in range(x.ndim) if i not in feature))


def check_feature(name: str, value: Any, x: jax.Array, axes: Axes) -> jax.Array:
    """Checks a feature array (scale, bias, mean, var): one number for each feature."""
    value = check_float_array(name, value)
    expected = axes.feature_shape(x.shape)
    if value.shape != expected:
        raise ValueError(
            f"{name} must have the shape of the feature axes {axes.feature} of x = {describe(x)}, "
            f"{expected}, got {describe(value)}."
        )
    if name == "var" and jnp.iscomplexobj(value):
        raise TypeError(f"var must be real, got {describe(value)}: var is E|x - mean|^2.")
    return value


def check_residual(residual: Any, x: jax.Array) -> jax.Array:
    """Checks that `residual` can be added to the output."""
    residual = check_float_array("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x = {describe(x)}, got {describe(residual)}. "
            "Broadcast it first: jnp.broadcast_to(residual, x.shape)."
        )
    return residual


def check_mask(mask: Any, x: jax.Array) -> jax.Array:
    """Returns the mask, boolean or weights, in the rank of `x`, not yet broadcast."""
    given, mask = mask, check_array("mask", mask)
    try:
        fits = jnp.broadcast_shapes(mask.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must broadcast to x = {describe(x)}, got {describe(mask)}. As in NumPy, its "
            "axes are matched from the last: a mask of the batch axis alone needs ones after it, "
            "mask.reshape(-1, 1, ..., 1)."
        )
    if mask.dtype != jnp.bool_:
        is_real = jnp.issubdtype(mask.dtype, jnp.floating)
        if not is_real and not jnp.issubdtype(mask.dtype, jnp.integer):
            raise TypeError(f"mask must be boolean or hold weights, got {describe(mask)}.")
        # In NumPy: inside jit, jax.numpy traces what it does to a known array too.
        known = None if is_traced(given) else np.asarray(given)
        if known is not None and not (np.isfinite(known) & (known >= 0)).all():
            raise ValueError(
                "mask must be boolean, or hold finite weights of at least 0, got "
                f"{describe(mask)} with values from {known.min()} to {known.max()}."
            )
    return jax.lax.expand_dims(mask, range(x.ndim - mask.ndim))


def check_number(name: str, value: Any, low: float, high: float, hint: str) -> Any:
    """Returns a hyperparameter as a float if its value is known, and else as it came.

    It must be a real number, and one in [low, high] if its value is known.
    """
    is_array = isinstance(value, jax.Array | np.ndarray) and value.shape == ()
    if not isinstance(value, numbers.Real) and not (
        is_array
        and (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer))
    ):
        raise TypeError(f"{name} must be a real number, got {describe(value)}: {hint}.")
    if is_traced(value):
        return value
    number = float(value)
    if not low <= number <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {bounds}, got {number:g}: {hint}.")
    return number


def check_epsilon(epsilon: Any) -> Any:
    """Checks the number that is added to the variance."""
    return check_number("epsilon", epsilon, 0, math.inf, "it is added to the variance")


def check_momentum(momentum: Any) -> Any:
    """Checks the weight of the old running statistics."""
    hint = "it weights the old statistics, where torch's 0.1 is 0.9; None averages all updates"
    return check_number("momentum", momentum, 0, 1, hint)


def check_output_dtype(dtype: Any, x: jax.Array, computed: np.dtype) -> np.dtype:
    """Resolves the `dtype` argument: that of `x` by default, able to hold what is computed."""
    try:
        resolved = jnp.dtype(x.dtype if dtype is None else dtype)
    except (TypeError, ValueError):
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.inexact):
        raise TypeError(
            "dtype must be a floating point or complex dtype such as jnp.float32, "
            f"got {resolved or describe(dtype)}."
        )
    dtype = jax.dtypes.canonicalize_dtype(resolved)
    if jnp.issubdtype(computed, jnp.complexfloating) and not jnp.issubdtype(
        dtype, jnp.complexfloating
    ):
        raise TypeError(
            f"the output is complex but its dtype would be {dtype.name}: "
            f"pass dtype=jnp.{computed.name}, or take real parts first."
        )
    return dtype


def check_batch(axis_name: Any, axis_index_groups: Any) -> Batch:
    """Resolves the names of the mapped axes that the batch is split over, which must be bound."""
    names = tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    names = () if axis_name is None else names
    if axis_index_groups is not None and len(names) != 1:
        raise ValueError(
            "axis_index_groups divide one named axis, "
            f"got axis_name = {axis_name!r} with axis_index_groups = {axis_index_groups!r}."
        )
    for name in names:
        if isinstance(name, int) or not isinstance(name, Hashable) or names.count(name) > 1:
            raise TypeError(
                "axis_name must be the name of a mapped axis, or different names, "
                f"got {axis_name!r}."
            )
        try:
            jax.lax.axis_size(name)
        except NameError:
            raise NameError(
                f"axis_name {name!r} is not bound: call inside jax.vmap or jax.pmap with "
                f"axis_name={name!r}, or inside jax.shard_map over a mesh with this axis."
            ) from None
    devices = tuple(name for name in names if name in device_axes())
    mapped = ((name,) for name in names if name not in devices)  # by vmap, which takes one at once
    exchanges = (*((devices,) if devices else ()), *mapped)
    return Batch(exchanges, _check_groups(axis_index_groups, names))


def device_axes() -> tuple[Any, ...]:
    """Names of the mapped axes along which devices lie: those of `shard_map` and `pmap`."""
    return jax.sharding.get_abstract_mesh().manual_axes


def _check_groups(groups: Any, names: tuple[Any, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Checks that the groups divide the one named axis into equal parts."""
    if groups is None:
        return None
    (name,) = names
    size = jax.lax.axis_size(name)
    try:
        checked = tuple(tuple(operator.index(i) for i in group) for group in groups)
    except TypeError:
        raise TypeError(
            "axis_index_groups must be lists of indices such as [[0, 1], [2, 3]], "
            f"got {describe(groups)}."
        ) from None
    equal = len({len(group) for group in checked}) == 1
    if not equal or sorted(itertools.chain(*checked)) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each of the {size} indices of axis {name!r} once, in "
            f"groups of one size, got {describe(groups)}."
        )
    return checked


def trace_activation(activation: Any, z: jax.Array) -> tuple[Any, np.dtype]:
    """Checks that `activation` keeps the shape; returns its jaxpr and the dtype that it gives."""
    if not callable(activation):
        raise TypeError(
            "activation must be an elementwise function such as jax.nn.relu, "
            f"got {describe(activation)}."
        )
    closed, y = jax.make_jaxpr(lambda z: activation(z), return_shape=True)(z)
    if getattr(y, "shape", None) != z.shape or not jnp.issubdtype(y.dtype, jnp.inexact):
        name = getattr(activation, "__name__", activation)
        raise ValueError(
            f"activation must be elementwise, from {describe(z)} to floating point or complex "
            f"numbers of the same shape, but {name} gives {describe(y)}. "
            "Apply it to the output instead."
        )
    return closed, y.dtype


def align_varying(*arrays: jax.Array | None) -> tuple[Any, ...]:
    """Casts arrays to vary over the same manual mesh axes.

    Inside `jax.shard_map` a replicated scale meets an `x` that differs by device. A custom rule
    returns a cotangent that differs by device for both; the cast, made outside the rule, is what
    sums the cotangent of the replicated one. Elsewhere this does nothing.
    """
    present = [a for a in arrays if a is not None]
    varying = [jax.typeof(a).manual_axis_type.varying for a in present]
    every = frozenset[Any]().union(*varying)

    def cast(a: jax.Array | None) -> jax.Array | None:
        held = every if a is None else jax.typeof(a).manual_axis_type.varying
        missing = tuple(sorted(every - held, key=str))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return tuple(cast(a) for a in arrays)


def vary_over(v: jax.Array, names: Sequence[Any]) -> jax.Array:
    """Casts to vary over mesh axes of `shard_map`, also those along which `v` is the same."""
    held = jax.typeof(v).manual_axis_type.varying
    missing = tuple(name for name in names if name in device_axes() and name not in held)
    return jax.lax.pcast(v, missing, to="varying") if missing else v


def shard_like(v: jax.Array, like: jax.Array) -> jax.Array:
    """Gives `v` the sharding of `like`, where a mesh of Explicit axes makes it part of the type."""
    return _shard(v, jax.typeof(like).sharding)


def shard_features(v: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """Gives a feature array the sharding of the features of `x`, as `shard_like` does."""
    sharding = jax.typeof(x).sharding
    spec = jax.P(*(sharding.spec[i] for i in axes.feature))
    return _shard(v, sharding.update(spec=spec))


def shard_mask(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Gives a mask [the rank of x] the sharding of `x`, where it is not broadcast."""
    sharding = jax.typeof(x).sharding
    return _shard(mask, sharding.update(spec=mask_spec(sharding.spec, x.shape, mask.shape)))


def mask_spec(spec: Any, shape: Sequence[int], mask_shape: Sequence[int]) -> jax.P:
    """How a mask is split: as `x`, where it is not broadcast."""
    return jax.P(*(s if n == m else None for s, n, m in zip(spec, shape, mask_shape, strict=True)))


def _shard(v: jax.Array, sharding: jax.NamedSharding) -> jax.Array:
    if sharding.mesh.empty or jax.typeof(v).sharding.spec == sharding.spec:
        return v
    return jax.sharding.reshard(v, sharding)
