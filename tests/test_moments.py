"""Moments: accuracy on hard data, edges, and the running statistics made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import implementations

PLATFORMS = ["default", "cpu", "gpu"]


@functools.cache
def compiled_variance(platform, shape):
    with implementations.lowered_for(platform):
        x = jax.ShapeDtypeStruct(shape, "float32")
        return jax.jit(lambda x: jbn.moments(x).var).lower(x).compile()


def relative_error(platform, x):
    """Of the variance of float32 values, against float64 of the same values."""
    var = np.asarray(compiled_variance(platform, x.shape)(x), np.float64)
    exact = np.asarray(x, np.float64).var(0)
    return np.max(np.abs(var - exact) / exact)


def normal(n, mean, std, seed=0, channels=4):
    return (np.random.default_rng(seed).normal(size=(n, channels)) * std + mean).astype("float32")


@pytest.fixture(params=PLATFORMS)
def lowering(request):
    with implementations.lowered_for(request.param):
        yield


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("n", [64, 1000, 100_352])
@pytest.mark.parametrize(
    ("mean", "std"),
    [(0, 1), (1000, 1), (3000, 0.01), (1e5, 1), (1e6, 1), (-1e6, 1), (1e-12, 1e-13), (1e10, 1e9)],
)
def test_variance_of_normal_data(platform, n, mean, std):
    assert relative_error(platform, normal(n, mean, std)) < 1e-6


def outlier_first(x):
    x[0] = 1e4


def outliers_in_the_sample(x):
    x[::64] += 1e3


def leading_zeros(x):
    x += 100
    x[: len(x) // 2] = 0


def one_huge_value(x):
    x[len(x) // 3] = 1e15


def sorted_data(x):
    x.sort(axis=0)


ADVERSARIAL = (
    outlier_first,
    outliers_in_the_sample,
    leading_zeros,
    one_huge_value,
    sorted_data,
)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("n", [64, 4096, 100_352])
@pytest.mark.parametrize("spoil", ADVERSARIAL)
def test_variance_of_adversarial_data(platform, n, spoil):
    x = normal(n, 0, 1)
    spoil(x)
    assert relative_error(platform, x) < 5e-5


def test_variance_under_a_mask_is_as_accurate():
    x = normal(4096, 3000, 0.01)
    mask = np.arange(4096)[:, None] % 64 == 5  # none of the rows that a sample would take
    var = jbn.moments(x, mask=mask).var
    exact = x[mask[:, 0]].astype("float64").var(0)
    np.testing.assert_allclose(var, exact, rtol=1e-6)


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_output_far_from_zero(dtype):
    """The mean is not rounded before it is subtracted."""
    x = jnp.asarray(normal(4096, 3000, 0.01 if dtype == "float32" else 30), dtype)
    y, _ = jax.jit(jbn.batch_norm)(x)
    wide = np.asarray(x, np.float64)
    exact = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    rounding = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2 * np.abs(exact).max()
    assert np.max(np.abs(np.asarray(y, np.float64) - exact)) < 1e-4 + rounding


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("activation", [None, jax.nn.gelu])
def test_gradients_far_from_zero(activation):
    rng = np.random.default_rng(1)
    wide = [normal(4096, 3000, 0.01, channels=3), rng.uniform(1, 2, 3), rng.normal(size=3)]
    wide.append(1 + rng.normal(size=wide[0].shape))  # so that the sum of dy is large

    @jax.jit
    def gradients(x, scale, bias, dy):
        f = functools.partial(jbn.batch_norm, activation=activation)
        return jax.vjp(lambda *args: f(*args)[0], x, scale, bias)[1](dy)

    exact = gradients(*(jnp.asarray(v, "float64") for v in wide))
    found = gradients(*(jnp.asarray(v, "float32") for v in wide))
    for name, a, b in zip(("dx", "dscale", "dbias"), found, exact, strict=True):
        error = np.abs(np.asarray(a, "float64") - b).max() / np.abs(b).max()
        assert error < 2e-5, (name, error)


def test_split_batch_far_from_zero_is_as_accurate():
    x = normal(4096, 3000, 0.01)
    f = jax.vmap(lambda x: jbn.batch_norm(x, axis_name="d")[0], axis_name="d")
    y = f(x.reshape(8, 512, 4)).reshape(x.shape)
    wide = x.astype("float64")
    exact = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    assert np.max(np.abs(np.asarray(y, np.float64) - exact)) < 1e-4


@pytest.mark.usefixtures("lowering")
def test_overflow_is_inf_and_never_nan():
    x = np.array([[1e30, 1], [-1e30, 2], [3e30, 3]], np.float32)
    y, moments = jbn.batch_norm(x, jnp.full(2, 2, "float32"), jnp.full(2, 0.5, "float32"))
    np.testing.assert_array_equal(moments.var, np.array([np.inf, 2 / 3], np.float32))
    assert np.isfinite(moments.mean).all()
    np.testing.assert_array_equal(y[:, 0], 0.5)
    grad = jax.grad(lambda x: jnp.sum(jbn.batch_norm(x)[0] ** 2))(jnp.asarray(x))
    np.testing.assert_array_equal(grad[:, 0], 0)
    assert np.isfinite(grad).all()


@pytest.mark.usefixtures("lowering")
def test_overflow_far_from_the_sampled_elements():
    """Both squares are infinite here, that of the elements and that of the shift's offset."""
    x = np.full((64, 1), 1e30, np.float32)
    x[::4] = 0
    y, moments = jbn.batch_norm(x)
    assert moments.var[0] == np.inf
    np.testing.assert_allclose(moments.mean[0], 7.5e29, rtol=1e-6)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_first_element_close_to_the_mean_but_far_in_standard_deviations(platform):
    x = np.full((100_000, 2), 1e6, np.float32)
    x[::10_000] += 0.0625
    x[0] = 1e6 + 0.875
    assert relative_error(platform, x) < 5e-5


