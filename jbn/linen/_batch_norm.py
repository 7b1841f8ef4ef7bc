"""Flax Linen layer: `flax.linen.BatchNorm`'s arguments and variables, jbn's computation."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax.nn import initializers

import jbn
from jbn import _axes, _layer


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Takes the place of `flax.linen.BatchNorm` by its import line: the same arguments, defaults and
    variables, `params/{scale, bias}` and `batch_stats/{mean, var}`, so that checkpoints of the one
    load into the other. What follows `force_float32_reductions` is jbn's own, by keyword only.

    Unlike Flax's, the statistics are accurate at any mean (`use_fast_variance` is accepted and has
    no effect), a batch that is empty or not finite leaves the running statistics as they were, and
    these keep the dtype they are stored in.

    If the collection `batch_moments` is named among the mutable ones, the layer puts the batch's
    `jbn.Moments` there (`init` puts empty ones). Moments that are there already are pooled with the
    batch's, and the running statistics are updated from them together: so micro-batches count as
    one batch, see docs/gradient_accumulation.md.

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
        update_running_average: False leaves the running statistics as they are while the batch
            normalizes; `batch_stats` need not be mutable then. Here or at the call.
        mean_init: initializer of the running mean, called without a key.
        var_init: initializer of the running variance, called without a key.

    Under `nn.scan` over layers the statistics are stacked, `variable_axes={"batch_stats": 0}`, as
    under `nn.vmap` for an ensemble, and so are `batch_moments` if they are asked for. Where one
    layer normalizes over the mapped axis, share them instead, and name the axes in the layer too,
    all of them if `nn.vmap` is nested:
    `nn.vmap(..., variable_axes={"params": None, "batch_stats": None}, axis_name="batch")` with
    `BatchNorm(axis_name="batch")`. Under `nn.scan` over time the statistics are carried from step
    to step in training and broadcast at inference, where nothing may be carried; what is carried
    must exist before, so `init` calls one step outside, as `Steps` does below.

    Example:
        >>> import jax, jax.numpy as jnp, jbn.linen
        >>> from flax import linen as nn
        >>> bn = jbn.linen.BatchNorm(use_running_average=False, activation=jax.nn.relu)
        >>> x = jax.random.normal(jax.random.key(0), (8, 3))
        >>> variables = bn.init(jax.random.key(1), x)
        >>> y, updated = bn.apply(variables, x, mutable=["batch_stats"])
        >>> jax.tree.map(jnp.shape, updated)
        {'batch_stats': {'mean': (3,), 'var': (3,)}}

        >>> class Step(nn.Module):
        ...     train: bool
        ...
        ...     @nn.compact
        ...     def __call__(self, carry, x):
        ...         bn = jbn.linen.BatchNorm(use_running_average=not self.train)
        ...         carry = jnp.tanh(bn(nn.Dense(3)(x) + carry))
        ...         return carry, carry
        >>> class Steps(nn.Module):
        ...     train: bool
        ...
        ...     @nn.compact
        ...     def __call__(self, carry, xs):
        ...         step = Step(self.train)
        ...         if self.is_initializing():
        ...             return step(carry, xs[0])
        ...         scan = nn.scan(
        ...             lambda step, carry, x: step(carry, x),
        ...             variable_carry="batch_stats" if self.train else False,
        ...             variable_broadcast="params" if self.train else ["params", "batch_stats"],
        ...         )
        ...         return scan(step, carry, xs)
        >>> carry, xs = jnp.zeros((8, 3)), jnp.stack([x, x + 1])
        >>> variables = Steps(train=True).init(jax.random.key(1), carry, xs)
        >>> (carry, ys), updated = Steps(train=True).apply(
        ...     variables, carry, xs, mutable=["batch_stats"]
        ... )
        >>> carry, ys = Steps(train=False).apply({**variables, **updated}, carry, xs)
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
    update_running_average: bool = dataclasses.field(default=True, kw_only=True)
    mean_init: Initializer = dataclasses.field(default=initializers.zeros, kw_only=True)
    var_init: Initializer = dataclasses.field(default=initializers.ones, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and in training updates `batch_stats`, which must then be mutable.

        During `init` the running statistics are not updated and `axis_name` is not used.

        Args:
            x: [..., C] floating or complex.
            use_running_average: as the attribute; give one of them.
            mask: boolean or weights, broadcasting to `x`: how much each element counts in the
                batch statistics.
            residual: added before the activation, in the shape of `x`.
            update_running_average: in place of the attribute.

        Returns:
            The output, in the shape of `x`.

        Raises:
            TypeError, ValueError: for bad input, as `jbn.batch_norm`, or if `batch_stats` are of
                another width than `x`.
            flax.errors.ModifyScopeVariableError: in training, if `batch_stats` is not mutable.
            flax.errors.ScopeCollectionNotFound: if there are no `batch_stats`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        if update_running_average is None:
            update_running_average = self.update_running_average
        x = _axes.check_float_array("x", x)
        shape = _layer.feature_shape(self, x)
        updates = not use_running_average and update_running_average
        running = self._running_stats(shape, jnp.iscomplexobj(x), counted=updates)
        params: dict[str, jax.Array | None] = {"scale": None, "bias": None}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, shape, self.param_dtype)
        stats = {name: variable.value for name, variable in running.items()}
        y, moments = _layer.normalize(
            self,
            x,
            params,
            stats,
            use_running_average=use_running_average,
            dtype=canonicalize_dtype(x, *params.values(), dtype=self.dtype),
            mask=mask,
            residual=residual,
            mapped=not self.is_initializing(),
        )
        if moments is not None:
            moments = self._pooled(moments)
            if updates and not self.is_initializing():
                for name, value in _layer.updated_stats(self, stats, moments).items():
                    running[name].value = value
        return y

    @nn.nowrap  # `tabulate` calls every wrapped method once more, alone
    def _running_stats(
        self, shape: tuple[int, ...], is_complex: bool, counted: bool
    ) -> dict[str, nn.Variable]:
        """The variables of `batch_stats`; a cumulative average needs its count to be updated."""
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean_dtype = _axes.compute_dtype(dtype, jnp.complex64) if is_complex else dtype
        initial = {"mean": (self.mean_init, mean_dtype), "var": (self.var_init, dtype)}
        if self.momentum is None and (counted or self.is_initializing()):
            initial["count"] = initializers.zeros, jnp.float32
        try:
            return {
                name: self.variable("batch_stats", name, init, None, shape, dtype)
                for name, (init, dtype) in initial.items()
            }
        except flax.errors.ScopeCollectionNotFound as error:
            error.add_note(
                "Running statistics are among the variables that `init` returns: pass them on, "
                "apply({'params': ..., 'batch_stats': ...}, x)."
            )
            raise

    @nn.nowrap
    def _pooled(self, moments: jbn.Moments) -> jbn.Moments:
        """The batch's moments with those handed in, and hands them out, if the caller asks for it.

        That is, names `batch_moments` as mutable rather than all collections.
        """
        mutable = self.scope.mutable if self.scope is not None else False
        named = {mutable} if isinstance(mutable, str) else mutable
        if not isinstance(named, Collection) or "batch_moments" not in named:
            return moments
        if self.is_initializing():
            moments = jax.tree.map(jnp.zeros_like, moments)
        if self.has_variable("batch_moments", "moments"):
            earlier = self.get_variable("batch_moments", "moments")
            moments = jbn.merge_moments(earlier, moments)
        self.put_variable("batch_moments", "moments", moments)
        return moments


def batch_norm_mask(variables: Mapping[str, Any]) -> Any:
    """Which parameters are those of batch norm: for optimizers that treat them apart.

    A layer is known by its running statistics: the scale and bias at a path where `batch_stats` has
    a mean and a var are its own, be it jbn's layer or Flax's.

    Args:
        variables: the model's, with the collections `params` and `batch_stats`.

    Returns:
        The tree of `params` with True for the parameters of batch norm and False for all others,
        as the masks of optax are.

    Raises:
        ValueError: if a collection is missing.

    Example:
        >>> import jax, jax.numpy as jnp, jbn.linen, optax
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(3), jbn.linen.BatchNorm(use_running_average=False)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> mask = jbn.linen.batch_norm_mask(variables)
        >>> mask["layers_1"]
        {'bias': True, 'scale': True}
        >>> decayed = jax.tree.map(lambda is_batch_norm: not is_batch_norm, mask)
        >>> optimizer = optax.adamw(1e-3, mask=decayed)  # no weight decay on batch norm
    """
    for name in ("params", "batch_stats"):
        if name not in variables:
            raise ValueError(
                "variables must have the collections params and batch_stats, got "
                f"{', '.join(variables) or 'none'}: pass what the model's init returns, and "
                "batch_stats={} for a model without batch norm."
            )
    return _layer.mask_of(variables["params"], variables["batch_stats"])
