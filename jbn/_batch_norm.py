"""Batch normalization, in training and at inference, with its hand-written backward pass."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.lax import stop_gradient  # by name: see _moments.py

from jbn import _axes, _lowering, _moments, _remat
from jbn._axes import Array, Axes, Batch
from jbn._complex import cast, times
from jbn._moments import Moments

Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What is static in a call.

    Attributes:
        axes: of `x`.
        centred: dtype of x - mean.
        computed: dtype of z, the activation's argument.
        dtype: of y.
        activation: called with z and the arrays that it closes over.
        passes: whether dz holds elements of dy and zeros only.
        adds: whether there is a residual.
        custom_vjp: whether to use the hand-written rule.
        epsilon: if its value is known.
    """

    axes: Axes
    centred: np.dtype
    computed: np.dtype
    dtype: np.dtype
    activation: Callable[..., jax.Array] | None
    passes: bool
    adds: bool
    custom_vjp: bool
    epsilon: float | None


class _Arrays(NamedTuple):
    """The arrays of a call, as given; `features` are scale, bias, mean, var, each [C].

    `epsilon` is None where `_Spec` has it.
    """

    x: jax.Array
    mask: jax.Array | None
    residual: jax.Array | None
    features: dict[str, jax.Array]
    epsilon: Any
    closed_over: tuple[jax.Array, ...]


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
            over 1 and y = activation(bias + residual). A new value that is not traced is compiled
            anew.
        mask: boolean, or weights of at least 0, broadcasting to `x` as in NumPy: how much each
            element counts in the statistics. Those of weight 0 take no part; they are normalized
            all the same, so for gradients they must be finite.
        residual: added before the activation, in the shape of `x`.
        activation: an elementwise function such as `jax.nn.relu`. The backward pass computes its
            argument again from `x`. Arrays that it closes over, such as a learned slope, get
            their gradients. Outside `jax.jit`, a function that is not JAX's own is compiled anew
            at each call.
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
    batch = _axes.check_batch(axis_name, axis_index_groups)
    features = {"scale": scale, "bias": bias}
    options = epsilon, mask, residual, activation, dtype, custom_vjp
    return _batch_norm(*_check(x, axis, features, *options), batch)


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
        epsilon: added to the variance, 0 or more; as in `batch_norm`.
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
    options = epsilon, None, residual, activation, dtype, custom_vjp
    return _batch_norm_inference(*_check(x, axis, features, *options))


def _check(
    x: Any,
    axis: Any,
    features: dict[str, Any],
    epsilon: Any,
    mask: Any,
    residual: Any,
    activation: Any,
    dtype: Any,
    custom_vjp: bool,
) -> tuple[_Spec, _Arrays]:
    """Checks what training and inference share, before any array work."""
    x = _axes.check_float_array("x", x)
    axes = _axes.check_axes(axis, x)
    features = {
        name: _axes.check_feature(name, value, x, axes)
        for name, value in features.items()
        if value is not None or name in ("mean", "var")
    }
    residual = None if residual is None else _axes.check_residual(residual, x)
    epsilon = _axes.check_epsilon(epsilon)
    number = epsilon if isinstance(epsilon, float) else None
    dtypes = [x.dtype, *(v.dtype for v in features.values())]
    computed = _axes.compute_dtype(*dtypes, *([] if residual is None else [residual.dtype]))
    mask = None if mask is None else _axes.check_mask(mask, x)
    function, closed_over, returned = None, (), computed
    if activation is not None:
        arrays = x, mask, residual, *features.values()
        function, closed_over, returned = _closure(activation, computed, *arrays)
    centred = [features[name].dtype for name in ("mean",) if name in features]
    spec = _Spec(
        axes=axes,
        centred=_axes.compute_dtype(_axes.real_dtype(computed), x.dtype, *centred),
        computed=computed,
        dtype=_axes.check_output_dtype(dtype, x, returned),
        activation=function,
        passes=activation is jax.nn.relu,
        adds=residual is not None,
        custom_vjp=bool(custom_vjp),
        epsilon=number,
    )
    traced = epsilon if number is None else None
    return spec, _Arrays(x, mask, residual, features, traced, closed_over)


