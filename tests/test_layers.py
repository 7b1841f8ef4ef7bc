"""What both Flax layers owe: running statistics, micro-batches, modes, dtypes, errors."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

# Each maker returns (params, stats, call), all functional, with
# call(params, stats, x, training=True, moments=None, **kwargs) -> (y, stats, moments).


def linen_layer(features, cls=jbn.linen.BatchNorm, **options):
    layer = cls(**options)
    collect = {"mutable": ["params", "batch_stats", "batch_moments"]} if cls is not FLAX[0] else {}
    sizes = features if isinstance(features, tuple) else (features,)
    variables = layer.init(jax.random.key(0), jnp.zeros((2, *sizes)), False, **collect)
    empty = variables.get("batch_moments")

    def call(params, stats, x, training=True, moments=None, **kwargs):
        y, updated = layer.apply(
            {"params": params, "batch_stats": stats, "batch_moments": moments or empty or {}},
            x,
            use_running_average=not training,
            mutable=["batch_stats", "batch_moments"],
            **kwargs,
        )
        return y, updated["batch_stats"], updated.get("batch_moments")

    return variables.get("params", {}), variables["batch_stats"], call


def nnx_layer(features, cls=jbn.nnx.BatchNorm, **options):
    graphdef, state = nnx.split(cls(features, rngs=nnx.Rngs(0), **options))

    def arrays(state, kind):
        return {name: v[...] for name, v in nnx.filter_state(state, kind).items()}

    def call(params, stats, x, training=True, moments=None, **kwargs):
        layer = nnx.merge(graphdef, state, copy=True)
        for name, value in {**params, **stats}.items():
            getattr(layer, name).set_value(value)
        forward = nnx.capture(layer, jbn.nnx.BatchMoments, init=moments)
        y, moments = forward(x, use_running_average=not training, **kwargs)
        return y, arrays(nnx.state(layer), nnx.BatchStat), moments

    return arrays(state, nnx.Param), arrays(state, nnx.BatchStat), call


FLAX = nn.BatchNorm, nnx.BatchNorm
LAYERS = pytest.mark.parametrize("make", [linen_layer, nnx_layer], ids=["linen", "nnx"])
WIDE = {  # running statistics in float64
    "mean_init": lambda key, shape, dtype: jnp.zeros(shape, jnp.float64),
    "var_init": lambda key, shape, dtype: jnp.ones(shape, jnp.float64),
}


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) * 2 + 1


def close(a, b, rtol=1e-12):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(lambda u, v: u.dtype == v.dtype or pytest.fail(f"{u.dtype} {v.dtype}"), a, b)


BATCHES = [draw((n, 3), n) + n for n in (7, 5, 1, 12, 3, 9, 8, 2, 6, 4)]


@LAYERS
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.0, 1.0, None])
def test_running_statistics_over_many_steps(make, momentum, unbiased):
    params, stats, call = make(3, momentum=momentum, unbiased=unbiased, **WIDE)
    mean, var, count = np.zeros(3), np.ones(3), 0
    for x in BATCHES:
        _, stats, _ = call(params, stats, x)
        x = np.asarray(x)
        has_var = not unbiased or len(x) > 1
        batch_var = x.var(0, ddof=int(unbiased)) if has_var else var
        if momentum is None and not has_var:
            continue  # one row has no unbiased variance and is no update
        weight = 1 / (count + 1) if momentum is None else 1 - momentum
        mean = mean + weight * (x.mean(0) - mean)
        var = var + weight * (batch_var - var)
        count += 1
        close(stats["mean"], mean)
        close(stats["var"], var)
    assert stats.keys() == ({"mean", "var", "count"} if momentum is None else {"mean", "var"})
    if momentum is None:
        np.testing.assert_array_equal(stats["count"], count)


BAD = {
    "infinite": (draw((5, 3)).at[2].set(jnp.inf), {}),
    "NaN": (draw((5, 3)).at[2].set(jnp.nan), {}),
    "empty": (jnp.zeros((0, 3)), {}),
    "masked": (draw((5, 3)), {"mask": jnp.zeros((5, 1), bool)}),
    "weights 0": (draw((5, 3)), {"mask": jnp.zeros((5, 1))}),
}


@LAYERS
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_batch_leaves_the_running_statistics(make, momentum, bad):
    params, stats, call = make(3, momentum=momentum)
    _, stats, _ = call(params, stats, BATCHES[0])
    x, kwargs = BAD[bad]
    y, after, _ = call(params, stats, x, **kwargs)
    same(after, stats)
    assert bool(jnp.isfinite(y).all()) == (bad not in ("infinite", "NaN"))  # nothing is hidden


@LAYERS
@pytest.mark.parametrize("bad", ["empty", "masked", "weights 0"])
def test_debug_nans_is_quiet_for_a_batch_without_elements(make, bad):
    x, kwargs = BAD[bad]
    params, stats, call = make(3, activation=jax.nn.relu)

    @jax.jit
    def step(params, x):
        def loss(params, x):
            y, after, _ = call(params, stats, x, **kwargs)
            return jnp.sum(y**2), after

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    with jax.debug_nans(True):
        _, after = step(params, x)
    same(after, stats)


@LAYERS
def test_an_overflowing_float16_step_leaves_the_running_statistics(make):
    """With a loss scale, and dx not finite: what the optimizer skips does not stay behind."""
    params, stats, call = make(3, dtype=jnp.float16)
    scale = jnp.float32(2.0**24)

    @jax.jit
    def step(params, stats, x):
        def loss(params):
            x_ = x * params["scale"].astype(jnp.float16) * 200  # inf in float16 for the large
            y, after, _ = call(params, stats, x_)
            return jnp.sum(y.astype(jnp.float32) ** 3) * scale, after

        return jax.grad(loss, has_aux=True)(params)

    x = BATCHES[0].astype(jnp.float16)
    _, stats = step(params, stats, x)
    grads, after = step(params, stats, x.at[0].set(1000))
    assert not all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    same(after, stats)
    assert all(bool(jnp.isfinite(v).all()) for v in stats.values())


@LAYERS
@pytest.mark.parametrize("momentum", [0.9, None])
def test_micro_batches_count_as_one_batch(make, momentum):
    """Of unequal sizes, one masked, one empty."""
    params, stats, call = make(3, momentum=momentum, **WIDE)
    _, stats, _ = call(params, stats, BATCHES[3])
    mask = jnp.arange(7)[:, None] % 3 > 0
    parts = [(BATCHES[0], {"mask": mask}), (BATCHES[1], {}), (jnp.zeros((0, 3)), {})]
    moments = None
    for x, kwargs in [*parts, (BATCHES[2], {})]:
        y, after, moments = call(params, stats, x, moments=moments, **kwargs)
    close(y, jnp.zeros((1, 3)))  # each by its own statistics
    whole = jnp.concatenate([BATCHES[0][mask[:, 0]], BATCHES[1], BATCHES[2]])
    _, expected, of_whole = call(params, stats, whole)
    close(after, expected)
    close(*(jax.tree.leaves(m) for m in (moments, of_whole)))


@LAYERS
def test_micro_batches_with_multi_steps_and_scan(make):
    """Three steps of four micro-batches: gradients by optax, moments in the carry of a scan."""
    params, stats, call = make(3, **WIDE)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)
    x, target = draw((12, 6, 3)), draw((12, 6, 3), 1)

    def loss(params, stats, moments, x, target):
        y, stats, moments = call(params, stats, x, moments=moments)
        return jnp.mean((y - target) ** 2), (stats, moments)

    def step(carry, batch):
        params, stats, moments, state = carry
        grads, (new_stats, moments) = jax.grad(loss, has_aux=True)(params, stats, moments, *batch)
        updates, state = optimizer.update(grads, state, params)
        done = optimizer.has_updated(state)
        stats = jax.tree.map(lambda a, b: jnp.where(done, a, b), new_stats, stats)
        moments = jax.tree.map(lambda m: jnp.where(done, 0, m), moments)
        return (optax.apply_updates(params, updates), stats, moments, state), stats["mean"]

    _, _, moments = jax.eval_shape(call, params, stats, x[0])
    moments = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), moments)
    start = params, stats, moments, optimizer.init(params)
    (after, after_stats, _, _), means = jax.jit(lambda c: jax.lax.scan(step, c, (x, target)))(start)

    for xs, targets in zip(x.reshape(3, 4, 6, 3), target.reshape(3, 4, 6, 3), strict=True):
        grad = jax.grad(lambda p, s, *b: loss(p, s, None, *b)[0])
        grads = jax.tree.map(
            lambda *g: sum(g) / 4,
            *(grad(params, stats, *batch) for batch in zip(xs, targets, strict=True)),
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        _, stats, _ = call(params, stats, xs.reshape(-1, 3))
    close(after, params, 1e-6)  # parameters are float32
    close(after_stats, stats)
    assert len(np.unique(means[:, 0])) == 4  # they move with each step, not with each micro-batch


@LAYERS
def test_normalizing_by_the_batch_without_an_update(make):
    x = BATCHES[0]
    params, stats, call = make(3)
    expected, moved, _ = call(params, stats, x)
    y, after, _ = call(params, stats, x, update_running_average=False)
    same((y, after), (expected, stats))
    assert (moved["mean"] != stats["mean"]).all()
    params, stats, call = make(3, update_running_average=False)
    y, after, moments = call(params, stats, x)
    same((y, after), (expected, stats))
    close(jax.tree.leaves(moments), list(jbn.moments(x)))
    _, after, _ = call(params, stats, x, update_running_average=True)
    same(after, moved)


def test_linen_without_an_update_needs_nothing_mutable():
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), BATCHES[0])
    y = layer.apply(variables, BATCHES[0], update_running_average=False)
    close(y.mean(0), np.zeros(3))
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        layer.apply(variables, BATCHES[0])
    cumulative = jbn.linen.BatchNorm(False, momentum=None, update_running_average=False)
    cumulative.apply(variables, BATCHES[0])  # a plain layer's statistics, without a count


@LAYERS
def test_parameters_are_trained_while_statistics_are_frozen(make):
    params, stats, call = make(3)
    _, stats, _ = call(params, stats, BATCHES[0])
    x, target = draw((6, 3), 1), draw((6, 3), 2)

    def loss(params, x):
        y, after, _ = call(params, stats, x, training=False)
        return jnp.sum((y - target) ** 2), after

    (grads, dx), after = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    same(after, stats)
    mean, var = (np.asarray(stats[k], np.float64) for k in ("mean", "var"))
    xhat = (x - mean) / np.sqrt(var + 1e-5)
    dy = 2 * (xhat - target)
    close(grads, {"scale": (dy * xhat).sum(0), "bias": dy.sum(0)}, 1e-6)
    close(dx, dy / np.sqrt(var + 1e-5), 1e-6)


@LAYERS
def test_weights(make):
    """Integer weights repeat rows."""
    x, weights = BATCHES[0], jnp.array([2, 0, 1, 3, 1, 0, 1])
    params, stats, call = make(3, unbiased=True, **WIDE)
    repeated = jnp.repeat(x, weights, axis=0)
    expected_y, expected, _ = call(params, stats, repeated)
    for mask in (weights[:, None], weights[:, None].astype(float)):
        y, after, _ = call(params, stats, x, mask=mask)
        close(after, expected)
        close(jnp.repeat(y, weights, axis=0), expected_y)


DTYPES = {
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16},
    "float16": {"dtype": jnp.float16, "param_dtype": jnp.float16},
    "neither": {},
}


@LAYERS
@pytest.mark.parametrize(
    ("x_dtype", "options"),
    [
        ("bfloat16", "neither"),
        ("bfloat16", "dtype"),
        ("bfloat16", "param_dtype"),
        ("float16", "float16"),
        ("float32", "dtype"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_output_dtypes(make, x_dtype, options, training):
    """Of Linen's layer. Flax's NNX layer says the same, but promotes to its statistics too."""
    promotes = options == "param_dtype"
    options, x = DTYPES[options], BATCHES[0].astype(x_dtype)
    params, stats, call = make(3, **options)
    y, after, _ = call(params, stats, x, training)
    flax_params, flax_stats, flax_call = linen_layer(3, FLAX[0], **options)
    expected, flax_after, _ = flax_call(flax_params, flax_stats, x, training)
    assert y.dtype == expected.dtype
    assert {v.dtype for v in after.values()} == {jnp.dtype("float32")}
    rounding = float(jnp.finfo(y.dtype).eps)
    close(np.float64(y), np.float64(expected), 20 * rounding)
    close(after, {k: v.astype(jnp.float32) for k, v in flax_after.items()}, 1e-2)
    of_nnx = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)(x, use_running_average=not training)
    assert of_nnx.dtype == (jnp.float32 if promotes else y.dtype)


@LAYERS
@pytest.mark.parametrize("options", DTYPES)
def test_half_precision_keeps_x_alone(make, options):
    x = draw((16, 8)).astype("float16" if options == "float16" else "bfloat16")
    params, stats, call = make(8, activation=jax.nn.relu, **DTYPES[options])
    kept = jax.tree.leaves(jax.vjp(lambda p, x: call(p, stats, x)[0], params, x)[1])
    (large,) = [v for v in kept if v.size >= x.size]
    same(large, x)


@LAYERS
def test_half_precision_statistics_are_not_rounded(make):
    """bfloat16, running mean 1000.3: x = 1001 would be 0 with the mean rounded to 1000."""
    params, _, call = make(1, dtype=jnp.bfloat16)
    stats = {"mean": jnp.full(1, 1000.3, jnp.float32), "var": jnp.ones(1, jnp.float32)}
    y, _, _ = call(params, stats, jnp.full((1, 1), 1000.0, jnp.bfloat16), training=False)
    np.testing.assert_allclose(np.float32(y), -0.3, rtol=1e-2)


@LAYERS
def test_feature_axes(make):
    x = draw((4, 2, 3))
    params, stats, call = make((2, 3), axis=(-1, 1), activation=jax.nn.relu, **WIDE)
    assert params["scale"].shape == stats["mean"].shape == (2, 3)
    y, after, _ = call(params, stats, x)
    expected, moments = jbn.batch_norm(x, axis=(1, 2), activation=jax.nn.relu)
    close(y, expected)
    close(after["mean"], 0.01 * moments.mean)


@LAYERS
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_another_width(make, training):
    """As from the checkpoint of another model: nothing broadcasts."""
    params, _, call = make(3)
    for width in (1, 4):
        stats = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
        with pytest.raises(ValueError, match=r"the running mean must have the shape .*\[7,3\]"):
            call(params, stats, BATCHES[0], training)


@LAYERS
def test_masks_and_axis_names_that_do_not_fit(make):
    params, stats, call = make(3)
    with pytest.raises(ValueError, match=r"mask must broadcast to x = float64\[7,3\]"):
        call(params, stats, BATCHES[0], mask=jnp.ones(7))
    with pytest.raises(ValueError, match="mask must be boolean, or hold finite weights"):
        call(params, stats, BATCHES[0], mask=-jnp.ones((7, 1)))
    with pytest.raises(TypeError, match="x must be floating point"):
        call(params, stats, jnp.ones((7, 3), int))
    params, stats, call = make(3, axis_name="batch")
    with pytest.raises(NameError, match="axis_name 'batch' is not bound"):
        call(params, stats, BATCHES[0])


def test_linen_without_batch_stats():
    layer = jbn.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), BATCHES[0])
    with pytest.raises(flax.errors.ScopeCollectionNotFound, match="batch_stats") as info:
        layer.apply({"params": variables["params"]}, BATCHES[0])
    assert "pass them on" in info.value.__notes__[0]


def test_nnx_arguments_that_do_not_fit():
    make = functools.partial(jbn.nnx.BatchNorm, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"num_features must be an int or ints, got float 3\.0"):
        make(3.0)
    for sizes, axis in ((3, (1, 2)), ((2, 3), -1), (-1, -1)):
        with pytest.raises(ValueError, match="num_features must hold the size of each feature"):
            make(sizes, axis=axis)
    with pytest.raises(ValueError, match=r"the running mean .*, \(3,\), got float32\[4\]"):
        make(4)(BATCHES[0])
    with pytest.raises(ValueError, match="use_running_average is given neither"):
        make(3, use_running_average=None)(BATCHES[0])


@LAYERS
@pytest.mark.parametrize("mask", [None, bool, float])
def test_features_sharded_over_an_explicit_mesh(make, mask):
    """The statistics start replicated, and stay so."""
    mesh = jax.make_mesh((2, 2), ("d", "f"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    x = draw((8, 4))
    mask = None if mask is None else jnp.arange(8)[:, None].astype(mask)
    params, stats, call = make(4)
    expected_y, expected, _ = call(params, stats, x, mask=mask)
    with jax.set_mesh(mesh):
        split = jax.sharding.PartitionSpec("d", "f")
        sharded = jax.device_put(x, jax.NamedSharding(mesh, split))
        whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params, stats = jax.device_put((params, stats), whole)
        y, after, _ = jax.jit(lambda p, s, x: call(p, s, x, mask=mask))(params, stats, sharded)
        if mask is not None:
            dx = jax.jit(jax.grad(lambda x: jnp.sum(jbn.moments(x, mask=mask).var ** 2)))(sharded)
            assert jax.typeof(dx).sharding.spec == split
    assert jax.typeof(after["mean"]).sharding.spec == jax.sharding.PartitionSpec(None)
    close(np.asarray(y), expected_y)
    close({k: np.asarray(v) for k, v in after.items()}, expected, 1e-6)
