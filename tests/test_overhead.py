"""Tracing and compiling: nothing twice, and programs no larger than Flax's."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jbn
import jbn.linen
from benchmarks import overhead

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

SHAPE = (16, 4)


def training(x, **kwargs):
    return jbn.batch_norm(x, jnp.ones(4), jnp.zeros(4), **kwargs)


def gradients(x, **kwargs):
    return jax.grad(lambda x: training(x, **kwargs)[0].sum())(x)


def inference(x, **kwargs):
    return jbn.batch_norm_inference(x, jnp.zeros(4), jnp.ones(4), **kwargs)


def running(x):
    stats = jbn.RunningStats(jnp.zeros(4), jnp.ones(4), jnp.zeros(4))
    return jbn.update_running_stats(stats, jbn.moments(x))


def layer(x, **kwargs):
    module = jbn.linen.BatchNorm(use_running_average=False, **kwargs)
    variables = module.init(jax.random.key(0), x)
    return module.apply(variables, x, mutable=["batch_stats"])


MODES = {
    "training": training,
    "relu": functools.partial(training, activation=jax.nn.relu),
    "mask": functools.partial(training, mask=jnp.arange(16)[:, None] < 9),
    "residual": functools.partial(
        training, residual=jnp.ones(SHAPE, "float32"), activation=jax.nn.gelu
    ),
    "without the rule": functools.partial(training, custom_vjp=False),
    "gradients": gradients,
    "gradients, relu": functools.partial(gradients, activation=jax.nn.relu),
    "inference": functools.partial(inference, activation=jax.nn.relu),
    "running": running,
    "layer": functools.partial(layer, activation=jax.nn.relu),
}


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_call_compiles_nothing(mode, jitted, caplog):
    f = jax.jit(MODES[mode]) if jitted else MODES[mode]
    first, second = jnp.ones(SHAPE), jnp.zeros(SHAPE)

    def compiled(x):
        caplog.clear()
        with jax.log_compiles():
            jax.block_until_ready(f(x))
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]

    jax.clear_caches()
    assert compiled(first)
    assert compiled(second) == []


@pytest.mark.parametrize("mode", [training, gradients, inference])
def test_a_second_call_traces_nothing(mode):
    traced = []

    def activation(z):
        traced.append(z)
        return jnp.tanh(z)

    f = jax.jit(functools.partial(mode, activation=activation))
    f(jnp.ones(SHAPE))
    first = len(traced)
    f(jnp.zeros(SHAPE))
    assert len(traced) == first > 0


@functools.cache
def lowered(name):
    model = overhead.Network(name, layers=10)
    args = overhead.arguments(model)
    return jax.jit(functools.partial(overhead.step, model)).lower(*args)


def test_layers_share_one_trace():
    flax, ours = (lowered(name).as_text().count("\n") for name in ("flax", "jbn"))
    assert ours <= flax


def test_table():
    table = overhead.table(layers=1, rounds=1)
    assert table.row_count == 6