def _closure(
    activation: Activation, dtype: np.dtype, x: jax.Array, *arrays: jax.Array | None
) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...], np.dtype]:
    """The activation as a function of z and of what it closes over, what that is, and its dtype.

    So that the rule can return cotangents for it, and be differentiated or batched apart from the
    trace in which the activation was made. (`jax.closure_convert` leaves integers inside.)
    """
    if _is_jaxs_own(activation):
        _, returned = _trace_once(activation, jax.ShapeDtypeStruct(x.shape, dtype))
        return activation, (), returned
    z = _axes.align_varying(x, *arrays)[0].astype(dtype)
    closed, returned = _axes.trace_activation(activation, z)

    def converted(z: jax.Array, *closed_over: jax.Array) -> jax.Array:
        (y,) = eval_jaxpr(closed.jaxpr, closed_over, z)
        return y

    return converted, tuple(closed.consts), returned


_trace_once = functools.lru_cache(_axes.trace_activation)


def _is_jaxs_own(f: Any) -> bool:
    """Whether a function stays what it is, so that what was compiled for it may be used again.

    That is, whether a module of JAX has it under its name. Others may hold arrays, or read a
    variable that has changed since.
    """
    module, name = getattr(f, "__module__", None) or "", getattr(f, "__name__", "")
    is_jax = module.partition(".")[0] == "jax"
    return is_jax and getattr(sys.modules.get(module), name, None) is f


@functools.partial(jax.jit, static_argnums=(0, 2))
def _batch_norm(spec: _Spec, args: _Arrays, batch: Batch) -> tuple[jax.Array, Moments]:
    """`batch_norm` of checked arguments."""
    x, mask, residual = _axes.align_varying(_remat.tag(args.x), args.mask, args.residual)
    x_carrier = _moments.carrier(x)
    stats, rstd = _moments.statistics(
        x_carrier, x, mask, spec.axes, batch, _epsilon(spec, args), spec.custom_vjp
    )
    moments = stats.moments()
    if mask is None and not batch.exchanges and spec.axes.reduced_size(x.shape) == 1:
        # One element is its own mean. That y does not depend on it is known, not left to rounding.
        x_carrier, stats, rstd = stop_gradient((x_carrier, stats, rstd))
    args = args._replace(x=x, residual=residual)
    return _normalize(spec, args, x_carrier, stats.shift, stats.offset, rstd), moments


@functools.partial(jax.jit, static_argnums=0)
def _batch_norm_inference(spec: _Spec, args: _Arrays) -> jax.Array:
    """`batch_norm_inference` of checked arguments."""
    args = args._replace(x=_remat.tag(args.x))
    mean, var = args.features["mean"], args.features["var"]
    rstd = _moments.inverse_std(var, _epsilon(spec, args))
    return _normalize(spec, args, _moments.carrier(args.x), mean, None, rstd)


def _epsilon(spec: _Spec, args: _Arrays) -> Any:
    return args.epsilon if spec.epsilon is None else spec.epsilon


