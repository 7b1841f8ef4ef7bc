"""Both layers inside Flax's transforms, against the same written as a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

NORM = functools.partial(jbn.linen.BatchNorm, use_running_average=False, momentum=0.9)
STATS = ["batch_stats"]


def close(a, b, rtol=1e-6):
    """Parameters and statistics are float32."""
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) * 2 + 1


class Block(nn.Module):
    """A layer and its norm, as the body of a scan too."""

    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: tuple | None = None

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1])(x)
        return NORM(axis_name=self.axis_name)(x), None


def moved(updated):
    """Whether every running variance has left its start."""
    leaves = jax.tree.leaves_with_path(updated)
    variances = [leaf for path, leaf in leaves if path[-1].key == "var"]
    return len(variances) > 0 and all(bool((v != 1).all()) for v in variances)


def test_linen_scan_over_layers():
    x, stacked = draw((6, 3)), {"params": 0, "batch_stats": 0}
    layers = nn.scan(Block, variable_axes=stacked, split_rngs={"params": True}, length=4)()
    variables = layers.init(jax.random.key(0), x)
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (4, 3)

    def scanned(params, x):
        (y, _), updated = layers.apply({**variables, "params": params}, x, mutable=STATS)
        return jnp.sum(y**3), (y, updated)

    def looped(params, x):
        y, updates = x, []
        for i in range(4):
            layer = jax.tree.map(lambda v, i=i: v[i], {**variables, "params": params})
            (y, _), updated = Block().apply(layer, y, mutable=STATS)
            updates.append(updated)
        return jnp.sum(y**3), (y, jax.tree.map(lambda *v: jnp.stack(v), *updates))

    actual, expected = (
        jax.jit(jax.grad(f, (0, 1), has_aux=True))(variables["params"], x)
        for f in (scanned, looped)
    )
    close(actual, expected)
    assert moved(actual[1][1])


def test_linen_vmap_ensemble():
    """Each member its own parameters and statistics."""
    x = draw((5, 6, 3))
    axes = {"params": 0, "batch_stats": 0}
    ensemble = nn.vmap(Block, variable_axes=axes, split_rngs={"params": True})()
    variables = ensemble.init(jax.random.key(0), x)
    (y, _), updated = ensemble.apply(variables, x, mutable=STATS)
    for i in range(5):
        member = jax.tree.map(lambda v, i=i: v[i], variables)
        (expected, _), stats = Block().apply(member, x[i], mutable=STATS)
        close((y[i], jax.tree.map(lambda v, i=i: v[i], updated)), (expected, stats))
    assert moved(updated)


@pytest.mark.parametrize("nested", [False, True], ids=["one axis", "nested"])
def test_linen_vmap_over_the_batch(nested):
    """flax#3319: shared statistics under nested `nn.vmap` need every axis name in the layer."""
    x = draw((4, 5, 6, 3)) if nested else draw((4, 6, 3))
    shared = {"params": None, "batch_stats": None}
    share = functools.partial(nn.vmap, variable_axes=shared, split_rngs={"params": False})
    if nested:
        model = share(share(Block, axis_name="inner"), axis_name="outer")(("outer", "inner"))
    else:
        model = share(Block, axis_name="batch")("batch")
    variables = model.init(jax.random.key(0), x)
    (y, _), updated = model.apply(variables, x, mutable=STATS)
    (expected, _), stats = Block().apply(variables, x.reshape(-1, 3), mutable=STATS)
    close((y.reshape(-1, 3), updated), (expected, stats))
    assert moved(updated)

    with pytest.raises(ValueError, match="out_axes"):  # each element its own statistics
        share(Block, axis_name="batch")().apply(variables, x, mutable=STATS)


class Step(nn.Module):
    """A recurrent cell."""

    train: bool

    @nn.compact
    def __call__(self, carry, x):
        bn = jbn.linen.BatchNorm(use_running_average=not self.train, momentum=0.9)
        carry = jnp.tanh(bn(nn.Dense(3)(x) + carry))
        return carry, carry


