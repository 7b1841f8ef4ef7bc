"""Batch norm folded into the layers before it, in a Linen model as it was written."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype, promote_dtype

from jbn import _axes, _fold, _graph, _layer
from jbn._fold import FoldReport
from jbn.linen._batch_norm import BatchNorm

_NORMS = (BatchNorm, nn.BatchNorm)
_LINEAR = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Embed)

# Part of the key of jit's caches, so that `nn.jit` inside a model traces anew.
_tracing: Any = jax.make_user_context(None)


class Folded(NamedTuple):
    """A model without the batch norms that were folded.

    Attributes:
        apply_fn: called as the model's `apply`.
        variables: for `apply_fn`.
        report: what was folded, and what was left and why; `print` shows a line for each.
    """

    apply_fn: Callable[..., Any]
    variables: Any
    report: FoldReport


def fold(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Folded:
    """Folds each batch norm into the linear layer whose output it normalizes by running statistics.

        kernel' = kernel * s, bias' = (bias - mean) * s + beta, s = scale / sqrt(var + epsilon)

    (Jacob et al. 2018, arXiv:1712.05877, section 3.2; see `jbn.fold_batch_norm`). The model is
    traced once with these arguments, without computing anything. A `jbn.linen.BatchNorm` or
    `flax.linen.BatchNorm` is folded if each of its calls takes the output of one and the same
    Conv, ConvTranspose, Dense, DenseGeneral or Embed, as that layer gave it, and nothing else reads
    that output or the variables of the two. All others are left as they are, and the report says
    why: those in training mode, after an activation or a sum, or after a class derived from one of
    these layers. Layers stacked along leading axes by `nn.scan` and `nn.vmap` are folded in place.

    The activation and residual of jbn's layer stay. The variables keep their dtype, and so does the
    output: where a layer computes in bfloat16 with float32 variables, the folded kernel is float32
    too, and its product is rounded to bfloat16 as before. A layer without a bias gets one, with the
    metadata (`nn.Partitioned`) of batch norm's own.

    Args:
        model: as it was written.
        variables: of the model, with `params` and `batch_stats`; dicts or FrozenDict.
        *args: what `model.apply` takes at inference, arrays or `jax.ShapeDtypeStruct`.
        **kwargs: likewise, such as `train=False` and `method`.

    Returns:
        `Folded`. Its `apply_fn` is to be called with the same flags and method as here, as other
        calls may read what was folded.

    Raises:
        TypeError: if `model` is not a Linen module.
        ValueError: if there is no batch norm, or a running variance is negative or NaN.

    Example:
        >>> import jax, jax.numpy as jnp, jbn.linen
        >>> from flax import linen as nn
        >>> bn = jbn.linen.BatchNorm(use_running_average=True, activation=jax.nn.relu)
        >>> model = nn.Sequential([nn.Dense(3), bn, nn.Dense(2)])
        >>> x = jnp.ones((4, 5))
        >>> variables = model.init(jax.random.key(0), x)
        >>> folded = jbn.linen.fold(model, variables, x)
        >>> print(folded.report)
        layers_1  folded into layers_0
        >>> list(folded.variables), sorted(folded.variables["params"])
        (['params'], ['layers_0', 'layers_2'])
        >>> y = jax.jit(folded.apply_fn)(folded.variables, x)
    """
    norms = _analyse(model, variables, *args, **kwargs)
    given: Any = variables
    flat = traverse_util.flatten_dict(flax.core.unfreeze(given), keep_empty_nodes=True)
    arrays = {by_layer(path): meta.unbox(value) for path, value in flat.items()}
    stats = {by_layer(path)[:-1]: None for path in flat if path[0] == "batch_stats" != path[-1]}
    called = {norm.layer.path for norm in norms}
    report = _fold.report(norms, ["/".join(path) for path in stats if path not in called])
    dtypes: dict[_graph.Path, Any] = {}
    biased = set()
    for norm in norms:
        if norm.obstacle is None:
            own, feeder = norm.layer.variables, _fold.feeder_of(norm)
            dtypes[norm.layer.path] = tuple(
                arrays[own[name].path].dtype if name in own else None for name in ("scale", "bias")
            )
            new = _fold.fold_variables(norm, arrays)
            biased |= {feeder.path} if "bias" in new.keys() - feeder.variables.keys() else set()
            _write(flat, norm, new)
    folded: Any = traverse_util.unflatten_dict(flat)
    if isinstance(variables, flax.core.FrozenDict):
        folded = flax.core.freeze(folded)
    return Folded(_apply_fn(model, dtypes, biased), folded, report)


def _analyse(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> list[_graph.Norm]:
    """The batch norms of a model's call at inference, and what feeds them."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a flax.linen.Module, got {_axes.describe(model)}: "
            "for flax.nnx there is jbn.nnx."
        )
    is_mapping = isinstance(variables, Mapping)
    if not is_mapping or "batch_stats" not in variables:
        given = ", ".join(map(str, variables)) or "none" if is_mapping else type(variables).__name__
        raise ValueError(
            f"variables must have the collection batch_stats, got {given}: pass what the model's "
            "init returns. "
            "A model without batch norm has nothing to fold."
        )
    _axes.check_variables(variables)
    try:
        return analyse(model.apply, variables, *args, **kwargs)
    except flax.errors.ModifyScopeVariableError as error:
        error.add_note("Give the arguments of inference, such as train=False.")
        raise


