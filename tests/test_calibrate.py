"""Population statistics of trained models: `jbn.linen.calibrate` and `jbn.nnx.calibrate`."""

import functools
import io
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jbn
import jbn.linen
import jbn.nnx
from jbn import _calibrate

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 4))
X = RNG.normal(size=(23, 3)) * [1, 5, 0.1] + [0, 100, -2]
MASK = RNG.random((23, 1)) < 0.7
SIZES = [8, 8, 7]


def split(x, sizes=SIZES):
    return np.split(x, np.cumsum(sizes)[:-1])


class Net(nn.Module):
    """Batch norm, a dense layer and batch norm; the second averages and is unbiased."""

    norm: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        x = self.norm(use_running_average=not train, name="first")(x, mask=mask)
        x = nn.Dense(4, use_bias=False, param_dtype=jnp.float64, name="dense")(x)
        own = {} if self.norm is nn.BatchNorm else {"unbiased": True, "momentum": None}
        return self.norm(use_running_average=not train, name="second", **own)(x, mask=mask)


class Model(nnx.Module):
    """The same, and dropout without effect."""

    def __init__(self, norm=jbn.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        own = {} if norm is nnx.BatchNorm else {"unbiased": True, "momentum": None}
        self.first = norm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 4, use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        self.dense.kernel.set_value(jnp.asarray(KERNEL))
        self.second = norm(4, rngs=rngs, **own)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        stats = nnx.state((self.first, self.second), nnx.BatchStat)
        nnx.update((self.first, self.second), jax.tree.map(lambda v: v.astype(jnp.float64), stats))

    def __call__(self, x, mask=None):
        x = self.second(self.dense(self.first(x, mask=mask)), mask=mask)
        self.dropout(x)
        return x


@functools.cache
def linen_variables():
    variables = Net().init(jax.random.key(0), X, train=True)
    variables["params"]["dense"]["kernel"] = jnp.asarray(KERNEL)
    return {
        **variables,
        "batch_stats": jax.tree.map(lambda v: v.astype(jnp.float64), variables["batch_stats"]),
    }


def apply_dict(variables, batch, **options):
    return Net().apply(variables, batch["x"], mask=batch.get("mask"), train=True, **options)


def calibrate_linen(batches, **options):
    variables = jbn.linen.calibrate(apply_dict, linen_variables(), batches, **options)
    return jax.tree.map(np.asarray, variables["batch_stats"])


def calibrate_nnx(batches, **options):
    model = Model()
    model.eval()
    jbn.nnx.calibrate(
        model, batches, apply_fn=lambda m, b: m(b["x"], mask=b.get("mask")), **options
    )
    return {
        name: {k: np.asarray(v) for k, v in nnx.as_pure(nnx.state(layer, nnx.BatchStat)).items()}
        for name, layer in (("first", model.first), ("second", model.second))
    }


BOTH = pytest.mark.parametrize("calibrate", [calibrate_linen, calibrate_nnx], ids=["linen", "nnx"])


def expected(batches):
    """In NumPy: the inputs of each layer, batch by batch, and the statistics of all of them."""
    seen = [[], []]
    for batch in batches:
        x = np.asarray(batch["x"])
        kept = np.asarray(batch.get("mask", np.ones((len(x), 1), bool)))[:, 0]
        seen[0].append(x[kept])
        mean, var = x[kept].mean(0), x[kept].var(0)
        seen[1].append(((x - mean) / np.sqrt(var + 1e-5) @ KERNEL)[kept])
    first, second = map(np.concatenate, seen)
    return {
        "first": {"mean": first.mean(0), "var": first.var(0)},
        "second": {
            "mean": second.mean(0),
            "var": second.var(0, ddof=1),
            "count": np.full(4, len(batches)),
        },
    }


def close(actual, wanted, rtol=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@BOTH
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_statistics_are_those_of_all_batches(calibrate, masked):
    """The first layer's of the data as one, exactly; the last batch is smaller."""
    batches = [{"x": x} for x in split(X)]
    if masked:
        batches = [{**b, "mask": m} for b, m in zip(batches, split(MASK), strict=True)]
    stats = calibrate(batches)
    close(stats, expected(batches))
    rows = X[MASK[:, 0]] if masked else X
    close(stats["first"], {"mean": rows.mean(0), "var": rows.var(0)})


@BOTH
def test_batches_are_taken_lazily_and_compiled_once(calibrate, monkeypatch):
    """A generator, no further than max_batches, with one trace for each shape."""
    traces, taken = [], []
    pool = _calibrate.pool

    def counted(step, *args, **options):
        def counting(batch):
            before = jbn_traces()
            result = step(batch)
            traces.append(jbn_traces() - before)
            return result

        return pool(counting, *args, **options)

    calls = []
    forward = jbn.batch_norm
    monkeypatch.setattr(_calibrate, "pool", counted)
    monkeypatch.setattr(jbn, "batch_norm", lambda *a, **k: calls.append(1) or forward(*a, **k))

    def jbn_traces():
        return len(calls)

    def loader():
        for i, x in enumerate(split(X, [4] * 4 + [7])):
            taken.append(i)
            yield {"x": x}

    stats = calibrate(loader(), max_batches=4)
    assert taken == [0, 1, 2, 3]
    assert traces == [2, 0, 0, 0]  # of the two layers
    close(stats, expected([{"x": x} for x in split(X, [4] * 4 + [7])[:4]]))

    traces.clear()
    calibrate([{"x": x} for x in split(X)])
    assert traces == [2, 0, 2]  # 8, 8 and 7 rows


@BOTH
def test_sharded_batches(calibrate):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    whole = [{"x": x} for x in (X[:16], X[7:23])]
    close(calibrate(jax.device_put(whole, sharding)), expected(whole))


def test_all_else_in_variables_is_untouched():
    variables = flax.core.freeze({**linen_variables(), "other": {"a": jnp.ones(2)}})
    new = jbn.linen.calibrate(apply_dict, variables, [{"x": X}])
    assert isinstance(new, flax.core.FrozenDict)
    assert list(new) == list(variables)
    for old_leaf, leaf in zip(
        jax.tree.leaves((variables["params"], variables["other"])),
        jax.tree.leaves((new["params"], new["other"])),
        strict=True,
    ):
        assert leaf is old_leaf
    close(variables["batch_stats"]["first"]["mean"], jnp.zeros(3))
    y, _ = apply_dict(new, {"x": X}, mutable=["batch_stats"])
    first = {c: {"first": new[c]["first"]} for c in ("params", "batch_stats")}
    by_running = jbn.linen.BatchNorm(True).apply(
        {c: v["first"] for c, v in first.items()}, jnp.asarray(X)
    )
    np.testing.assert_allclose(by_running.mean(0), 0, atol=1e-12)
    assert y.shape == (23, 4)


def test_all_else_in_the_model_is_untouched():
    """Weights, the state of random numbers and every layer's mode; the batch norm's as well."""
    model = Model()
    model.first.use_running_average = True
    before = nnx.clone(model)
    variables = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    jbn.nnx.calibrate(model, [jnp.asarray(x) for x in split(X)])
    assert nnx.graphdef(model) == nnx.graphdef(before)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] not in ("mean", "var", "count"):
            assert variable.get_value() is variables[path]
    close(np.asarray(model.first.mean[...]), X.mean(0))


def test_interrupted_the_model_is_as_before():
    model = Model()
    before = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}

    def interrupted():
        yield X[:8]
        yield X[8:16]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jbn.nnx.calibrate(model, interrupted())
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable.get_value() is before[path]


