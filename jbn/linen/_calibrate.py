"""Population statistics of the batch norm layers of a Linen model."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, meta
from flax.traverse_util import flatten_dict, unflatten_dict

import jbn
from jbn import _axes, _calibrate
from jbn.linen._batch_norm import BatchNorm

_calls = itertools.count()
# As Flax's interceptors see them.
_CALL, _FLAXS_CALL = (inspect.unwrap(kind.__call__) for kind in (BatchNorm, nn.BatchNorm))


def calibrate(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    progress: bool = True,
) -> Any:
    """Replaces running statistics by those of the whole population ("precise batch norm").

    Running averages trail the weights, which change while they are taken, and weight the last
    batches most. Here the weights are fixed, and the moments of all batches are pooled exactly:

        n = sum_b n_b    mean = sum_b n_b mean_b / n
        var = sum_b n_b (var_b + |mean_b - mean|^2) / n

    after Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3,
    with counts in place of their assumption that all batches are of one size; masked elements do
    not count. The first layer gets the moments of all batches as one, exactly. For deeper layers
    these are not defined without further passes, since their inputs depend on how batches are
    normalized: they get the pooled moments of what they see in training mode, each batch
    normalized by its own statistics, which come the closer to those of all the larger and the
    better shuffled the batches are.

    Each layer of `jbn.linen.BatchNorm` that normalizes by its batch takes part, also with
    `update_running_average=False`. Layers that ran by their running statistics keep them, and all
    other variables are as they were. With a warning, a layer that is not called keeps its
    statistics too, and so does a feature whose elements are all masked or not finite; a batch whose
    moments are not finite is left out. A variance is unbiased where the layer says so. The `count`
    of a layer with `momentum=None` becomes the number of batches, as if each had been one update.

    The forward pass is compiled once for each shape of batch, and may be sharded by that of
    `variables` and the batches. Interrupted, it leaves `variables` as they were.

    Args:
        apply_fn: `apply_fn(variables, batch, mutable=[...])` runs the model in training mode and
            returns what `model.apply` does with `mutable`, the output and the updated collections.
            For a model that is called with `train=True`: `functools.partial(model.apply,
            train=True)`. Dropout needs its `rngs` there, or `deterministic=True`.
        variables: of the model, with `batch_stats`.
        batches: any iterable of batches, pytrees of arrays as `apply_fn` takes them. Taken one by
            one, once.
        max_batches: the most to take, where `batches` are endless or more than needed.
        progress: whether to show a progress bar, if there is a terminal.

    Returns:
        `variables` with new `batch_stats`, in the same dtypes.

    Raises:
        TypeError: if `apply_fn` does not take these arguments or return these results, or
            `batches` is not an iterable of batches.
        ValueError: if there is no batch, no layer of batch norm, none that normalizes by its
            batch, or one of `flax.linen.BatchNorm`, which has no moments to give; if `max_batches`
            is less than 1, or a layer's moments do not leave a transformation such as `nn.scan`.

    Example:
        >>> import functools, jax, jax.numpy as jnp, jbn.linen
        >>> bn = jbn.linen.BatchNorm()
        >>> x = jnp.arange(6.0).reshape(6, 1)
        >>> variables = bn.init(jax.random.key(0), x, use_running_average=False)
        >>> train = functools.partial(bn.apply, use_running_average=False)
        >>> variables = jbn.linen.calibrate(train, variables, [x[:4], x[4:]])
        >>> variables["batch_stats"]["mean"].tolist()
        [2.5]
    """
    pooled, _ = pool(
        apply_fn,
        variables,
        batches,
        max_batches=max_batches,
        progress=progress,
        description="Calibrating",
    )
    stats = running_stats(variables)
    new = {
        name: _calibrate.new_stats(name, layer, stats[name], moments, stacklevel=3)
        for name, (layer, moments) in pooled.items()
    }
    flat = flatten_dict(variables["batch_stats"], keep_empty_nodes=True)
    for path, value in flat.items():
        updated = new.get(_calibrate.join(path[:-1]), {})
        if path[-1] in updated:
            flat[path] = meta.replace_boxed(value, updated[path[-1]])
    return _replaced(variables, "batch_stats", unflatten_dict(flat))


def pool(
    apply_fn: Callable[..., Any], variables: Mapping[str, Any], batches: Any, **options: Any
) -> tuple[dict[str, tuple[BatchNorm, _calibrate.Pooled]], Any]:
    """Each layer that normalizes by its batch, unbound, and its moments over all batches.

    And the shapes of a batch.

    Args:
        apply_fn: as for `calibrate`.
        variables: as for `calibrate`.
        batches: as for `calibrate`.
        options: of `_calibrate.pool`.
    """
    stats = running_stats(variables)
    _check_apply_fn(apply_fn, variables)
    _calibrate.check_outside_jit(variables)
    shapes = {name: layer["mean"].shape for name, layer in stats.items()}
    layers: dict[str, BatchNorm] = {}
    called: set[str] = set()
    # The last name is new in each call, lest nn.jit finds its trace and no layer is met.
    mutable = [*changed_in_training(variables), f"call{next(_calls)}"]

    @jax.jit
    def step(variables: Mapping[str, Any], batch: Any) -> dict[str, jbn.Moments]:
        training: dict[str, BatchNorm] = {}
        own = "lambda v, batch, mutable: model.apply(v, batch[0], train=True, mutable=mutable)"
        note = functools.partial(_note_layer, training, called)
        with nn.intercept_methods(note), _calibrate.explained(batch, own):
            result = apply_fn(variables, batch, mutable=mutable)
        moments: dict[str, Any] = {
            _calibrate.join(path[:-1]): value
            for path, value in flatten_dict(_updated(result).get("batch_moments", {})).items()
        }
        # One whose statistics are not among the variables is of a model applied inside the model.
        training = {name: layer for name, layer in training.items() if name in stats}
        _check_layers(training, moments)
        for name, layer in training.items():
            _calibrate.check_moments(name, layer, moments[name], shapes[name])
        layers.update(training)
        return {name: moments[name] for name in training}

    if "batch_moments" in variables:  # of init, or of an earlier batch
        empty = jax.tree.map(jnp.zeros_like, variables["batch_moments"])
        variables = _replaced(variables, "batch_moments", empty)
    pooled, batch = _calibrate.pool(lambda b: step(variables, b), shapes, batches, **options)
    _calibrate.warn_silent(sorted(stats.keys() - called), stacklevel=3)
    return {name: (layers[name], pooled[name]) for name in layers if name in pooled}, batch


def changed_in_training(variables: Mapping[str, Any]) -> list[str]:
    """All collections that the model may change; of these changes only the moments are taken."""
    return sorted({*variables} - {"params"} | {"batch_stats", "batch_moments"})


def _replaced(variables: Mapping[str, Any], name: str, collection: Any) -> Mapping[str, Any]:
    """The variables with another collection of that name, frozen if they are."""
    if isinstance(variables, FrozenDict):
        return variables.copy({name: collection})
    return {**variables, name: collection}


def running_stats(variables: Any) -> dict[str, dict[str, Any]]:
    """The running statistics of each layer by its name."""
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        is_mapping = isinstance(variables, Mapping)
        given = ", ".join(variables) or "none" if is_mapping else _axes.describe(variables)
        raise ValueError(
            "variables must be the model's, with the collection batch_stats, as init returns them, "
            f"got {given}."
        )
    layers: dict[str, dict[str, Any]] = {}
    for path, value in flatten_dict(variables["batch_stats"]).items():
        layers.setdefault(_calibrate.join(path[:-1]), {})[path[-1]] = meta.unbox(value)
    layers = {name: values for name, values in layers.items() if {"mean", "var"} <= values.keys()}
    if not layers:
        raise ValueError(
            "variables['batch_stats'] has no layer with a mean and a var: the model has no batch "
            "norm."
        )
    return layers


def _check_apply_fn(apply_fn: Any, variables: Any) -> None:
    hint = (
        "it is called as apply_fn(variables, batch, mutable=[...]) and runs the model in training "
        "mode, such as functools.partial(model.apply, train=True)."
    )
    if isinstance(apply_fn, nn.Module) or not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function, got {type(apply_fn).__name__}: {hint}")
    try:
        inspect.signature(apply_fn).bind(variables, None, mutable=[])
    except TypeError as error:
        raise TypeError(f"apply_fn does not take its arguments ({error}): {hint}") from None
    except ValueError:  # no signature to be had
        pass


def _updated(result: Any) -> Mapping[str, Any]:
    """The collections that `apply` returns beside the output."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise TypeError(
            "apply_fn must return what model.apply(..., mutable=mutable) does, the output and the "
            f"updated collections, got {type(result).__name__}: does it pass mutable on?"
        )
    return result[1]


