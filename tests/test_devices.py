"""A batch that is split over devices is one batch, under every way that JAX has to split it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jbn
from benchmarks import hlo
from tests import cases, oracle

pytestmark = pytest.mark.quick_compile

P = PartitionSpec
# Padded on the right, by more from shard to shard: of 8 devices the last three hold padding alone.
MASK = np.arange(16)[:, None, None, None] < 10 - np.arange(4).reshape(1, 1, 4, 1)
CASE = cases.Case(
    "devices", (16, 4, 4, 2), mask=MASK.shape, residual=True, activation=jnp.tanh, epsilon=0.1
)
UNMASKED = cases.Case("unmasked", CASE.shape, residual=True, activation=jnp.tanh, epsilon=0.1)
NAMES = ("x", "scale", "bias", "residual")


def draw(masked):
    args = cases.draw(CASE if masked else UNMASKED)
    return {**args, "mask": MASK} if masked else args


def close(actual, expected, rtol=1e-12):
    def check(a, b):
        scale = max(1.0, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)

    jax.tree.map(check, actual, expected)


@functools.cache
def expected(masked):
    """y, moments and gradients of the whole batch, by the oracle."""
    case, args = (CASE if masked else UNMASKED), draw(masked)
    y, *moments = oracle.batch_norm(case, args)
    grads = oracle.gradients(case, args)
    total = {k: sum(grads[output][k] for output in ("y", "mean", "var")) for k in NAMES}
    return y, jbn.Moments(*moments), total


def norm(x, scale, bias, residual, mask, **options):
    return jbn.batch_norm(
        x,
        scale,
        bias,
        residual=residual,
        mask=mask,
        activation=jnp.tanh,
        epsilon=0.1,
        **options,
    )


def weighted(y, moments, dy, dmean, dvar, share=1.0):
    """A scalar whose gradient has the given cotangents, those of the moments by this share."""
    return jnp.sum(y * dy) + share * jnp.sum(moments.mean * dmean + moments.var * dvar)


def mesh_of(sizes, names, kind=AxisType.Auto):
    return jax.make_mesh(
        sizes,
        names,
        axis_types=(kind,) * len(sizes),
        devices=jax.devices()[: int(np.prod(sizes))],
    )


def mapped(kind, f, devices):
    """f of the device's own part of the first argument and of all of the second."""
    if kind == "vmap":
        return jax.vmap(f, (0, None), axis_name="d", axis_size=devices)
    if kind == "pmap":
        return jax.pmap(f, axis_name="d", in_axes=(0, None), devices=jax.devices()[:devices])

    def local(parts, whole):
        out = f(jax.tree.map(lambda v: v[0], parts), whole)
        return jax.tree.map(lambda v: v[None], out)

    return jax.shard_map(
        local,
        mesh=mesh_of((devices,), ("d",)),
        in_specs=(P("d"), P()),
        out_specs=P("d"),
        check_vma=kind == "shard_map, checked",
    )


MAPPED = ("vmap", "pmap", "shard_map, checked", "shard_map, unchecked")


@pytest.mark.parametrize("kind", MAPPED)
def test_without_a_name_each_device_has_a_batch_of_its_own(kind):
    """In which what is shared, epsilon too, gets the sum of all devices' gradients."""
    args = draw(masked=False)
    x, dy = (args[k].reshape(4, -1, *args[k].shape[1:]) for k in ("x", "dy"))

    def local(parts, whole):
        x, dy = parts
        scale, bias, epsilon = whole
        return jnp.sum(jbn.batch_norm(x, scale, bias, epsilon=epsilon)[0] * dy)

    def definition(x, scale, bias, epsilon):
        mean = x.mean((1, 2, 3), keepdims=True)
        var = jnp.square(x - mean).mean((1, 2, 3), keepdims=True)
        return jnp.sum((scale * (x - mean) / jnp.sqrt(var + epsilon) + bias) * dy)

    def loss(x, *whole):
        return jnp.sum(mapped(kind, local, 4)((x, dy), whole))

    primals = x, args["scale"], args["bias"], jnp.asarray(0.1)
    actual = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*primals)
    with jax.numpy_rank_promotion("allow"):
        close(actual, jax.grad(definition, (0, 1, 2, 3))(*primals))


