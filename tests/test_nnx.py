"""The NNX layer: flax.nnx.BatchNorm's equal, and what it adds."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import jbn
import jbn.linen
import jbn.nnx

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

FLAX, JBN = nnx.BatchNorm, jbn.nnx.BatchNorm
BOTH = pytest.mark.parametrize("cls", [FLAX, JBN], ids=["flax", "jbn"])


def close(a, b, rtol=1e-12):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) * 2 + 1


def as_float64(model):
    nnx.update(model, jax.tree.map(lambda v: v.astype(jnp.float64), nnx.state(model)))
    return model


def test_arguments_are_flaxs():
    """Names, order, defaults and kinds, and jbn's own, the same as Linen's, after them."""
    theirs, ours = (inspect.signature(cls.__init__).parameters for cls in (FLAX, JBN))
    names = list(theirs)
    assert list(ours)[: len(names)] == names
    for name in names:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind
    own = list(ours)[len(names) :]
    linen = [f for f in dataclasses.fields(jbn.linen.BatchNorm) if f.kw_only]
    linen = {f.name: f.default for f in linen if f.name not in ("parent", "name")}
    assert {name: ours[name].default for name in own} == linen
    assert inspect.signature(JBN.__call__) == inspect.signature(jbn.linen.BatchNorm.__call__)


def test_attributes_are_flaxs():
    theirs, ours = (vars(cls(3, rngs=nnx.Rngs(0))) for cls in (FLAX, JBN))
    missing = theirs.keys() - ours.keys()
    assert not missing
    for name in theirs.keys() - {"_pytree__state", "_pytree__nodes"}:
        if isinstance(theirs[name], nnx.Variable):
            assert type(ours[name]) is type(theirs[name])
        else:
            assert ours[name] == theirs[name], name


OPTIONS = [
    {},
    {"axis": 1},
    {"momentum": 0.5, "epsilon": 0.1},
    {"use_scale": False},
    {"use_bias": False},
    {"param_dtype": jnp.float64},
    {"dtype": jnp.float64},
    {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
def test_values_gradients_and_statistics_are_flaxs(options, masked):
    """In float64, with Flax's two-pass variance and its statistics cast to float64 first."""
    x, dy = draw((4, 5, 5)), draw((4, 5, 5), 1)
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (4, 5, 1)) if masked else None
    if options.get("axis") == 1 and masked:
        mask = mask.swapaxes(1, 2)
    results = []
    for cls in (FLAX, JBN):
        layer = cls(5, use_fast_variance=False, rngs=nnx.Rngs(0), **options)
        initial = nnx.clone(nnx.state(layer))
        as_float64(layer)

        @nnx.jit
        def step(layer, x):
            def loss(layer, x):
                y = layer(x, mask=mask)
                return jnp.sum(y * dy), y

            return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

        (grads, dx), y = step(layer, x)
        after = nnx.clone(nnx.state(layer))
        layer.eval()
        results.append((initial, nnx.state(grads, nnx.Param), dx, y, after, layer(x)))
    theirs, ours = (jax.tree.map(np.asarray, nnx.as_pure(r)) for r in results)
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    close(ours, theirs)