def _note_layer(
    training: dict[str, BatchNorm],
    called: set[str],
    next_fn: Any,
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Keeps each layer that is called in training mode: an interceptor of Flax's methods."""
    module, method = context.module, context.orig_method.func
    # Those of subclasses, which may take other arguments, call one of these.
    kind = {_CALL: BatchNorm, _FLAXS_CALL: nn.BatchNorm}.get(method)
    if kind is not None:
        call = inspect.signature(kind.__call__).bind(module, *args, **kwargs)
        by_running = call.arguments.get("use_running_average")
        by_running = module.use_running_average if by_running is None else by_running
        name = _calibrate.join(module.scope.path)
        if not by_running and kind is nn.BatchNorm:
            raise _calibrate.no_moments(name, "linen")
        if not by_running:
            training[name] = module.clone(parent=None)
        called.add(name)
    return next_fn(*args, **kwargs)


def _check_layers(training: Mapping[str, Any], moments: Mapping[str, Any]) -> None:
    """That there are layers in training mode, and that each gives its moments."""
    if not training:
        raise ValueError(
            "no layer of jbn.linen.BatchNorm normalizes by its batch: apply_fn must run the model "
            "in training mode, such as functools.partial(model.apply, train=True)."
        )
    for name in training.keys() - moments.keys():
        raise ValueError(
            f"the moments of {_calibrate.title(name)} do not reach the caller: apply_fn must pass "
            "on the mutable that it is given, and a transformation that the layer runs in must name"
            " the collection batch_moments beside batch_stats, such as nn.scan(..., "
            "variable_axes={'params': 0, 'batch_stats': 0, 'batch_moments': 0})."
        )
