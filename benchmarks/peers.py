"""Batch norm layers, jbn's and its peers', as functions of the same arrays.

Scale, bias and running statistics are float32; the output and the gradient of x are in the dtype of
x. Every layer is in training the same function of its arrays, running statistics included, except
that torch's running variance is unbiased.
"""

import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn.linen

MODES = ("forward", "forward+backward", "inference")
AFTER = ("none", "relu", "add-relu")
EPSILON = 1e-5

Arrays = dict[str, jax.Array]  # x, scale, bias, mean and var; if needed dy and residual
Stats = tuple[jax.Array, jax.Array]  # running mean and variance
Layer = Callable[[Arrays], tuple[jax.Array, Stats]]


class Case(NamedTuple):
    """What every peer is asked to do.

    Attributes:
        shape: of x, features last.
        dtype: of x and of the output.
        mode: one of `MODES`.
        after: one of `AFTER`, what follows the normalization.
        momentum: weight of the old running statistics.
    """

    shape: tuple[int, ...]
    dtype: str
    mode: str
    after: str = "none"
    momentum: float = 0.99

    @property
    def training(self) -> bool:
        """Whether the batch's own statistics normalize it."""
        return self.mode != "inference"

    @property
    def activation(self) -> Callable[[jax.Array], jax.Array] | None:
        """The function that follows."""
        return None if self.after == "none" else jax.nn.relu


class Prepared(NamedTuple):
    """A peer ready to run one case.

    Attributes:
        call: computes y, and in training the running mean and var, and with a backward pass
            dx, dscale, dbias and dresidual; may return before it is done.
        wait: waits for what a call returned.
        compile_seconds: what tracing and compiling took, if there was any.
        feature_axis: of x and what has its shape.
    """

    call: Callable[[], dict[str, Any]]
    wait: Callable[[dict[str, Any]], Any]
    compile_seconds: float | None
    feature_axis: int

    def outputs(self) -> dict[str, np.ndarray]:
        """What one call computes, as float32 with features last."""

        def convert(value: Any) -> np.ndarray:
            value = value if isinstance(value, jax.Array) else value.detach().float().cpu()
            return np.moveaxis(np.asarray(value, np.float32), self.feature_axis % value.ndim, -1)

        result = self.call()
        self.wait(result)
        return {name: convert(value) for name, value in result.items()}


class Peer(NamedTuple):
    """One layer.

    Attributes:
        module: that it is imported from.
        package: that pip installs.
        prepare: makes it ready for a case and its arrays.
    """

    module: str
    package: str
    prepare: Callable[[Case, Arrays], Prepared]


def draw(case: Case) -> Arrays:
    """Random arrays of a case."""
    rng = np.random.default_rng(0)
    names = ["x"]
    names += ["residual"] if case.after == "add-relu" else []
    names += ["dy"] if case.mode == "forward+backward" else []
    wide = {name: rng.standard_normal(case.shape, np.float32) for name in names}
    features = {
        "scale": rng.uniform(0.5, 2, case.shape[-1]),
        "bias": rng.normal(size=case.shape[-1]),
        "mean": rng.normal(size=case.shape[-1]),
        "var": rng.uniform(0.5, 2, case.shape[-1]),
    }
    return {
        **{name: jnp.asarray(value, case.dtype) for name, value in wide.items()},
        **{name: jnp.asarray(value, "float32") for name, value in features.items()},
    }


def _in_jax(
    build: Callable[[Case], Layer], case: Case, arrays: Arrays, feature_axis: int = -1
) -> Prepared:
    """Compiles the layer; every array is an argument, so that XLA folds none as a constant."""
    layer = build(case)

    def step(arrays: Arrays) -> Arrays:
        if case.mode != "forward+backward":
            y, (mean, var) = layer(arrays)
            return {"y": y, "mean": mean, "var": var} if case.training else {"y": y}
        inputs = {k: arrays[k] for k in ("x", "scale", "bias", "residual") if k in arrays}
        # y is returned too: in a network the next layer reads it.
        y, pull, (mean, var) = jax.vjp(lambda v: layer(arrays | v), inputs, has_aux=True)
        (grads,) = pull(arrays["dy"])
        return {"y": y, "mean": mean, "var": var} | {f"d{k}": v for k, v in grads.items()}

    if feature_axis != -1:
        arrays = {
            k: jnp.moveaxis(v, -1, feature_axis) if v.ndim > 1 else v for k, v in arrays.items()
        }
    start = time.perf_counter()
    compiled = jax.jit(step).lower(arrays).compile()
    seconds = time.perf_counter() - start
    return Prepared(lambda: compiled(arrays), jax.block_until_ready, seconds, feature_axis)


