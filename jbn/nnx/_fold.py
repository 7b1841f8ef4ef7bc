"""Batch norm folded into the layers before it, in an NNX model as it was written."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jbn import _axes, _fold, _graph, _layer
from jbn._fold import FoldReport
from jbn.nnx._batch_norm import BatchNorm

_NORMS = (BatchNorm, nnx.BatchNorm)
_LINEAR = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Embed)

Model = TypeVar("Model", bound=nnx.Module)
Method = str | Callable[..., Any] | None


def fold(
    model: Model, *args: Any, method: Method = None, **kwargs: Any
) -> tuple[Model, FoldReport]:
    """Folds each batch norm into the linear layer whose output it normalizes by running statistics.

        kernel' = kernel * s, bias' = (bias - mean) * s + beta, s = scale / sqrt(var + epsilon)

    (Jacob et al. 2018, arXiv:1712.05877, section 3.2; see `jbn.fold_batch_norm`). The model is
    traced once with these arguments, without computing anything. A `jbn.nnx.BatchNorm` or
    `flax.nnx.BatchNorm` is folded if each of its calls takes the output of one and the same
    Conv, ConvTranspose, Linear, LinearGeneral or Embed, as that layer gave it, and nothing else
    reads that output or the variables of the two. All others are left as they are, and the report
    says why: those in training mode, after an activation or a sum, or after a class derived from
    one of these layers. Layers stacked along their leading axis by `nnx.vmap` are folded in place.

    The activation and residual of jbn's layer stay. The variables keep their dtype, and so does the
    output: where a layer computes in bfloat16 with float32 variables, the folded kernel is float32
    too, and its product is rounded to bfloat16 as before. A layer without a bias gets one, with the
    metadata of batch norm's own.

    Args:
        model: as it was written, and in evaluation mode (`model.eval()`); it is not changed.
        *args: what the model takes at inference, arrays or `jax.ShapeDtypeStruct`.
        method: what is called, by name or as a function of the model; `model(...)` by default.
        **kwargs: of the call.

    Returns:
        A copy of the model without the batch norms that were folded, and what was folded and what
        was left and why (`print` shows a line for each). The copy is to be called with the same
        flags and method as here, as other calls may read what was folded. The model's own code
        must not ask for the class of a layer, or whether it has a bias: both change.

    Raises:
        TypeError: if `model` is not an NNX module.
        ValueError: if there is no batch norm, or a running variance is negative or NaN.

    Example:
        >>> import jax, jax.numpy as jnp, jbn.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> bn = jbn.nnx.BatchNorm(3, activation=jax.nn.relu, rngs=rngs)
        >>> model = nnx.Sequential(nnx.Linear(5, 3, rngs=rngs), bn, nnx.Linear(3, 2, rngs=rngs))
        >>> model.eval()
        >>> x = jnp.ones((4, 5))
        >>> folded, report = jbn.nnx.fold(model, x)
        >>> print(report)
        layers/1  folded into layers/0
        >>> y = nnx.jit(folded)(x)
    """
    norms = analyse(model, *args, method=method, **kwargs)
    folded = nnx.clone(model)
    layers = {path: layer for path, layer in _layers(folded) if type(layer) in (*_NORMS, *_LINEAR)}
    seen = {norm.layer.call.path for norm in norms}
    uncalled = [
        "/".join(map(str, path))
        for path, layer in layers.items()
        if isinstance(layer, _NORMS) and path not in seen
    ]
    report = _fold.report(norms, uncalled)
    values = dict(arrays(folded))
    for norm in norms:
        if norm.obstacle is None:
            layer, feeder = norm.layer.call.path, _fold.feeder_of(norm).call.path
            _write(layers[layer], layers[feeder], _fold.fold_variables(norm, values))
    return folded, report


def analyse(
    model: nnx.Module, *args: Any, method: Method = None, **kwargs: Any
) -> list[_graph.Norm]:
    """The batch norms of a model's call, and what feeds them."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {_axes.describe(model)}: "
            "for flax.linen there is jbn.linen."
        )
    marked = nnx.clone(model)
    norms: set[_graph.Path] = set()
    for path, layer in list(_layers(marked)):
        if type(layer) in (*_NORMS, *_LINEAR):
            norms |= {path} if type(layer) in _NORMS else set()
            layer.path_in_model = path
            _become(layer, _marking(type(layer)))
    graphdef, state = nnx.split(marked)
    unchanged: dict[int, _graph.Path] = {}

    def run(state: Any, args: Any, kwargs: Any) -> Any:
        model = nnx.merge(graphdef, state)
        bound = getattr(model, method) if isinstance(method, str) else model
        called = functools.partial(method, model) if callable(method) else bound
        outputs = called(*args, **kwargs)
        # What the model keeps, but for running statistics: batch norm itself reads its input.
        after = [(path, v) for path, v in arrays(model) if path[:-1] not in norms]
        n = len(jax.tree.leaves(outputs))
        unchanged.update(enumerate((path for path, _ in after), n))
        return outputs, [v for _, v in after]

    closed = _graph.trace(run, state, args, kwargs)
    return _graph.analyse(closed, _paths(state), unchanged=unchanged)


