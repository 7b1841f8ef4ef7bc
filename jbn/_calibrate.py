"""Population statistics from the batches of a loader: what Linen and NNX share."""

import contextlib
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

import jbn
from jbn import _axes


class Layer(Protocol):
    """The fields of a layer that matter here."""

    axis_name: Any
    unbiased: bool


class Pooled(NamedTuple):
    """What the batches of one pass say about the features of a layer, on the host.

    Attributes:
        mean: of all batches together [C], float64 (complex128 for complex `x`).
        var: the biased variance of all [C], float64.
        count: the number of elements of all, or sum of their weights [C], float64.
        batches: how many had elements of the feature and finite moments [C].
        left_out: how many had moments that are not finite [C]: they are not in the above.
        smallest: the least count of a batch [C].
        dtype: of the mean as the layer computes it.
    """

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray
    batches: np.ndarray
    left_out: np.ndarray
    smallest: np.ndarray
    dtype: np.dtype


def check_batches(batches: Any, max_batches: Any) -> tuple[Iterable[Any], int | None]:
    """The batches of one pass, at most `max_batches`, and how many they are if that is known."""
    single = isinstance(batches, str | bytes | Mapping) or hasattr(batches, "shape")
    if single or not isinstance(batches, Iterable):
        given = type(batches).__name__ if isinstance(batches, Mapping) else _axes.describe(batches)
        raise TypeError(
            "batches must be an iterable of batches such as a list, a generator or a loader, got "
            f"{given}{': for a single batch pass [batch]' if single else ''}."
        )
    total = operator.length_hint(batches) or None
    if max_batches is None:
        return batches, total
    try:
        most = operator.index(max_batches)
    except TypeError:
        most = 0
    if most < 1:
        raise ValueError(
            "max_batches must be a whole number of at least 1, or None for all, got "
            f"{_axes.describe(max_batches)}."
        )
    return itertools.islice(batches, most), most if total is None else min(total, most)


def check_outside_jit(arrays: Any) -> None:
    """Statistics are pooled on the host, which has no place inside a program."""
    _axes.check_variables(arrays)
    if any(map(_axes.is_traced, jax.tree.leaves(arrays))):
        raise TypeError(
            "the model's variables are traced: call it outside jax.jit and other transformations; "
            "the forward pass is compiled in it."
        )


def no_moments(name: str, module: str) -> ValueError:
    """The error for Flax's own layer, of linen or nnx."""
    return ValueError(
        f"{title(name)} is flax.{module}.BatchNorm, which does not give the moments of its batch: "
        f"import BatchNorm from jbn.{module}, which takes the same arguments and variables."
    )


def check_moments(name: str, layer: Layer, moments: jbn.Moments, shape: tuple[int, ...]) -> None:
    """Whether moments can be those of statistics of this shape.

    A layer whose statistics are shared along a mapped axis, as under a scan over time, may give
    moments of each of its elements, [K, C]. Where `axis_name` has already pooled these, each would
    be counted K times.
    """
    given = moments.mean.shape
    extra = len(given) - len(shape)
    if extra < 0 or given[extra:] != shape:
        raise ValueError(
            f"{title(name)} has running statistics of shape {shape} but moments of shape {given}: "
            "map both alike."
        )
    if extra and layer.axis_name is not None:
        raise ValueError(
            f"{title(name)} pools its batch over axis_name = {layer.axis_name!r}, but each element"
            f" of a mapped axis gives moments, of shape {given} where its running statistics have "
            f"{shape}: share the moments as the running statistics are."
        )