@pytest.mark.parametrize("axis_name", [None, "d"])
@pytest.mark.parametrize("kind", ["vmap", "shard_map, checked"])
def test_epsilon_may_be_mapped_where_x_is_not(kind, axis_name):
    """And leaves the moments as they are: known to be the same on all devices."""
    x, epsilons = draw(masked=False)["x"], np.array([0.0, 0.1, 0.2, 0.3])

    def local(epsilon, x):
        return jbn.batch_norm(x, epsilon=epsilon, axis_name=axis_name)

    if kind == "vmap":
        f = jax.vmap(local, (0, None), (0, None), axis_name="d")
    else:
        f = jax.shard_map(
            lambda epsilon, x: local(epsilon[0], x),
            mesh=mesh_of((4,), ("d",)),
            in_specs=(P("d"), P()),
            out_specs=(P("d"), P()),
        )
    y, moments = f(epsilons, x)
    for epsilon, part in zip(epsilons, y.reshape(4, *x.shape), strict=True):
        expected_y, expected_moments = jbn.batch_norm(x, epsilon=epsilon)
        close(part, expected_y)
    close(moments[:2], expected_moments[:2])


@pytest.mark.parametrize("kind", MAPPED)
@pytest.mark.parametrize(
    ("devices", "masked"), [(1, True), (2, True), (4, True), (8, True), (8, False)]
)
def test_named_axis(kind, devices, masked):
    """Values, moments and all gradients; each device returns its own copy of what is shared."""
    args = draw(masked)
    checked = kind == "shard_map, checked"

    def local(parts, whole):
        def loss(x, scale, bias, residual):
            y, moments = norm(x, scale, bias, residual, parts["mask"], axis_name="d")
            # Checked, the moments are known to be replicated, and count once.
            value = jnp.sum(y * parts["dy"])
            value = jax.lax.psum(value, "d") if checked else value
            share = 1.0 if checked else 1 / devices
            return value + weighted(0.0, moments, 0.0, *whole[2:], share), (y, moments)

        diff = parts["x"], *whole[:2], parts["residual"]
        grads, (y, moments) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*diff)
        if not checked:  # there the sum is JAX's
            grads = (grads[0], *jax.lax.psum(grads[1:3], "d"), grads[3])
        return y, moments, grads

    parts = {
        k: None if args[k] is None else args[k].reshape(devices, -1, *args[k].shape[1:])
        for k in ("x", "residual", "dy", "mask")
    }
    whole = tuple(args[k] for k in ("scale", "bias", "dmean", "dvar"))
    y, moments, grads = jax.jit(mapped(kind, local, devices))(parts, whole)
    expected_y, expected_moments, expected_grads = expected(masked)
    close(y.reshape(CASE.shape), expected_y)
    for name, grad in zip(NAMES, grads, strict=True):
        if name in ("x", "residual"):
            close(grad.reshape(CASE.shape), expected_grads[name])
        else:
            close(grad, np.broadcast_to(expected_grads[name], grad.shape))
    for moment, value in zip(moments, expected_moments, strict=True):
        close(moment, np.broadcast_to(value, moment.shape))


SPECS = {
    "data": P("d"),
    "data over both axes": P(("d", "s")),
    "data and space": P("d", "s"),
    "space": P(None, "d", "s"),
    "channels": P(None, None, None, "s"),
    "data and channels": P("d", None, None, "s"),
}


@functools.partial(jax.jit, static_argnames="custom_vjp")
def program(args, custom_vjp=True):
    def loss(x, scale, bias, residual):
        out = norm(x, scale, bias, residual, args["mask"], custom_vjp=custom_vjp)
        return weighted(*out, args["dy"], args["dmean"], args["dvar"]), out

    grads, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*(args[k] for k in NAMES))
    return *out, dict(zip(NAMES, grads, strict=True))


