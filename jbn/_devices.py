"""A batch that is split over devices: each computes what it holds, then one exchange.

The devices are the indices of named axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`), or those that
hold the parts of a sharded array under `jax.jit`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jbn import _axes, _lowering
from jbn._axes import Axes, Batch, device_axes

Arrays = TypeVar("Arrays", bound=Sequence[jax.Array])
# Statistics of one device's part of x, merged over the batch it is told of.
Local = Callable[[Axes, Batch, jax.Array, jax.Array | None], Any]


def gather(values: Arrays, names: Sequence[Any], groups: Any) -> Arrays:
    """Stacks feature arrays of all devices along a new first axis, in one collective.

    Inside `jax.shard_map` with its replication check the result counts as replicated.
    """
    name = names[0] if len(names) == 1 else tuple(names)

    def collect(rows: jax.Array) -> jax.Array:
        # One axis, as vmap takes one at once; several that `device_axes` does not know are of
        # devices in a custom partitioning.
        if name not in device_axes() and len(names) == 1:
            return _gather_mapped(rows, name, groups)
        if groups is None:
            to = "invarying" if _varies(rows, names) else "varying"
            return lax.all_gather(rows, name, to=to)
        return lax.all_gather(rows, name, axis_index_groups=groups)

    return _as_rows(lambda rows: jnp.moveaxis(collect(rows), 1, 0), values)


def _gather_mapped(rows: jax.Array, name: Any, groups: Any) -> jax.Array:
    """`lax.all_gather` along an axis of `jax.vmap`, which has no groups of its own."""
    mesh, spec = jax.typeof(rows).sharding.mesh, jax.typeof(rows).sharding.spec
    stacked = NamedSharding(mesh, PartitionSpec(None, *spec))
    split = any(spec)  # the features, over Explicit axes, which JAX mistakes once gathered
    if split:
        rows = jax.sharding.reshard(rows, NamedSharding(mesh, PartitionSpec()))
    gathered = lax.all_gather(rows, name)
    if groups is None:
        return jax.sharding.reshard(gathered, stacked) if split else gathered
    members = np.empty((len(groups) * len(groups[0]), len(groups[0])), np.int32)
    for group in groups:
        members[list(group)] = group
    own = jnp.asarray(members)[lax.axis_index(name)]
    # Said, as JAX would not choose where an Explicit axis, unseen from here, splits the mapped one.
    return gathered.at[own].get(out_sharding=stacked)


def total(values: Arrays, batch: Batch) -> Arrays:
    """Sums feature arrays over the devices of a batch, in one collective."""
    groups = batch.axis_index_groups
    for names in batch.exchanges:
        # With groups there is no psum inside shard_map with its replication check. Under vmap there
        # is none with groups, and without them JAX mistypes it where an Explicit mesh is at hand.
        if names[0] in device_axes() and (groups is None or not _varies(values[0], names)):
            add = functools.partial(lax.psum, axis_name=names, axis_index_groups=groups)
            values = _as_rows(add, values)
        else:
            values = _like(values, [jnp.sum(v, 0) for v in gather(values, names, groups)])
    return values


def _varies(v: jax.Array, names: Sequence[Any]) -> bool:
    """Whether `v` is known to differ along all of these axes."""
    return set(names) <= jax.typeof(v).manual_axis_type.varying


def _as_rows(f: Callable[[jax.Array], jax.Array], values: Arrays) -> Arrays:
    """Applies f to the values as the rows of one real array, of which it keeps the first axis."""
    parts = ([v.real, v.imag] if jnp.iscomplexobj(v) else [v] for v in values)
    rows = iter(f(jnp.stack(list(itertools.chain(*parts)))))
    return _like(
        values,
        [
            lax.complex(next(rows), next(rows)) if jnp.iscomplexobj(v) else next(rows)
            for v in values
        ],
    )


def _like(values: Arrays, new: list[jax.Array]) -> Arrays:
    """The new values in the structure of the old."""
    return jax.tree.unflatten(jax.tree.structure(values), new)


# Under jit with sharded arrays there is no name to give. XLA then splits every operation by itself:
# the shift has to be shared before the sums about it can begin, and the few rows that it is the
# mean of travel between the devices, five collectives or more. Told how to split the computation
# as a whole, it takes one: each device takes the statistics of what it holds, about a shift of its
# own, and all are merged.
#
# A primitive holds what JAX is told, with its own rules for `vmap` and for derivatives, as there
# are none for custom partitioning. (`jax.custom_jvp` would not do: JAX drops its rule inside a
# scan that is differentiated twice.)


def over_shards(
    local: Local, axes: Axes, x: jax.Array, mask: jax.Array | None
) -> Sequence[jax.Array]:
    """`local` of what each device holds of `x`, merged over those that share the features."""
    known = all(isinstance(n, int) for n in x.shape)  # not so in a program that is exported
    if device_axes() or not known or x.size == 0:  # inside a mapping x is a part already
        return local(axes, Batch(), x, mask)
    operands = (x,) if mask is None else (x, mask)
    jaxpr = jax.make_jaxpr(functools.partial(_told, local, axes))(*operands)
    return over_shards_p.bind(*operands, local=local, axes=axes, jaxpr=jaxpr)


over_shards_p = Primitive("over_shards")
over_shards_p.multiple_results = True
over_shards_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
over_shards_p.def_impl(lambda *operands, jaxpr, **_: jaxpr_as_fun(jaxpr)(*operands))


def _lower(ctx, *operands, jaxpr, **_):
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


def _differentiate(primals, tangents, *, local, axes, jaxpr):
    """By the plain formulas. The first derivatives of batch norm have rules of their own."""
    out = over_shards_p.bind(*primals, local=local, axes=axes, jaxpr=jaxpr)
    n = sum(jnp.issubdtype(p.dtype, jnp.inexact) for p in primals)  # x, and a mask of weights

    def plain(*varied: jax.Array) -> list[jax.Array]:
        x, mask, *_ = (*varied, *primals[n:], None)
        return [*local(axes, Batch(), x, mask)]

    tangents = [ad.instantiate_zeros(t) for t in tangents[:n]]
    return out, jax.jvp(plain, list(primals[:n]), tangents)[1]


def _batch(operands, mapped, *, local, axes, jaxpr):
    """The mapped axis is one more feature axis, before all others."""
    del jaxpr
    size = next(v.shape[i] for v, i in zip(operands, mapped, strict=True) if i is not None)
    x, *mask = (
        v[None] if i is None else jnp.moveaxis(v, i, 0)
        for v, i in zip(operands, mapped, strict=True)
    )
    x = jnp.broadcast_to(x, (size, *x.shape[1:]))
    axes = Axes((0, *(i + 1 for i in axes.feature)), tuple(i + 1 for i in axes.reduced))
    out = over_shards(local, axes, x, *(mask or [None]))
    return out, [0] * len(out)


mlir.register_lowering(over_shards_p, _lower)
ad.primitive_jvps[over_shards_p] = _differentiate
batching.primitive_batchers[over_shards_p] = _batch


def _told(
    local: Local, axes: Axes, x: jax.Array, mask: jax.Array | None = None
) -> Sequence[jax.Array]:
    """`local`, with what is known here or by the compiler of how `x` is split."""
    if _names(axes.reduced, jax.typeof(x).sharding.spec):
        return [*_by_type(local, axes, x, mask)]
    partitioned = functools.partial(_by_compiler, local, axes)
    whole = functools.partial(local, axes, Batch())
    # JAX has no custom partitioning for TPUs (jax issue 38196).
    return [*_lowering.by_platform(x, mask, cpu=partitioned, gpu=partitioned, default=whole)]


def _by_type(local: Local, axes: Axes, x: jax.Array, mask: jax.Array | None) -> Any:
    """Over the Explicit mesh axes that the type of `x` names."""
    sharding = jax.typeof(x).sharding
    mesh, spec = sharding.mesh, sharding.spec
    batch = Batch((_names(axes.reduced, spec),))
    operands, specs = [x], [spec]
    if mask is not None:
        specs.append(_axes.mask_spec(spec, x.shape, mask.shape))
        operands.append(_axes.shard_mask(mask, x))
    return jax.shard_map(
        lambda x, mask=None: local(axes, batch, x, mask),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=_feature_spec(axes, spec),
        axis_names=set(_names(range(x.ndim), spec)),
    )(*operands)


@custom_partitioning
def _by_compiler(local: Local, axes: Axes, x: jax.Array, mask: jax.Array | None) -> Any:
    """Over the mesh axes that XLA splits `x` by."""
    return local(axes, Batch(), x, mask)


_by_compiler.static_argnums = (0, 1)


def _partition(local, axes, mesh, args, results):
    x, mask = args
    mesh, spec = _split(x)
    names = _names(axes.reduced, spec)
    batch = Batch((names,) if names else ())

    def lower(x: jax.Array, mask: jax.Array | None) -> Any:
        # Not in the mesh of `jax.set_mesh`: these are one device's own.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return local(axes, batch, x, mask)

    specs = (spec, None if mask is None else _axes.mask_spec(spec, x.shape, mask.shape))
    return (
        mesh,
        lower,
        _infer(local, axes, mesh, args, results),
        tuple(None if s is None else NamedSharding(mesh, s) for s in specs),
    )


def _infer(local, axes, mesh, args, results):
    mesh, spec = _split(args[0])
    return jax.tree.map(lambda _: NamedSharding(mesh, _feature_spec(axes, spec)), results)


def _split(x: jax.ShapeDtypeStruct) -> tuple[Mesh, PartitionSpec]:
    """How XLA splits `x`, over a mesh whose axes are as small as can be.

    XLA may split an array by a part of a mesh axis, after a reshape for one, so the axes are prime.
    What it would pad, with anything, and what no order of the axes explains is not split.
    """
    sharding: Any = x.sharding
    devices = np.array(sharding._device_assignment)
    hlo = sharding._to_xla_hlo_sharding(x.ndim)
    tiles = np.zeros((1,) * x.ndim, int)
    if hlo.is_tiled():
        tiles = np.reshape(hlo.tile_assignment_devices(), hlo.tile_assignment_dimensions())
    whole = tiles.shape[: x.ndim].count(1)
    tried = []
    for sizes in _factorings(devices.size):  # 3 x 2 devices are not 2 x 3
        spec = [_explained(tiles, i, n, sizes) for i, n in enumerate(x.shape)]
        tried.append((sizes, spec))
        if spec.count(None) == whole:
            break
    sizes, spec = min(tried, key=lambda found: found[1].count(None))
    names = [f"d{i}" for i in range(len(sizes))]
    return Mesh(devices.reshape(sizes), names), PartitionSpec(*spec)


def _explained(tiles: Any, axis: int, n: int, sizes: Sequence[int]) -> tuple[str, ...] | None:
    """The axes of a mesh of these sizes by which an axis of n elements is split evenly."""
    along, found, step = np.moveaxis(tiles, axis, 0).reshape(tiles.shape[axis], -1)[:, 0], [], 1
    strides = {math.prod(sizes[i + 1 :]): i for i in range(len(sizes))}
    while step < len(along) and (k := strides.get(along[step] - along[0])) is not None:
        found.insert(0, f"d{k}")
        step *= sizes[k]
    return tuple(found) or None if step == len(along) and n % step == 0 else None


def _factorings(n: int) -> Iterator[list[int]]:
    """The prime factors of n in every order."""
    if n == 1:
        yield []
    for k in range(2, n + 1):
        if n % k == 0 and all(k % i for i in range(2, k)):
            yield from ([k, *rest] for rest in _factorings(n // k))


def _sharding_rule(local, axes, mesh, args, results):
    """Which axes go together, in the notation of Shardy: those of the features."""
    del local, mesh
    x, *mask = (tuple(map(int, a.shape)) for a in args)
    names = [f"x{i}" for i in range(len(x))]
    operands = [names]
    for shape in mask:
        operands.append(
            [n if k == x[i] else f"m{i}" for i, (n, k) in enumerate(zip(names, shape, strict=True))]
        )
    result = " ".join(names[i] for i in axes.feature)
    return ", ".join(map(" ".join, operands)) + " -> " + ", ".join([result] * len(results))


_by_compiler.def_partition(_partition, _infer, sharding_rule=_sharding_rule, decode_shardings=False)


def _tuple(names: Any) -> tuple[Any, ...]:
    """The mesh axes of one axis of an array, as a PartitionSpec has them."""
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _names(of: Sequence[int], spec: Any) -> tuple[Any, ...]:
    """The mesh axes that these axes of an array are split over."""
    return tuple(itertools.chain(*(_tuple(spec[i]) for i in of)))


def _feature_spec(axes: Axes, spec: Any) -> PartitionSpec:
    """How the feature arrays are split."""
    return PartitionSpec(*(spec[i] for i in axes.feature))