def analyse(
    apply_fn: Callable[..., Any], variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> list[_graph.Norm]:
    """The batch norms of a call, and what feeds them.

    Args:
        apply_fn: calls the model, as its `apply`.
        variables: of the model, arrays or abstract.
        *args: arrays, abstract arrays and flags.
        **kwargs: likewise.
    """

    def run(variables: Any, args: Any, kwargs: Any) -> Any:
        with _tracing("marks"), nn.intercept_methods(_mark):
            return apply_fn(variables, *args, **kwargs)

    closed = _graph.trace(run, variables, args, kwargs)
    paths = [by_layer(_layer._names(p)) for p, _ in jax.tree.leaves_with_path(variables)]
    return _graph.analyse(closed, paths, shares_traces=True)


def by_layer(path: tuple[Any, ...]) -> _graph.Path:
    """A path in the variables with the layer's in front: (*layer, (collection, name))."""
    collection, *layer = path
    return (*layer[:-1], (collection, *layer[-1:]))


def _in_variables(path: _graph.Path) -> tuple[Any, ...]:
    *layer, (collection, name) = path
    return (collection, *layer, name)


def _write(flat: dict[Any, Any], norm: _graph.Norm, new: dict[str, jax.Array]) -> None:
    """Puts the folded variables in place of those of the two layers, in their boxes."""
    own = {name: _in_variables(v.path) for name, v in norm.layer.variables.items()}
    like = next((flat[own[name]] for name in ("bias", "scale") if name in own), None)
    kernel = next(iter(_fold.feeder_of(norm).variables.values()))
    for name, value in new.items():
        path = (*_in_variables(kernel.path)[:-1], name)
        box = flat.get(path, like)
        fits = isinstance(box, meta.AxisMetadata) and meta.unbox(box).ndim == value.ndim
        flat[path] = meta.replace_boxed(box, value) if fits else value
    for path in (*own.values(), (*own["mean"][:-1], "count")):
        flat.pop(path, None)


def _apply_fn(
    model: nn.Module, dtypes: dict[_graph.Path, Any], biased: set[_graph.Path]
) -> Callable[..., Any]:
    """The model's `apply`, in which folded batch norms are skipped."""
    key = "folded", tuple(sorted(dtypes.items())), tuple(sorted(biased))

    def without_norms(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = module.path
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if type(module) in _NORMS and path in dtypes:
            return _skip(module, dtypes[path], *args, **kwargs)
        y = next_fun(*args, **kwargs)
        if type(module) in _LINEAR and path in biased:
            bias = meta.unbox(module.get_variable("params", "bias"))
            y += jax.lax.expand_dims(bias.astype(y.dtype), range(y.ndim - bias.ndim))
        return y

    def apply_fn(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with _tracing(key), nn.intercept_methods(without_norms):
            return model.apply(variables, *args, **kwargs)

    return apply_fn


def _skip(
    module: Any,
    dtypes: tuple[Any, ...],
    x: jax.Array,
    use_running_average: bool | None = None,
    residual: jax.Array | None = None,
    **_: Any,
) -> jax.Array:
    """The call of a batch norm that was folded."""
    if not _runs(module, use_running_average):
        raise ValueError(
            f"{'/'.join(module.path)} was folded into the layer before it, so it can't run in "
            "training mode: train the model that it came from."
        )
    params = (None if dtype is None else jnp.zeros((), dtype) for dtype in dtypes)
    dtype = canonicalize_dtype(x, *params, dtype=module.dtype)
    return _fold.after(x, getattr(module, "activation", None), residual, dtype)


def _runs(module: Any, use_running_average: bool | None) -> bool:
    """Whether a batch norm normalizes by its running statistics."""
    given = module.use_running_average if use_running_average is None else use_running_average
    return bool(given)


def _mark(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Marks the calls of linear layers and of batch norm."""
    y, module = next_fun(*args, **kwargs), context.module
    if context.method_name != "__call__":
        return y
    if type(module) in _NORMS:
        names = {"batch_stats": ("mean", "var"), "params": ("scale", "bias")}
        runs = _runs(module, args[1] if args[1:] else kwargs.get("use_running_average"))
        call = _fold.norm_call(module, module.path, args[0] if args else kwargs["x"], runs)
    elif type(module) in _LINEAR:
        names = {"params": ("embedding",) if type(module) is nn.Embed else ("kernel", "bias")}
        axes = _kernel_axes(module)
        call = _fold.linear_call(module, module.path, y, axes, promote_dtype)
    else:
        return y
    variables = {
        name: meta.unbox(module.get_variable(collection, name))
        for collection, of_collection in names.items()
        for name in of_collection
        if getattr(module, f"use_{name}", True)
    }
    return _graph.mark(call, y, variables, args, kwargs)


def _kernel_axes(module: Any) -> tuple[int, ...]:
    """Where the output features lie in the kernel."""
    if type(module) is nn.DenseGeneral:
        return tuple(range(-np.size(module.features), 0))
    return (-2,) if getattr(module, "transpose_kernel", False) else (-1,)
