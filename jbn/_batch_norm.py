"""Batch normalization, in training and at inference, with its hand-written backward pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import eval_jaxpr

from jbn import _axes, _moments
from jbn._axes import Array, Axes
from jbn._complex import cast, times
from jbn._moments import Moments

Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """The checked arguments that training and inference share.

    Attributes:
        x: [..., C].
        x_carrier: `x` cast to the dtype of computation, never read: see _moments.py.
        mask: boolean, of the rank of `x`, or None.
        features: scale, bias, mean, var, those that were given, each [C].
        residual: in the shape of `x`, or None.
        activation: as given.
        axes: of `x`.
        computed: dtype of z, the activation's argument.
        dtype: of y.
    """

    x: jax.Array
    x_carrier: jax.Array
    mask: jax.Array | None
    features: dict[str, jax.Array]
    residual: jax.Array | None
    activation: Activation | None
    axes: Axes
    computed: np.dtype
    dtype: np.dtype


def batch_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float | jax.Array = 1e-5,
    mask: Array | None = None,
    residual: Array | None = None,
    activation: Activation | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
    custom_vjp: bool = True,
) -> tuple[jax.Array, Moments]:
    """Normalizes each feature by the mean and variance of the batch, as in training.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)

    (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1). Statistics, affine step and backward
    sums are computed in at least float32; y and dx are rounded once, at the end. Kept for the
    backward pass are x, the mask, the residual (with an activation) and O(C) numbers.

    Args:
        x: [..., C] floating or complex, any rank from 1.
        scale: gamma, in the shape of the feature axes [C]; None for 1.
        bias: beta [C]; None for 0.
        axis: the feature axis or axes; all others are reduced.
        epsilon: added to the variance, 0 or more. Where var + epsilon is 0, x - mean is taken
            over 1 and y = activation(bias + residual).
        mask: boolean or 0/1, broadcasting to `x` as in NumPy. Elements where it is 0 take no part
            in the statistics; they are normalized all the same, so for gradients they must be
            finite.
        residual: added before the activation, in the shape of `x`.
        activation: an elementwise function such as `jax.nn.relu`. The backward pass computes its
            argument again from `x`. Arrays that it closes over, such as a learned slope, get
            their gradients.
        axis_name: name or names of mapped axes (`jax.vmap`, `jax.pmap`, `jax.shard_map`) over
            which the batch is split as well.
        axis_index_groups: groups of indices along `axis_name`, each a batch of its own.
        dtype: of y; that of `x` by default.
        custom_vjp: whether to differentiate by the hand-written rule. False leaves it to JAX,
            which keeps more in memory, and adds forward mode (`jax.jvp`, `jax.jacfwd`).

    Returns:
        y in the shape of `x`, and the `Moments` [C] of the batch, both differentiable. An empty
        batch, or one masked out whole, has mean 0, var 0 and y = activation(bias + residual).

    Raises:
        TypeError: if an argument has the wrong type, or y is complex and `dtype` is not.
        ValueError: if an axis is out of range or repeated, a shape does not fit `x`, epsilon is
            negative, the activation changes the shape, or `axis_index_groups` come without an
            axis name. Values that are traced are not checked.
        NameError: if `axis_name` is not bound.

    Example:
        >>> import jax, jax.numpy as jnp, jbn
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> y, moments = jbn.batch_norm(x, jnp.ones(2), jnp.zeros(2), activation=jax.nn.relu)
        >>> y.round(3).tolist(), moments.var.tolist()
        ([[0.0, 0.0], [1.0, 1.0]], [1.0, 100.0])
    """
    names = _axes.check_axis_names(axis_name, axis_index_groups)
    args = _check(x, axis, epsilon, mask, residual, activation, dtype, scale=scale, bias=bias)
    stats = _moments.statistics(
        args.x_carrier, args.x, args.mask, args.axes, names, axis_index_groups, custom_vjp
    )
    rstd = _rstd(stats.var, epsilon, empty=stats.count == 0)
    return _normalize(args, stats.shift, stats.offset, rstd, custom_vjp), stats.moments()


def batch_norm_inference(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float | jax.Array = 1e-5,
    residual: Array | None = None,
    activation: Activation | None = None,
    dtype: Any = None,
    custom_vjp: bool = True,
) -> jax.Array:
    """Normalizes each feature by a given mean and variance, as at test time.

        y = activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)

    (Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 2, step 11). The mean and the variance
    are arguments like any other and get their gradients.

    Args:
        x: [..., C] floating or complex, any rank from 1.
        mean: in the shape of the feature axes [C].
        var: variance [C], real.
        scale: gamma [C]; None for 1.
        bias: beta [C]; None for 0.
        axis: the feature axis or axes.
        epsilon: added to the variance, 0 or more.
        residual: added before the activation, in the shape of `x`.
        activation: an elementwise function such as `jax.nn.relu`.
        dtype: of y; that of `x` by default.
        custom_vjp: as in `batch_norm`.

    Returns:
        y in the shape of `x`.

    Raises:
        TypeError: if an argument has the wrong type, or y is complex and `dtype` is not.
        ValueError: if an axis is out of range or repeated, a shape does not fit `x`, epsilon is
            negative, or the activation changes the shape.

    Example:
        >>> import jax.numpy as jnp, jbn
        >>> x, mean, var = jnp.array([[1.0], [5.0]]), jnp.array([3.0]), jnp.array([4.0])
        >>> jbn.batch_norm_inference(x, mean, var, epsilon=0.0).tolist()
        [[-1.0], [1.0]]
    """
    features = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    args = _check(x, axis, epsilon, None, residual, activation, dtype, **features)
    mean, var = args.features["mean"], args.features["var"]
    return _normalize(args, mean, None, _rstd(var, epsilon), custom_vjp)


def _check(
    x: Any,
    axis: Any,
    epsilon: Any,
    mask: Any,
    residual: Any,
    activation: Any,
    dtype: Any,
    **features: Any,
) -> _Arguments:
    """Checks what training and inference share, before any array work."""
    x = _axes.check_float_array("x", x)
    axes = _axes.check_axes(axis, x)
    features = {
        name: _axes.check_feature(name, value, x, axes)
        for name, value in features.items()
        if value is not None or name in ("mean", "var")
    }
    residual = None if residual is None else _axes.check_residual(residual, x)
    _axes.check_epsilon(epsilon)
    dtypes = [x.dtype, *(v.dtype for v in features.values())]
    computed = _axes.compute_dtype(*dtypes, *([] if residual is None else [residual.dtype]))
    returned = _axes.check_activation(activation, x.shape, computed)
    dtype = _axes.check_output_dtype(dtype, x, returned)
    mask = None if mask is None else _axes.check_mask(mask, x)

    x, mask, residual = _axes.align_varying(x, mask, residual)
    carrier = _moments.carrier(x)
    return _Arguments(x, carrier, mask, features, residual, activation, axes, computed, dtype)


def _rstd(var: jax.Array, epsilon: Any, empty: Any = False) -> jax.Array:
    """1 / sqrt(var + epsilon); 0, with no gradient, where that is infinite or the batch empty."""
    v = var + jnp.asarray(epsilon, var.dtype)
    undefined = empty | (v == 0) | (v == jnp.inf)
    return jnp.where(undefined, 0, lax.rsqrt(jnp.where(undefined, 1, v)))


def _normalize(
    args: _Arguments,
    shift: jax.Array,
    offset: jax.Array | None,
    rstd: jax.Array,
    custom_vjp: bool,
) -> jax.Array:
    """y from statistics: what is O(C) is done here and differentiated by JAX, the rest below."""
    width = _axes.real_dtype(args.computed)

    def widen(v: jax.Array | None) -> jax.Array | None:
        return None if v is None else v.astype(_axes.compute_dtype(width, v.dtype))

    scale, bias = widen(args.features.get("scale")), widen(args.features.get("bias"))
    rstd = rstd.astype(width)
    if scale is not None:  # where rstd is 0 for overflow, the sum of dz (x - mean) may be infinite
        scale = jnp.where(rstd == 0, 0, scale)
    operands = _Operands(
        x=args.x,
        shift=widen(shift),
        offset=widen(offset),
        factor=rstd if scale is None else times(rstd, scale),
        bias=bias,
        residual=args.residual,
    )
    x_carrier, *aligned = _axes.align_varying(args.x_carrier, *operands)
    operands = _Operands(*aligned)
    z = x_carrier.astype(args.computed)  # for its type alone
    activation, closed_over = _closure(args.activation, z)
    dtypes = _Operands(*(None if v is None else v.dtype for v in operands))
    spec = _Spec(args.axes, dtypes, args.computed, args.dtype, activation)
    if custom_vjp:
        return _affine(spec, x_carrier, operands, closed_over)
    return _affine_plain(spec, operands._replace(x=x_carrier), closed_over)


def _closure(
    activation: Activation | None, z: jax.Array
) -> tuple[Callable[..., jax.Array] | None, tuple[jax.Array, ...]]:
    """The activation as a function of z and of what it closes over, and what that is.

    So that the rule can return cotangents for it, and be differentiated or batched apart from the
    trace in which the activation was made. (`jax.closure_convert` leaves integers inside.)
    """
    if activation is None:
        return None, ()
    closed = jax.make_jaxpr(lambda z: activation(z))(z)

    def converted(z: jax.Array, *closed_over: jax.Array) -> jax.Array:
        (y,) = eval_jaxpr(closed.jaxpr, closed_over, z)
        return y

    return converted, tuple(closed.consts)


# The normalisation, with c = x - mean, f = scale * rstd and sums over all N elements of a feature,
# valid or masked out:
#
#     z = f c + bias + residual        y = activation(z)
#
# With dz = activation'(z) dy:
#
#     dresidual = dz        dbias = sum(dz) = S        df = sum(dz c)
#     dmean = -f S          dx = f dz
#
# and no more is written by hand. JAX itself carries df to dscale = rstd df, and through
# d rstd / d var = -rstd^3 / 2 to the statistics, whose rule (in _moments.py) adds
# dmean / N + 2 dvar c / N to dx. With xhat = rstd c and D = sum(dz xhat), so that
# df = D / rstd and dvar = -scale rstd^2 D / 2, the three terms are the textbook's
#
#     dx = scale rstd (dz - S / N - xhat D / N).
#
# For complex values these are JAX's cotangents, without conjugation; a real argument takes the
# real part. z is computed again from x, so nothing but x (and residual, which z needs where there
# is an activation) is kept. `x_carrier` takes the cotangent of x before it is rounded: see
# _moments.py.


class _Operands(NamedTuple):
    """One entry for each array of the affine step, where all but x, shift and factor may be None.

    `shift + offset` is the mean, `factor` is scale * rstd.
    """

    x: Any
    shift: Any
    offset: Any
    factor: Any
    bias: Any
    residual: Any


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static part of the affine step.

    Attributes:
        axes: of `x`.
        dtypes: of the operands.
        computed: dtype of z.
        dtype: dtype of y.
        activation: called with z and the arrays that it closes over.
    """

    axes: Axes
    dtypes: _Operands
    computed: np.dtype
    dtype: np.dtype
    activation: Callable[..., jax.Array] | None

    @property
    def centred_dtype(self) -> np.dtype:
        return _axes.compute_dtype(
            _axes.real_dtype(self.computed), self.dtypes.x, self.dtypes.shift
        )