class Steps(nn.Module):
    """The cell over time: statistics are carried in training, broadcast at inference."""

    train: bool

    @nn.compact
    def __call__(self, carry, xs):
        step = Step(self.train)
        if self.is_initializing():  # what a scan carries must exist before it
            return step(carry, xs[0])
        scan = nn.scan(
            lambda step, carry, x: step(carry, x),
            variable_carry="batch_stats" if self.train else False,
            variable_broadcast="params" if self.train else ["params", "batch_stats"],
        )
        return scan(step, carry, xs)


def loop(variables, carry, xs, train):
    """`Steps`, written out."""
    ys, stats = [], variables["batch_stats"]["Step_0"]
    for x in xs:
        (carry, y), updated = Step(train).apply(
            {"params": variables["params"]["Step_0"], "batch_stats": stats},
            carry,
            x,
            mutable=STATS,
        )
        ys.append(y)
        stats = updated["batch_stats"]
    return (carry, jnp.stack(ys)), {"batch_stats": {"Step_0": stats}}


def test_linen_scan_over_time_inside_a_module():
    """flax#2052: `variable_carry` inside a module finds nothing to carry at `init`."""
    carry, xs = jnp.zeros((6, 3)), draw((7, 6, 2))
    model = Steps(train=True)
    variables = model.init(jax.random.key(0), carry, xs)

    def f(params, run):
        outputs, updated = run({**variables, "params": params})
        return jnp.sum(outputs[1] ** 3), (outputs, updated)

    actual, expected = (
        jax.grad(functools.partial(f, run=run), has_aux=True)(variables["params"])
        for run in (
            lambda v: model.apply(v, carry, xs, mutable=STATS),
            lambda v: loop(v, carry, xs, True),
        )
    )
    close(actual, expected)
    assert moved(actual[1][1])


def test_linen_scan_over_time_at_inference():
    """flax#3602: without mutable statistics nothing is carried, so they are broadcast."""
    carry, xs = jnp.zeros((6, 3)), draw((7, 6, 2))
    variables = Steps(train=True).init(jax.random.key(0), carry, xs)
    _, updated = Steps(train=True).apply(variables, carry, xs, mutable=STATS)
    variables = {**variables, **updated}
    outputs = Steps(train=False).apply(variables, carry, xs)
    expected, unchanged = loop(variables, carry, xs, False)
    close(outputs, expected)
    close(unchanged, updated, 0)


def test_linen_statistics_in_lax_scan():
    """A training loop in one program: the statistics are part of its carry, dtypes and all."""
    xs, layer = draw((5, 6, 3)), NORM()
    variables = layer.init(jax.random.key(0), xs[0])

    def step(stats, x):
        y, updated = layer.apply({**variables, "batch_stats": stats}, x, mutable=STATS)
        return updated["batch_stats"], y

    stats, ys = jax.lax.scan(step, variables["batch_stats"], xs)
    expected = variables["batch_stats"]
    for x, y in zip(xs, ys, strict=True):
        expected, expected_y = step(expected, x)
        close(y, expected_y)
    close(stats, expected)
    assert moved(stats)


@pytest.mark.parametrize("policy", [None, jbn.save_batch_norm_inputs], ids=["", "policy"])
def test_linen_remat_and_jit(policy):
    """The forward pass is computed again, the statistics are updated once."""
    x = draw((6, 3))
    variables = Block().init(jax.random.key(0), x)

    def grads(cls):
        model = cls()

        def loss(params, x):
            (y, _), updated = model.apply({**variables, "params": params}, x, mutable=STATS)
            return jnp.sum(y**3), updated

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    expected = grads(Block)
    for cls in (nn.remat(Block, policy=policy), nn.jit(Block)):
        close(grads(cls), expected, 1e-5)
    assert moved(expected[1])


class NNXBlock(nnx.Module):
    """A layer and its norm."""

    def __init__(self, rngs, **options):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(3, momentum=0.9, rngs=rngs, **options)

    def __call__(self, x):
        return self.norm(self.linear(x))


