"""Statistics of a batch: one accurate pass, masks, merging."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.lax import stop_gradient  # by name: chex.assert_numerical_grads patches jax.lax's

from jbn import _axes, _devices, _lowering, _remat
from jbn._axes import Array, Axes, Batch
from jbn._complex import abs2, times

# A shift taken from one element in 64 costs 1/64 of a read of x; see `_sample_mean`.
_SAMPLE_STRIDE = 64
# Small batches are sampled more densely: 16 elements put the shift within a std of the mean.
_SAMPLE_MIN = 16
# How large |mean|^2 / var may be for one float32 to hold the mean as well as two.
_NEAR_ZERO = 64


class Moments(NamedTuple):
    """The first two moments of each feature of a batch.

    Attributes:
        mean: [C], in the accumulation dtype (float32 or wider; complex for complex `x`).
        var: biased variance E|x - mean|^2 [C], real.
        count: number of elements that each feature has, or sum of their weights [C], real. 0 for
            an empty batch.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class Statistics(NamedTuple):
    """Moments with the mean kept as the unrounded sum of two numbers.

    One float32 holds the mean of N(3000, 0.01) to 1e-2 standard deviations only, and so would be
    every `x - mean`. `(x - shift) - offset` is exact to rounding: the first difference is exact
    or small against the spread of `x`.

    Attributes:
        shift: a constant close to the mean [C]; no gradient flows to it.
        offset: mean - shift [C].
        var: biased variance [C], real.
        count: number of elements, or sum of their weights [C], real.
    """

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array

    def moments(self) -> Moments:
        """The same with the mean rounded to one number."""
        return Moments(self.shift + self.offset, self.var, self.count)


def moments(
    x: Array,
    *,
    axis: int | Sequence[int] = -1,
    mask: Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Mean, biased variance and count of each feature.

        mean = sum(x) / N        var = sum(|x - mean|^2) / N

    in one shifted pass over `x` (two under a mask), whose relative error in var is at most about
    65 float32 roundings whatever the data are (Chan, Golub and LeVeque 1983, "Algorithms for
    computing the sample variance", section 3, shifted data). Differentiable in reverse mode, in
    floating weights too; a weight of 0 gets the gradient 0.

    Args:
        x: [..., C] floating or complex, any rank from 1.
        axis: the feature axis or axes; all others are reduced.
        mask: boolean, or weights of at least 0, broadcasting to `x` as in NumPy. Elements of weight
            0 are left out, whatever they hold, and one of weight 2 counts as two.
        axis_name: name or names of mapped axes (`jax.vmap`, `jax.pmap`, `jax.shard_map`) over
            which the batch is split as well.
        axis_index_groups: groups of indices along `axis_name`, each a batch of its own.

    Returns:
        `Moments(mean, var, count)`, each in the shape of the feature axes in increasing order.
        An empty batch has mean 0, var 0, count 0. Squares whose sum overflows make var inf; if
        the sum of x - shift overflows too, the mean is given as 0 (that of the device where it
        does, in a batch over several).

    Raises:
        TypeError: if `x` or `mask` is not an array, or `x` is not floating or complex.
        ValueError: if an axis is out of range or repeated, `mask` does not broadcast to `x` or has
            negative weights, or `axis_index_groups` come without an axis name.
        NameError: if `axis_name` is not bound.

    Example:
        >>> import jax.numpy as jnp, jbn
        >>> jbn.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]])).mean.tolist()
        [2.0, 4.0]
    """
    batch = _axes.check_batch(axis_name, axis_index_groups)
    values = _axes.check_float_array("x", x)
    axes = _axes.check_axes(axis, values)
    valid = None if mask is None else _axes.check_mask(mask, values)
    return _moments(axes, batch, values, valid)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(axes: Axes, batch: Batch, x: jax.Array, mask: jax.Array | None) -> Moments:
    x, mask = _axes.align_varying(x, mask)
    stats, _ = statistics(carrier(x), x, mask, axes, batch)
    return stats.moments()


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of two sets of elements together, from the moments of each.

        n = n_a + n_b        mean = (n_a mean_a + n_b mean_b) / n
        var = (n_a var_a + n_b var_b + |mean_a - mean_b|^2 n_a n_b / n) / n

    Exact for unequal and for empty sets (Chan, Golub and LeVeque 1983, eq. 2.1). Carry it through
    `jax.lax.scan`, starting from a count of 0, to pool any number of batches.

    Args:
        a: moments, each field [C].
        b: moments of the same shape.

    Returns:
        `Moments` [C] of both; empty if both are.

    Raises:
        TypeError: if `a` or `b` is not `Moments`.
        ValueError: if the shapes differ.

    Example:
        >>> import jax.numpy as jnp, jbn
        >>> x = jnp.array([[1.0], [2.0], [6.0]])
        >>> both = jbn.merge_moments(jbn.moments(x[:1]), jbn.moments(x[1:]))
        >>> both.mean.tolist(), both.count.tolist()
        ([3.0], [3.0])
    """
    a, b = check_fields("a", a, Moments), check_fields("b", b, Moments)
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            "a and b must be moments of the same features, got mean = "
            f"{_axes.describe(a.mean)} and {_axes.describe(b.mean)}."
        )
    both = jax.tree.map(lambda *leaves: jnp.stack(_same_dtype(*leaves)), a, b)
    return _pool(Statistics(both.mean, jnp.zeros_like(both.mean), both.var, both.count)).moments()