def shard(args, mesh, spec, rest=None):
    """x, and what has its shape, split; the rest by another spec, or left as it is."""
    split = ("x", "residual", "dy")
    specs = {k: spec if k in split else rest for k, v in args.items() if v is not None}
    return args | {
        k: jax.device_put(args[k], jax.NamedSharding(mesh, s))
        for k, s in specs.items()
        if s is not None
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_sharded_arrays_under_jit(kind, name):
    """With no argument at all; `jax.make_mesh` makes Explicit axes unless told otherwise."""
    for masked, rest in ((True, P()), (False, None)):
        args = shard(draw(masked), mesh_of((4, 2), ("d", "s"), kind), SPECS[name], rest)
        y, moments, grads = program(args)
        close((y, moments, grads), expected(masked))
        assert y.sharding.is_equivalent_to(args["x"].sharding, y.ndim)


@pytest.mark.parametrize("split", ["shard_map", "Auto", "Explicit"])
def test_no_valid_element_on_any_device(split):
    """Moments of nothing, and y = activation(bias + residual) with the gradients of that."""
    args = {**draw(True), "mask": np.zeros_like(MASK)}
    x, scale, bias, residual = (args[k] for k in NAMES)

    def f(x, residual, mask, dy, **options):
        def loss(x, residual):
            y, moments = norm(x, scale, bias, residual, mask, **options)
            return jnp.sum(y * dy) + jnp.sum(moments.mean + moments.var), (y, moments)

        grads, out = jax.grad(loss, (0, 1), has_aux=True)(x, residual)
        return *out, grads

    parts = (x, residual, args["mask"], args["dy"])
    if split == "shard_map":
        f = jax.shard_map(
            functools.partial(f, axis_name="d"),
            mesh=mesh_of((8,), ("d",)),
            in_specs=P("d"),
            out_specs=(P("d"), P(), P("d")),
        )
    else:
        sharding = jax.NamedSharding(mesh_of((8,), ("d",), AxisType[split]), P("d"))
        parts = jax.device_put(parts, sharding)
    y, moments, (dx, dresidual) = jax.jit(f)(*parts)
    expected_y = np.tanh(bias + residual)
    close(y, expected_y)
    for moment in moments:
        np.testing.assert_array_equal(moment, 0)
    np.testing.assert_array_equal(dx, 0)
    close(dresidual, args["dy"] * (1 - expected_y**2))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2)], ids=str)