class Network(nnx.Module):
    """A small convolutional network, with either layer."""

    def __init__(self, norm, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        self.norm = norm(4, use_fast_variance=False, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_three_training_steps_are_flaxs():
    x, labels = draw((16, 6, 6, 1)), jnp.arange(16) % 3
    results = []
    for cls in (FLAX, JBN):
        model = as_float64(Network(cls, nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [step(model, optimizer) for _ in range(3)]
        assert losses[2] < losses[0]
        model.eval()
        results.append((nnx.as_pure(nnx.state(model)), losses, model(x)))
    close(*results[::-1])


@BOTH
def test_train_eval_view_and_the_call(cls):
    """The call wins over the attribute; a view shares the variables."""
    x = draw((6, 3)).astype(jnp.float32)
    layer = cls(3, rngs=nnx.Rngs(0))
    by_batch = layer(x)
    layer.eval()
    frozen = nnx.clone(nnx.state(layer))
    at_test_time = layer(x)
    assert abs(at_test_time - by_batch).max() > 0.1
    close(nnx.state(layer), frozen, 0)
    training = nnx.view(layer, use_running_average=False)
    close(training(x), by_batch, 1e-6)
    assert (layer.mean[...] != frozen["mean"][...]).all()
    assert layer.use_running_average
    close(layer(x, use_running_average=False), by_batch, 1e-6)
    layer.set_attributes(use_running_average=False)
    close(layer(x), by_batch, 1e-6)
    layer.train()
    assert layer.use_running_average is False


def test_view_without_updates():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), JBN(3, rngs=nnx.Rngs(1)))
    x, before = draw((6, 3)), nnx.clone(nnx.state(model, nnx.BatchStat))
    view = nnx.view(model, update_running_average=False)
    y = view(x)
    close(nnx.state(model, nnx.BatchStat), before, 0)
    close(y, model(x), 1e-6)
    assert (nnx.state(model)["layers"][1]["mean"][...] != 0).all()
    info = nnx.view_info(model)
    assert "whether to normalize by the running statistics" in info
    assert "update_running_average: bool | None = None" in info


def test_promote_dtype_decides_the_dtype_alone():
    """Not the values: x, the statistics and the parameters reach the computation unrounded."""
    x = draw((6, 3)) + 3000
    seen = []

    def to_half(arrays, dtype):
        seen.append([None if a is None else a.dtype.name for a in arrays] + [dtype])
        return tuple(None if a is None else a.astype(jnp.bfloat16) for a in arrays)

    layer = JBN(3, promote_dtype=to_half, use_bias=False, rngs=nnx.Rngs(0))
    y = layer(x)
    assert seen == [["float64", "float64", "float64", "float32", None, None]]
    assert y.dtype == jnp.bfloat16
    exact = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    close(np.float64(y), np.float64(exact.astype(jnp.bfloat16)), 2**-8)
    assert JBN(3, promote_dtype=to_half, dtype=jnp.float32, rngs=nnx.Rngs(0))(x).dtype == "float32"
    assert layer.mean[...].dtype == jnp.float32
    as_flax_calls_it = {
        "promote_dtype": lambda arrays, dtype: [a.astype("bfloat16") for a in arrays]
    }
    for cls in (FLAX, JBN):
        assert cls(3, rngs=nnx.Rngs(0), **as_flax_calls_it)(x).dtype == jnp.bfloat16


def test_complex_input():
    x = jax.lax.complex(draw((6, 3)), draw((6, 3), 1))
    layer = JBN(3, momentum=0.0, rngs=nnx.Rngs(0))
    expected = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    close(layer(x), expected, 1e-6)
    close(layer.mean[...], x.mean(0), 1e-6)
    layer.eval()
    close(layer(x), expected, 1e-6)


def test_a_second_call_does_not_trace_again():
    traces = []

    @nnx.jit
    def step(layer, x):
        traces.append(None)
        return layer(x)

    layer, x = JBN(3, momentum=None, activation=jax.nn.relu, rngs=nnx.Rngs(0)), draw((6, 3))
    for i in range(3):
        step(layer, x + i)
    assert len(traces) == 1
    np.testing.assert_array_equal(layer.count[...], 3)


def test_metadata_and_sharding():
    """Of parameters by Flax's arguments, of the statistics by their initializers."""
    mesh = jax.make_mesh((4,), ("f",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = JBN(
            8,
            mean_init=nnx.with_partitioning(nn.initializers.zeros, ("f",)),
            var_init=nnx.with_partitioning(nn.initializers.ones, ("f",)),
            scale_metadata={"out_sharding": ("f",)},
            bias_metadata={"note": "beta"},
            rngs=nnx.Rngs(0),
        )
        x = draw((6, 8))
        y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    specs = nnx.get_partition_spec(nnx.state(layer))
    split = jax.sharding.PartitionSpec("f")
    assert [specs[k].get_value() for k in ("mean", "var", "scale")] == [split] * 3
    assert layer.mean[...].sharding.spec == split
    assert layer.bias.get_metadata()["note"] == "beta"
    close(y, jbn.batch_norm(x)[0])


def test_bridges():
    """Linen's layer inside NNX, and NNX's inside Linen: outputs, statistics, gradients."""
    x = draw((6, 3))
    expected = JBN(3, rngs=nnx.Rngs(0))
    y = expected(x)

    to_nnx = bridge.ToNNX(jbn.linen.BatchNorm(use_running_average=False), rngs=nnx.Rngs(0))
    to_nnx.lazy_init(x)
    close(to_nnx(x, mutable=["batch_stats"]), y)
    assert isinstance(to_nnx.mean, nnx.BatchStat)
    close(to_nnx.mean[...], expected.mean[...], 0)

    to_linen = bridge.to_linen(JBN, 3)
    variables = to_linen.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, nn.unbox(variables["batch_stats"])) == {
        "mean": (3,),
        "var": (3,),
    }
    z, updated = to_linen.apply(variables, x, mutable=["batch_stats"])
    close(z, y)
    close(nn.unbox(updated["batch_stats"])["var"], expected.var[...], 0)


def test_batch_norm_mask():
    """Weight decay reaches the linear layer alone, jbn's and Flax's norms not."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), JBN(3, rngs=rngs), FLAX(3, rngs=rngs))
    mask = jbn.nnx.batch_norm_mask(model)
    assert nnx.to_pure_dict(mask)["layers"] == {
        0: {"kernel": False, "bias": False},
        1: {"scale": True, "bias": True},
        2: {"scale": True, "bias": True},
    }
    before = nnx.clone(model)
    decayed = jax.tree.map(lambda is_batch_norm: not is_batch_norm, mask)
    optimizer = nnx.Optimizer(
        model, optax.adamw(0.1, weight_decay=0.5, mask=decayed), wrt=nnx.Param
    )
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    close(model.layers[0].kernel[...], 0.95 * before.layers[0].kernel[...], 1e-6)
    for i in (1, 2):
        np.testing.assert_array_equal(model.layers[i].scale[...], 1)
    assert nnx.to_pure_dict(jbn.nnx.batch_norm_mask(JBN(2, rngs=rngs))) == {
        "scale": True,
        "bias": True,
    }
    linen = nn.Sequential([nn.Dense(3), jbn.linen.BatchNorm(use_running_average=False)])
    bridged = bridge.ToNNX(linen, rngs=rngs).lazy_init(draw((4, 2)))
    mask = nnx.to_pure_dict(jbn.nnx.batch_norm_mask(bridged))
    assert mask == {
        "layers_0": {"kernel": False, "bias": False},
        "layers_1": {"scale": True, "bias": True},
    }