def carrier(x: jax.Array) -> jax.Array:
    """`x` in the dtype of computation, to take its cotangents: see `_local_statistics`."""
    return x.astype(_axes.compute_dtype(x.dtype))


def statistics(
    x_carrier: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    axes: Axes,
    batch: Batch,
    epsilon: Any = None,
    custom_vjp: bool = True,
) -> tuple[Statistics, Any]:
    """`moments` of checked arguments, with the mean unrounded, and rstd [C] if epsilon is given.

    Only the local pass has a hand-written rule. The merge over devices is plain JAX on O(C)
    numbers, so JAX transposes its collective rightly under every kind of mapping. rstd is computed
    in the local pass where it can be: of one device's batch, with an epsilon that is a number. An
    array may be mapped where x is not, and must not take the statistics with it.
    """
    if mask is not None:
        mask = _axes.shard_mask(mask, x)
    can_be_empty = _can_be_empty(axes, x, mask)
    number = epsilon if isinstance(epsilon, float) else None
    local = None if batch.exchanges else number
    computed: tuple[Statistics, Any] = (
        _local_statistics(axes, local, x_carrier, x, mask)
        if custom_vjp
        else _in_memory(_local_statistics_plain(axes, x_carrier, mask), local, can_be_empty)
    )
    stats, rstd = computed
    stats = stats._replace(shift=stop_gradient(stats.shift))
    if batch.exchanges:
        merged = _merged(batch, axes, x, mask, stats)
        stats, rstd = _in_memory(merged, number, can_be_empty)
    if rstd is None and epsilon is not None:
        rstd = _rstd_of(stats, epsilon, can_be_empty)
    return stats, rstd


# The local pass, with d = x - shift, weights w (1 and 0 under a boolean mask), N = sum(w):
#
#     offset = sum(w d) / N        var = sum(w |d|^2) / N - |offset|^2
#
# For every constant shift these are mean - shift and the variance exactly, so the shift takes no
# part in differentiation and, with g the cotangents,
#
#     dx = w (g_offset / N + g_var * 2 conj(x - mean) / N),        x - mean = d - offset
#     dw = Re(g_offset (x - mean)) / N + g_var (|x - mean|^2 - var) / N + g_N
#
# (conj by JAX's convention for the cotangent of a complex argument of a real function). An element
# of weight 0 is left out altogether, since it may hold NaN: its weight gets the gradient 0. Of
# r = rstd, where that is computed here too, g_var gets -r^3 g_r / 2 more.
#
# x enters the rule twice: `x` is read and kept in its own dtype; `x_carrier`, the same values cast
# to the dtype of computation, is never read and takes the cotangent. So the contributions of this
# rule and of the normalisation, which has the same carrier, are added before the one rounding to
# the dtype of x.