def test_fewer_devices_under_jit(kind, sizes):
    args = shard(draw(True), mesh_of(sizes, ("d", "s"), kind), P("d", "s"))
    close(program(args), expected(True))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_jax_differentiates_the_plain_definition(kind):
    args = shard(draw(True), mesh_of((4, 2), ("d", "s"), kind), P("d", "s"))
    close(program(args, custom_vjp=False), expected(True))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_an_ensemble_split_over_its_members(kind):
    """The parameters are those of all members, which are mapped along a split axis."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 4, 8, 6))
    scale, bias = rng.normal(size=(2, 6))

    def loss(x, scale, bias, dy):
        return jnp.sum(jax.vmap(lambda x: jbn.batch_norm(x, scale, bias)[0])(x) * dy)

    f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    mesh = mesh_of((4, 2), ("d", "s"), kind)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P("d", "s"))
        actual = f(jax.device_put(x, sharding), scale, bias, jax.device_put(dy, sharding))
    close(actual, f(x, scale, bias, dy))


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("spec", [P("a"), P("b"), P("b", "a"), P("a", None, None, "b")], ids=str)
def test_meshes_that_are_no_powers_of_two(sizes, spec):
    """However the devices are laid out, O(C) numbers are exchanged, and not x."""
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 6, 2, 6))
    sharding = jax.NamedSharding(mesh_of(sizes, ("a", "b")), spec)
    f = jax.jit(jax.value_and_grad(lambda x, dy: jnp.sum(jbn.batch_norm(x)[0] * dy)))
    compiled = f.lower(*jax.device_put((x, dy), sharding)).compile()
    found = hlo.collectives(compiled)
    assert {c.op for c in found} == {"all-gather", "all-reduce"}
    assert max(c.numbers for c in found) <= 3 * x.shape[-1]
    close(compiled(*jax.device_put((x, dy), sharding)), f(x, dy))


def test_second_derivative_in_weights_shared_by_split_features():
    x = np.random.default_rng(0).normal(size=(8, 2, 4))
    weights = np.random.default_rng(1).random((8, 2, 1))

    def loss(x, weights):
        y, moments = jbn.batch_norm(x, mask=weights)
        return jnp.sum(y**3) + jnp.sum(moments.count * moments.mean)

    def squares(x, weights):
        return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, weights))

    f = jax.jit(jax.grad(squares, (0, 1)))
    mesh = mesh_of((4, 2), ("d", "s"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        actual = f(*jax.device_put((x, weights), (P("d", None, "s"), P("d"))))
    close(actual, f(x, weights))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_a_mask_split_apart(kind, weights):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 8, 4, 6))
    mask = rng.random((8, 1, 1)) if weights else np.arange(8).reshape(8, 1, 1) < 5

    def loss(x, mask, dy):
        return jnp.sum(jbn.batch_norm(x, mask=mask)[0] * dy)

    f = jax.jit(jax.value_and_grad(loss, (0, 1) if weights else 0))
    mesh = mesh_of((4, 2), ("d", "s"), kind)
    with jax.set_mesh(mesh):
        split, apart = jax.NamedSharding(mesh, P("d")), jax.NamedSharding(mesh, P("s"))
        actual = f(jax.device_put(x, split), jax.device_put(mask, apart), jax.device_put(dy, split))
    close(actual, f(x, mask, dy))


def test_a_mesh_of_both_kinds():
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("d", "s"), axis_types=kinds)
    close(program(shard(draw(True), mesh, P("d", "s"))), expected(True))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_under_set_mesh(kind):
    """Also for arrays that are not split, of which the compiler knows no mesh."""
    args = draw(True)
    mesh = mesh_of((4, 2), ("d", "s"), kind)
    with jax.set_mesh(mesh):
        close(program(args), expected(True))
        close(program(shard(args, mesh, P("d", "s"))), expected(True))


def test_axes_that_do_not_divide_among_the_devices():
    """Inside jit, XLA splits 13 rows over 4 devices, and pads."""

    def cut(args):
        return {k: v[:13] if np.ndim(v) == 4 else v for k, v in args.items()}

    sliced = jax.jit(lambda args: program(cut(args)))
    for masked in (True, False):
        args = draw(masked)
        sharded = shard(args, mesh_of((4, 2), ("d", "s")), P("d", "s"))
        close(sliced(sharded), program(cut(args)))


@pytest.mark.parametrize("shape", [(4, 4, 6), (2, 8, 6), (8, 2, 2, 3)], ids=str)
def test_a_batch_reshaped_inside_jit(shape):
    """XLA may then split an axis by a part of a mesh axis."""
    x = np.random.default_rng(0).normal(size=(16, 6))

    def f(x):
        y, pull, moments = jax.vjp(
            lambda x: jbn.batch_norm(x.reshape(shape).swapaxes(0, 1)), x, has_aux=True
        )
        return y, moments, pull(jnp.sin(y))

    for sizes, spec in (((8,), P("d")), ((4, 2), P(("s", "d")))):
        mesh = mesh_of(sizes, ("d", "s")[: len(sizes)])
        close(jax.jit(f)(jax.device_put(x, jax.NamedSharding(mesh, spec))), f(x))


@pytest.mark.parametrize("spec", [P(None, "d", "s"), P("s", "d")], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_an_ensemble_of_sharded_batches(kind, spec):
    x = np.stack([draw(False)["x"], draw(False)["dy"]])

    def f(x):
        y, pull, moments = jax.vjp(lambda x: jbn.batch_norm(x), x, has_aux=True)
        return y, moments, pull(y)

    mesh = mesh_of((4, 2), ("d", "s"), kind)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, spec))
    close(jax.jit(jax.vmap(f))(sharded), jax.vmap(f)(x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_second_derivatives_of_sharded_arrays(kind):
    """Inside a scan too, where JAX keeps fewer of the rules for derivatives."""
    args = draw(True)

    def layer(x, _):
        y, moments = norm(x, *(args[k] for k in ("scale", "bias", "residual", "mask")))
        return y, weighted(jnp.sin(y), moments, *(args[k] for k in ("dy", "dmean", "dvar")))

    def loss(x):
        y, first = layer(x, None)
        return first + jnp.sum(jax.lax.scan(layer, y, None, length=2)[1])

    twice = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(loss)(x)))))
    x = jax.device_put(args["x"], jax.NamedSharding(mesh_of((4,), ("d",), kind), P("d")))
    close(twice(x), twice(args["x"]))


@pytest.mark.parametrize("kind", MAPPED)
def test_second_derivatives_over_a_named_axis(kind):
    """Of the variance, those of the weights of a mask too."""
    x, weights = np.random.default_rng(0).uniform(1, 2, (2, 8, 3))
    checked = kind == "shard_map, checked"

    def var(x, weights, **options):
        moments = jbn.moments(x, mask=weights, **options)
        return jnp.sum(jnp.sin(moments.mean) * moments.var + moments.count**2)

    def local(parts, whole):
        def of(x, weights):
            value = var(x, weights, axis_name="d")
            return value if checked else value / 4

        def first(x, weights):
            value = sum(jnp.sum(jnp.sin(g)) for g in jax.grad(of, (0, 1))(x, weights))
            return jax.lax.psum(value, "d") if checked else value

        return jax.grad(first, (0, 1))(*parts)

    def whole(x, weights):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(var, (0, 1))(x, weights))

    parts = x.reshape(4, 2, 3), weights.reshape(4, 2, 3)
    grads = jax.jit(mapped(kind, local, 4))(parts, 0.0)
    close([g.reshape(8, 3) for g in grads], [*jax.grad(whole, (0, 1))(x, weights)], 1e-11)


@pytest.mark.parametrize("kind", MAPPED)
def test_forward_mode_over_a_named_axis(kind):
    x, t = np.random.default_rng(0).normal(size=(2, 8, 3))

    def tangent(x, t, **options):
        f = functools.partial(jbn.batch_norm, custom_vjp=False, **options)
        return jax.jvp(lambda x: f(x)[0], (x,), (t,))[1]

    parts = x.reshape(4, 2, 3), t.reshape(4, 2, 3)
    local = jax.jit(mapped(kind, lambda parts, _: tangent(*parts, axis_name="d"), 4))
    close(local(parts, 0.0).reshape(8, 3), tangent(x, t))


@pytest.mark.parametrize("kind", MAPPED)
def test_groups_of_devices(kind):
    """Each group is a batch of its own, here of devices that do not lie side by side."""
    x, dy = np.random.default_rng(2).normal(size=(2, 8, 5, 3))
    mask = np.arange(5)[:, None] < np.array([5, 4, 3, 0, 2, 1, 0, 0])[:, None, None]
    groups = [[0, 5], [7, 3], [1, 2], [6, 4]]

    def f(x, mask, dy, **options):
        def loss(x):
            y, moments = jbn.batch_norm(x, mask=mask, epsilon=0.1, **options)
            share = 0.5 if options else 1.0
            return jnp.sum(y * dy) + share * jnp.sum(moments.mean**3 + moments.var**2), (
                y,
                moments,
            )

        grad, out = jax.grad(loss, has_aux=True)(x)
        return grad, *out

    def local(parts, _):
        return f(*parts, axis_name="d", axis_index_groups=groups)

    out = jax.jit(mapped(kind, local, 8))((x, mask, dy), 0.0)
    for group in groups:
        rows = (np.concatenate([v[i] for i in group]) for v in (x, mask, dy))
        dx, y, moments = f(*rows)
        for k, i in enumerate(group):
            part = slice(5 * k, 5 * k + 5)
            close(jax.tree.map(lambda v, i=i: v[i], out), (dx[part], y[part], moments))


@pytest.mark.parametrize("groups", [None, [[0, 5], [7, 3], [1, 2], [6, 4]]], ids=("all", "groups"))
@pytest.mark.parametrize("spec", [P(("a", "b")), P("a", "b"), P("a", None, "b")], ids=str)
def test_vmap_along_an_axis_that_an_explicit_mesh_splits(spec, groups):
    """The statistics stay where their batch is, and split as the features are."""
    x = np.random.default_rng(0).normal(size=(8, 6, 4))
    options = {"axis_name": "d", "axis_index_groups": groups}

    def loss(x):
        y, moments = jbn.batch_norm(x, epsilon=0.1, **options)
        return jnp.sum(y**3), (y, moments)

    mapped = jax.vmap(jax.value_and_grad(loss, has_aux=True), axis_name="d")

    def total(x):
        return jnp.sum(mapped(x)[0][0])

    functions = (
        jax.vmap(lambda x: jbn.moments(x, **options), axis_name="d"),
        mapped,
        # Second derivatives of all batches together, as JAX differentiates the mapped program.
        jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(total)(x)))),
    )
    expected = jax.jit(lambda x: [f(x) for f in functions])(x)
    mesh = mesh_of((4, 2), ("a", "b"), AxisType.Explicit)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, spec))
        moments = jax.jit(functions[0])(split)
        close(moments, expected[0])
        assert jax.typeof(moments.mean).sharding.spec == P(spec[0], *(spec[2:] or [None]))
        try:
            jax.vmap(jax.jit(lambda x: jax.lax.psum(x, "d")), axis_name="d")(jnp.ones(8))
        except ValueError:
            pytest.skip("this JAX has no sum over a mapped axis on Explicit meshes, nor gradients")
        close(jax.jit(functions[1])(split), expected[1])
        close(jax.jit(functions[2])(split), expected[2], 1e-10)


def nested(f):
    return jax.vmap(jax.vmap(f, axis_name="s"), axis_name="d")


def over_both(f):
    """Both axes are of devices."""
    mesh = mesh_of((4, 2), ("d", "s"))
    return jax.shard_map(
        lambda x: jax.tree.map(lambda v: v[None, None], f(x[0, 0])),
        mesh=mesh,
        in_specs=P("d", "s"),
        out_specs=P("d", "s"),
    )


def over_one(f):
    """One axis is of devices, one of vmap: in JAX not with the replication check."""
    mesh = mesh_of((4,), ("d",))
    return jax.shard_map(
        lambda x: jax.tree.map(lambda v: v[None], jax.vmap(f, axis_name="s")(x[0])),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=False,
    )


@pytest.mark.parametrize("mapping", [nested, over_both, over_one])
def test_two_named_axes(mapping):
    x = np.random.default_rng(3).normal(size=(4, 2, 5, 3))

    def f(x, **options):
        return jbn.batch_norm(x, activation=jnp.tanh, **options)

    y, moments = jax.jit(mapping(functools.partial(f, axis_name=("d", "s"))))(x)
    expected_y, expected_moments = f(x.reshape(40, 3))
    close(y.reshape(40, 3), expected_y)
    for i, k in itertools.product(range(4), range(2)):
        close(jax.tree.map(lambda v, i=i, k=k: v[i, k], moments), expected_moments)


def test_moments_of_a_mapped_axis_are_replicated():
    """So that a training step under shard_map may return running statistics as replicated."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)))
    for mask in (None, np.arange(8)[:, None] < 5):
        moments = jax.shard_map(
            lambda x, mask: jbn.moments(x, mask=mask, axis_name="d"),
            mesh=mesh_of((4,), ("d",)),
            in_specs=(P("d"), None if mask is None else P("d")),
            out_specs=P(),
        )(x, mask)
        close(moments, jbn.moments(x, mask=mask))


