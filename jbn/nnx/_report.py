"""What the batch norm layers of a trained NNX model look like inside."""

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx

from jbn import _report
from jbn.nnx._batch_norm import BatchNorm
from jbn.nnx._calibrate import pool, running_stats
from jbn.nnx._fold import analyse, arrays


def report(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    apply_fn: Callable[[Any, Any], Any] | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> _report.Report:
    """Compares the running statistics of each batch norm layer with those of some batches.

    For each layer, run in training mode, of the pooled moments of all batches:

        drift = |running mean - mean| / sqrt(var + epsilon)
        ratio = (running var + epsilon) / (var + epsilon)

    and how many features vary by little against epsilon, how many scales are dead or exploding, how
    few elements a feature has in a batch, whether the layer before has a bias that batch norm takes
    away again with the mean, and what of this is worth a look, in words. Nothing is changed;
    `calibrate` mends running statistics that are off.

    Args:
        model: with layers of batch norm.
        batches: any iterable of batches, taken one by one, once.
        apply_fn: calls the model on a batch, as for `calibrate`.
        max_batches: the most to take.
        progress: whether to show a progress bar, if there is a terminal.

    Returns:
        A report: `print` shows it as a table, `.rows` and `.to_dict()` hold the numbers, `.values`
        those of each feature, and `.plot(path)` draws them, for which matplotlib is needed.

    Raises:
        TypeError, ValueError: for bad input, as `calibrate`.

    Example:
        >>> import jax, jbn.nnx
        >>> from flax import nnx
        >>> bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 2
        >>> report = jbn.nnx.report(bn, [x[:32], x[32:]])
        >>> report.rows[0].findings
        ('running statistics are off: calibrate',)
    """
    layers, batch = pool(
        model,
        batches,
        apply_fn=apply_fn,
        max_batches=max_batches,
        progress=progress,
        description="Looking inside",
    )
    stats = {name: running_stats(layer) for name, (layer, _) in layers.items()}
    scales = {
        name: layer.scale[...] for name, (layer, _) in layers.items() if layer.scale is not None
    }
    training = nnx.view(model, only=BatchNorm, use_running_average=False)
    norms = analyse(training, batch, method=apply_fn or (lambda model, batch: model(batch)))
    biases = _report.useless_biases(norms, dict(arrays(model)))
    return _report.make(layers, stats, scales, biases)