def _centre(spec: _Spec, a: _Operands) -> jax.Array:
    """c = x - mean, the mean subtracted in its two parts."""
    c = a.x.astype(spec.centred_dtype) - spec.axes.expand(a.shift).astype(spec.centred_dtype)
    return c if a.offset is None else c - spec.axes.expand(a.offset)


def _preactivation(spec: _Spec, a: _Operands, c: jax.Array) -> jax.Array:
    """z = f c + bias + residual."""
    z = times(c, spec.axes.expand(a.factor)).astype(spec.computed)
    if a.bias is not None:
        z = z + spec.axes.expand(a.bias).astype(spec.computed)
    if a.residual is not None:
        z = z + a.residual.astype(spec.computed)
    return z


def _activate(spec: _Spec, z: jax.Array, *closed_over: jax.Array) -> jax.Array:
    """y = activation(z), in its dtype."""
    return (spec.activation(z, *closed_over) if spec.activation else z).astype(spec.dtype)


def _affine_plain(spec: _Spec, a: _Operands, closed_over: tuple[jax.Array, ...]) -> jax.Array:
    return _activate(spec, _preactivation(spec, a, _centre(spec, a)), *closed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(
    spec: _Spec, x_carrier: jax.Array, a: _Operands, closed_over: tuple[jax.Array, ...]
) -> jax.Array:
    del x_carrier
    return _affine_plain(spec, a, closed_over)


def _affine_fwd(spec, x_carrier, a, closed_over):
    del x_carrier
    y = _affine_plain(spec, a, closed_over)
    kept = a if spec.activation else a._replace(bias=None, residual=None)
    return y, (kept, closed_over)


def _affine_bwd(spec, kept, dy):
    a, closed_over = kept
    c = _centre(spec, a)
    if spec.activation is None:
        dz, dclosed_over = cast(dy, spec.computed), ()
    else:
        z = _preactivation(spec, a, c)
        _, pull = jax.vjp(functools.partial(_activate, spec), z, *closed_over)
        dz, *dclosed_over = pull(dy)
    total = jnp.sum(dz, spec.axes.reduced)
    dmean = -times(total, a.factor)
    dx = times(dz, spec.axes.expand(a.factor))
    da = _Operands(
        x=None,
        shift=dmean,
        offset=dmean,
        factor=jnp.sum(times(dz, c), spec.axes.reduced),
        bias=total,
        residual=dz,
    )
    da = _Operands(
        *(
            None if v is None or dtype is None else cast(v, dtype)
            for v, dtype in zip(da, spec.dtypes, strict=True)
        )
    )
    return cast(dx, _axes.compute_dtype(spec.dtypes.x)), da, tuple(dclosed_over)


_affine.defvjp(_affine_fwd, _affine_bwd)