def stacked_blocks(n):
    @nnx.split_rngs(splits=n)
    @nnx.vmap
    def make(rngs):
        return NNXBlock(rngs)

    return make(nnx.Rngs(0))


def member(model, i):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda v: v[i], state))


def test_nnx_scan_over_layers():
    x, model = draw((6, 3)), stacked_blocks(4)
    members = [member(model, i) for i in range(4)]

    def scanned(model, x):
        layers = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return jnp.sum(layers(model, x) ** 3)

    def looped(members, x):
        for block in members:
            x = block(x)
        return jnp.sum(x**3)

    value, (grads, dx) = nnx.jit(nnx.value_and_grad(scanned, argnums=(0, 1)))(model, x)
    expected, (expected_grads, expected_dx) = nnx.value_and_grad(looped, argnums=(0, 1))(members, x)
    close((value, dx), (expected, expected_dx))
    for i in range(4):
        close(jax.tree.map(lambda v, i=i: v[i], grads), expected_grads[i], 1e-5)
        close(nnx.state(member(model, i)), nnx.state(members[i]))
    assert (model.norm.var[...] != 1).all()


def test_nnx_vmap_ensemble():
    x, model = draw((5, 6, 3)), stacked_blocks(5)
    members = [member(model, i) for i in range(5)]
    y = nnx.vmap(lambda block, x: block(x))(model, x)
    for i, block in enumerate(members):
        close(y[i], block(x[i]))
        close(nnx.state(member(model, i)), nnx.state(block))
    assert (model.norm.var[...] != 1).all()


def test_nnx_vmap_over_the_batch():
    x = draw((4, 6, 3))
    model, expected = (NNXBlock(nnx.Rngs(0), axis_name=name) for name in ("batch", None))
    over_batch = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="batch")
    for _ in range(2):
        close(over_batch(model, x).reshape(-1, 3), expected(x.reshape(-1, 3)))
        close(nnx.state(model), nnx.state(expected))
    assert (model.norm.var[...] != 1).all()

    alone = NNXBlock(nnx.Rngs(0))
    each = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
    with pytest.raises(ValueError, match="out_axes"):  # each element its own statistics
        each(alone, x)
    without_update = nnx.view(alone, update_running_average=False)
    close(each(without_update, x)[1], without_update(x[1]))


def test_nnx_remat_and_jit():
    x = draw((6, 3))

    def grads(wrap):
        model = NNXBlock(nnx.Rngs(0))
        forward = wrap(lambda model, x: model(x))
        f = nnx.jit(nnx.grad(lambda m, x: jnp.sum(forward(m, x) ** 3), argnums=(0, 1)))
        return f(model, x), nnx.state(model)

    expected = grads(lambda f: f)
    policy = functools.partial(nnx.remat, policy=jbn.save_batch_norm_inputs)
    for wrap in (nnx.remat, policy, nnx.jit):
        close(grads(wrap), expected, 1e-5)
    assert (expected[1]["norm"]["var"][...] != 1).all()


def test_nnx_split_and_merge_in_lax_scan():
    xs, model = draw((5, 6, 3)), NNXBlock(nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def step(stats, x):
        merged = nnx.merge(graphdef, params, stats, copy=True)
        y = merged(x)
        return nnx.state(merged, nnx.BatchStat), y

    stats, ys = jax.lax.scan(step, stats, xs)
    for x, y in zip(xs, ys, strict=True):
        close(y, model(x))
    close(stats, nnx.state(model, nnx.BatchStat))


def test_nnx_eval_shape():
    """Of the model's making, and of its call (flax#4734)."""
    model = nnx.eval_shape(lambda: NNXBlock(nnx.Rngs(0), use_running_average=True))
    assert model.norm.mean.shape == (3,)
    model = NNXBlock(nnx.Rngs(0))
    before = nnx.clone(nnx.state(model))
    x = jax.ShapeDtypeStruct((6, 3), jnp.float32)
    y = nnx.eval_shape(lambda model, x: model(x), model, x)
    assert (y.shape, y.dtype) == ((6, 3), jnp.float32)
    close(nnx.state(model), before, 0)