def _local_statistics_plain(axes: Axes, x: jax.Array, mask: jax.Array | None) -> Statistics:
    """Statistics of the local elements alone."""
    real = _axes.real_dtype(x.dtype)
    shape = axes.feature_shape(x.shape)
    n = axes.reduced_size(x.shape)
    if mask is None:
        count = jnp.broadcast_to(jnp.asarray(n, real), shape)
    else:
        exact = np.dtype(np.int32)  # float32 stops counting at 2^24
        if mask.dtype != jnp.bool_:
            exact, mask = real, _of_weight(mask, mask.astype(real))
        mask = _axes.shard_like(jnp.broadcast_to(mask, x.shape), x)
        count = jnp.sum(mask, axes.reduced, dtype=exact).astype(real)
    if n == 0:
        zeros = jnp.zeros(shape, _axes.compute_dtype(x.dtype))
        return Statistics(zeros, zeros, jnp.zeros(shape, real), count)
    if mask is None and axes.can_slice(x):
        sample = functools.partial(_about_sample, axes, axes.reduced)
        # A TPU takes the sample along the batch axis last: under jit it may be the one that is
        # split over devices, and XLA would send the rows.
        default = functools.partial(_about_sample, axes, (*axes.reduced[1:], *axes.reduced[:1]))
        cpu = sample if _lowering.is_small(x) else functools.partial(_about_own_mean, axes)
        shifted = _lowering.by_platform(x, cpu=cpu, gpu=sample, default=default)
    else:
        shifted = _about_mean(axes, x, mask, count)
    return _finish(shifted, count)


def _finish(shifted: "_Shifted", count: jax.Array) -> Statistics:
    """Statistics from sum(d) / N and sum(|d|^2) / N."""
    shift, offset, mean_square = shifted
    # Squares overflow long before sums do, and make var inf. A mean that overflowed as well is
    # given up for 0: x itself is finite, and finite times rsqrt(inf) = 0 makes y = bias.
    overflow = mean_square == jnp.inf
    lost = overflow & ~jnp.isfinite(offset)
    shift, offset = jnp.where(lost, 0, shift), jnp.where(lost, 0, offset)
    square_of_mean = abs2(jnp.where(overflow, 0, offset))
    var = mean_square - square_of_mean
    # Not jnp.maximum, which halves the derivative of a constant feature, at the tie.
    var = jnp.where(mean_square < square_of_mean, 0, var)
    return Statistics(shift, offset, var, count)


def _in_memory(
    stats: Statistics, epsilon: float | None, can_be_empty: bool
) -> tuple[Statistics, jax.Array | None]:
    """The statistics, and rstd if epsilon is given, computed before the loops over x."""
    features = [stats.shift, stats.offset, stats.var]
    if epsilon is not None:
        features.append(_rstd_of(stats, epsilon, can_be_empty))
    shift, offset, var, *rstd = _lowering.once(*features)
    return Statistics(shift, offset, var, stats.count), rstd[0] if rstd else None


def _can_be_empty(axes: Axes, x: jax.Array, mask: jax.Array | None) -> bool:
    """Whether a feature may have no element."""
    return mask is not None or axes.reduced_size(x.shape) == 0


def _rstd_of(stats: Statistics, epsilon: Any, can_be_empty: bool) -> jax.Array:
    """`inverse_std`; 0, with no gradient, where the batch is empty."""
    var = jnp.where(stats.count == 0, jnp.inf, stats.var) if can_be_empty else stats.var
    return inverse_std(var, epsilon)


def inverse_std(var: jax.Array, epsilon: Any) -> jax.Array:
    """1 / sqrt(var + epsilon); 0, with no gradient, where that is infinite."""
    return _rsqrt(var + jnp.asarray(epsilon, var.dtype))


@jax.custom_jvp
def _rsqrt(v: jax.Array) -> jax.Array:
    """1 / sqrt(v), where that is finite and not 0; elsewhere 0, and so are its derivatives."""
    regular = (v != 0) & (v != jnp.inf)
    r = lax.rsqrt(lax.select(regular, v, jnp.ones_like(v)))
    return lax.select(regular, r, jnp.zeros_like(r))


@_rsqrt.defjvp
def _rsqrt_jvp(primals, tangents):
    """What JAX would derive too (and does, where it drops the rule), but quicker to compile."""
    (v,), (dv,) = primals, tangents
    r = _rsqrt(v)
    return r, _times_slope(r, dv)


def _times_slope(r: jax.Array, g: jax.Array) -> jax.Array:
    """-r^3 g / 2, for the derivative of r = rstd by the variance; 0 where r is, whatever g."""
    return jnp.where(r == 0, 0, -0.5 * r * r * r * g)


