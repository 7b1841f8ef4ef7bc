"""The Linen layer: flax.linen.BatchNorm's equal, and what it adds."""

import dataclasses
import functools
import inspect

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbn
import jbn.linen

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

FLAX, JBN = nn.BatchNorm, jbn.linen.BatchNorm
BOTH = pytest.mark.parametrize("cls", [FLAX, JBN], ids=["flax", "jbn"])


def close(a, b, rtol=1e-12):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) * 2 + 1


def as_float64(variables):
    return jax.tree.map(lambda v: v.astype(jnp.float64), variables)


def test_arguments_are_flaxs():
    """Names, order, defaults, and jbn's own by keyword only after them."""
    theirs, ours = (inspect.signature(cls).parameters for cls in (FLAX, JBN))
    names = [n for n in theirs if n not in ("parent", "name")]
    assert [n for n in ours if n in names] == names
    for name in names:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind
    own = [f for f in dataclasses.fields(JBN) if f.name not in theirs]
    assert [f.name for f in own] == [
        "activation",
        "unbiased",
        "custom_vjp",
        "update_running_average",
        "mean_init",
        "var_init",
    ]
    assert all(f.kw_only for f in own)
    call = list(inspect.signature(JBN.__call__).parameters)
    assert call[:4] == ["self", "x", "use_running_average", "mask"]
    assert call[4:] == ["residual", "update_running_average"]
    assert JBN(True, 1, 0.9, name="bn").momentum == 0.9


OPTIONS = [
    {},
    {"axis": 1},
    {"axis": (1, -1)},
    {"momentum": 0.5, "epsilon": 0.1},
    {"use_scale": False},
    {"use_bias": False},
    {"param_dtype": jnp.float64},
    {"param_dtype": jnp.bfloat16},
    {"param_dtype": jnp.float64, "force_float32_reductions": False},
    {"dtype": jnp.bfloat16},
    {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "defaults")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_init_is_flaxs(options, dtype):
    x = draw((4, 3, 5)).astype(dtype)
    theirs, ours = (
        cls(use_running_average=False, **options).init_with_output(jax.random.key(0), x)
        for cls in (FLAX, JBN)
    )
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    jax.tree.map(lambda u, v: u.dtype == v.dtype or pytest.fail(f"{u.dtype}"), ours[1], theirs[1])
    assert ours[0].dtype == theirs[0].dtype


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", OPTIONS[:8], ids=lambda o: "-".join(o) or "defaults")
def test_outputs_gradients_and_statistics_are_flaxs(options, masked):
    """In float64, with Flax's two-pass variance and its statistics cast to float64 first."""
    x, dy = draw((4, 3, 5)), draw((4, 3, 5), 1)
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (4, 3, 1)) if masked else None
    results = []
    for cls in (FLAX, JBN):
        layer = cls(use_fast_variance=False, **options)
        variables = as_float64(layer.init(jax.random.key(0), x, False))

        @jax.jit
        def step(params, stats, x, layer=layer):
            def loss(params, x):
                y, updated = layer.apply(
                    {"params": params, "batch_stats": stats},
                    x,
                    use_running_average=False,
                    mask=mask,
                    mutable=["batch_stats"],
                )
                return jnp.sum(y * dy), (y, updated)

            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        grads, (y, updated) = step(variables.get("params", {}), variables["batch_stats"], x)
        at_test_time = layer.apply({**variables, **updated}, x, use_running_average=True)
        results.append((grads, y, updated, at_test_time))
    close(*results[::-1])


class Network(nn.Module):
    """A small convolutional network, with either layer."""

    norm: type

    @nn.compact
    def __call__(self, x, train):
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), use_bias=False, param_dtype=jnp.float64)(x)
            x = nn.relu(self.norm(use_fast_variance=False, momentum=0.9)(x, not train))
        return nn.Dense(3, param_dtype=jnp.float64)(x.mean((1, 2)))


