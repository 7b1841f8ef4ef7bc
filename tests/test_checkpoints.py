"""Orbax keeps every bit of a model, in Flax's layers and jbn's, and on whichever devices."""

import functools
import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]


class LinenNetwork(nn.Module):
    norm: type
    momentum: float | None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(self.norm(not train, momentum=self.momentum)(x))
        x = nn.Dense(4)(x.mean((1, 2)))
        return self.norm(not train, momentum=self.momentum, param_dtype=jnp.bfloat16)(x)


class NnxNetwork(nnx.Module):
    def __init__(self, norm, momentum, rngs):
        norm = functools.partial(norm, momentum=momentum, rngs=rngs)
        self.conv = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm(8)
        self.dense = nnx.Linear(8, 4, rngs=rngs)
        self.norm2 = norm(4, param_dtype=jnp.bfloat16)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv(x)))
        return self.norm2(self.dense(x.mean((1, 2))))


class Linen:
    """A network as a tree of arrays, to be saved, and what can be done with it."""

    layers = SimpleNamespace(flax=nn.BatchNorm, jbn=jbn.linen.BatchNorm)

    def __init__(self, norm, momentum):
        network = LinenNetwork(getattr(self.layers, norm), momentum)

        @jax.jit
        def step(variables, x):
            def loss(params):
                variables_now = {**variables, "params": params}
                y, updated = network.apply(variables_now, x, train=True, mutable=["batch_stats"])
                return jnp.sin(y).sum(), updated

            grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
            return {"params": descend(variables["params"], grads), **updated}

        self.init = lambda: network.init(jax.random.key(0), batches(1)[0], train=False)
        self.step = step
        self.infer = jax.jit(functools.partial(network.apply, train=False))

    def abstract(self):
        return jax.eval_shape(self.init)

    def train(self, variables, steps):
        for x in steps:
            variables = self.step(variables, x)
        return variables

    def counts(self, variables):
        return [stats["count"] for stats in variables["batch_stats"].values()]


class Nnx:
    """The same of an NNX module."""

    layers = SimpleNamespace(flax=nnx.BatchNorm, jbn=jbn.nnx.BatchNorm)

    def __init__(self, norm, momentum):
        norm = getattr(self.layers, norm)

        @nnx.jit
        def step(model, x):
            grads = nnx.grad(lambda model: jnp.sin(model(x)).sum())(model)
            nnx.update(model, descend(nnx.state(model, nnx.Param), grads))

        self.make = lambda: NnxNetwork(norm, momentum, nnx.Rngs(0))
        self.step = step
        self.apply = nnx.jit(lambda model, x: nnx.view(model, use_running_average=True)(x))

    def init(self):
        return nnx.state(self.make())

    def abstract(self):
        return nnx.state(nnx.eval_shape(self.make))

    def loaded(self, state):
        model = self.make()
        nnx.update(model, state)
        return model

    def train(self, state, steps):
        model = self.loaded(state)
        for x in steps:
            self.step(model, x)
        return nnx.state(model)

    def infer(self, state, x):
        return self.apply(self.loaded(state), x)

    def counts(self, state):
        return [state[name]["count"][...] for name in ("norm1", "norm2")]


BOTH = pytest.mark.parametrize("api", [Linen, Nnx], ids=["linen", "nnx"])


@functools.cache
def network(api, norm, momentum=0.9):
    return api(norm, momentum)


@functools.cache
def trained(api, norm, momentum=0.9):
    """Two steps of gradient descent from a fresh network."""
    model = network(api, norm, momentum)
    return model.train(model.init(), batches(4)[:2])


def batches(count):
    return list(3 + 2 * jax.random.normal(jax.random.key(7), (count, 16, 6, 6, 1)))


def descend(params, grads):
    return jax.tree.map(lambda p, g: p - 0.01 * g.astype(p.dtype), params, grads)


def on_one_device(leaf):
    """Not the default one."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[-1])


def on_four_devices(leaf):
    """The features, the last axis of every array, divided."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "d")
    return jax.sharding.NamedSharding(mesh, spec)


def save_and_restore(folder, saved, abstract, layout=on_one_device):
    """What comes back in the shapes and dtypes of `abstract`, on the devices of `layout`."""
    target = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=layout(v)), abstract
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint", target)


