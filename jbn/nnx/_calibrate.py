"""Population statistics of the batch norm layers of an NNX model."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

import jbn
from jbn import _axes, _calibrate
from jbn.nnx._batch_norm import BatchMoments, BatchNorm


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply_fn: Callable[[Any, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> None:
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

    Each layer of `jbn.nnx.BatchNorm` runs in training mode, whatever its attributes say, also with
    `update_running_average=False`; other layers, such as dropout, run as the model is set, by
    `train()` or `eval()`. The running statistics are updated in place, all else is as it was, also
    the state of random numbers: each batch is given the same. With a warning, a layer that is not
    called keeps its statistics, and so does a feature whose elements are all masked or not finite;
    a batch whose moments are not finite is left out. A variance is unbiased where the layer says
    so. The `count` of a layer with `momentum=None` becomes the number of batches, as if each had
    been one update.

    The forward pass is compiled once for each shape of batch, and may be sharded by that of the
    model and the batches. Interrupted, it leaves the model as it was.

    Args:
        model: with layers of batch norm.
        batches: any iterable of batches, pytrees of arrays as the model takes them. Taken one by
            one, once.
        apply_fn: `apply_fn(model, batch)` calls the model, by default `model(batch)`. Layers that
            are to keep their statistics are set so there: `model.backbone.eval()`.
        max_batches: the most to take, where `batches` are endless or more than needed.
        progress: whether to show a progress bar, if there is a terminal.

    Raises:
        TypeError: if `model` is no `nnx.Module`, `apply_fn` no function or `batches` not an
            iterable of batches.
        ValueError: if there is no batch, no layer of batch norm, none that normalizes by its
            batch, or one of `flax.nnx.BatchNorm`, which has no moments to give; if `max_batches`
            is less than 1.

    Example:
        >>> import jax.numpy as jnp, jbn.nnx
        >>> from flax import nnx
        >>> bn = jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> x = jnp.arange(6.0).reshape(6, 1)
        >>> jbn.nnx.calibrate(bn, [x[:4], x[4:]])
        >>> bn.mean[...].tolist()
        [2.5]
    """
    pooled, _ = pool(
        model,
        batches,
        apply_fn=apply_fn,
        max_batches=max_batches,
        progress=progress,
        description="Calibrating",
    )
    new = [
        (layer, _calibrate.new_stats(name, layer, running_stats(layer), moments, stacklevel=3))
        for name, (layer, moments) in pooled.items()
    ]
    for layer, values in new:
        for name, value in values.items():
            getattr(layer, name).set_value(value)


def pool(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply_fn: Callable[[Any, Any], Any] | None,
    **options: Any,
) -> tuple[dict[str, tuple[BatchNorm, _calibrate.Pooled]], Any]:
    """Each layer of the model that normalizes by its batch, and its moments over all batches.

    And the shapes of a batch.

    Args:
        model: as for `calibrate`, left as it is.
        batches: as for `calibrate`.
        apply_fn: as for `calibrate`.
        options: of `_calibrate.pool`.
    """
    layers = batch_norms(model)
    if apply_fn is not None and not callable(apply_fn):
        raise TypeError(
            "apply_fn must be a function that calls the model on a batch, such as "
            f"lambda model, batch: model(batch['image']), got {_axes.describe(apply_fn)}."
        )
    shapes = {name: layer.mean.shape for name, layer in layers.items()}
    training = nnx.view(model, only=BatchNorm, use_running_average=False)
    graphdef, state = nnx.split(training)
    _calibrate.check_outside_jit(state)

    def forward(model: Any, batch: Any) -> None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.List | nnx.Dict) and hasattr(module, "__captures__"):
                del module.__captures__  # a name that JAX can't sort among a list's numbers
        model(batch) if apply_fn is None else apply_fn(model, batch)

    silent: set[str] = set()

    @jax.jit
    def step(state: Any, batch: Any) -> dict[str, jbn.Moments]:
        copy = nnx.merge(graphdef, state)
        with _calibrate.explained(batch, "lambda model, batch: model(batch[0])"):
            _, captured = nnx.capture(forward, BatchMoments)(copy, batch)
        moments = {
            _calibrate.join(path[:-1]): variable.get_value()
            for path, variable in nnx.to_flat_state(captured)
        }
        if not moments:
            raise ValueError(
                "no layer of jbn.nnx.BatchNorm normalizes by its batch: apply_fn must call the "
                "model and leave its batch norm in training mode, and a transformation that names "
                "kinds of variables must name jbn.nnx.BatchMoments as well, such as "
                "nnx.StateAxes({jbn.nnx.BatchMoments: 0, ...})."
            )
        for name, value in moments.items():
            _calibrate.check_moments(name, layers[name], value, shapes[name])
        training = {
            name for name, layer in batch_norms(copy).items() if not layer.use_running_average
        }
        silent.update(training - moments.keys())
        return moments

    pooled, batch = _calibrate.pool(lambda b: step(state, b), shapes, batches, **options)
    _calibrate.warn_silent(sorted(silent - pooled.keys()), stacklevel=3)
    return {name: (layers[name], pooled[name]) for name in layers if name in pooled}, batch


def running_stats(layer: BatchNorm) -> dict[str, Any]:
    """The running statistics as arrays."""
    stats = {"mean": layer.mean, "var": layer.var, "count": layer.count}
    return {name: variable[...] for name, variable in stats.items() if variable is not None}


def batch_norms(model: Any) -> dict[str, BatchNorm]:
    """The layers of batch norm by their names."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {_axes.describe(model)}.")
    modules = {_calibrate.join(path): module for path, module in nnx.iter_modules(model)}
    for name, module in modules.items():
        if isinstance(module, nnx.BatchNorm):
            raise _calibrate.no_moments(name, "nnx")
    layers = {name: module for name, module in modules.items() if isinstance(module, BatchNorm)}
    if not layers:
        raise ValueError(f"model, {type(model).__name__}, has no layer of jbn.nnx.BatchNorm.")
    return layers