def test_layers_that_run_by_running_statistics_keep_them():
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jbn.linen.BatchNorm(use_running_average=True)(x)
            return jbn.linen.BatchNorm()(x, False, update_running_average=False)

    variables = Frozen().init(jax.random.key(0), X)
    # Empty moments, of init, or used ones may be among the variables.
    moments = {"BatchNorm_1": {"moments": jbn.moments(X)}}
    new = jbn.linen.calibrate(Frozen().apply, {**variables, "batch_moments": moments}, [X])
    assert new["batch_moments"] is moments
    old, new = variables["batch_stats"], new["batch_stats"]
    assert new["BatchNorm_0"]["mean"] is old["BatchNorm_0"]["mean"]
    mean, var = X.mean(0) / np.sqrt(1 + 1e-5), X.var(0) / (1 + 1e-5)
    close(new["BatchNorm_1"], {"mean": np.float32(mean), "var": np.float32(var)}, 1e-6)

    model = Model()

    def partly(model, batch):
        model.first.eval()
        return model(batch)

    before = model.first.mean.get_value()
    jbn.nnx.calibrate(model, [X], apply_fn=partly)
    assert model.first.mean.get_value() is before
    close(np.asarray(model.second.mean[...]), (X / np.sqrt(1 + 1e-5) @ KERNEL).mean(0))