def _layers(model: nnx.Module) -> Any:
    """The path and object of each module."""
    return ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))


def _paths(state: Any) -> list[_graph.Path]:
    return [_layer._names(path) for path, _ in jax.tree.leaves_with_path(state)]


def arrays(model: nnx.Module) -> Any:
    """The path and value of each variable."""
    state = nnx.state(model)
    return zip(_paths(state), jax.tree.leaves(state), strict=True)


def _become(layer: nnx.Module, cls: type) -> None:
    """Changes the class of an object in place, wherever the model refers to it."""
    object.__setattr__(layer, "__class__", cls)


@functools.cache
def _marking(cls: Any) -> type:
    """A subclass of a layer whose calls are marked."""

    def call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        y = cls.__call__(self, *args, **kwargs)
        if cls in _NORMS:
            names = ("mean", "var", "scale", "bias")
            runs = _runs(self, args[1] if args[1:] else kwargs.get("use_running_average"))
            x = args[0] if args else kwargs["x"]
            description = _fold.norm_call(self, self.path_in_model, x, runs)
            if self.promote_dtype is not dtypes.promote_dtype:
                description = description._replace(obstacle="its promote_dtype is not Flax's")
        else:
            names = ("embedding",) if cls is nnx.Embed else ("kernel", "bias")
            own = dtypes.promote_dtype
            axes = _kernel_axes(self)
            description = _fold.linear_call(self, self.path_in_model, y, axes, own)
        found = {name: getattr(self, name) for name in names}
        variables = {name: v[...] for name, v in found.items() if v is not None}
        return _graph.mark(description, y, variables, args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def _kernel_axes(layer: Any) -> tuple[int, ...]:
    """Where the output features lie in the kernel."""
    if isinstance(layer, nnx.LinearGeneral):
        return tuple(range(-len(layer.out_features), 0))
    return (-2,) if getattr(layer, "transpose_kernel", False) else (-1,)


def _runs(layer: Any, use_running_average: bool | None) -> bool:
    """Whether a batch norm normalizes by its running statistics."""
    given = layer.use_running_average if use_running_average is None else use_running_average
    return bool(given)


def _write(norm: Any, feeder: Any, new: dict[str, jax.Array]) -> None:
    """Puts the folded variables in place, and takes those of batch norm away."""
    for name, value in new.items():
        if getattr(feeder, name) is not None:
            getattr(feeder, name).set_value(value)
            continue
        like = next((v for v in (norm.bias, norm.scale) if v is not None), None)
        metadata = like.get_metadata() if like is not None and like.ndim == value.ndim else {}
        feeder.bias = nnx.Param(value, **metadata)
        feeder.use_bias = True
    kind: Any = type(norm)
    promoted = ["scale", "bias"] if kind is BatchNorm else ["mean", "var", "scale", "bias"]
    found = [v for v in (getattr(norm, name) for name in promoted) if v is not None]
    norm.dtypes = tuple(v.dtype for v in found)
    for name in vars(norm).keys() & {"mean", "var", "scale", "bias", "count"}:
        setattr(norm, name, nnx.data(None))
    _become(norm, FoldedBatchNorm)


class FoldedBatchNorm(nnx.Module):
    """What is left of a batch norm that was folded: the activation and the residual."""

    dtype: Any
    dtypes: tuple[Any, ...]
    use_running_average: bool | None

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        update_running_average: bool | None = None,
    ) -> jax.Array:
        """As the call of the batch norm at inference, of its normalized input.

        Raises:
            ValueError: in training mode.
        """
        if not _runs(self, use_running_average):
            raise ValueError(
                "this batch norm was folded into the layer before it, so it can't run in training "
                "mode: train the model that it came from."
            )
        params = (jnp.zeros((), dtype) for dtype in self.dtypes)
        dtype = dtypes.canonicalize_dtype(x, *params, dtype=self.dtype)
        return _fold.after(x, getattr(self, "activation", None), residual, dtype)

    set_view = BatchNorm.set_view