@contextlib.contextmanager
def explained(batch: Any, apply_fn: str) -> Iterator[None]:
    """Adds to an error of the model's what calibrating may have to do with it.

    Args:
        batch: what the model was called on.
        apply_fn: one that takes the first of a pair.
    """
    try:
        yield
    except Exception as error:
        if "branch outputs must have the same" in str(error):
            error.add_note(
                "Calibrating, each layer of batch norm hands out its moments, which one branch "
                "alone cannot: let apply_fn call the model so that batch norm runs in all branches "
                "or in none, such as by jnp.where."
            )
        elif type(error).__name__ == "ModifyScopeVariableError":  # of flax.errors
            error.add_note("apply_fn must pass on the mutable that it is given to model.apply.")
        elif not hasattr(batch, "shape"):
            error.add_note(
                f"The batch came as a {type(batch).__name__}: where the model takes a part of it "
                f"alone, apply_fn has to take that out, such as {apply_fn}."
            )
        raise


def warn_silent(names: Iterable[str], stacklevel: int) -> None:
    """Names the layers that gave no moments although nothing says that they should not."""
    for name in names:
        warnings.warn(
            f"{title(name)} keeps its running statistics: it was not called, or called to use them,"
            " or the moments of its batch did not reach the caller.",
            stacklevel=stacklevel + 1,
        )


def pool(
    step: Callable[[Any], dict[str, jbn.Moments]],
    shapes: Mapping[str, tuple[int, ...]],
    batches: Any,
    *,
    max_batches: int | None,
    progress: bool,
    description: str,
) -> tuple[dict[str, Pooled], Any]:
    """The moments of each layer over all batches, in one pass over them, and a batch's shapes.

    The host merges the moments of one batch, O(C) numbers, while the device computes the next. It
    has float64, in which counts beyond 2^24 are exact and a small variance between large means
    is not lost.

    Args:
        step: the moments of a batch by name of the layer, compiled.
        shapes: of the statistics, by name of the layer.
        batches: any iterable of pytrees of arrays; no more are taken than needed.
        max_batches: the most to take.
        progress: whether to show a bar, if there is a terminal.
        description: the words before the bar.

    Raises:
        TypeError, ValueError: if `batches` are empty or no iterable of batches.
    """
    batches, total = check_batches(batches, max_batches)
    pools: dict[str, Pooled] = {}

    def merge(moments: dict[str, jbn.Moments]) -> None:
        for name, new in moments.items():
            pools[name] = _merged(pools.get(name), new, shapes[name])

    pending: dict[str, jbn.Moments] = {}
    seen, shapes_of_batch = 0, None
    with _bar(progress) as bar:
        for batch in bar.track(batches, total=total, description=description):
            _check_batch(seen, batch)
            if not seen:
                shapes_of_batch = jax.tree.map(_shape_of, batch)
            moments = jax.tree.map(whole, step(batch))
            jax.tree.map(lambda leaf: leaf.copy_to_host_async(), moments)
            merge(pending)
            pending, seen = moments, seen + 1
        merge(pending)
    if not seen:
        raise ValueError(
            "batches is empty: pass at least one batch; a generator that was used up must be made "
            "anew."
        )
    return pools, shapes_of_batch


def new_stats(
    name: str, layer: Layer, stats: Mapping[str, Any], pooled: Pooled, stacklevel: int
) -> dict[str, Any]:
    """The running mean, var and, if there is one, count that equal the pooled moments.

    They keep their dtypes and places. A feature keeps its statistics, with a warning, if no batch
    had elements of it and finite moments, or if these overflow in the stored dtype.
    """
    taken, var = pooled.count > 0, pooled.var
    if layer.unbiased:
        taken = pooled.count >= 2
        var = var * (pooled.count / np.where(taken, pooled.count - 1, 1))
    mean_dtype = stats["mean"].dtype
    if np.iscomplexobj(pooled.mean) and not jnp.issubdtype(mean_dtype, jnp.complexfloating):
        mean_dtype = _axes.compute_dtype(mean_dtype, pooled.dtype)  # as update_running_stats does
    with np.errstate(over="ignore"):
        new = {"mean": pooled.mean.astype(mean_dtype), "var": var.astype(stats["var"].dtype)}
    taken &= np.isfinite(new["mean"]) & np.isfinite(new["var"])
    if "count" in stats:
        new["count"] = pooled.batches.astype(stats["count"].dtype)
    _warn(name, taken, pooled.left_out, stacklevel + 1)
    if not taken.all():
        old = {
            name: np.asarray(whole(stats[name])).astype(value.dtype) for name, value in new.items()
        }
        new = {name: np.where(taken, value, old[name]) for name, value in new.items()}
    return {name: _placed(value, stats[name]) for name, value in new.items()}