def test_layers_that_were_not_called_are_named():
    variables = linen_variables()

    class First(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jbn.linen.BatchNorm(use_running_average=False, name="first")(x)

    told = "'second' keeps its running statistics: it was not called"
    with pytest.warns(UserWarning, match=told) as warned:
        new = jbn.linen.calibrate(First().apply, variables, [X])
    assert [w.filename for w in warned] == [__file__]
    assert new["batch_stats"]["second"]["mean"] is variables["batch_stats"]["second"]["mean"]
    close(np.asarray(new["batch_stats"]["first"]["mean"]), X.mean(0))

    model = Model()
    with pytest.warns(UserWarning, match=told) as warned:
        jbn.nnx.calibrate(model, [X], apply_fn=lambda model, batch: model.first(batch))
    assert [w.filename for w in warned] == [__file__]
    close(np.asarray(model.first.mean[...]), X.mean(0))


class Block(nn.Module):
    """Batch norm, as one layer of a stack."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, _=None):
        x = jbn.linen.BatchNorm(False, name="bn", axis_name=self.axis_name)(x)
        return x * 2 + 1, None


def scanned(collections):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict.fromkeys(collections, 0)
            stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
            return stack(name="stack")(x, None)[0]

    return Scanned()


def test_linen_scanned_layers():
    model = scanned(["params", "batch_stats", "batch_moments"])
    variables = model.init(jax.random.key(0), X)
    stats = jbn.linen.calibrate(model.apply, variables, split(X))["batch_stats"]["stack"]["bn"]
    inputs = [X, np.concatenate([_normalized(x) * 2 + 1 for x in split(X)])]
    for name, function in (("mean", np.mean), ("var", np.var)):
        close(np.asarray(stats[name]), np.stack([function(x, 0) for x in inputs]), 1e-6)

    model = scanned(["params", "batch_stats"])
    del variables["batch_moments"]  # that init gives inside a transformation
    with pytest.raises(ValueError, match=r"layer 'stack/bn' do not reach .* batch_moments"):
        jbn.linen.calibrate(model.apply, variables, split(X))


def _normalized(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_linen_statistics_shared_along_an_axis(axis_name):
    """Moments of each element are pooled, unless those of each are of all."""

    def model(moments):
        shared = {"params": None, "batch_stats": None, "batch_moments": moments}
        return nn.vmap(
            functools.partial(jbn.linen.BatchNorm, update_running_average=axis_name is not None),
            variable_axes=shared,
            split_rngs={"params": False},
            axis_name=axis_name,
        )(use_running_average=False, axis_name=axis_name)

    batches = [x.reshape(2, -1, 3) for x in split(X[:22], [8, 14])]
    pooling = model(0 if axis_name is None else None)
    variables = pooling.init(jax.random.key(0), batches[0])
    stats = jbn.linen.calibrate(pooling.apply, variables, batches)["batch_stats"]
    close(jax.tree.map(np.asarray, stats), {"mean": X[:22].mean(0), "var": X[:22].var(0)}, 1e-6)
    if axis_name is not None:
        del variables["batch_moments"]  # of the whole batch, which init gives
        with pytest.raises(ValueError, match=r"pools its batch over axis_name = 'batch'"):
            jbn.linen.calibrate(model(0).apply, variables, batches)


def test_linen_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",))
    split_by, whole = PartitionSpec("data"), PartitionSpec()
    bn = jbn.linen.BatchNorm(use_running_average=False, axis_name="data")
    variables = bn.init(jax.random.key(0), X)

    def apply_fn(variables, batch, mutable):
        forward = functools.partial(bn.apply, mutable=mutable)
        specs = {"in_specs": (whole, split_by), "out_specs": (split_by, whole)}
        return jax.shard_map(forward, mesh=mesh, **specs)(variables, batch)

    batches = jax.device_put([X[:8], X[7:23]], NamedSharding(mesh, split_by))
    stats = jbn.linen.calibrate(apply_fn, variables, batches)["batch_stats"]
    rows = np.concatenate([X[:8], X[7:23]])
    close(jax.tree.map(np.asarray, stats), {"mean": rows.mean(0), "var": rows.var(0)}, 1e-6)


PROCESS = """
import sys, warnings
import jax, numpy as np, jbn.linen
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
mesh = jax.make_mesh((2, 2), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
x[:, 3] = np.nan

def put(value, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    return jax.make_array_from_callback(value.shape, sharding, lambda i: np.asarray(value)[i])

bn = jbn.linen.BatchNorm(use_running_average=False)
variables = jax.tree.map(lambda v: put(v, "model"), bn.init(jax.random.key(0), x))
warnings.simplefilter("ignore")
batches = [put(x[:8], "data"), put(x[8:], "data")]
stats = jbn.linen.calibrate(bn.apply, variables, batches)["batch_stats"]
wanted = {"mean": x.mean(0), "var": x.var(0)}
wanted["mean"][3], wanted["var"][3] = 0, 1
for name, value in stats.items():
    assert value.sharding.spec == P("model")
    assert not value.is_fully_addressable
    for shard in value.addressable_shards:
        np.testing.assert_allclose(shard.data, wanted[name][shard.index], 1e-5, 1e-6)
"""


def test_features_on_several_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROCESS, port]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [*command, rank], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs


@nn.jit
class Jitted(nn.Module):
    """A layer that is called twice, inside Flax's own jit."""

    @nn.compact
    def __call__(self, x):
        bn = jbn.linen.BatchNorm(use_running_average=False, unbiased=True)
        return bn(bn(x))


def test_linen_jitted_and_called_twice():
    """The moments of both calls are pooled; a second time Flax has the trace."""
    model = Jitted()
    variables = model.init(jax.random.key(0), X)
    rows = np.concatenate([X, _normalized(X)])
    for _ in range(2):
        stats = jbn.linen.calibrate(model.apply, variables, [X])["batch_stats"]["BatchNorm_0"]
        wanted = {"mean": rows.mean(0), "var": rows.var(0, ddof=1)}
        close(jax.tree.map(np.asarray, stats), wanted, 1e-6)


@pytest.mark.parametrize("mapped", ["scan", "vmap"])
def test_nnx_stacked_layers(mapped):
    """Also inside `nnx.Sequential`, whose list `nnx.capture` cannot map by itself."""

    class Stack(nnx.Module):
        def __init__(self):
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(scale):
                bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
                bn.scale.set_value(scale)
                return nnx.Sequential(bn, lambda x: x + 1)

            self.blocks = make(jnp.array([[2.0] * 3, [3.0] * 3]))

        def __call__(self, x):
            forward = lambda block, x: block(x)  # noqa: E731
            if mapped == "vmap":
                return nnx.vmap(forward, in_axes=(0, None))(self.blocks, x)
            return nnx.scan(forward, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)

    model = Stack()
    jbn.nnx.calibrate(model, [jnp.asarray(x) for x in split(X)])
    second = np.concatenate([_normalized(x) * 2 + 1 for x in split(X)])
    inputs = [X, X if mapped == "vmap" else second]
    bn = model.blocks.layers[0]
    close(np.asarray(bn.mean[...]), np.stack([x.mean(0) for x in inputs]), 1e-6)
    close(np.asarray(bn.var[...]), np.stack([x.var(0) for x in inputs]), 1e-6)


@pytest.mark.parametrize("mapped", ["vmap", "scan"])
def test_nnx_layer_shared_along_an_axis(mapped):
    """Pooled over the axis by the layer under vmap, and by calibrate under a scan over time."""
    bn = jbn.nnx.BatchNorm(3, axis_name="batch" if mapped == "vmap" else None, rngs=nnx.Rngs(0))
    forward = lambda bn, x: bn(x)  # noqa: E731

    def apply_fn(bn, x, moments=0):
        if mapped == "vmap":
            return nnx.vmap(forward, in_axes=(None, 0), axis_name="batch")(bn, x)
        kinds = {nnx.BatchStat: nnx.Carry, jbn.nnx.BatchMoments: moments, ...: None}
        return nnx.scan(forward, in_axes=(nnx.StateAxes(kinds), 0), out_axes=0)(bn, x)

    batches = [x.reshape(2, -1, 3) for x in split(X[:22], [8, 14])]
    jbn.nnx.calibrate(bn, batches, apply_fn=apply_fn)
    close(np.asarray(bn.mean[...]), X[:22].mean(0), 1e-6)
    close(np.asarray(bn.var[...]), X[:22].var(0), 1e-6)
    if mapped == "scan":
        with pytest.raises(ValueError, match=r"must name jbn\.nnx\.BatchMoments"):
            jbn.nnx.calibrate(bn, batches, apply_fn=functools.partial(apply_fn, moments=None))


@BOTH
def test_what_is_not_finite_or_empty_is_left_out(calibrate):
    """The batch of a bad value for its feature, and the feature that has no good batch."""
    x = X.copy()
    x[3, 1] = np.nan  # the first batch
    x[[0, 9, 20], 2] = np.inf
    with pytest.warns(UserWarning, match="statistics|left out") as warned:
        stats = calibrate([{"x": x} for x in split(x)])
    assert all(w.filename == __file__ for w in warned)
    assert sorted(str(w.message) for w in warned) == [
        "layer 'first': 1 of 3 features keep their running statistics: no batch had enough "
        "elements of them, and moments that are finite in the stored dtype; up to 3 batches were "
        "left out for 2 of 3 features, whose moments in them were not finite.",
        "layer 'second': 4 of 4 features keep their running statistics: no batch had enough "
        "elements of them, and moments that are finite in the stored dtype; up to 3 batches were "
        "left out for 4 of 4 features, whose moments in them were not finite.",
    ]
    mean, var = (np.array([f(X[:, 0]), f(X[8:, 1]), d]) for f, d in ((np.mean, 0), (np.var, 1)))
    close(stats["first"], {"mean": mean, "var": var})
    close(stats["second"], {"mean": np.zeros(4), "var": np.ones(4), "count": np.zeros(4)})


@pytest.mark.parametrize("unbiased", [False, True], ids=["", "unbiased"])
def test_a_feature_without_enough_elements_keeps_its_statistics(unbiased):
    bn = jbn.linen.BatchNorm(use_running_average=False, unbiased=unbiased)
    variables = bn.init(jax.random.key(0), X)
    mask = np.ones((23, 3))
    mask[:, 1], mask[1:, 2] = 0, 0
    with pytest.warns(UserWarning, match=f"^the layer: {2 if unbiased else 1} of 3 features keep"):
        new = jbn.linen.calibrate(
            lambda v, b, mutable: bn.apply(v, b[0], mask=b[1], mutable=mutable),
            variables,
            list(zip(split(X), split(mask), strict=True)),
        )
    last = [0, 1] if unbiased else [X[0, 2], 0]
    var = X[:, 0].var(ddof=int(unbiased))
    stats = {"mean": np.array([X[:, 0].mean(), 0, last[0]]), "var": np.array([var, 1, last[1]])}
    close(jax.tree.map(np.asarray, new["batch_stats"]), stats, 1e-6)


def test_dtypes_and_places_of_the_statistics_are_kept():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())
    bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    bn.var.set_value(jax.device_put(jnp.ones(3, jnp.bfloat16), sharding))
    jbn.nnx.calibrate(bn, [X.astype(np.float32)])
    assert (bn.mean.dtype, bn.var.dtype) == (jnp.float32, jnp.bfloat16)
    assert not bn.mean.get_value().committed
    assert bn.var.get_value().sharding == sharding
    np.testing.assert_allclose(np.float64(bn.var[...]), X.var(0), rtol=2**-8)

    jbn.nnx.calibrate(bn, [(X + 1j).astype(np.complex64)])  # as in training, the mean turns complex
    assert bn.mean.dtype == jnp.complex64
    close(np.asarray(bn.mean[...]), X.mean(0) + 1j, 1e-6)
    bn.var.set_value(jnp.ones(3, jnp.float16))
    with pytest.warns(UserWarning, match="^the layer: 2 of 3 .* finite in the stored dtype"):
        jbn.nnx.calibrate(bn, [X * 1e3])
    wanted = [1, 1, X[:, 2].var() * 1e6]
    np.testing.assert_allclose(np.float64(bn.var[...]), wanted, rtol=2**-10)


def test_boxed_and_numpy_variables():
    """Metadata about the sharding stays around the statistics; a checkpoint may hold NumPy's."""
    boxed = nn.with_partitioning(nn.initializers.zeros, ("features",))
    bn = jbn.linen.BatchNorm(use_running_average=False, mean_init=boxed)
    variables = jax.tree.map(np.asarray, bn.init(jax.random.key(0), X))
    stats = jbn.linen.calibrate(bn.apply, variables, [X])["batch_stats"]
    assert isinstance(stats["mean"], nn.Partitioned)
    assert stats["mean"].names == ("features",)
    close(np.asarray(stats["mean"].value), X.mean(0), 1e-6)
    close(np.asarray(stats["var"]), X.var(0), 1e-6)


def test_pool_is_exact_beyond_float32():
    """2^24 elements and 2^24 single ones more, which float32 would not count."""
    parts = [(100.0, 1e-6, 2.0**24), *[(100.001, 0.0, 2.0**19 + 1)] * 32]
    moments = [jbn.Moments(*(jnp.full(1, v, jnp.float32) for v in part)) for part in parts]
    pooled = _calibrate.pool(
        lambda i: {"": moments[i]},
        {"": (1,)},
        range(33),
        max_batches=None,
        progress=False,
        description="",
    )[0][""]
    mean, var, n = (np.array([m[k][0] for m in moments], np.float64) for k in range(3))
    center = (n * mean).sum() / n.sum()
    assert pooled.count == n.sum() == 2**25 + 32
    np.testing.assert_allclose(pooled.mean, center, rtol=1e-14)
    wanted = (n * (var + (mean - center) ** 2)).sum() / n.sum()
    np.testing.assert_allclose(pooled.var, wanted, rtol=1e-9)
    assert (pooled.batches, pooled.left_out, pooled.smallest) == (33, 0, 2**19 + 1)


def test_pool_of_batches_in_parts():
    """Two parts of a batch, as under a scan over time, count as batches do."""
    parts = jbn.Moments(*(jnp.array(v) for v in ([[1.0], [4.0]], [[0.5], [2.0]], [[6.0], [3.0]])))
    options = {"max_batches": None, "progress": False, "description": ""}
    pooled = _calibrate.pool(lambda _: {"": parts}, {"": (1,)}, [0, 0], **options)[0][""]
    assert (pooled.batches, pooled.smallest, pooled.count) == (4, 3, 18)
    assert (pooled.mean, pooled.var) == pytest.approx((2, (6 * 1.5 + 3 * 6) / 9), rel=1e-14)


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("batches", "limit", "told"),
    [(split(X), None, "3/3"), (split(X), 2, "2/2"), ((x for x in split(X)), 7, "3/7")],
)
def test_progress_bar(batches, limit, told, monkeypatch):
    bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    jbn.nnx.calibrate(bn, batches, max_batches=limit)
    assert "Calibrating" in sys.stderr.getvalue()
    assert told in sys.stderr.getvalue()


def test_no_progress_bar(monkeypatch, capfd):
    """If it is not wanted, or there is no terminal."""
    bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    jbn.nnx.calibrate(bn, split(X))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    jbn.nnx.calibrate(bn, split(X), progress=False)
    assert sys.stderr.getvalue() == ""


TRAIN = functools.partial(Net().apply, train=True)
BAD_LINEN = {
    "no batch": (TRAIN, {}, [], {}, ValueError, "batches is empty: pass at least one"),
    "array": (TRAIN, {}, X, {}, TypeError, r"got float64\[23,3\]: for a single batch pass \[b"),
    "dict": (TRAIN, {}, {"x": X}, {}, TypeError, r"iterable of batches .* pass \[batch\]"),
    "number": (TRAIN, {}, 3, {}, TypeError, "iterable of batches .* got int 3."),
    "limit": (TRAIN, {}, [X], {"max_batches": 0}, ValueError, "at least 1, .* got int 0"),
    "half": (TRAIN, {}, [X], {"max_batches": 1.5}, ValueError, "at least 1, .* got float 1.5"),
    "words": (TRAIN, {}, [X, ["a"]], {}, TypeError, r"batch 1 at \[0\] must be .* got str 'a'"),
    "inference": (Net().apply, {}, [X], {}, ValueError, "no layer of .* train=True"),
    "model": (Net(), {}, [X], {}, TypeError, r"must be a function, got Net: .*model\.apply"),
    "no mutable": (lambda v, b: 0, {}, [X], {}, TypeError, "take its arguments .*'mutable'"),
    "output": (lambda v, b, mutable: b, {}, [X], {}, TypeError, "does it pass mutable on"),
    "lost mutable": (
        lambda v, b, mutable: TRAIN(v, b, mutable=["batch_stats"]),
        {},
        [X],
        {},
        ValueError,
        "layer '(first|second)' do not reach the caller: apply_fn must pass on the mutable",
    ),
    "no stats": (TRAIN, {"batch_stats": None}, [X], {}, ValueError, "batch_stats, .* got params"),
    "no layer": (TRAIN, {"batch_stats": {}}, [X], {}, ValueError, "the model has no batch norm"),
    "other": (
        functools.partial(Net(nn.BatchNorm).apply, train=True),
        {},
        [X],
        {},
        ValueError,
        "layer 'first' is flax.linen.BatchNorm, .* import BatchNorm from jbn.linen",
    ),
}


@pytest.mark.parametrize("case", BAD_LINEN)
def test_bad_input_linen(case):
    apply_fn, changes, batches, options, error, message = BAD_LINEN[case]
    variables = {k: v for k, v in {**linen_variables(), **changes}.items() if v is not None}
    with pytest.raises(error, match=message):
        jbn.linen.calibrate(apply_fn, variables, batches, **options)


def test_bad_input_nnx():
    calibrate = jbn.nnx.calibrate
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(Model(), iter(()))
    with pytest.raises(TypeError, match=r"model must be an nnx.Module, got float64\[23,3\]"):
        calibrate(X, [X])
    with pytest.raises(ValueError, match=r"Linear, has no layer of jbn\.nnx\.BatchNorm"):
        calibrate(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), [X])
    with pytest.raises(ValueError, match=r"layer 'first' is flax\.nnx\.BatchNorm"):
        calibrate(Model(nnx.BatchNorm), [X])
    with pytest.raises(TypeError, match=r"apply_fn must be a function .* got str"):
        calibrate(Model(), [X], apply_fn="forward")
    with pytest.raises(ValueError, match=r"no layer of jbn.nnx.BatchNorm normalizes"):
        calibrate(Model(), [X], apply_fn=lambda model, batch: model.eval())
    with pytest.raises(TypeError, match=r"call it outside jax\.jit"):
        nnx.jit(lambda model: calibrate(model, [X]))(Model())


