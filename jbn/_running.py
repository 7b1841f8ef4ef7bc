"""Running statistics: what inference uses in place of the batch's own."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn import _axes, _moments
from jbn._complex import times
from jbn._moments import Moments


class RunningStats(NamedTuple):
    """Averages of the batch moments over training.

    Attributes:
        mean: [C], float (complex for complex `x`).
        var: [C], float.
        count: number of updates taken by each feature [C], float.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def update_running_stats(
    running: RunningStats,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.99,
    unbiased: bool = False,
    guard: bool = True,
) -> RunningStats:
    """Takes the moments of one batch into the running statistics.

        running = momentum * running + (1 - momentum) * batch

    or, with `momentum=None`, the average of all updates. Momentum weights the old value, as in
    Flax and Keras; torch's momentum weights the new one, so torch's 0.1 is 0.9 here.

    Gradients are stopped, and the stored dtypes kept (a real mean turns complex to hold complex
    moments). With the guard, a feature whose batch moments are not finite, or overflow in the
    stored dtype, or that had no element, keeps its statistics: one overflowing step does not spoil
    them for good.

    Args:
        running: `RunningStats`, each field [C].
        moments: the batch's `Moments`, each field [C].
        momentum: in [0, 1], or None for the cumulative average.
        unbiased: average var * count / (count - 1), as torch does, rather than the biased var;
            weights count as repetitions. Fewer than two elements have no unbiased variance and
            leave the running one as it was; under the
            cumulative average, which weights mean and var alike, it is not counted as an update.
        guard: whether to leave out batch moments that are empty or not finite.

    Returns:
        The new `RunningStats`; `count` is one more for each feature that was updated.

    Raises:
        TypeError: if `running` or `moments` is of another type, or momentum is not a number.
        ValueError: if shapes differ or momentum lies outside [0, 1].

    Example:
        >>> import jax.numpy as jnp, jbn
        >>> running = jbn.RunningStats(jnp.zeros(1), jnp.ones(1), jnp.zeros(1))
        >>> batch = jbn.moments(jnp.array([[1.0], [3.0]]))
        >>> jbn.update_running_stats(running, batch, momentum=0.5).mean.tolist()
        [1.0]
    """
    running = _moments.check_fields("running", running, RunningStats)
    moments = _moments.check_fields("moments", moments, Moments)
    if running.mean.shape != moments.mean.shape:
        raise ValueError(
            "running must have the shape of the moments, got "
            f"running.mean = {_axes.describe(running.mean)} and "
            f"moments.mean = {_axes.describe(moments.mean)}."
        )
    weights = None
    if momentum is not None:
        old: Any = _axes.check_momentum(momentum)
        if _axes.is_traced(old):
            old = jnp.asarray(old, _axes.real_dtype(running.var.dtype, moments.var.dtype))
        weights = old, 1 - old  # of a Python float without float32's rounding
    return _update(running, moments, weights, bool(unbiased), bool(guard))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _update(
    running: RunningStats, moments: Moments, weights: Any, unbiased: bool, guard: bool
) -> RunningStats:
    """`update_running_stats` of checked arguments: one trace for all layers of a shape."""
    # On a mesh of Explicit axes they keep their own sharding, from step to step of a scan.
    mean, var, n = (_axes.shard_like(v, running.mean) for v in moments)
    has_var = jnp.ones(n.shape, bool)
    if unbiased:
        has_var = n >= 2
        var = jnp.where(has_var, var * (n / jnp.where(has_var, n - 1, 1)), 0)
    taken = jnp.ones(n.shape, bool) if weights is not None else has_var
    if guard:  # what is not finite is not even averaged, so that jax.debug_nans stays quiet
        taken &= (n > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
        mean, var = jnp.where(taken, mean, 0), jnp.where(taken, var, 0)

    new_mean = _average(running.mean, mean, running.count, weights)
    new_var = _average(running.var, var, running.count, weights)
    stored = running.mean.dtype, running.var.dtype
    if guard and (weights is None or stored != (mean.dtype, var.dtype)):
        # What is finite may overflow in a narrower dtype, and the difference of two in any.
        taken &= jnp.isfinite(new_mean) & jnp.isfinite(new_var)
    updated = RunningStats(
        jnp.where(taken, new_mean, running.mean.astype(new_mean.dtype)),
        jnp.where(taken & has_var, new_var, running.var),
        running.count + taken.astype(running.count.dtype),
    )
    return jax.tree.map(lax.stop_gradient, updated)


def _average(
    old: jax.Array, new: jax.Array, count: jax.Array, weights: tuple[Any, Any] | None
) -> jax.Array:
    """The running value after one more, in the dtype of `old` (complex if `new` is).

    `weights` are those of `old` and `new`, None for the cumulative average.
    """
    dtype = _axes.compute_dtype(old.dtype, new.dtype)
    stored = dtype if jnp.iscomplexobj(new) and not jnp.iscomplexobj(old) else old.dtype
    old, new = old.astype(dtype), new.astype(dtype)
    real = _axes.real_dtype(dtype)
    if weights is None:
        step = times(1 / (count.astype(real) + 1), new - old)
        updated = jnp.where(count == 0, new, old + step)  # the first wholly replaces its start
    else:
        a, b = (jnp.asarray(w, real) for w in weights)
        updated = times(a, old) + times(b, new)
    return updated.astype(stored)