@pytest.mark.usefixtures("lowering")
def test_constant_features_are_exact():
    """At any magnitude, also where the sum of the sample would be rounded."""
    rng = np.random.default_rng(0)
    value = (rng.uniform(1, 2, 100) * 10.0 ** rng.uniform(-30, 30, 100)).astype("float32")
    y, moments = jbn.batch_norm(np.broadcast_to(value, (1000, 100)), bias=-value)
    np.testing.assert_array_equal(moments.var, 0)
    np.testing.assert_array_equal(moments.mean, value)
    np.testing.assert_array_equal(y, np.broadcast_to(-value, y.shape))


@pytest.mark.parametrize("value", [0.1, 1234.567, 1e6 / 3, 1e17 / 7])
def test_constant_feature_under_a_mask(value):
    """The shift is rounded, so all differences are one tiny number: var must not fall below 0."""
    x = np.full((1001, 50), value, np.float32)
    mask = np.random.default_rng(0).random((1001, 50)) < 0.7
    y, moments = jax.jit(lambda x, mask: jbn.batch_norm(x, epsilon=1e-12, mask=mask))(x, mask)
    assert (moments.var >= 0).all()
    np.testing.assert_allclose(moments.mean, x[0], rtol=1e-6)
    np.testing.assert_allclose(moments.var, 0, atol=(1e-6 * value) ** 2)
    assert np.isfinite(y).all()


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("masked", [False, True])
def test_sums_that_overflow(masked):
    """Finite values whose sums and differences are infinite: y is still the bias."""
    scale, bias = jnp.array([2.0], jnp.float32), jnp.array([0.5], jnp.float32)
    mask = np.ones((64, 1), bool) if masked else None

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def f(x, scale, bias):
        y, moments = jbn.batch_norm(x, scale, bias, mask=mask)
        return jnp.sum(y * jnp.sign(x)), (y, moments)

    for values in ((3e38, 2e38), (3e38, -3e38), (-3e38, 3e38), (1e30, -1e30)):
        x = np.array(values * 32, np.float32)[:, None]
        grads, (y, moments) = f(x, scale, bias)
        assert np.isfinite(moments.mean[0]), values
        assert moments.var[0] == np.inf, values
        np.testing.assert_array_equal(y, 0.5, f"{values}")
        np.testing.assert_array_equal(grads[0], 0, f"{values}")
        np.testing.assert_array_equal(grads[1], 0, f"{values}")
        np.testing.assert_allclose(grads[2], np.sum(np.sign(x)), err_msg=f"{values}")