class Branches(nn.Module):
    """Batch norm in one branch alone."""

    @nn.compact
    def __call__(self, x):
        bn = jbn.linen.BatchNorm(use_running_average=False)
        if self.is_initializing():
            return bn(x)
        return nn.cond(x.sum() > 0, lambda bn, x: bn(x), lambda bn, x: x, bn, x)


def test_errors_of_the_model_tell_what_calibrating_has_to_do_with_them():
    """A pair of images and labels for the images, and batch norm in one branch."""
    labels = np.zeros(23)
    bn = jbn.linen.BatchNorm(use_running_average=False)
    variables = bn.init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="x must be an array") as linen:
        jbn.linen.calibrate(bn.apply, variables, [(X, labels)])
    assert (
        "came as a tuple: where the model takes a part of it alone, apply_fn has to take that out, "
        in told(linen)
    )
    with pytest.raises(TypeError, match="x must be an array") as of_nnx:
        jbn.nnx.calibrate(Model(), [{"x": X, "y": labels}])
    assert (
        "as a dict: where the model takes a part of it alone, apply_fn has to take that out, "
        in told(of_nnx)
    )
    with pytest.raises(flax.errors.ModifyScopeVariableError) as immutable:
        jbn.linen.calibrate(lambda v, b, mutable: bn.apply(v, b), variables, [X])
    assert "must pass on the mutable that it is given to model.apply" in told(immutable)
    variables = Branches().init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="branch outputs") as branches:
        jbn.linen.calibrate(Branches().apply, variables, [X])
    assert "so that batch norm runs in all branches or in none" in told(branches)


def told(info):
    return " ".join(info.value.__notes__)


class Renamed(jbn.linen.BatchNorm):
    """A subclass with arguments of its own."""

    @nn.compact
    def __call__(self, x, train):
        return super().__call__(x, use_running_average=not train)


def test_linen_subclass_whose_call_takes_other_arguments():
    bn = Renamed()
    variables = bn.init(jax.random.key(0), X, True)
    new = jbn.linen.calibrate(functools.partial(bn.apply, train=True), variables, [X])
    close(np.asarray(new["batch_stats"]["mean"]), X.mean(0), 1e-6)
    with pytest.raises(ValueError, match=r"no layer of .* normalizes by its batch"):
        jbn.linen.calibrate(functools.partial(bn.apply, train=False), variables, [X])


def test_no_warning_without_need():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate_nnx([{"x": X}])
