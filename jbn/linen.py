"""Flax Linen layer: `flax.linen.BatchNorm`'s arguments and variables, jbn's computation."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax.nn import initializers

import jbn
from jbn import _axes


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Takes the place of `flax.linen.BatchNorm` by its import line: the same arguments, defaults and
    variables, `params/{scale, bias}` and `batch_stats/{mean, var}`, so that checkpoints of the one
    load into the other. What follows `force_float32_reductions` is jbn's own, by keyword only.

    Unlike Flax's, the statistics are accurate at any mean (`use_fast_variance` is accepted and has
    no effect), a batch that is empty or not finite leaves the running statistics as they were, and
    these keep the dtype they are stored in.

    If the collection `batch_moments` is named among the mutable ones, the batch's `jbn.Moments`
    are put there.

    Attributes:
        use_running_average: whether to normalize by `batch_stats` rather than by the batch. Given
            here or at the call, not both.
        axis: the feature axis or axes; all others are reduced.
        momentum: weight of the old running statistics, in [0, 1], or None for the average of all
            updates, which adds `batch_stats/count`.
        epsilon: added to the variance.
        dtype: of the output; by default that of the input and parameters together.
        param_dtype: of scale and bias.
        use_bias: whether to add a bias.
        use_scale: whether to multiply by a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: name or names of mapped axes over which the batch is split. Not used by `init`.
        axis_index_groups: groups of indices along `axis_name`, each a batch of its own.
        use_fast_variance: accepted for compatibility, without effect: jbn's variance is both fast
            and accurate.
        force_float32_reductions: whether running statistics are float32 rather than `param_dtype`.
            Batch statistics are computed in at least float32 either way.
        activation: an elementwise function such as `jax.nn.relu`, applied to the output. It costs
            no memory for the backward pass.
        unbiased: whether the running variance averages the unbiased variances, as in torch.
        custom_vjp: False leaves the backward pass to JAX, which adds forward mode (`jax.jvp`).

    Example:
        >>> import jax, jax.numpy as jnp, jbn.linen
        >>> bn = jbn.linen.BatchNorm(use_running_average=False, activation=jax.nn.relu)
        >>> x = jax.random.normal(jax.random.key(0), (8, 3))
        >>> variables = bn.init(jax.random.key(1), x)
        >>> y, updated = bn.apply(variables, x, mutable=["batch_stats"])
        >>> jax.tree.map(jnp.shape, updated)
        {'batch_stats': {'mean': (3,), 'var': (3,)}}
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: Callable[[jax.Array], jax.Array] | None = dataclasses.field(
        default=None, kw_only=True
    )
    unbiased: bool = dataclasses.field(default=False, kw_only=True)
    custom_vjp: bool = dataclasses.field(default=True, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and in training updates `batch_stats`, which must then be mutable.

        During `init` the running statistics are not updated and `axis_name` is not used.

        Args:
            x: [..., C] floating or complex.
            use_running_average: as the attribute; give one of them.
            mask: boolean or 0/1, broadcasting to `x`; which elements the batch statistics count.
            residual: added before the activation, in the shape of `x`.

        Returns:
            The output, in the shape of `x`.

        Raises:
            TypeError, ValueError: for bad input, as `jbn.batch_norm`.
            flax.errors.ModifyScopeVariableError: in training, if `batch_stats` is not mutable.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        x = _axes.check_float_array("x", x)
        shape = _axes.check_axes(self.axis, x).feature_shape(x.shape)
        counted = self.momentum is None and (not use_running_average or self.is_initializing())
        running = self._running_stats(shape, jnp.iscomplexobj(x), counted)
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "residual": residual,
            "activation": self.activation,
            "dtype": canonicalize_dtype(x, scale, bias, dtype=self.dtype),
            "custom_vjp": self.custom_vjp,
        }
        if use_running_average:
            mean, var = running["mean"].value, running["var"].value
            return jbn.batch_norm_inference(x, mean, var, scale, bias, **options)

        if self.axis_name is not None and not self.is_initializing():
            options["axis_name"] = self.axis_name
            options["axis_index_groups"] = self.axis_index_groups
        y, moments = jbn.batch_norm(x, scale, bias, mask=mask, **options)
        if not self.is_initializing():
            self._update(running, moments)
        return y

    def _running_stats(
        self, shape: tuple[int, ...], is_complex: bool, counted: bool
    ) -> dict[str, nn.Variable]:
        """The variables of `batch_stats`; `count` is needed to update a cumulative average."""
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean_dtype = _axes.compute_dtype(dtype, jnp.complex64) if is_complex else dtype
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, shape, mean_dtype),
            "var": self.variable("batch_stats", "var", jnp.ones, shape, dtype),
        }
        if counted:
            count = self.variable("batch_stats", "count", jnp.zeros, shape, jnp.float32)
            running["count"] = count
        return running

    def _update(self, running: dict[str, nn.Variable], moments: jbn.Moments) -> None:
        """Takes the batch's moments into `batch_stats`, and hands them out if asked to."""
        values = {name: variable.value for name, variable in running.items()}
        values.setdefault("count", jnp.zeros(values["mean"].shape))
        updated = jbn.update_running_stats(
            jbn.RunningStats(**values), moments, momentum=self.momentum, unbiased=self.unbiased
        )
        for name, variable in running.items():
            variable.value = getattr(updated, name)
        if self._names_batch_moments():
            self.put_variable("batch_moments", "moments", moments)

    def _names_batch_moments(self) -> bool:
        """Whether the caller asked for `batch_moments` by name, and not for all collections."""
        mutable = self.scope.mutable if self.scope is not None else False
        if isinstance(mutable, str):
            return mutable == "batch_moments"
        return isinstance(mutable, Collection) and "batch_moments" in mutable