def _normalize(
    spec: _Spec,
    args: _Arrays,
    x_carrier: jax.Array,
    shift: jax.Array,
    offset: jax.Array | None,
    rstd: jax.Array,
) -> jax.Array:
    """y from statistics: what is O(C) is done here and differentiated by JAX, the rest below."""
    width = _axes.real_dtype(spec.computed)
    if args.residual is not None:
        args = args._replace(residual=_axes.shard_like(args.residual, args.x))

    def feature(v: Any, dtype: np.dtype) -> Any:
        return None if v is None else _axes.shard_features(v.astype(dtype), args.x, spec.axes)

    scale, bias = args.features.get("scale"), args.features.get("bias")
    factor = feature(rstd, width)
    if scale is not None:  # where rstd is 0 for overflow, the sum of dz (x - mean) may be infinite
        scale = feature(scale, _axes.compute_dtype(width, scale.dtype))
        factor = times(factor, jnp.where(factor == 0, 0, scale))

    operands = _Operands(
        x=args.x,
        residual=args.residual,
        shift=feature(shift, spec.centred),
        offset=feature(offset, spec.centred),
        factor=factor,
        bias=feature(bias, spec.computed),
    )
    carriers = _Carriers(
        x=x_carrier.astype(spec.centred),
        residual=None if args.residual is None else args.residual.astype(spec.computed),
    )
    aligned = _axes.align_varying(*carriers, *operands)
    carriers, operands = _Carriers(*aligned[:2]), _Operands(*aligned[2:])
    if spec.custom_vjp:
        return _affine(spec, carriers, operands, args.closed_over)
    operands = _once(operands._replace(**carriers._asdict()))
    return _affine_plain(spec, operands, args.closed_over)


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
# and no more is written by hand. JAX itself carries df to dscale = rstd df and drstd = scale df,
# and that through d rstd / d var = -rstd^3 / 2 to the statistics (where their rule, in _moments.py,
# computes rstd too, it does so itself), which add dmean / N + 2 dvar c / N to dx. With
# xhat = rstd c and D = sum(dz xhat), so that df = D / rstd and dvar = -scale rstd^2 D / 2, the
# three terms are the textbook's
#
#     dx = scale rstd (dz - S / N - xhat D / N).
#
# For complex values these are JAX's cotangents, without conjugation; a real argument takes the
# real part. z is computed again from x, so nothing but x (and residual, which z needs where there
# is an activation) is kept. The carriers take the cotangents of x and residual before they are
# rounded: see _moments.py.


class _Carriers(NamedTuple):
    """`x` and `residual` again in the dtypes of c and z, never read."""

    x: Any
    residual: Any


class _Operands(NamedTuple):
    """What z is made of; residual, offset and bias may be None.

    `shift + offset` is the mean, `factor` is scale * rstd. Feature arrays come in the dtypes of
    c and z (`factor` may be real); `x` and `residual` are read in their own.
    """

    x: Any
    residual: Any
    shift: Any
    offset: Any
    factor: Any
    bias: Any


def _about_shift(spec: _Spec, a: _Operands) -> jax.Array:
    """x - shift."""
    return a.x.astype(spec.centred) - spec.axes.expand(a.shift)


def _centre(spec: _Spec, a: _Operands) -> jax.Array:
    """c = x - mean, the mean subtracted in its two parts."""
    d = _about_shift(spec, a)
    return d if a.offset is None else d - spec.axes.expand(a.offset)


def _preactivation(spec: _Spec, a: _Operands, c: jax.Array) -> jax.Array:
    """z = f c + bias + residual."""
    z = times(c, spec.axes.expand(a.factor)).astype(spec.computed)
    if a.bias is not None:
        z = z + spec.axes.expand(a.bias)
    if a.residual is not None:
        z = z + _lowering.widen(a.residual, spec.computed)
    return z


def _activate(spec: _Spec, z: jax.Array, *closed_over: jax.Array) -> jax.Array:
    """y = activation(z), in its dtype."""
    return (spec.activation(z, *closed_over) if spec.activation else z).astype(spec.dtype)


def _once(a: _Operands) -> _Operands:
    """Has the feature arrays computed before the loop over x.

    In training shift and offset are already, and so is rstd, which a small x is scaled by in the
    loop: that takes less time than another kernel.
    """
    if a.offset is not None and _lowering.is_small(a.x):
        return a
    names = ("factor", "bias") if a.offset is not None else ("shift", "factor", "bias")
    present = [name for name in names if getattr(a, name) is not None]
    values = _lowering.once(*(getattr(a, name) for name in present))
    return a._replace(**dict(zip(present, values, strict=True)))