def test_three_training_steps_are_flaxs():
    x, labels = draw((16, 6, 6, 1)), jnp.arange(16) % 3
    optimizer = optax.sgd(0.1, momentum=0.9)
    results = []
    for cls in (FLAX, JBN):
        model = Network(cls)
        variables = as_float64(model.init(jax.random.key(0), x, train=True))
        params, stats = variables["params"], variables["batch_stats"]
        state, losses = optimizer.init(params), []

        @jax.jit
        def step(params, stats, state, model=model):
            def loss(params):
                logits, updated = model.apply(
                    {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
                )
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                return loss, updated["batch_stats"]

            (loss, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), stats, state, loss

        for _ in range(3):
            params, stats, state, loss = step(params, stats, state)
            losses.append(loss)
        assert losses[2] < losses[0]
        results.append((params, stats, losses))
    renamed = flax.serialization.to_bytes(results[0][:2])
    restored = flax.serialization.from_bytes(results[1][:2], renamed)  # the same tree of names
    close(restored, results[0][:2], 0)
    close(*results[::-1])


def test_checkpoints_load_into_each_other():
    x = draw((8, 3))
    theirs, ours = FLAX(False), JBN(False)
    variables = theirs.init(jax.random.key(0), x)
    _, updated = theirs.apply(variables, x, mutable=["batch_stats"])
    saved = flax.serialization.to_bytes({**variables, **updated})
    loaded = flax.serialization.from_bytes(ours.init(jax.random.key(1), x), saved)
    close(loaded, {**variables, **updated}, 0)
    close(
        ours.clone(use_running_average=True).apply(loaded, x),
        theirs.clone(use_running_average=True).apply(loaded, x),
    )


@BOTH
def test_use_running_average_is_given_once(cls):
    x = draw((4, 3))
    with pytest.raises(ValueError, match="must be passed"):
        cls().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="just once"):
        cls(use_running_average=True).init(jax.random.key(0), x, use_running_average=True)


@BOTH
def test_training_needs_mutable_statistics(cls):
    x = draw((4, 3))
    variables = cls(False).init(jax.random.key(0), x)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        cls(False).apply(variables, x)


@BOTH
def test_init_ignores_the_axis_name(cls):
    x = draw((4, 3))
    layer = cls(False, axis_name="batch")
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    with pytest.raises(NameError, match="batch"):
        layer.apply(variables, x, mutable=["batch_stats"])


@BOTH
def test_axis_name(cls):
    x = draw((4, 5, 3))
    layer = cls(False, axis_name="batch", use_fast_variance=False)
    variables = as_float64(cls(False).init(jax.random.key(0), x[0]))
    apply = functools.partial(layer.apply, variables, mutable=["batch_stats"])
    y, updated = jax.vmap(apply, axis_name="batch")(x)
    whole = cls(False, use_fast_variance=False).apply(
        variables, x.reshape(-1, 3), mutable=["batch_stats"]
    )
    close(y.reshape(-1, 3), whole[0])
    close(jax.tree.map(lambda v: v[2], updated), whole[1])


@pytest.mark.parametrize("training", [True, False])
def test_activation_and_residual(training):
    x, residual = draw((6, 3)), draw((6, 3), 1)
    variables = as_float64(JBN(False).init(jax.random.key(0), x))
    fused, _ = JBN(not training, activation=jax.nn.relu).apply(
        variables, x, residual=residual, mutable=["batch_stats"]
    )
    plain, _ = JBN(not training).apply(variables, x, mutable=["batch_stats"])
    close(fused, jax.nn.relu(plain + residual))
    assert (fused == 0).any()


def train(layer, batches, **kwargs):
    variables = layer.init(jax.random.key(0), batches[0])
    for x in batches:
        _, updated = layer.apply(variables, x, mutable=["batch_stats"], **kwargs)
        variables = {**variables, **updated}
    return variables["batch_stats"]


def test_statistics_keep_their_dtype():
    stats = train(JBN(False), [draw((4, 3))] * 2)
    assert {v.dtype for v in stats.values()} == {jnp.dtype("float32")}


