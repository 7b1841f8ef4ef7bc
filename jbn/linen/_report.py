"""What the batch norm layers of a trained Linen model look like inside."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax.core import meta
from flax.traverse_util import flatten_dict

from jbn import _calibrate, _report
from jbn.linen._calibrate import changed_in_training, pool, running_stats
from jbn.linen._fold import analyse, by_layer


def report(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    progress: bool = True,
) -> _report.Report:
    """Compares the running statistics of each batch norm layer with those of some batches.

    For each layer that normalizes by its batch, of the pooled moments of all batches:

        drift = |running mean - mean| / sqrt(var + epsilon)
        ratio = (running var + epsilon) / (var + epsilon)

    and how many features vary by little against epsilon, how many scales are dead or exploding, how
    few elements a feature has in a batch, whether the layer before has a bias that batch norm takes
    away again with the mean, and what of this is worth a look, in words. Nothing is changed;
    `calibrate` mends running statistics that are off.

    Args:
        apply_fn: runs the model in training mode, as for `calibrate`.
        variables: of the model, with `batch_stats`.
        batches: any iterable of batches, taken one by one, once.
        max_batches: the most to take.
        progress: whether to show a progress bar, if there is a terminal.

    Returns:
        A report: `print` shows it as a table, `.rows` and `.to_dict()` hold the numbers, `.values`
        those of each feature, and `.plot(path)` draws them, for which matplotlib is needed.

    Raises:
        TypeError, ValueError: for bad input, as `calibrate`.

    Example:
        >>> import functools, jax, jax.numpy as jnp, jbn.linen
        >>> bn = jbn.linen.BatchNorm()
        >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 2
        >>> variables = bn.init(jax.random.key(0), x, use_running_average=False)
        >>> train = functools.partial(bn.apply, use_running_average=False)
        >>> report = jbn.linen.report(train, variables, [x[:32], x[32:]])
        >>> report.rows[0].findings
        ('running statistics are off: calibrate',)
    """
    layers, batch = pool(
        apply_fn,
        variables,
        batches,
        max_batches=max_batches,
        progress=progress,
        description="Looking inside",
    )
    scales = {
        _calibrate.join(path[:-1]): meta.unbox(value)
        for path, value in flatten_dict(variables.get("params", {})).items()
        if path[-1] == "scale"
    }
    mutable = changed_in_training(variables)
    norms = analyse(lambda v, b: apply_fn(v, b, mutable=mutable)[0], variables, batch)
    arrays = {by_layer(path): meta.unbox(v) for path, v in flatten_dict(variables).items()}
    biases = _report.useless_biases(norms, arrays)
    return _report.make(layers, running_stats(variables), scales, biases)
