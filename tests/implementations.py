"""The functions under test, under one signature.

A new path (a lowering, a layer, a variant) is held to the whole contract by an entry here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

import jbn
import jbn.linen
import jbn.nnx
from jbn import _batch_norm, _lowering, _moments
from tests import cases
from tests.cases import Case


def function(case: Case, args: dict[str, Any], custom_vjp: bool = True) -> tuple[Any, jbn.Moments]:
    """The functional form."""
    return jbn.batch_norm(
        args["x"],
        args["scale"],
        args["bias"],
        axis=case.axis,
        epsilon=case.epsilon,
        mask=args["mask"],
        residual=args["residual"],
        activation=case.activation,
        custom_vjp=custom_vjp,
    )


def autodiff(case: Case, args: dict[str, Any]) -> tuple[Any, jbn.Moments]:
    """The functional form, differentiated by JAX."""
    return function(case, args, custom_vjp=False)


def linen(case: Case, args: dict[str, Any]) -> tuple[Any, jbn.Moments]:
    """The Linen layer in training."""
    layer = jbn.linen.BatchNorm(use_running_average=False, **_layer_options(case, args))
    zeros = jnp.zeros(case.features, cases.accumulated(args["x"].dtype))
    variables = {
        "params": {k: args[k] for k in ("scale", "bias") if args[k] is not None},
        "batch_stats": {"mean": zeros, "var": zeros.real},
    }
    y, updated = layer.apply(
        variables,
        args["x"],
        mask=args["mask"],
        residual=args["residual"],
        mutable=["batch_stats", "batch_moments"],
    )
    return y, updated["batch_moments"]["moments"]


def nnx(case: Case, args: dict[str, Any]) -> tuple[Any, jbn.Moments]:
    """The NNX layer in training."""
    features = case.features if isinstance(case.axis, tuple) else case.features[0]
    options = _layer_options(case, args)
    layer = jbn.nnx.BatchNorm(features, rngs=flax.nnx.Rngs(0), **options)
    for name in ("scale", "bias"):
        if args[name] is not None:
            getattr(layer, name).set_value(args[name])
    forward = flax.nnx.capture(layer, jbn.nnx.BatchMoments)
    y, captured = forward(args["x"], mask=args["mask"], residual=args["residual"])
    return y, captured["moments"].get_value()


def _layer_options(case: Case, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "axis": case.axis,
        "epsilon": case.epsilon,
        "dtype": args["x"].dtype,
        "use_scale": case.scale,
        "use_bias": case.bias,
        "activation": case.activation,
    }


@contextlib.contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """Inside, jbn compiles for the CPU what it would for another platform.

    "gpu"; "default", as for a TPU; "cpu", as for a CPU and large arrays.
    """

    def choose(*args: Any, **branches: Any) -> Any:
        return branches[platform](*args)

    compiled = (_batch_norm._batch_norm, _batch_norm._batch_norm_inference, _moments._moments)
    for function in compiled:
        function.clear_cache()
    try:
        with (
            mock.patch.object(_lowering, "by_platform", choose),
            mock.patch.object(_lowering, "is_small", return_value=False),
        ):
            yield
    finally:
        for function in compiled:
            function.clear_cache()


def gpu(case: Case, args: dict[str, Any]) -> tuple[Any, jbn.Moments]:
    """The functional form as compiled for a GPU."""
    return function(case, args)


def large(case: Case, args: dict[str, Any]) -> tuple[Any, jbn.Moments]:
    """The functional form as compiled for large arrays, differentiated by JAX."""
    return autodiff(case, args)


# What a TPU runs are the plain formulas, as a CPU does for arrays as small as the cases.
LOWERINGS = {gpu: "gpu", large: "cpu"}
ALL = (function, autodiff, linen, nnx, gpu, large)


def run(implementation: Any, case: Case, args: dict[str, Any]) -> tuple[Any, jbn.Moments, dict]:
    """Values, moments, and gradients as `oracle.gradients` gives them, in one compiled program."""
    if implementation in LOWERINGS:
        with lowered_for(LOWERINGS[implementation]):
            return run(lambda case, args: implementation(case, args), case, args)
    names = cases.differentiable(args)

    @jax.jit
    def program(diff, rest, cotangents):
        (y, moments), pull = jax.vjp(lambda d: implementation(case, {**rest, **d}), diff)
        dy, dmean, dvar = cotangents
        zero = jax.tree.map(jnp.zeros_like, (y, moments))
        chosen = {
            "y": (dy.astype(y.dtype), zero[1]),
            "mean": (zero[0], zero[1]._replace(mean=dmean)),
            "var": (zero[0], zero[1]._replace(var=dvar)),
        }
        return y, moments, {name: pull(g)[0] for name, g in chosen.items()}

    diff = {k: jnp.asarray(args[k]) for k in names}
    rest = {k: args[k] for k in ("scale", "bias", "mask", "residual") if k not in names}
    out = program(diff, rest, (args["dy"], args["dmean"], args["dvar"]))
    return jax.tree.map(np.asarray, out)