def _sharded_statistics(axes: Axes, x: jax.Array, mask: jax.Array | None) -> Statistics:
    """`_local_statistics_plain`, in one exchange where `x` is split over devices under jit."""
    return Statistics(*_devices.over_shards(_merged_statistics, axes, x, mask))


def _merged_statistics(
    axes: Axes, batch: Batch, x: jax.Array, mask: jax.Array | None
) -> Statistics:
    return _merged(batch, axes, x, mask, _local_statistics_plain(axes, x, mask))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _local_statistics(
    axes: Axes,
    epsilon: float | None,
    x_carrier: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
) -> tuple[Statistics, jax.Array | None]:
    out, _ = _local_statistics_fwd(axes, epsilon, x_carrier, x, mask)
    return out


def _local_statistics_fwd(axes, epsilon, x_carrier, x, mask):
    del x_carrier
    stats = _sharded_statistics(axes, x, mask)
    out = _remat.tag(_in_memory(stats, epsilon, _can_be_empty(axes, x, mask)))
    return out, (x, mask, *out)


def _local_statistics_bwd(axes, epsilon, kept, g):
    x, mask, (shift, offset, var, count), rstd = kept
    g, g_rstd = g
    g_var = g.var if epsilon is None else g.var + _times_slope(rstd, g_rstd)
    n = _divisor(count)
    constant, slope = times(1 / n, g.offset), 2 * g_var / n
    features = shift, offset, *_lowering.once(constant, slope)
    shift, offset, constant, slope = map(axes.expand, features)
    read = x if mask is None else _of_weight(mask, x)
    centred = (read.astype(shift.dtype) - shift) - offset
    dx = _weighted(mask, constant + times(slope, jnp.conj(centred)))
    dx = _axes.shard_like(dx, x)
    if mask is None or not jnp.issubdtype(mask.dtype, jnp.floating):
        return dx, None, None
    var, g_count = axes.expand(var), axes.expand(g.count)
    dmask = (constant * centred).real + slope / 2 * (abs2(centred) - var) + g_count
    spread = [i for i in range(x.ndim) if mask.shape[i] != x.shape[i]]
    dmask = jnp.sum(_of_weight(mask, dmask), spread, keepdims=True)
    return dx, None, _axes.shard_like(dmask.astype(mask.dtype), mask)


_local_statistics.defvjp(_local_statistics_fwd, _local_statistics_bwd)


# The shift s. var computed about it has a relative error near (1 + |mean - s|^2 / var) roundings,
# so any s within a few standard deviations of the mean will do.
#
# The mean of any k of the N elements is such an s: by Cauchy-Schwarz
#
#     |mean - s|^2 <= (1/k) sum over the k of |x_i - mean|^2 <= (N/k) var.
#
# One element in 64 gives at most about 65 roundings, on any data at all; on most it gives about
# one. On CPU, where the two sums read a large x one after the other, the first can be the mean
# itself. If that is within 8 standard deviations of 0, its own rounding (about 2^-22 of it) is no
# error to speak of, and offset = 0; a third sum for the offset makes it the corrected two-pass
# algorithm (Chan, Golub and LeVeque, eq. 1.7).

_Shifted = tuple[jax.Array, jax.Array, jax.Array]  # shift, sum(d) / N, sum(|d|^2) / N


def _about_sample(axes: Axes, order: tuple[int, ...], x: jax.Array) -> _Shifted:
    """For one read of x and a bit: both sums in one kernel."""
    shift = stop_gradient(_sample_mean(axes, order, x))
    n = axes.reduced_size(x.shape)
    d = x.astype(shift.dtype) - axes.expand(shift)
    return shift, _mean(axes, d, n), _mean(axes, abs2(d), n)