def join(path: tuple[Any, ...]) -> str:
    """The name of a layer, from its path in the model."""
    return "/".join(map(str, path))


def title(name: str) -> str:
    """The layer in a message; one that is the whole model has no name."""
    return f"layer {name!r}" if name else "the layer"


def whole(array: Any) -> Any:
    """The array, copied to all devices if its parts lie on those of other processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return array
    mesh = array.sharding.mesh  # type: ignore[attr-defined] # no other sharding spans processes
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def _bar(progress: bool) -> Progress:
    """Progress on the standard error, of a terminal or notebook alone."""
    console = Console(stderr=True)
    shown = progress and (console.is_terminal or console.is_jupyter)
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    return Progress(*columns, console=console, disable=not shown)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of an array."""
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=getattr(leaf, "sharding", None))


def _check_batch(index: int, batch: Any) -> None:
    """A batch is a pytree of what JAX takes as an array."""
    for path, leaf in jax.tree.leaves_with_path(batch):
        try:
            jax.typeof(leaf)
        except TypeError:
            where = f"batch {index}{' at ' if path else ''}{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{where} must be an array of numbers, JAX's or NumPy's, got "
                f"{_axes.describe(leaf)}: convert it, or leave it out of the batch."
            ) from None


def _merged(earlier: Pooled | None, batch: jbn.Moments, shape: tuple[int, ...]) -> Pooled:
    """The pool with a batch's moments [C], or [K, C] of K parts of it."""
    mean, var, n = (np.asarray(leaf).reshape(-1, *shape) for leaf in batch)
    finite = np.isfinite(mean) & np.isfinite(var) & np.isfinite(n)
    used = finite & (n > 0)
    parts = (np.where(used, v, 0).astype(_wide(v.dtype)) for v in (mean, var, n))
    new = Pooled(*_together(*parts), used.sum(0), (~finite).sum(0), n.min(0), mean.dtype)
    if earlier is None:
        return new
    return Pooled(
        *_together(*(np.stack(both) for both in zip(earlier[:3], new[:3], strict=True))),
        earlier.batches + new.batches,
        earlier.left_out + new.left_out,
        np.minimum(earlier.smallest, new.smallest),
        np.result_type(earlier.dtype, new.dtype),
    )


def _wide(dtype: np.dtype) -> np.dtype:
    return np.result_type(dtype, np.float64)


def _together(
    mean: np.ndarray, var: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and count [C] of K sets together, from those of each [K, C].

    Chan, Golub and LeVeque 1983, eq. 2.1, for any number of sets.
    """
    n = count.sum(0)
    weights = count / np.where(n > 0, n, 1)
    center = (weights * mean).sum(0)
    return center, (weights * (var + abs(mean - center) ** 2)).sum(0), n


def _placed(value: np.ndarray, like: Any) -> Any:
    """The values as an array of JAX where `like` is, unless that is JAX's to choose."""
    placed = isinstance(like, jax.Array) and like.committed
    return jax.device_put(value, like.sharding if placed else None)


def _warn(name: str, taken: np.ndarray, left_out: np.ndarray, stacklevel: int) -> None:
    """Says which statistics are kept, and what was left out of the others."""
    told = []
    if not taken.all():
        told.append(
            f"{(~taken).sum()} of {taken.size} features keep their running statistics: no batch "
            "had enough elements of them, and moments that are finite in the stored dtype"
        )
    if left_out.any():
        told.append(
            f"up to {left_out.max()} batches were left out for {(left_out > 0).sum()} of "
            f"{taken.size} features, whose moments in them were not finite"
        )
    if told:
        warnings.warn(f"{title(name)}: {'; '.join(told)}.", stacklevel=stacklevel + 1)