@pytest.mark.usefixtures("lowering")
def test_overflow_under_debug_nans():
    with jax.debug_nans(True):
        y, _ = jbn.batch_norm(jnp.array([[1e30], [-1e30], [1.0]], jnp.float32))
    np.testing.assert_array_equal(y, 0)


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("masked", [False, True])
def test_sample_whose_sum_overflows(masked):
    """Its partial sums are infinite, of both signs too, whose own sum is NaN."""
    for second in (0, -3e38):
        x = np.zeros((4096, 1), np.float32)
        x[1:2048], x[2048:] = 3e38, second
        y, moments = jbn.batch_norm(x, mask=np.ones((4096, 1), bool) if masked else None)
        assert -3e38 <= moments.mean[0] <= 3e38, second
        assert moments.var[0] == np.inf, second
        np.testing.assert_array_equal(y, 0, f"{second}")


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_show(value):
    x = normal(256, 0, 1)
    x[3, 1] = value
    y, moments = jbn.batch_norm(x)
    assert not np.isfinite(moments.var[1])
    assert np.isnan(y[3, 1])
    assert np.isfinite(y[:, [0, 2, 3]]).all()


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("custom_vjp", [True, False])
def test_zero_variance_without_epsilon(custom_vjp):
    def f(x):
        y, _ = jbn.batch_norm(x, epsilon=0.0, custom_vjp=custom_vjp)
        return jnp.sum(y**3), y

    grad, y = jax.grad(f, has_aux=True)(jnp.array([[1.0, 2.0], [1.0, 4.0]]))
    np.testing.assert_array_equal(y, [[0, -1], [0, 1]])
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("custom_vjp", [True, False])
def test_no_valid_element(custom_vjp):
    """y = activation(bias + residual), and the gradient is theirs alone."""
    x, residual = jnp.ones((3, 2)), jnp.array([[-1.0, 1], [2, -3], [4, 5]])
    bias = jnp.array([0.5, -0.5])
    mask = jnp.zeros((3, 1), bool)

    def f(x, bias, residual):
        y, moments = jbn.batch_norm(
            x,
            bias=bias,
            mask=mask,
            residual=residual,
            activation=jax.nn.relu,
            custom_vjp=custom_vjp,
        )
        return jnp.sum(y), (y, moments)

    grads, (y, moments) = jax.grad(f, (0, 1, 2), has_aux=True)(x, bias, residual)
    z = residual + bias[None]
    np.testing.assert_array_equal(y, jnp.maximum(z, 0))
    assert [float(jnp.sum(jnp.abs(m))) for m in moments] == [0, 0, 0]
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_array_equal(grads[2], z > 0)
    np.testing.assert_array_equal(grads[1], (z > 0).sum(0))


@pytest.mark.parametrize("shape", [(0, 4), (0, 2, 3), (3, 0), (2, 0, 0)])
def test_zero_size(shape):
    y, moments = jbn.batch_norm(jnp.zeros(shape), jnp.ones(shape[-1:]), jnp.ones(shape[-1:]))
    assert y.shape == shape
    for m in moments:
        np.testing.assert_array_equal(
            m, np.full(shape[-1], 0 if m is not moments.count else np.prod(shape[:-1]))
        )


def test_merging_empty_moments():
    """What an empty set holds does not count, nor how far its mean lies from the other."""
    zeros = jnp.zeros(2)
    empty = jbn.Moments(zeros, zeros, zeros)
    spoiled = jbn.Moments(jnp.full(2, jnp.nan), jnp.full(2, jnp.inf), zeros)
    some = jbn.moments(jnp.array([[1.0, 1e200], [3.0, 1e200]]))
    for nothing in (empty, spoiled):
        for merged in (jbn.merge_moments(nothing, some), jbn.merge_moments(some, nothing)):
            for a, b in zip(merged, some, strict=True):
                np.testing.assert_array_equal(a, b)
        for m in jbn.merge_moments(nothing, nothing):
            np.testing.assert_array_equal(m, 0)
    grad = jax.grad(lambda m: jnp.sum(jbn.merge_moments(empty, m).var))(some)
    np.testing.assert_array_equal(grad.var, 1)


def test_merged_moments_are_differentiable():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)))

    def merged(x):
        return jbn.merge_moments(jbn.moments(x[:3]), jbn.moments(x[3:]))

    grads = jax.jit(jax.jacrev(lambda x: merged(x)[:2]))(x)
    expected = jax.jit(jax.jacrev(lambda x: (x.mean(0), x.var(0))))(x)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15), grads, expected
    )


