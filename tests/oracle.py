"""The naive definition, which everything is compared against.

It is written once for NumPy and for jax.numpy: NumPy in 64 bits gives the values, JAX's own
differentiation of the same lines the gradients. It shares no code with the package.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import cases
from tests.cases import Case


def batch_norm(case: Case, args: dict[str, Any], xp: Any = np) -> tuple[Any, Any, Any, Any]:
    """Returns y and the mean, variance and count of each feature, in 64 bits."""
    x = args["x"]
    dtype = np.result_type(x.dtype, np.float64)
    sums = {"axis": case.reduced_axes, "keepdims": True}

    def per_feature(v, default):
        v = xp.full(case.features, default) if v is None else v
        return xp.expand_dims(v.astype(dtype), case.reduced_axes)

    x = x.astype(dtype)
    weight = xp.ones(x.shape) if args["mask"] is None else args["mask"].astype(np.float64)
    weight = xp.broadcast_to(weight, x.shape)
    weight = xp.where(weight > 0, weight, 0.0)  # and no gradient where it is 0
    n = weight.sum(**sums)
    total = xp.where(n > 0, n, 1.0)
    mean = (weight.astype(dtype) * xp.where(weight > 0, x, 0)).sum(**sums) / total.astype(dtype)
    c = x - mean
    square = c.real**2 + c.imag**2 if xp.iscomplexobj(c) else c**2
    var = (weight * xp.where(weight > 0, square, 0.0)).sum(**sums) / total
    xhat = c / xp.sqrt(var + case.epsilon).astype(dtype)
    xhat = xp.where(n > 0, xhat, 0)
    z = per_feature(args["scale"], 1.0) * xhat + per_feature(args["bias"], 0.0)
    if args["residual"] is not None:
        z = z + args["residual"].astype(dtype)
    y = z if case.activation is None else case.activation(z)
    return y, *(xp.squeeze(v, case.reduced_axes) for v in (mean, var, n))


def gradients(case: Case, args: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Cotangents of the arguments, for the cotangents of y, mean and var apart."""
    args = {
        k: v if v is None or k == "mask" else v.astype(np.result_type(v.dtype, np.float64))
        for k, v in args.items()
    }
    return jax.tree.map(np.asarray, _gradients(case, args))


@functools.partial(jax.jit, static_argnums=0)
def _gradients(case: Case, args: dict[str, Any]) -> dict[str, dict[str, jax.Array]]:
    diff = {k: args[k] for k in cases.differentiable(args)}
    outputs, pull = jax.vjp(lambda d: batch_norm(case, {**args, **d}, jnp)[:3], diff)
    zeros = [jnp.zeros_like(o) for o in outputs]
    grads = {}
    for i, name in enumerate(("y", "mean", "var")):
        cotangent = args[f"d{name}"].astype(outputs[i].dtype)
        (grads[name],) = pull((*zeros[:i], cotangent, *zeros[i + 1 :]))
    return grads
