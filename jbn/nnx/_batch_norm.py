"""Flax NNX layer: `flax.nnx.BatchNorm`'s arguments and variables, jbn's computation."""

import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax.nn import initializers

import jbn
from jbn import _axes, _layer


class BatchMoments(nnx.Variable[Any]):
    """The `jbn.Moments` of a batch, which `nnx.capture` takes from each `BatchNorm`."""


class BatchNorm(nnx.Module):
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Takes the place of `flax.nnx.BatchNorm` by its import line: the same arguments, defaults and
    variables, `nnx.Param` scale and bias, `nnx.BatchStat` mean and var. What follows
    `scale_metadata` is jbn's own.

    Unlike Flax's, the statistics are accurate at any mean (`use_fast_variance` is accepted and has
    no effect), a batch that is empty or not finite leaves the running statistics as they were, and
    these are float32 at inference too, whatever `promote_dtype` does to the rest.

    `nnx.capture(model, jbn.nnx.BatchMoments)` hands out the batch's `jbn.Moments`. Moments that
    are handed in as its `init` are pooled with the batch's, and the running statistics are updated
    from them together: so micro-batches count as one batch, see docs/gradient_accumulation.md.

    Under `nnx.vmap` and `nnx.scan` over stacked layers the variables are mapped as any others. A
    layer that is shared by the elements of a mapped axis, `in_axes=(None, 0)`, cannot be updated by
    each of them on its own: give it that axis, `BatchNorm(..., axis_name="batch")` with
    `nnx.vmap(..., axis_name="batch")`, or `update_running_average=False`. To take the shapes of a
    model's output without computing it use `nnx.eval_shape(lambda m, x: m(x), model, x)`.

    Args:
        num_features: C, or the sizes of the feature axes in the order that they have in `x`.
        use_running_average: whether to normalize by the running statistics rather than by the
            batch. `train()` and `eval()` of the model, `nnx.view` and the call can change it.
        axis: the feature axis or axes; all others are reduced.
        momentum: weight of the old running statistics, in [0, 1], or None for the average of all
            updates, which adds a `BatchStat` count.
        epsilon: added to the variance.
        dtype: of the output; by default that of the input and parameters together.
        param_dtype: of scale and bias.
        use_bias: whether to add a bias.
        use_scale: whether to multiply by a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: name or names of mapped axes over which the batch is split.
        axis_index_groups: groups of indices along `axis_name`, each a batch of its own.
        use_fast_variance: accepted for compatibility, without effect: jbn's variance is both fast
            and accurate.
        promote_dtype: decides the dtype of the output where `dtype` does not, from the tuple
            (x, mean, var, scale, bias), in which the statistics have the dtype of `x`: they keep
            their own.
        rngs: gives the keys of the initializers.
        bias_metadata: of the `Param`, such as its sharding.
        scale_metadata: of the `Param`, such as its sharding.
        activation: an elementwise function such as `jax.nn.relu`, applied to the output. It costs
            no memory for the backward pass.
        unbiased: whether the running variance averages the unbiased variances, as in torch.
        custom_vjp: False leaves the backward pass to JAX, which adds forward mode (`jax.jvp`).
        update_running_average: False leaves the running statistics as they are while the batch
            normalizes. `nnx.view` and the call can change it.
        mean_init: initializer of the running mean, called without a key. For complex `x` the mean
            turns complex with the first update, unless it starts so.
        var_init: initializer of the running variance, called without a key.

    Raises:
        TypeError, ValueError: if `num_features` are not sizes, one for each axis.

    Example:
        >>> import jax, jbn.nnx
        >>> from flax import nnx
        >>> bn = jbn.nnx.BatchNorm(3, activation=jax.nn.relu, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (8, 3))
        >>> y = bn(x)  # by the batch, updating bn.mean and bn.var
        >>> bn.eval()
        >>> bn(x).shape
        (8, 3)
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: Callable[[jax.Array], jax.Array] | None = None,
        unbiased: bool = False,
        custom_vjp: bool = True,
        update_running_average: bool = True,
        mean_init: Initializer = initializers.zeros,
        var_init: Initializer = initializers.ones,
    ):
        shape = _check_num_features(num_features, axis)
        no_key: Any = None
        self.mean = nnx.BatchStat(mean_init(no_key, shape, jnp.float32))
        self.var = nnx.BatchStat(var_init(no_key, shape, jnp.float32))
        self.count = nnx.data(None)
        if momentum is None:
            self.count = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
        self.scale = self.bias = nnx.data(None)
        if use_scale:
            scale = scale_init(rngs.params(), shape, param_dtype)
            self.scale = nnx.Param(scale, **scale_metadata)
        if use_bias:
            bias = bias_init(rngs.params(), shape, param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)

        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.activation = activation
        self.unbiased = unbiased
        self.custom_vjp = custom_vjp
        self.update_running_average = update_running_average

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and in training updates the running statistics.

        Args:
            x: [..., C] floating or complex.
            use_running_average: in place of the attribute.
            mask: boolean or weights, broadcasting to `x`: how much each element counts in the
                batch statistics.
            residual: added before the activation, in the shape of `x`.
            update_running_average: in place of the attribute.

        Returns:
            The output, in the shape of `x`.

        Raises:
            TypeError, ValueError: for bad input, as `jbn.batch_norm`, or if `x` has not
                `num_features` features, or use_running_average is None here and as attribute.
        """
        use_running_average = first_from(
            use_running_average,
            self.use_running_average,
            error_msg="use_running_average is given neither to the layer nor to the call: say "
            "BatchNorm(..., use_running_average=False) or layer(x, use_running_average=False), or "
            "model.train() and model.eval().",
        )
        x = _axes.check_float_array("x", x)
        params = {
            name: None if variable is None else variable[...]
            for name, variable in (("scale", self.scale), ("bias", self.bias))
        }
        variables = {"mean": self.mean, "var": self.var}
        if self.count is not None:
            variables["count"] = self.count
        stats = {name: variable[...] for name, variable in variables.items()}
        y, moments = _layer.normalize(
            self,
            x,
            params,
            stats,
            use_running_average=use_running_average,
            dtype=self._output_dtype(x, **params),
            mask=mask,
            residual=residual,
        )
        if moments is not None:
            moments = self._pooled(moments)
            if first_from(update_running_average, self.update_running_average, error_msg=""):
                for name, value in _layer.updated_stats(self, stats, moments).items():
                    variables[name].set_value(value)
        return y

    def _output_dtype(self, x: jax.Array, scale: Any, bias: Any) -> Any:
        """The dtype that `promote_dtype` and `dtype` give the output."""
        if self.dtype is None and self.promote_dtype is not dtypes.promote_dtype:
            stats = jnp.zeros(self.mean.shape, x.dtype)  # in their place, to no effect
            arrays = x, stats, stats, scale, bias
            promoted = jax.eval_shape(lambda: self.promote_dtype(arrays, dtype=None))
            return jnp.result_type(*(a.dtype for a in promoted if a is not None))
        return dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)

    def _pooled(self, moments: jbn.Moments) -> jbn.Moments:
        """The batch's moments with those handed in, and hands them out, inside `nnx.capture`."""

        def pool(earlier: jbn.Moments | None, batch: jbn.Moments) -> jbn.Moments:
            nonlocal moments
            moments = batch if earlier is None else jbn.merge_moments(earlier, batch)
            return moments

        if hasattr(self, "__captures__"):  # elsewhere `sow` warns
            self.sow(BatchMoments, "moments", moments, reduce_fn=pool, init_fn=lambda: None)
        return moments

    def set_view(
        self,
        use_running_average: bool | None = None,
        update_running_average: bool | None = None,
    ) -> None:
        """What `nnx.view` changes; `nnx.view_info` reads arguments at this indentation only.

        Args:
          use_running_average: whether to normalize by the running statistics.
          update_running_average: whether to update them in training.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average


def batch_norm_mask(model: nnx.Module, wrt: nnx.filterlib.Filter = nnx.Param) -> Any:
    """Which parameters are those of batch norm: for optimizers that treat them apart.

    A layer is known by its running statistics: the scale and bias beside a `BatchStat` mean and var
    are its own, be it jbn's layer, Flax's or one of Linen under `nnx.bridge.ToNNX`.

    Args:
        model: with any number of layers of batch norm.
        wrt: the variables that are optimized, as for `nnx.Optimizer`.

    Returns:
        The tree of `nnx.state(model, wrt)` with True for the parameters of batch norm and False
        for all others, as the masks of optax are.

    Example:
        >>> import jax, jbn.nnx, optax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), jbn.nnx.BatchNorm(3, rngs=rngs))
        >>> mask = jbn.nnx.batch_norm_mask(model)
        >>> decayed = jax.tree.map(lambda is_batch_norm: not is_batch_norm, mask)
        >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3, mask=decayed), wrt=nnx.Param)
    """
    params, stats = (nnx.as_pure(nnx.state(model, kind)) for kind in (wrt, nnx.BatchStat))
    return _layer.mask_of(params, stats)


def _check_num_features(num_features: Any, axis: Any) -> tuple[int, ...]:
    """The shape of the parameters and statistics."""
    given = tuple(num_features) if np.iterable(num_features) else (num_features,)
    axes = tuple(axis) if np.iterable(axis) else (axis,)
    try:
        shape = tuple(operator.index(n) for n in given)
    except TypeError:
        raise TypeError(
            f"num_features must be an int or ints, got {_axes.describe(num_features)}."
        ) from None
    if len(shape) != len(axes) or any(n < 0 for n in shape):
        raise ValueError(
            "num_features must hold the size of each feature axis in the order of the axes in x, "
            f"got num_features = {num_features!r} for axis = {axis!r}."
        )
    return shape