def test_merging_keeps_the_wider_dtype():
    narrow = jbn.moments(normal(8, 1, 1))
    wide = jbn.moments(normal(8, 1, 1, seed=1).astype("float64"))
    assert jbn.merge_moments(narrow, wide).mean.dtype == np.float64
    assert jbn.merge_moments(narrow, narrow).count.dtype == np.float32


# Running statistics


def running(mean=0.0, var=1.0, count=0.0, dtype=jnp.float64):
    return jbn.RunningStats(*(jnp.full(3, v, dtype) for v in (mean, var, count)))


def batch(mean=(1.0, 2, 3), var=(1.0, 4, 9), count=(10.0, 10, 10)):
    return jbn.Moments(*(jnp.array(v, jnp.float64) for v in (mean, var, count)))


def test_momentum_weights_the_old_value():
    new = jbn.update_running_stats(running(), batch(), momentum=0.9)
    np.testing.assert_allclose(new.mean, [0.1, 0.2, 0.3], rtol=1e-15)
    np.testing.assert_allclose(new.var, [1.0, 1.3, 1.8], rtol=1e-15)
    np.testing.assert_array_equal(new.count, 1)


def test_torchs_formula():
    """torch.nn.BatchNorm1d: running = (1 - m) running + m observed, the variance unbiased."""
    x = np.random.default_rng(0).normal(size=(7, 3)) + 2
    scale, bias, m = np.array([1.0, 2, 3]), np.array([0.5, 0, -1]), 0.1
    y, moments = jbn.batch_norm(x, scale, bias)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0, ddof=0) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    new = jbn.update_running_stats(running(0.3, 2.0), moments, momentum=1 - m, unbiased=True)
    np.testing.assert_allclose(new.mean, (1 - m) * 0.3 + m * x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(new.var, (1 - m) * 2.0 + m * x.var(0, ddof=1), rtol=1e-12)
    y = jbn.batch_norm_inference(x, new.mean, new.var, scale, bias)
    expected = (x - np.asarray(new.mean)) / np.sqrt(np.asarray(new.var) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("unbiased", [False, True])
def test_guard(momentum, unbiased):
    old = running(5.0, 6.0, 3.0)
    bad = batch((np.nan, 0, 1), (1, 0, np.inf), (4, 0, 4))
    new = jbn.update_running_stats(old, bad, momentum=momentum, unbiased=unbiased)
    for a, b in zip(new, old, strict=True):
        np.testing.assert_array_equal(a, b)
    half = batch((np.nan, 0, 1), (1, 0, 2), (4, 0, 4))
    new = jbn.update_running_stats(old, half, momentum=momentum, unbiased=unbiased)
    np.testing.assert_array_equal(new.mean[:2], 5)
    np.testing.assert_array_equal(new.count, [3, 3, 4])
    assert new.mean[2] < 5


def test_guard_off():
    bad = batch((np.nan, 0, 1), (1, 0, np.inf), (4, 0, 4))
    new = jbn.update_running_stats(running(5.0, 6.0), bad, momentum=0.5, guard=False)
    np.testing.assert_array_equal(new.mean, [np.nan, 2.5, 3])
    np.testing.assert_array_equal(new.var, [3.5, 3, np.inf])
    np.testing.assert_array_equal(new.count, 1)


@pytest.mark.parametrize("guard", [False, True])
def test_unbiased_variance_of_one_element(guard):
    """It does not exist: the running variance stays; momentum still takes the mean."""
    one = batch(var=(0.0, 0, 4), count=(1.0, 1, 2))
    new = jbn.update_running_stats(running(), one, momentum=0.5, unbiased=True, guard=guard)
    np.testing.assert_array_equal(new.mean, [0.5, 1, 1.5])
    np.testing.assert_array_equal(new.var, [1, 1, 4.5])
    new = jbn.update_running_stats(
        running(7.0, 7.0), one, momentum=None, unbiased=True, guard=guard
    )
    np.testing.assert_array_equal(new.mean, [7, 7, 3])
    np.testing.assert_array_equal(new.var, [7, 7, 8])
    np.testing.assert_array_equal(new.count, [0, 0, 1])


def test_the_first_cumulative_update_takes_the_batch():
    """Exactly: a variance far below the 1 that it starts from too."""
    small = batch(var=(1e-9, 1e-30, 1e9))
    new = jbn.update_running_stats(running(dtype=jnp.float32), small, momentum=None)
    np.testing.assert_array_equal(new.var, np.float32([1e-9, 1e-30, 1e9]))


def test_guard_sees_what_overflows_in_the_stored_dtype():
    big = batch(var=(1e8, 1, 1))
    new = jbn.update_running_stats(running(dtype=jnp.float16), big, momentum=0.5)
    np.testing.assert_array_equal(new.mean, [0, 1, 1.5])
    np.testing.assert_array_equal(new.var, 1)
    np.testing.assert_array_equal(new.count, [0, 1, 1])


def test_momentum_may_be_a_numpy_scalar():
    for scalar in (np.float64(0.5), np.float32(0.5), jnp.float32(0.5)):
        new = jbn.update_running_stats(running(dtype=jnp.float32), batch(), momentum=scalar)
        np.testing.assert_array_equal(new.mean, [0.5, 1, 1.5])


@pytest.mark.parametrize("momentum", [0.9, None])
def test_stored_dtypes_are_kept(momentum):
    for dtype in (jnp.float32, jnp.bfloat16):
        new = jbn.update_running_stats(running(dtype=dtype), batch(), momentum=momentum)
        assert [v.dtype for v in new] == [dtype] * 3


@pytest.mark.parametrize("momentum", [0.9, None])
def test_complex_mean(momentum):
    x = jax.lax.complex(*jnp.ones((2, 4, 3)))
    old = jbn.RunningStats(jnp.zeros(3), jnp.ones(3), jnp.zeros(3))
    new = jbn.update_running_stats(old, jbn.moments(x), momentum=momentum)
    weight = 1 if momentum is None else 0.1
    np.testing.assert_allclose(new.mean, np.full(3, weight * (1 + 1j)), rtol=1e-15)
    assert new.var.dtype == np.float64


def test_momentum_may_be_traced():
    f = jax.jit(lambda m: jbn.update_running_stats(running(), batch(), momentum=m))
    for a, b in zip(
        f(0.7), jbn.update_running_stats(running(), batch(), momentum=0.7), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-15)


def test_gradients_are_stopped():
    def f(running, batch):
        return sum(jnp.sum(v) for v in jbn.update_running_stats(running, batch))

    for g in jax.tree.leaves(jax.grad(f, (0, 1))(running(), batch())):
        np.testing.assert_array_equal(g, 0)


def test_integer_weights_do_not_wrap():
    """Their sum passes 2^31."""
    x = normal(5000, 5, 1)
    for mask in (np.full((5000, 1), 2**20, np.int32), np.full((5000, 1), 255, np.uint8)):
        m = jbn.moments(x, mask=mask)
        plain = jbn.moments(x)
        np.testing.assert_allclose(m.mean, plain.mean, rtol=1e-6)
        np.testing.assert_allclose(m.var, plain.var, rtol=1e-5)
        np.testing.assert_allclose(m.count, 5000 * float(mask[0, 0]), rtol=1e-6)


def test_weights_below_two_elements_have_no_unbiased_variance():
    """Normalized weights sum to 1, give or take a rounding."""
    start = jbn.RunningStats(jnp.zeros(1), jnp.ones(1), jnp.zeros(1))
    for total in (1 - 1e-7, 1 + 1e-7, 1.5):
        m = jbn.Moments(jnp.ones(1), jnp.full(1, 3.0), jnp.full(1, total))
        after = jbn.update_running_stats(start, m, momentum=0.5, unbiased=True)
        np.testing.assert_array_equal(after.var, 1)
        np.testing.assert_array_equal(after.mean, 0.5)


@pytest.mark.parametrize("dtype", [bool, float])
def test_second_derivative_beside_a_masked_nan(dtype):
    x, mask = jnp.array([[1.0], [2.0], [4.0], [jnp.nan]]), jnp.array([[1], [1], [1], [0]], dtype)

    def f(x, mask, custom_vjp):
        moments = jbn.batch_norm(x, mask=mask, custom_vjp=custom_vjp)[1]
        return jnp.sum(moments.var**2)

    @functools.partial(jax.jit, static_argnames="custom_vjp")
    def second(x, mask=None, custom_vjp=True):
        return jax.grad(lambda x: jnp.sum(jax.grad(f)(x, mask, custom_vjp) ** 2))(x)

    expected = second(x[:3])
    for custom_vjp in (True, False):
        actual = second(x, mask, custom_vjp=custom_vjp)
        np.testing.assert_allclose(actual[:3], expected, rtol=1e-12)
        np.testing.assert_array_equal(actual[3], 0)