def _about_own_mean(axes: Axes, x: jax.Array) -> _Shifted:
    """For one read of x by each sum; and one more if a mean is far from 0."""
    n, dtype = axes.reduced_size(x.shape), _axes.compute_dtype(x.dtype)
    near = _sample_mean(axes, axes.reduced, x)
    (x,) = _lowering.apart(x)
    mean = _mean(axes, x.astype(dtype), n)
    # For a constant, the mean itself, unrounded; and for what the sum overflows, a number.
    differs = jnp.abs(mean - near) > 2**-20 * jnp.abs(mean)
    shift = stop_gradient(jnp.where(differs, mean, near))
    # One barrier each: under one, JAX gives the constant shift a tangent, of zeros.
    (x,), (s,) = _lowering.apart(x), _lowering.apart(shift)
    mean_square = _mean(axes, abs2(x.astype(dtype) - axes.expand(s)), n)

    def correct(x: jax.Array, s: jax.Array) -> jax.Array:
        (x,) = _lowering.apart(x)
        return _mean(axes, x.astype(dtype) - axes.expand(s), n)

    exact = (abs2(mean) <= _NEAR_ZERO * mean_square) & jnp.isfinite(mean_square)
    offset = lax.cond(jnp.all(exact), lambda *_: mean - shift, correct, x, s)
    return shift, offset, mean_square


def _about_mean(axes: Axes, x: jax.Array, mask: jax.Array | None, count: jax.Array) -> _Shifted:
    """For one more read of x, where a sample will not do: under a mask it might hold nothing."""
    n = _divisor(count)
    x = x.astype(_axes.compute_dtype(x.dtype))
    mean = _mean(axes, _weighted(mask, x), n)
    shift = stop_gradient(jnp.where(jnp.isfinite(mean), mean, 0))
    d = x - axes.expand(shift)
    if mask is not None:
        d = _of_weight(mask, d)  # before it is squared, and may overflow
    return shift, _mean(axes, _weighted(mask, d), n), _mean(axes, _weighted(mask, abs2(d)), n)


def _weighted(mask: jax.Array | None, v: jax.Array) -> jax.Array:
    """Each element times its weight, and 0 for the weight 0, whatever the element."""
    if mask is None:
        return v
    v = _of_weight(mask, v)
    return v if mask.dtype == jnp.bool_ else times(mask.astype(_axes.real_dtype(v.dtype)), v)


def _of_weight(mask: jax.Array, v: jax.Array) -> jax.Array:
    """The elements that have a weight, the others 0."""
    return jnp.where(mask.astype(bool), v, jnp.zeros((), v.dtype))


def _divisor(count: jax.Array) -> jax.Array:
    """The count to divide by: 1 where there is nothing, whose sums are 0."""
    return jnp.where(count > 0, count, 1)


def _mean(axes: Axes, v: jax.Array, n: Any) -> jax.Array:
    """sum(v) / n over the reduced axes, exact for a constant that few bits hold."""
    total = jnp.sum(v, axes.reduced)
    n = jnp.asarray(n, total.real.dtype)
    return lax.complex(total.real / n, total.imag / n) if jnp.iscomplexobj(total) else total / n