def test_closed_over_slope_under_shard_map():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(8, 3)))

    def total(x, slope, **options):
        y, _ = jbn.batch_norm(x, activation=lambda z: jax.nn.leaky_relu(z, slope), **options)
        return jnp.sum(y**2)

    f = jax.shard_map(
        lambda x, slope: jax.lax.psum(total(x, slope, axis_name="d"), "d"),
        mesh=mesh_of((4,), ("d",)),
        in_specs=(P("d"), P()),
        out_specs=P(),
    )
    args = (x, jnp.float64(0.3))
    close(jax.grad(f, (0, 1))(*args), jax.jit(jax.grad(total, (0, 1)))(*args))


@pytest.mark.parametrize(
    ("name", "spec"), [("d", P()), ("d", P("s")), (("d", "s"), P("d")), (("d", "s"), P())], ids=str
)
def test_a_batch_that_is_not_split_over_every_named_axis(name, spec):
    """Every device along the others holds it again, and the moments stay the same."""
    x = np.random.default_rng(0).normal(size=(8, 3))

    def f(x, **options):
        y, moments = jbn.batch_norm(x, **options)
        return jnp.sum(jnp.sin(y)), moments.mean, moments.var

    def local(x):
        loss, *_ = f(x, axis_name=name)
        varying = tuple(jax.typeof(loss).manual_axis_type.varying)
        # Only the axes that split x have other rows, by which the loss adds up.
        axes = tuple(a for a in varying if a in spec)
        loss = jax.lax.psum(loss, axes) if axes else loss
        rest = tuple(a for a in varying if a not in axes)
        return jax.lax.pmean(loss, rest) if rest else loss

    split = "s" in spec and name == "d"  # then each half along s is a batch of its own
    f_mapped = jax.shard_map(local, mesh=mesh_of((4, 2), ("d", "s")), in_specs=spec, out_specs=P())
    value, grad = jax.value_and_grad(f_mapped)(x)
    alone = jax.jit(jax.value_and_grad(lambda x: f(x)[0]))
    values, grads = zip(*map(alone, [x[:4], x[4:]] if split else [x]), strict=True)
    close(value, sum(values))
    close(grad, np.concatenate(grads))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("split", ["shard_map", "Auto", "Explicit"])
