"""What must hold for any data: r = 1 / sqrt(v + e), s = v r^2, per feature, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import jbn
from tests import cases

SHAPES = {
    "pair": cases.Case("pair", (2, 3)),
    "matrix": cases.Case("matrix", (9, 4)),
    "nchw": cases.Case("nchw", (2, 3, 4, 2), axis=1),
    "two axes": cases.Case("two axes", (3, 2, 4, 3), axis=(1, 3)),
}
EPSILONS = (1e-12, 1e-5, 1e-3, 0.5)
shapes = st.sampled_from(sorted(SHAPES)).map(SHAPES.get)
epsilons = st.sampled_from(EPSILONS)
seeds = st.integers(0, 2**31)


@functools.partial(jax.jit, static_argnames="axis")
def batch_norm(x, scale, bias, dy, axis, epsilon):
    """Outputs, moments and gradients; epsilon is traced, so each shape compiles once."""
    y, pull, moments = jax.vjp(
        lambda *a: jbn.batch_norm(*a, axis=axis, epsilon=epsilon), x, scale, bias, has_aux=True
    )
    return y, moments, *pull(dy)


class Quantities:
    """The symbols of the properties, for drawn arguments; feature arrays broadcast to x."""

    def __init__(self, case, epsilon, seed):
        args = cases.draw(case, seed=seed)
        self.args = [args[k] for k in ("x", "scale", "bias", "dy")]
        self.axis = case.axis
        self.epsilon = epsilon
        self.n = case.n
        self.x, _, _, self.dz = self.args
        out = batch_norm(*self.args, axis=case.axis, epsilon=epsilon)
        self.sum = functools.partial(np.sum, axis=case.reduced_axes, keepdims=True)
        wide = functools.partial(np.expand_dims, axis=case.reduced_axes)
        y, moments, dx, dscale, dbias = jax.tree.map(np.asarray, out)
        self.y, self.dx = y, dx
        self.scale, self.bias, self.dscale, self.dbias, self.u, self.v = map(
            wide, (self.args[1], self.args[2], dscale, dbias, moments.mean, moments.var)
        )
        self.r = 1 / np.sqrt(self.v + epsilon)
        self.s = self.v * self.r**2
        self.xhat = (self.x - self.u) * self.r
        self.terms = np.abs(self.scale * self.r * self.dz)  # dx is what cancels among these
        self.S = self.sum(self.dz)
        self.D = self.sum(self.dz * self.xhat)


def close(a, b, scale=1.0, rtol=1e-12):
    np.testing.assert_allclose(a, np.broadcast_to(b, np.shape(a)), rtol=rtol, atol=rtol * scale)


def size(*arrays):
    """The magnitude against which a cancelling sum is judged."""
    return max(float(np.max(np.abs(a))) for a in arrays)


drawn = st.builds(Quantities, shapes, epsilons, seeds)


@given(drawn)
def test_1_sums_of_dx(q):
    close(q.sum(q.dx), 0, size(q.sum(q.terms)))
    close(
        q.sum(q.dx * q.xhat),
        q.scale * q.r * q.D * q.epsilon / (q.v + q.epsilon),
        size(q.sum(q.terms * np.abs(q.xhat))),
    )


@given(drawn)
def test_2_norm_of_dx(q):
    f = (q.scale * q.r) ** 2
    expected = f * (q.sum(q.dz**2) - q.S**2 / q.n - (2 - q.s) * q.D**2 / q.n)
    close(q.sum(q.dx**2), expected, size(f * q.sum(q.dz**2)))


@functools.partial(jax.jit, static_argnames="custom_vjp")
def jacobian(x, scale, bias, epsilon, custom_vjp):
    """d y / d x as [N, N, C, C], by reverse or by forward mode."""
    transform = jax.jacrev if custom_vjp else jax.jacfwd
    j = transform(
        lambda x: jbn.batch_norm(x, scale, bias, epsilon=epsilon, custom_vjp=custom_vjp)[0]
    )(x)
    return jnp.moveaxis(j, 2, 1)


@given(st.sampled_from(["pair", "matrix"]).map(SHAPES.get), epsilons, seeds)
def test_3_jacobian(case, epsilon, seed):
    q = Quantities(case, epsilon, seed)

    args = (q.x, *q.args[1:3], epsilon)
    j = np.asarray(jacobian(*args, custom_vjp=True))
    factor = (q.scale * q.r).ravel()
    close(j, jacobian(*args, custom_vjp=False), size(factor))
    for c, f, s in zip(range(case.shape[1]), factor, q.s.ravel(), strict=True):
        block = j[:, :, c, c]
        close(block, block.T, f)
        expected = np.sort([0, f * (1 - s)] + [f] * (q.n - 2))
        close(np.linalg.eigvalsh((block + block.T) / 2), expected, f, rtol=1e-11)
    off_diagonal = j * (1 - np.eye(case.shape[1]))
    assert not off_diagonal.any()


@given(drawn, st.floats(0.25, 4), st.floats(-3, 3))
def test_4_affine_invariance(q, a, c):
    y, *_ = batch_norm(a * q.x + c, *q.args[1:], axis=q.axis, epsilon=q.epsilon)
    expected, *_ = batch_norm(*q.args, axis=q.axis, epsilon=q.epsilon / a**2)
    close(y, expected, size(q.r * (np.abs(q.x) + np.abs(c / a))), rtol=1e-11)


@functools.partial(jax.jit, static_argnames="axis")
def gradient_of_a_bias_before(x, scale, bias, dy, axis, epsilon):
    def loss(before):
        y, _ = jbn.batch_norm(x + before, scale, bias, axis=axis, epsilon=epsilon)
        return jnp.vdot(y, dy)

    zeros = jnp.zeros([1 if i != axis % x.ndim else n for i, n in enumerate(x.shape)])
    return jax.grad(loss)(zeros)


@given(drawn.filter(lambda q: isinstance(q.axis, int)))
def test_4_a_bias_before_has_no_gradient(q):
    db = gradient_of_a_bias_before(*q.args, axis=q.axis, epsilon=q.epsilon)
    close(db, 0, size(q.sum(q.terms)))


@given(drawn)
def test_5_gradient_along_x(q):
    expected = q.scale * q.D * q.epsilon / (q.v + q.epsilon)
    close(q.sum(q.x * q.dx), expected, size(q.sum(np.abs(q.x) * q.terms)))


@given(drawn)
def test_6_moments_of_y(q):
    expected = q.scale * q.dscale + q.bias * q.dbias
    close(q.sum(q.y * q.dz), expected, size(q.sum(np.abs(q.y * q.dz))))
    close(q.sum(q.y) / q.n, q.bias, size(q.y))
    close(q.sum((q.y - q.bias) ** 2) / q.n, q.scale**2 * q.s, size(q.y) ** 2)
    close(q.dscale, q.D, size(q.sum(np.abs(q.dz * q.xhat))))
    close(q.dbias, q.S)


@given(st.integers(1, 5), seeds, st.sampled_from(["float32", "float64"]))
def test_7_batch_of_one(channels, seed, dtype):
    args = cases.draw(cases.Case("one", (1, channels)), dtype, seed)
    args = [args[k].astype(dtype) for k in ("x", "scale", "bias", "dy")]
    y, moments, dx, dscale, dbias = batch_norm(*args, axis=-1, epsilon=1e-5)
    np.testing.assert_array_equal(y[0], args[2])
    np.testing.assert_array_equal(moments.mean, args[0][0])
    np.testing.assert_array_equal(moments.var, 0)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dscale, 0)
    np.testing.assert_array_equal(dbias, args[3][0])


@given(
    st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    st.floats(-1, 1).filter(bool),
    st.floats(-0.95, 0.95),
    st.sampled_from([0.0, 1e-5]),
)
def test_7_constant_feature(dtype, mantissa, exponent, epsilon):
    finfo = jnp.finfo(dtype)
    largest = float(np.log10(float(finfo.max)))
    value = jnp.asarray(mantissa * 10.0 ** (exponent * largest), dtype)
    scale, bias = jnp.array([2.0]), jnp.array([-0.75])
    dy = jnp.linspace(-1, 1, 7).reshape(7, 1).astype(dtype)
    y, moments, *grads = batch_norm(
        jnp.full((7, 1), value), scale, bias, dy, axis=-1, epsilon=epsilon
    )
    np.testing.assert_array_equal(y, -0.75)
    assert moments.var == 0
    assert moments.mean == value.astype(moments.mean.dtype)
    assert all(np.isfinite(np.asarray(g, np.float64)).all() for g in grads)


@given(drawn, seeds)
def test_8_order_and_repetition(q, seed):
    order = np.random.default_rng(seed).permutation(len(q.x))
    shuffled = [q.x[order], *q.args[1:3], q.dz[order]]
    y, _, dx, *_ = batch_norm(*shuffled, axis=q.axis, epsilon=q.epsilon)
    close(y, q.y[order], size(q.y))
    close(dx, q.dx[order], size(q.terms))
    twice = [np.concatenate([v, v]) for v in (q.x, q.dz)]
    y, moments, *_ = batch_norm(twice[0], *q.args[1:3], twice[1], axis=q.axis, epsilon=q.epsilon)
    close(y, np.concatenate([q.y, q.y]), size(q.y))
    close(moments.var, q.v.reshape(moments.var.shape))


@given(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=5), seeds)
def test_9_merging_shards(sizes, seed):
    rng = np.random.default_rng(seed)
    shards = [rng.normal(size=(n, 3)) * 2 + 5 * rng.normal(size=3) for n in sizes]
    merged = functools.reduce(jbn.merge_moments, map(jbn.moments, shards))
    whole = jbn.moments(np.concatenate(shards))
    for a, b in zip(merged, whole, strict=True):
        close(a, b, 10)


@given(st.sampled_from(["matrix", "nchw"]).map(SHAPES.get), seeds, st.sampled_from([0.1, 0.5, 1]))
def test_9_a_mask_deletes(case, seed, share):
    args = cases.draw(case, seed=seed)
    keep = np.random.default_rng(seed).random(len(args["x"])) < share
    garbage = np.where(keep.reshape(-1, *[1] * (args["x"].ndim - 1)), args["x"], np.nan)
    masked = jbn.moments(
        garbage, axis=case.axis, mask=keep.reshape(-1, *[1] * (args["x"].ndim - 1))
    )
    deleted = jbn.moments(args["x"][keep], axis=case.axis)
    for a, b in zip(masked, deleted, strict=True):
        close(a, b, 10)


@given(st.integers(1, 20), st.floats(0, 1), seeds)
def test_10_running_statistics(steps, momentum, seed):
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=3), rng.random(3)
    running = jbn.RunningStats(jnp.zeros(3), jnp.ones(3), jnp.zeros(3))
    batch = jbn.Moments(jnp.asarray(mean), jnp.asarray(var), jnp.full(3, 8.0))
    for _ in range(steps):
        running = jbn.update_running_stats(running, batch, momentum=momentum)
    left = momentum**steps
    close(running.mean, left * 0 + (1 - left) * mean, 1, 1e-11)
    close(running.var, left * 1 + (1 - left) * var, 1, 1e-11)
    np.testing.assert_array_equal(running.count, steps)


@given(st.integers(1, 20), seeds)
def test_10_cumulative_average(steps, seed):
    rng = np.random.default_rng(seed)
    means, variances = rng.normal(size=(steps, 3)), rng.random((steps, 3))
    running = jbn.RunningStats(jnp.full(3, 7.0), jnp.full(3, 7.0), jnp.zeros(3))
    for mean, var in zip(means, variances, strict=True):
        batch = jbn.Moments(jnp.asarray(mean), jnp.asarray(var), jnp.full(3, 8.0))
        running = jbn.update_running_stats(running, batch, momentum=None)
    close(running.mean, means.mean(0), 1, 1e-11)
    close(running.var, variances.mean(0), 1, 1e-11)


@given(drawn)
def test_11_inference_by_the_batchs_own_moments(q):
    moments = jbn.moments(q.x, axis=q.axis)

    def inference(x, mean, var, scale, bias):
        return jbn.batch_norm_inference(x, mean, var, scale, bias, axis=q.axis, epsilon=q.epsilon)

    y, pull = jax.vjp(inference, q.x, moments.mean, moments.var, *q.args[1:3])
    dx, dmean, dvar, dscale, dbias = pull(jnp.asarray(q.dz))
    flat = moments.mean.shape
    close(y, q.y, size(q.y))
    close(dx, q.scale * q.r * q.dz, size(dx))
    close(dmean, (-q.scale * q.r * q.S).reshape(flat), size(dmean))
    close(dvar, (-q.scale * q.r**2 * q.D / 2).reshape(flat), size(dvar))
    close(dscale, q.D.reshape(flat), size(q.sum(np.abs(q.dz * q.xhat))))
    close(dbias, q.S.reshape(flat))