def _affine_plain(spec: _Spec, a: _Operands, closed_over: tuple[jax.Array, ...]) -> jax.Array:
    return _activate(spec, _preactivation(spec, a, _centre(spec, a)), *closed_over)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(
    spec: _Spec, carriers: _Carriers, a: _Operands, closed_over: tuple[jax.Array, ...]
) -> jax.Array:
    y, _ = _affine_fwd(spec, carriers, a, closed_over)
    return y


def _affine_fwd(spec, carriers, a, closed_over):
    del carriers
    a = _once(a)
    y = _affine_plain(spec, a, closed_over)
    return y, (a if spec.activation else a._replace(residual=None), closed_over)


def _affine_bwd(spec, kept, dy):
    a, closed_over = kept
    plain, gpu, cpu = (
        functools.partial(bwd, spec)
        for bwd in (_affine_bwd_plain, _affine_bwd_gpu, _affine_bwd_cpu)
    )
    cpu = plain if _lowering.is_small(a.x) else cpu
    return _lowering.by_platform(a, closed_over, dy, cpu=cpu, gpu=gpu, default=plain)


_affine.defvjp(_affine_fwd, _affine_bwd)


def _affine_bwd_plain(spec, a, closed_over, dy):
    c = _centre(spec, a)
    dz, dclosed_over = _dz(spec, a, closed_over, dy, c)
    total = jnp.sum(dz, spec.axes.reduced)
    df = jnp.sum(times(dz, c), spec.axes.reduced)
    return *_cotangents(spec, a, dz, total, df), dclosed_over


def _affine_bwd_gpu(spec, a, closed_over, dy):
    c = _centre(spec, a)
    dz, dclosed_over = _dz(spec, a, closed_over, dy, c)
    total, df = _lowering.sum_both(dz, times(dz, c), spec.axes.reduced)
    held = _hold(spec, dz, dy)
    if spec.adds and held.dtype.itemsize <= dy.dtype.itemsize:  # written anyway: read it back
        held, a, total, df = _lowering.apart(held, a, total, df)
        dz = cast(held, spec.computed)
    else:
        features = _lowering.apart(a.shift, a.offset, a.factor, a.bias)
        b = _Operands(a.x, a.residual, *features)
        dz, _ = _dz(spec, b, closed_over, dy, _centre(spec, b))
    return *_cotangents(spec, a, dz, total, df), dclosed_over


def _affine_bwd_cpu(spec, a, closed_over, dy):
    dz, dclosed_over = _dz(spec, a, closed_over, dy, _centre(spec, a))
    held = _hold(spec, dz, dy)
    read, b = _lowering.apart(held, a)
    total = jnp.sum(cast(read, spec.computed), spec.axes.reduced)
    read, b = _lowering.apart(read, b)
    df = times(cast(read, spec.computed), _about_shift(spec, b))
    df = jnp.sum(df, spec.axes.reduced)
    if a.offset is not None:
        df = df - times(total, a.offset)
    return *_cotangents(spec, a, cast(held, spec.computed), total, df), dclosed_over


def _dz(spec, a, closed_over, dy, c):
    """activation'(z) dy, and the cotangents of what the activation closes over."""
    if spec.activation is None:
        return cast(dy, spec.computed), ()
    z = _preactivation(spec, a, c)
    _, pull = jax.vjp(functools.partial(_activate, spec), z, *closed_over)
    dz, *dclosed_over = pull(dy)
    return dz, tuple(dclosed_over)


def _hold(spec, dz, dy):
    """dz in the dtype of dy, where that loses nothing."""
    if spec.activation is None:
        return dy
    return dz.astype(dy.dtype) if spec.passes else dz


def _cotangents(spec, a, dz, total, df):
    """Of the carriers and the operands, from dz, S and df."""
    dmean = cast(-times(total, a.factor), spec.centred)
    dx = cast(times(dz, spec.axes.expand(a.factor)), spec.centred)
    operands = _Operands(
        x=None,
        residual=None,
        shift=dmean,
        offset=None if a.offset is None else dmean,
        factor=cast(df, a.factor.dtype),
        bias=None if a.bias is None else total,
    )
    return _Carriers(dx, dz if spec.adds else None), operands