def test_complex_input():
    x = jax.lax.complex(draw((6, 3)), draw((6, 3), 1))
    layer = JBN(False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    assert variables["batch_stats"]["mean"].dtype == jnp.complex64
    _, updated = layer.apply(variables, x, mutable=["batch_stats"])
    close(updated["batch_stats"]["mean"], x.mean(0), 1e-6)
    y = layer.clone(use_running_average=True).apply({**variables, **updated}, x)
    expected = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    close(y, expected, 1e-6)


def test_batch_moments_are_handed_out():
    x = draw((6, 3))
    layer = JBN(False)
    variables = layer.init(jax.random.key(0), x)
    assert variables.keys() == {"params", "batch_stats"}
    _, updated = layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
    close(updated["batch_moments"]["moments"], jbn.moments(x), 0)
    _, updated = layer.apply(variables, x, mutable=["batch_stats"])
    assert updated.keys() == {"batch_stats"}

    named = ["params", "batch_stats", "batch_moments"]
    empty = layer.init(jax.random.key(0), x, mutable=named)["batch_moments"]["moments"]
    close(empty, jbn.Moments(*jnp.zeros((3, 3))), 0)

    for mutable in (True, flax.core.DenyList("params")):
        _, updated = layer.apply(variables, x, mutable=mutable)
        assert "batch_moments" not in updated


def test_batch_moments_inside_scanned_layers():
    """Each layer's own, stacked."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return JBN(False)(x) * 2 + 1, None

    layers = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0, "batch_moments": 0},
        split_rngs={"params": True},
        length=3,
    )()
    x = draw((6, 2))
    variables = layers.init(jax.random.key(0), x, None)
    _, updated = layers.apply(variables, x, None, mutable=["batch_stats", "batch_moments"])
    moments = updated["batch_moments"]["BatchNorm_0"]["moments"]
    assert moments.mean.shape == (3, 2)
    close(jax.tree.map(lambda v: v[0], moments), jbn.moments(x))
    close(moments.mean[1:], jnp.ones((2, 2)), 1e-9)


def test_cumulative_layer_takes_a_flax_checkpoint_at_inference():
    x = draw((6, 3))
    variables = FLAX(False).init(jax.random.key(0), x)
    y = JBN(True, momentum=None).apply(variables, x)
    close(y, FLAX(True).apply(variables, x))
    assert "count" in JBN(True, momentum=None).init(jax.random.key(0), x)["batch_stats"]


def test_replicated_statistics_under_shard_map():
    x = draw((8, 3))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = JBN(False, axis_name="d")
    variables = layer.init(jax.random.key(0), x)
    batch, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    y, updated = jax.shard_map(
        lambda v, x: layer.apply(v, x, mutable=["batch_stats"]),
        mesh=mesh,
        in_specs=(whole, batch),
        out_specs=(batch, whole),
    )(variables, x)
    close((y, updated), JBN(False).apply(variables, x, mutable=["batch_stats"]))


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_without_the_custom_rule(training):
    x = draw((6, 3))
    variables = as_float64(JBN(False).init(jax.random.key(0), x))

    def f(x, cls, **options):
        layer = cls(not training, **options)
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    ours = jax.jvp(functools.partial(f, cls=JBN, custom_vjp=False), (x,), (jnp.cos(x),))
    theirs = jax.jvp(functools.partial(f, cls=FLAX, use_fast_variance=False), (x,), (jnp.cos(x),))
    close(ours, theirs)


def test_kept_for_the_backward():
    """For bfloat16 input Flax's layer keeps two float32 arrays of its size, jbn's x alone."""
    x = jax.random.normal(jax.random.key(0), (16, 8), jnp.bfloat16)

    def kept(cls):
        layer = cls(False, dtype=jnp.bfloat16)
        variables = layer.init(jax.random.key(0), x)

        def f(x):
            return layer.apply(variables, x, mutable=["batch_stats"])[0]

        leaves = jax.tree.leaves(jax.vjp(f, x)[1])
        return [v.dtype.name for v in leaves if v.size >= x.size]

    assert kept(FLAX) == ["float32", "float32"]
    assert kept(JBN) == ["bfloat16"]


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_partitioning_metadata(box):
    """On parameters and statistics; kept by an update, and given the layers' axis by a scan."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            layer = JBN(
                False,
                scale_init=box(nn.initializers.ones, ("features",)),
                mean_init=box(nn.initializers.zeros, ("features",)),
                var_init=box(nn.initializers.ones, ("features",)),
            )
            return layer(x), None

    x = draw((6, 4))
    variables = Block().init(jax.random.key(0), x)
    (y, _), updated = Block().apply(variables, x, mutable=["batch_stats"])
    expected, stats = JBN(False).apply(
        JBN(False).init(jax.random.key(0), x), x, mutable=["batch_stats"]
    )
    close(y, expected)
    close(nn.unbox(updated["batch_stats"]["BatchNorm_0"]), stats["batch_stats"])
    spec = jax.sharding.PartitionSpec("features")
    for tree in (variables, updated):
        specs = nn.get_partition_spec(tree)["batch_stats"]["BatchNorm_0"]
        assert specs == {"mean": spec, "var": spec}
    specs = nn.get_partition_spec(variables)["params"]["BatchNorm_0"]
    assert specs == {"scale": spec, "bias": jax.sharding.PartitionSpec()}

    layers = nn.scan(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    variables = layers.init(jax.random.key(0), x)
    _, updated = layers.apply(variables, x, mutable=["batch_stats"])
    for tree in (variables, updated):
        specs = nn.get_partition_spec(tree)["batch_stats"]["BatchNorm_0"]
        assert specs["mean"] == jax.sharding.PartitionSpec("layers", "features")


def test_batch_norm_mask():
    """Parameters at the path of running statistics, in any nesting, Flax's layer too."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return FLAX(False, use_bias=False)(nn.Dense(3)(x))

    class Normalizer(nn.Module):
        """Statistics of its own, and a layer below them that is not batch norm's."""

        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, 3)
            var = self.variable("batch_stats", "var", jnp.ones, 3)
            gain = self.param("gain", nn.initializers.ones, (3,))
            return nn.LayerNorm()(gain * (x - mean.value) / var.value)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Normalizer(name="normalizer")(x)
            x = JBN(False, scale_init=nn.with_partitioning(nn.initializers.ones, ("f",)))(x)
            x = nn.LayerNorm(name="layer")(nn.Dense(3, name="dense")(x))
            return Inner(name="rest")(x)

    variables = Model().init(jax.random.key(0), draw((4, 3)))
    mask = jbn.linen.batch_norm_mask(variables)
    assert nn.unbox(mask) == {
        "BatchNorm_0": {"scale": True, "bias": True},
        "normalizer": {"gain": False, "LayerNorm_0": {"scale": False, "bias": False}},
        "layer": {"scale": False, "bias": False},
        "dense": {"kernel": False, "bias": False},
        "rest": {"Dense_0": {"kernel": False, "bias": False}, "BatchNorm_0": {"scale": True}},
    }
    decayed = jax.tree.map(lambda is_batch_norm: not is_batch_norm, mask)
    optimizer = optax.adamw(0.1, weight_decay=0.5, mask=decayed)
    params = variables["params"]
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    close(updates["dense"]["kernel"], -0.05 * params["dense"]["kernel"], 1e-6)
    for norm in (updates["BatchNorm_0"], updates["rest"]["BatchNorm_0"]):
        np.testing.assert_array_equal(nn.unbox(norm["scale"]), 0)
    alone = JBN(False).init(jax.random.key(0), draw((4, 3)))
    assert jbn.linen.batch_norm_mask(alone) == {"scale": True, "bias": True}
    with pytest.raises(ValueError, match="collections params and batch_stats, got params: pass"):
        jbn.linen.batch_norm_mask({"params": params})