def bits(tree):
    return {
        jax.tree_util.keystr(path): (v.dtype.name, v.shape, np.asarray(v).tobytes())
        for path, v in jax.tree.leaves_with_path(tree)
    }


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@BOTH
def test_every_bit_is_restored(api, tmp_path):
    model, saved = network(api, "jbn"), trained(api, "jbn")
    untrained = bits(model.init())
    assert all(untrained[name] != value for name, value in bits(saved).items())
    assert [name for _, (name, *_) in bits(saved).items()].count("bfloat16") == 2
    restored = save_and_restore(tmp_path, saved, model.abstract())
    assert bits(restored) == bits(saved)
    assert len(bits(restored)) == 11
    x = batches(1)[0]
    np.testing.assert_array_equal(model.infer(restored, x), model.infer(saved, x))


@BOTH
@pytest.mark.parametrize(("first", "second"), [("flax", "jbn"), ("jbn", "flax")])
def test_one_layers_checkpoint_in_the_other_and_back(api, first, second, tmp_path):
    model, other, saved = network(api, first), network(api, second), trained(api, first)
    there = save_and_restore(tmp_path / "there", saved, other.abstract())
    assert bits(there) == bits(saved)
    x = batches(1)[0]
    close(other.infer(there, x), model.infer(saved, x))
    back = save_and_restore(tmp_path / "back", there, model.abstract())
    assert bits(back) == bits(saved)


@BOTH
@pytest.mark.parametrize(
    ("before", "after"), [(on_four_devices, on_one_device), (on_one_device, on_four_devices)]
)
def test_saved_and_restored_on_other_devices(api, before, after, tmp_path):
    model, expected = network(api, "jbn", None), trained(api, "jbn", None)
    saved = jax.tree.map(lambda v: jax.device_put(v, before(v)), expected)
    restored = save_and_restore(tmp_path, saved, model.abstract(), after)
    assert bits(restored) == bits(expected)
    assert len(bits(restored)) == 13
    for source, leaf in zip(*map(jax.tree.leaves, (saved, restored)), strict=True):
        assert source.sharding == before(source)
        assert leaf.sharding == after(leaf)
    x = batches(1)[0]
    close(model.infer(restored, x), model.infer(expected, x))


@BOTH
def test_cumulative_average_goes_on_after_a_restore(api, tmp_path):
    model, saved = network(api, "jbn", None), trained(api, "jbn", None)
    restored = save_and_restore(tmp_path, saved, model.abstract())
    resumed = model.train(restored, batches(4)[2:])
    uninterrupted = model.train(model.init(), batches(4))
    assert bits(resumed) == bits(uninterrupted)
    for state, steps in ((restored, 2), (resumed, 4)):
        assert len(model.counts(state)) == 2
        for count in model.counts(state):
            assert count.dtype == jnp.float32
            np.testing.assert_array_equal(count, steps)


NARROW = np.ones((2, 3), np.float32)
ANOTHER_WIDTH = re.escape(
    "the running mean must have the shape of the feature axes of x = float32[2,3], (3,), "
    "got float32[4]"
)


@pytest.mark.parametrize("training", [True, False])
def test_linen_statistics_of_another_width(training, tmp_path):
    layer = jbn.linen.BatchNorm(not training)
    wide = layer.init(jax.random.key(0), np.ones((2, 4), np.float32))["batch_stats"]
    restored = save_and_restore(tmp_path, wide, wide)
    variables = layer.init(jax.random.key(0), NARROW)
    with pytest.raises(ValueError, match=ANOTHER_WIDTH):
        layer.apply({**variables, "batch_stats": restored}, NARROW, mutable=["batch_stats"])


@pytest.mark.parametrize("training", [True, False])
def test_nnx_statistics_of_another_width(training, tmp_path):
    layer, wide_layer = (
        jbn.nnx.BatchNorm(n, use_running_average=not training, rngs=nnx.Rngs(0)) for n in (3, 4)
    )
    wide = nnx.state(wide_layer, nnx.BatchStat)
    nnx.update(layer, save_and_restore(tmp_path, wide, wide))
    with pytest.raises(ValueError, match=ANOTHER_WIDTH):
        layer(NARROW)