def _followed(build: Callable[[Case], Layer]) -> Callable[[Case], Layer]:
    """Lets the residual and the activation of a case follow a layer that does not fuse them."""

    def build_followed(case: Case) -> Layer:
        layer = build(case)

        def followed(arrays: Arrays) -> tuple[jax.Array, Stats]:
            y, stats = layer(arrays)
            y = y + arrays["residual"] if "residual" in arrays else y
            return y if case.activation is None else case.activation(y), stats

        return followed

    return build_followed


def _options(case: Case) -> dict[str, Any]:
    """What Linen, NNX and jbn call by the same names."""
    return {
        "use_running_average": not case.training,
        "momentum": case.momentum,
        "epsilon": EPSILON,
        "dtype": case.dtype,  # by default float32 parameters would make the output float32
    }


def _apply(layer: nn.Module, arrays: Arrays, **kwargs: Any) -> tuple[jax.Array, Stats]:
    """Calls a Linen layer."""
    variables = {
        "params": {"scale": arrays["scale"], "bias": arrays["bias"]},
        "batch_stats": {"mean": arrays["mean"], "var": arrays["var"]},
    }
    y, updated = layer.apply(variables, arrays["x"], mutable=["batch_stats"], **kwargs)
    stats: Any = updated["batch_stats"]
    return y, (stats["mean"], stats["var"])


def _jbn(case: Case) -> Layer:
    layer = jbn.linen.BatchNorm(activation=case.activation, **_options(case))
    return lambda arrays: _apply(layer, arrays, residual=arrays.get("residual"))


@_followed
def _linen(case: Case) -> Layer:
    return functools.partial(_apply, nn.BatchNorm(**_options(case)))


@_followed
def _linen_two_pass(case: Case) -> Layer:
    return functools.partial(_apply, nn.BatchNorm(use_fast_variance=False, **_options(case)))


@_followed
def _nnx(case: Case) -> Layer:
    def layer(arrays: Arrays) -> tuple[jax.Array, Stats]:
        module = nnx.BatchNorm(case.shape[-1], rngs=nnx.Rngs(0), **_options(case))
        module.scale, module.bias = nnx.Param(arrays["scale"]), nnx.Param(arrays["bias"])
        module.mean, module.var = nnx.BatchStat(arrays["mean"]), nnx.BatchStat(arrays["var"])
        y = module(arrays["x"])
        return y, (module.mean[...], module.var[...])

    return layer


@_followed
def _haiku(case: Case) -> Layer:
    hk = importlib.import_module("haiku")

    def layer(arrays: Arrays) -> tuple[jax.Array, Stats]:
        def call(x: jax.Array) -> jax.Array:
            norm = hk.BatchNorm(True, True, decay_rate=case.momentum, eps=EPSILON)
            return norm(x, is_training=case.training)

        x = arrays["x"]
        # Parameters and statistics have the rank of x, and its dtype: float32 as inside the others.
        wide = {k: v.reshape((1,) * (x.ndim - 1) + (-1,)) for k, v in arrays.items() if v.ndim == 1}
        params = {"batch_norm": {"scale": wide["scale"], "offset": wide["bias"]}}
        state = {
            f"batch_norm/~/{k}_ema": {"counter": jnp.int32(0), "hidden": v, "average": v}
            for k, v in (("mean", wide["mean"]), ("var", wide["var"]))
        }
        apply = hk.without_apply_rng(hk.transform_with_state(call)).apply
        y, state = apply(params, state, x.astype(jnp.float32))
        # What haiku reads at inference is the debiased average of these.
        mean, var = (state[f"batch_norm/~/{k}_ema"]["hidden"].ravel() for k in ("mean", "var"))
        return y.astype(x.dtype), (mean, var)

    return layer


@_followed
def _equinox(case: Case) -> Layer:
    eqx = importlib.import_module("equinox")

    def layer(arrays: Arrays) -> tuple[jax.Array, Stats]:
        x = arrays["x"]
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            case.shape[-1],
            axis_name="batch",
            eps=EPSILON,
            momentum=case.momentum,
            inference=not case.training,
            mode="batch",
        )
        params = (arrays["scale"], arrays["bias"])
        norm = eqx.tree_at(lambda norm: (norm.weight, norm.bias), norm, params)
        state = state.set(norm.batch_state_index, (arrays["mean"], arrays["var"]))
        over_batch = jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        # It computes in the dtype of x, the statistics too: float32 as inside the others.
        y, state = over_batch(x.astype(jnp.float32), state)
        return y.astype(x.dtype), state.get(norm.batch_state_index)

    return layer