def _sample_mean(axes: Axes, order: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The mean of about one element in 64, exact for a constant feature and safe from overflow.

    The sample is thinned out along the axes in this order: where nothing else decides, major axes
    first, as a slice of a minor one would read all of x.
    """
    if jnp.iscomplexobj(x):
        parts = (_sample_mean(axes, order, part) for part in (x.real, x.imag))
        return lax.complex(*parts)
    stride = max(1, min(_SAMPLE_STRIDE, axes.reduced_size(x.shape) // _SAMPLE_MIN))
    steps = [slice(None)] * x.ndim
    for i in order:
        step = min(stride, x.shape[i])
        steps[i] = slice(None, None, step)
        stride //= step
    sample = x[tuple(steps)].astype(_axes.real_dtype(x.dtype))
    mean = jnp.mean(sample, axes.reduced)
    mean = jnp.where(jnp.isfinite(mean), mean, 0)
    return jnp.clip(mean, jnp.min(sample, axes.reduced), jnp.max(sample, axes.reduced))


def _pool(parts: Statistics) -> Statistics:
    """Merges the statistics of disjoint sets, stacked along the first axis of each field.

    With weights w = count / sum(count), and every mean taken relative to one common shift:

        offset = sum(w m)        var = sum(w (var + |m - offset|^2)),        m = mean - shift
    """
    total = functools.partial(jnp.sum, axis=0, keepdims=True)
    count = total(parts.count)
    weight = parts.count / _divisor(count)
    # An empty set has weight 0, but 0 * inf is NaN: its moments must not count at all.
    part_shift, part_offset, part_var = (
        jnp.where(weight > 0, v, 0) for v in (parts.shift, parts.offset, parts.var)
    )
    shift = stop_gradient(total(times(weight, part_shift)))
    relative = (part_shift - shift) + part_offset
    offset = total(times(weight, relative))
    deviation = jnp.where(weight > 0, relative - offset, 0)
    var = total(weight * (part_var + abs2(deviation)))
    return Statistics(*(lax.squeeze(v, (0,)) for v in (shift, offset, var, count)))


# The merge over devices. With n the counts, m the means and v the variances of the devices, each a
# function of what that device holds,
#
#     N = sum(n)        offset = sum(n m) / N        var = sum(n (v + |m - offset|^2)) / N
#
# and since sum(n (m - offset)) = 0,
#
#     d offset = sum(n dm + dn (m - offset)) / N
#     d var = sum(n (dv + 2 Re(conj(m - offset) dm)) + dn (v + |m - offset|^2 - var)) / N
#
# in which each device has its own term. So derivatives take one sum of O(C) numbers, where the
# transpose of the all-gather would sum those of all devices, to give each its own.


def _merged(
    batch: Batch, axes: Axes, x: jax.Array, mask: jax.Array | None, stats: Statistics
) -> Statistics:
    """The statistics of this device's `x`, merged with those of the others in its batch."""
    if not batch.exchanges:
        return stats
    names = tuple(itertools.chain(*batch.exchanges))
    stats = Statistics(*(_axes.vary_over(v, names) for v in stats))
    n = axes.reduced_size(x.shape) if mask is None else None
    weighted = mask is not None and jnp.issubdtype(mask.dtype, jnp.floating)
    return _merge(batch, n, weighted, stats)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _merge(batch: Batch, n: Any, weighted: bool, stats: Statistics) -> Statistics:
    """Merges the statistics of all devices.

    Args:
        batch: over which mapped axes.
        n: count of every device; None if they may differ, as under a mask, and must be sent.
        weighted: whether counts have derivatives, those of the weights of a mask.
        stats: this device's own.
    """
    for names in batch.exchanges:
        sent = [*stats] if n is None else [*stats[:3]]
        parts = _devices.gather(sent, names, batch.axis_index_groups)
        if n is not None:
            parts.append(jnp.full_like(parts[-1], n))
            n = n * len(parts[-1])
        stats = _pool(_remat.tag(Statistics(*parts)))
    return stats


@_merge.defjvp
def _merge_jvp(batch, n, weighted, primals, tangents):
    (own,), (d,) = primals, tangents
    merged = _merge(batch, n, weighted, own)
    count = _divisor(merged.count)
    weight = own.count / count
    centred = (own.shift - merged.shift) + (own.offset - merged.offset)
    if n is None:  # of a device that has no elements it may be anything
        centred = jnp.where(weight > 0, centred, 0)
    d_offset = times(weight, d.offset)
    d_var = weight * (d.var + 2 * times(jnp.conj(centred), d.offset).real)
    terms = d_offset, d_var
    if weighted:
        d_weight = d.count / count
        terms = (
            d_offset + times(d_weight, centred),
            d_var + d_weight * (own.var + abs2(centred) - merged.var),
            d.count,
        )
    d_offset, d_var, *d_count = _devices.total(terms, batch)
    zeros = jax.tree.map(jnp.zeros_like, merged)
    tangent = zeros._replace(offset=d_offset, var=d_var)
    return merged, tangent._replace(count=d_count[0]) if weighted else tangent


def check_fields(name: str, value: Any, kind: type) -> Any:
    """Checks that `value` is of a kind with mean, var and count, arrays of one shape."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be jbn.{kind.__name__}, got {_axes.describe(value)}.")
    fields = {k: _axes.check_float_array(f"{name}.{k}", v) for k, v in value._asdict().items()}
    for k in ("var", "count"):
        if jnp.iscomplexobj(fields[k]):
            raise TypeError(f"{name}.{k} must be real, got {_axes.describe(fields[k])}.")
    if len({v.shape for v in fields.values()}) > 1:
        came = ", ".join(f"{k} = {_axes.describe(v)}" for k, v in fields.items())
        raise ValueError(f"the fields of {name} must have one shape, got {came}.")
    return kind(**fields)


def _same_dtype(*arrays: jax.Array) -> list[jax.Array]:
    """Casts arrays to the one dtype that holds them all."""
    dtype = _axes.compute_dtype(*(a.dtype for a in arrays))
    return [a.astype(dtype) for a in arrays]