def test_accuracy_does_not_depend_on_the_split(split, devices):
    x = np.random.default_rng(0).normal(3000, 0.01, (4096, 4)).astype("float32")
    wide = x.astype("float64")
    exact = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    if split == "shard_map":
        f = jax.shard_map(
            functools.partial(jbn.batch_norm, axis_name="d"),
            mesh=mesh_of((devices,), ("d",)),
            in_specs=P("d"),
            out_specs=(P("d"), P()),
        )
        y, moments = jax.jit(f)(x)
    else:
        mesh = mesh_of((devices,), ("d",), AxisType[split])
        y, moments = jax.jit(jbn.batch_norm)(jax.device_put(x, jax.NamedSharding(mesh, P("d"))))
    np.testing.assert_allclose(moments.var, wide.var(0), rtol=1e-6)
    np.testing.assert_allclose(y, exact, rtol=0, atol=2e-6)


def test_a_program_for_many_devices_is_exported():
    """Over Explicit axes; those that the compiler finds cannot be written to a file by JAX."""
    args = shard(draw(False), mesh_of((4, 2), ("d", "s"), AxisType.Explicit), P("d", "s"))
    exported = jax.export.export(jax.jit(jbn.batch_norm))(args["x"])
    assert exported.nr_devices == 8
    close(jax.jit(exported.call)(args["x"]), jbn.batch_norm(draw(False)["x"]))


