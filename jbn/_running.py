"""Running statistics: what inference uses in place of the batch's own."""

from typing import NamedTuple

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
    moments). With the guard, a feature whose batch moments are not finite, or that had no element,
    keeps its statistics: one overflowing step does not spoil them for good.

    Args:
        running: `RunningStats`, each field [C].
        moments: the batch's `Moments`, each field [C].
        momentum: in [0, 1], or None for the cumulative average.
        unbiased: average var * count / (count - 1), as torch does, rather than the biased var. One
            element alone has no unbiased variance and leaves the running one as it was; under the
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
    running, moments = _check(running, moments)
    if momentum is not None:
        momentum = _axes.check_number("momentum", momentum, 0, 1)
    mean, var, n = jax.tree.map(lax.stop_gradient, moments)

    has_var = jnp.ones(n.shape, bool)
    if unbiased:
        has_var = n != 1
        var = jnp.where(has_var, var * (n / jnp.where(has_var, jnp.maximum(n - 1, 1), 1)), 0)
    taken = (n > 0) & jnp.isfinite(mean) & jnp.isfinite(var) if guard else jnp.ones(n.shape, bool)
    if momentum is None:
        taken &= has_var

    def step(old: jax.Array, new: jax.Array, take: jax.Array) -> jax.Array:
        dtype = _axes.compute_dtype(old.dtype, new.dtype)
        stored = dtype if jnp.iscomplexobj(new) and not jnp.iscomplexobj(old) else old.dtype
        old, new = old.astype(dtype), jnp.where(take, new, 0).astype(dtype)
        if momentum is None:
            weight = 1 / (running.count.astype(_axes.real_dtype(dtype)) + 1)
            updated = old + times(weight, new - old)
        elif isinstance(momentum, float | int):  # 1 - momentum without float32's rounding
            updated = momentum * old + (1 - momentum) * new
        else:
            weight = jnp.asarray(momentum, _axes.real_dtype(dtype))
            updated = times(weight, old) + times(1 - weight, new)
        return jnp.where(take, updated, old).astype(stored)

    return jax.tree.map(
        lax.stop_gradient,
        RunningStats(
            step(running.mean, mean, taken),
            step(running.var, var, taken & has_var),
            running.count + taken.astype(running.count.dtype),
        ),
    )


def _check(running: RunningStats, moments: Moments) -> tuple[RunningStats, Moments]:
    """Checks types and shapes of both before anything is computed."""
    moments = _moments.check_moments("moments", moments)
    if not isinstance(running, RunningStats):
        raise TypeError(f"running must be jbn.RunningStats, got {_axes.describe(running)}.")
    checked = {k: _axes.check_float_array(f"running.{k}", v) for k, v in running._asdict().items()}
    for k, v in checked.items():
        if v.shape != moments.mean.shape:
            raise ValueError(
                f"running.{k} must have the shape of the moments, {moments.mean.shape}, "
                f"got {_axes.describe(v)}."
            )
    return RunningStats(**checked), moments