@_followed
def _keras(case: Case) -> Layer:
    os.environ["KERAS_BACKEND"] = "jax"
    keras = importlib.import_module("keras")
    policy = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
    norm = keras.layers.BatchNormalization(momentum=case.momentum, epsilon=EPSILON, dtype=policy)
    norm.build(case.shape)

    def layer(arrays: Arrays) -> tuple[jax.Array, Stats]:
        params, stats = [arrays["scale"], arrays["bias"]], [arrays["mean"], arrays["var"]]
        y, (mean, var) = norm.stateless_call(params, stats, arrays["x"], training=case.training)
        return y, (mean, var)

    return layer


def _torch(case: Case, arrays: Arrays, channels_last: bool = False) -> Prepared:
    """The layer in eager mode, with features in the second axis, where torch wants them."""
    torch = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    backward = case.mode == "forward+backward"

    def convert(value: jax.Array) -> Any:
        tensor = torch.tensor(np.asarray(value, np.float32), device=device)
        if tensor.ndim == 1:
            return tensor
        tensor = tensor.to(getattr(torch, case.dtype)).movedim(-1, 1)
        return tensor.contiguous(memory_format=layout)

    tensors = {name: convert(value) for name, value in arrays.items()}
    module = _torch_module(torch, case, tensors)
    inputs = {"x": tensors["x"], "scale": module.weight, "bias": module.bias}
    inputs |= {"residual": tensors["residual"]} if "residual" in tensors else {}
    for tensor in inputs.values():
        tensor.requires_grad_(backward)

    def call() -> dict[str, Any]:
        y = module(inputs["x"])
        # In place, as in torchvision's networks.
        y = y.add_(inputs["residual"]) if "residual" in inputs else y
        y = y if case.after == "none" else y.relu_()
        if not case.training:
            return {"y": y}
        result = {"y": y, "mean": module.running_mean, "var": module.running_var}
        if backward:
            grads = torch.autograd.grad(y, list(inputs.values()), tensors["dy"])
            result |= {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
        return result

    def wait(result: dict[str, Any]) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return Prepared(call, wait, None, 1)


def _torch_module(torch: Any, case: Case, tensors: dict[str, Any]) -> Any:
    """torch's layer, with these parameters and statistics."""
    norm = {2: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}[len(case.shape)]
    module = norm(case.shape[-1], eps=EPSILON, momentum=1 - case.momentum)
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    state = {own: tensors[name] for own, name in names.items()}
    module.load_state_dict(state, strict=False)  # which leaves its count of batches at 0
    return module.to(tensors["x"].device).train(case.training)


def _jax_peer(module: str, package: str, build: Callable[[Case], Layer], **kwargs: int) -> Peer:
    return Peer(module, package, functools.partial(_in_jax, build, **kwargs))


PEERS = {
    "jbn": _jax_peer("jbn", "jbn", _jbn),
    "linen": _jax_peer("flax", "flax", _linen),
    "linen-two-pass": _jax_peer("flax", "flax", _linen_two_pass),
    "nnx": _jax_peer("flax", "flax", _nnx),
    "haiku": _jax_peer("haiku", "dm-haiku", _haiku),
    "equinox": _jax_peer("equinox", "equinox", _equinox, feature_axis=1),
    "keras": _jax_peer("keras", "keras", _keras),
    "torch": Peer("torch", "torch", _torch),
    "torch-channels-last": Peer("torch", "torch", functools.partial(_torch, channels_last=True)),
}


def unavailable(name: str, platform: str) -> str:
    """Why a peer cannot run on this platform, and what to do; empty if it can."""
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        return f"{name} is not installed: pip install {peer.package}"
    if peer.module == "torch" and platform != "cpu":
        if platform != "cuda":
            return f"{name} does not run on {platform}"
        if not importlib.import_module("torch").cuda.is_available():
            return f"{name} finds no GPU: pip install a torch that is built for its CUDA"
    return ""


def supports(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a peer is any different for x of this shape: channels come last where no axes do."""
    return name != "torch-channels-last" or len(shape) == 4