def test_a_symbolic_batch_under_set_mesh():
    (n,) = jax.export.symbolic_shape("n")
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(jbn.batch_norm(x)[0])))
    with jax.set_mesh(mesh_of((8,), ("d",))):
        exported = jax.export.export(jax.jit(grad))(jax.ShapeDtypeStruct((n, 6), np.float64))
    assert exported.nr_devices == 8


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_no_channels(kind):
    mesh = mesh_of((8,), ("d",), kind)
    x = jax.device_put(np.ones((8, 0)), jax.NamedSharding(mesh, P("d")))
    assert jax.jit(jbn.moments)(x).mean.shape == (0,)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_residual_split_apart_from_x(kind):
    args = draw(True)
    mesh = mesh_of((4, 2), ("d", "s"), kind)
    for spec in (P(), P(None, "d")):
        sharded = shard(args, mesh, P("d", "s"))
        sharded["residual"] = jax.device_put(args["residual"], jax.NamedSharding(mesh, spec))
        close(program(sharded), expected(True))


BAD_GROUPS = {
    "not all": [[0, 1], [2, 3]],
    "unequal": [[0, 1, 2], [3, 4], [5, 6, 7]],
    "twice": [[0, 1, 2, 3], [3, 4, 5, 6]],
    "too large": [[0, 1, 2, 3], [4, 5, 6, 8]],
    "none": [],
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_groups_that_do_not_partition_the_axis(name):
    f = functools.partial(jbn.moments, axis_name="d", axis_index_groups=BAD_GROUPS[name])
    message = "axis_index_groups must hold each of the 8 indices of axis 'd' once, in groups of one"
    for mapping in (jax.vmap, jax.pmap):
        with pytest.raises(ValueError, match=message):
            mapping(f, axis_name="d")(np.ones((8, 2, 3)))


@pytest.mark.parametrize("groups", [4, [0, 1], [[0.5, 1], [2, 3]]], ids=str)
def test_groups_that_are_not_lists_of_indices(groups):
    f = functools.partial(jbn.moments, axis_name="d", axis_index_groups=groups)
    with pytest.raises(TypeError, match="axis_index_groups must be lists of indices such as"):
        jax.vmap(f, axis_name="d")(np.ones((8, 2, 3)))
