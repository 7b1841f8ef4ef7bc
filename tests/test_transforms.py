"""JAX's transformations, composed: gradients of all orders, vmap, scan, jit, devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import jbn
from tests import cases, implementations, oracle

pytestmark = pytest.mark.quick_compile

CASE = cases.Case("everything", (4, 3, 2), mask=(4, 1, 2), residual=True, activation=jnp.tanh)
NAMES = ("x", "scale", "bias", "residual")
ARGS = cases.draw(CASE)
DIFF = tuple(jnp.asarray(ARGS[k]) for k in NAMES)


def batch_norm(x, scale, bias, residual=None, **options):
    options = {"mask": ARGS["mask"], "activation": jnp.tanh, **options}
    return jbn.batch_norm(x, scale, bias, residual=residual, **options)


def loss(*diff, **options):
    """A scalar that depends on y, on the mean and on the variance."""
    y, moments = batch_norm(*diff, **options)
    weight = jnp.asarray(ARGS["dy"]).astype(y.dtype)
    return jnp.sum(weight * y**2) + jnp.sum(jnp.sin(moments.mean) * moments.var)


plain = functools.partial(loss, custom_vjp=False)


def naive(*diff):
    """The same scalar from the oracle, for derivatives of any order."""
    y, mean, var, _ = oracle.batch_norm(CASE, {**ARGS, **dict(zip(NAMES, diff, strict=True))}, jnp)
    return jnp.sum(jnp.asarray(ARGS["dy"]) * y**2) + jnp.sum(jnp.sin(mean) * var)


def close(actual, expected, rtol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("argnum", range(4), ids=NAMES)
def test_numerical_gradients(argnum):
    def f(v):
        return loss(*DIFF[:argnum], v, *DIFF[argnum + 1 :])

    chex.assert_numerical_grads(
        jax.jit(f), (DIFF[argnum],), order=1, atol=1e-7, rtol=1e-7, modes=["rev"]
    )


@pytest.mark.parametrize("argnum", range(5), ids=("x", "mean", "var", "scale", "bias"))
def test_numerical_gradients_of_inference(argnum):
    args = [DIFF[0], jnp.array([0.3, 3.0]), jnp.array([0.5, 2.0]), *DIFF[1:3]]

    def f(v):
        y = jbn.batch_norm_inference(*args[:argnum], v, *args[argnum + 1 :], activation=jnp.tanh)
        return jnp.sum(jnp.asarray(ARGS["dy"]) * y**2)

    chex.assert_numerical_grads(
        jax.jit(f), (args[argnum],), order=1, atol=1e-7, rtol=1e-7, modes=["rev"]
    )


def test_check_grads():
    check = functools.partial(jax.test_util.check_grads, args=DIFF, atol=1e-5, rtol=1e-5)
    check(jax.jit(loss), order=2, modes=["rev"])
    check(jax.jit(plain), order=2, modes=["fwd", "rev"])


def test_first_order():
    every = tuple(range(4))
    expected = jax.jit(jax.grad(naive, every))(*DIFF)
    value, grads = jax.value_and_grad(loss, every)(*DIFF)
    close(grads, expected)
    close(value, naive(*DIFF))
    out, pull = jax.vjp(loss, *DIFF)
    close(pull(jnp.ones_like(out)), expected)
    close(jax.jit(jax.grad(plain, every))(*DIFF), expected)


@pytest.mark.parametrize("argnum", range(4), ids=NAMES)
def test_second_order(argnum):
    def hessian(f):
        return jax.jit(jax.hessian(f, argnum))(*DIFF)

    expected = hessian(naive)
    close(hessian(loss), expected, 1e-11)
    close(jax.jit(jax.jacrev(jax.grad(loss, argnum), argnum))(*DIFF), expected, 1e-11)


def test_grad_of_grad():
    def norm(f):
        return lambda *diff: sum(jnp.sum(g**2) for g in jax.grad(f, (0, 1, 2, 3))(*diff))

    grad = [jax.jit(jax.grad(norm(f), (0, 1, 2, 3)))(*DIFF) for f in (loss, naive)]
    close(*grad, 1e-10)


def test_jvp_of_grad():
    tangents = tuple(jnp.cos(d) for d in DIFF)
    out = [
        jax.jit(lambda d, t, f=f: jax.jvp(jax.grad(f, (0, 1, 2, 3)), d, t))(DIFF, tangents)
        for f in (loss, naive)
    ]
    close(*out, 1e-11)


def test_forward_mode_of_the_plain_definition():
    tangents = tuple(jnp.cos(d) for d in DIFF)
    close(jax.jvp(plain, DIFF, tangents), jax.jvp(naive, DIFF, tangents))
    close(jax.jacfwd(plain)(*DIFF), jax.grad(naive)(*DIFF))
    out, linear = jax.linearize(plain, *DIFF)
    close((out, linear(*tangents)), jax.jvp(naive, DIFF, tangents))


def test_forward_mode_of_the_custom_rule_says_what_to_do():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, DIFF, DIFF)


@pytest.mark.parametrize("batched", [(0,), (1, 2), (0, 1, 2, 3)], ids=["x", "parameters", "both"])
def test_vmap(batched):
    def stack(i, v):
        return jnp.stack([v, 2 * v + 1, -v]) if i in batched else v

    stacked = [stack(i, v) for i, v in enumerate(DIFF)]
    axes = [0 if i in batched else None for i in range(4)]
    f = jax.value_and_grad(loss, (0, 1, 2, 3))
    expected = [
        f(*(v if a is None else v[k] for v, a in zip(stacked, axes, strict=True))) for k in range(3)
    ]
    close(jax.jit(jax.vmap(f, axes))(*stacked), jax.tree.map(lambda *v: jnp.stack(v), *expected))


def test_grad_of_vmap_over_parameters():
    def total(scale):
        return jnp.sum(jax.vmap(lambda s: loss(DIFF[0], s, *DIFF[2:]))(scale))

    scales = jnp.stack([DIFF[1], 3 * DIFF[1]])
    expected = jnp.stack([jax.grad(loss, 1)(DIFF[0], s, *DIFF[2:]) for s in scales])
    close(jax.jit(jax.grad(total))(scales), expected)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
def test_scan_over_layers(checkpoint):
    scales = jnp.stack([DIFF[1], DIFF[1] + 1, 2 * DIFF[1]])

    def layer(x, scale):
        y, moments = batch_norm(x, scale, DIFF[2], x)
        return y, moments.var

    layer = jax.checkpoint(layer) if checkpoint else layer

    def scanned(x, scales):
        y, var = jax.lax.scan(layer, x, scales)
        return jnp.sum(y * ARGS["dy"]) + jnp.sum(var)

    def unrolled(x, scales):
        total = 0.0
        for scale in scales:
            x, var = layer(x, scale)
            total += jnp.sum(var)
        return jnp.sum(x * ARGS["dy"]) + total

    out = [jax.jit(jax.grad(f, (0, 1)))(DIFF[0], scales) for f in (scanned, unrolled)]
    close(*out)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "default"])
def test_second_derivatives_in_bfloat16_through_scan(platform):
    """JAX drops the rule of a `jax.custom_jvp` there, so that none may be needed."""
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(rng.normal(size=(8, 3)), "bfloat16") for _ in range(2))

    def layer(residual, dtype):
        cast = x.astype(dtype), residual.astype(dtype)
        y, _ = jbn.batch_norm(cast[0], residual=cast[1], activation=jnp.tanh)
        return y.astype("bfloat16"), None

    def second(dtype):
        def first(residual):
            y, _ = jax.lax.scan(lambda r, _: layer(r, dtype), residual, length=2)
            return jnp.sum(jnp.sin(y.astype("float32")))

        return jax.grad(lambda r: jnp.sum(jnp.square(jax.grad(first)(r).astype("float32"))))

    expected = np.asarray(jax.jit(second("float32"))(residual), "float32")
    with implementations.lowered_for(platform):
        actual = np.asarray(jax.jit(second("bfloat16"))(residual), "float32")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_second_derivatives_of_constant_and_huge_features_through_scan():
    x = jnp.asarray([[1, 2, 1e30], [1, 3, -2e30], [1, 5, 3e30]], "float32")

    def layer(x, _):
        return x + jbn.batch_norm(x, epsilon=0.0, activation=jnp.tanh)[0], None

    def scanned(x):
        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, length=1)[0]))

    def unrolled(x):
        return jnp.sum(jnp.sin(layer(x, None)[0]))

    def second(f):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(jax.grad(f)(x)))))(x)

    close(second(scanned), second(unrolled), 1e-5)
    close(second(scanned)[:, 0], -jnp.sin(2 * x[:, 0]), 1e-5)  # y does not depend on a constant


def test_moments_carried_through_scan_under_a_mask():
    """Padded batches, one of them empty, pool to the moments of the valid elements."""
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(5, 8, 3)), rng.random((5, 8, 1)) < 0.5
    mask[2] = False

    @jax.jit
    def pool(x, mask):
        def step(carry, batch):
            return jbn.merge_moments(carry, jbn.moments(batch[0], mask=batch[1])), None

        zeros = jnp.zeros(3, x.dtype)
        return jax.lax.scan(step, jbn.Moments(zeros, zeros, zeros), (x, mask))[0]

    valid = x[mask[..., 0]]
    close(pool(x, mask), jbn.Moments(valid.mean(0), valid.var(0), np.full(3, len(valid) * 1.0)))
    pooled = pool(x.astype("float32"), mask)
    assert all(m.dtype == np.float32 for m in pooled)
    grad = jax.grad(lambda x: jnp.sum(pool(x, mask).var))(x)
    close(grad, mask * 2 * (x - valid.mean(0)[None, None]) / len(valid))


def test_closed_over_slope_gets_its_gradient():
    def prelu(slope, custom_vjp):
        def activation(z):
            return jnp.where(z > 0, z, slope * z)

        y, _ = jbn.batch_norm(*DIFF[:3], activation=activation, custom_vjp=custom_vjp)
        return jnp.sum(y * ARGS["dy"])

    slope = jnp.float64(0.25)
    y, _ = jbn.batch_norm(*DIFF[:3])
    expected = jnp.sum(jnp.where(y > 0, 0, y) * ARGS["dy"])
    assert abs(expected) > 0.1
    for custom_vjp in (True, False):
        grad = jax.grad(functools.partial(prelu, custom_vjp=custom_vjp))
        close(grad(slope), expected)
        close(jax.jit(grad)(slope), expected)
        close(jax.vmap(grad)(jnp.stack([slope, slope]))[1], expected)


def dropout(key):
    return lambda z: jnp.where(jax.random.bernoulli(key, 0.5, z.shape), z, 0)


CLOSED_OVER = {
    "key": (dropout, jax.random.key(1)),
    "mask": (lambda m: lambda z: jnp.where(m, z, 0), jnp.arange(24).reshape(4, 3, 2) % 3 > 0),
    "integer": (lambda i: lambda z: z * i.astype(z.dtype), jnp.int32(3)),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
@pytest.mark.parametrize("transform", ["grad of jit", "scan", "checkpoint", "vmap", "inference"])
def test_closed_over_values_that_have_no_gradient(name, transform):
    """They are traced with the activation, which is used again in the backward pass."""
    activation, value = CLOSED_OVER[name]

    def f(x, value, custom_vjp):
        options = {"activation": activation(value), "custom_vjp": custom_vjp}
        if transform == "inference":
            mean = jnp.mean(x, (0, 1))
            return jnp.sum(jbn.batch_norm_inference(x, mean, mean**2, **options) ** 2)
        return jnp.sum(jbn.batch_norm(x, **options)[0] ** 2)

    def gradient(custom_vjp):
        g = functools.partial(f, custom_vjp=custom_vjp)
        if transform == "scan":
            return jax.grad(
                lambda x: jax.lax.scan(lambda c, v: (c + g(x, v), None), 0.0, value[None])[0]
            )(DIFF[0])
        if transform == "checkpoint":
            return jax.grad(jax.jit(jax.checkpoint(g)))(DIFF[0], value)
        if transform == "vmap":
            total = jax.vmap(g, (None, 0))
            return jax.grad(lambda x: jnp.sum(total(x, value[None])))(DIFF[0])
        return jax.grad(jax.jit(g))(DIFF[0], value)

    close(gradient(True), gradient(False), 1e-10)


def test_derivatives_of_a_constant_feature():
    """The variance is smooth there: its Hessian is 2 (I - 1/N) / N, and so on."""
    v = jnp.ones(3)
    for custom_vjp in (True, False):

        def var(v, custom_vjp=custom_vjp):
            return jnp.sum(jbn.batch_norm(v[:, None], custom_vjp=custom_vjp)[1].var)

        close(jax.jit(jax.jacrev(jax.grad(var)))(v), 2 * (jnp.eye(3) - 1 / 3) / 3)

    c, d = jnp.arange(3.0), jnp.array([1.0, 2, -3])

    def third(f):
        first = jax.grad(f)
        second = jax.grad(lambda v: jnp.vdot(first(v), d))
        return jax.jit(jax.grad(lambda v: jnp.vdot(second(v), d)))(v)

    def y(v, **options):
        return jnp.vdot(jbn.batch_norm(v[:, None], epsilon=1.0, **options)[0][:, 0], c)

    def definition(v):
        centred = v - v.mean()
        return jnp.vdot(centred / jnp.sqrt((centred**2).mean() + 1), c)

    close(third(y), third(definition))
    close(third(functools.partial(y, custom_vjp=False)), third(definition))


def test_forward_mode_at_inference():
    mean, var = jnp.array([0.3, 3.0]), jnp.array([0.5, 2.0])

    def f(x, mean, var, **options):
        return jbn.batch_norm_inference(x, mean, var, activation=jnp.tanh, **options)

    primals = (DIFF[0], mean, var)
    out, tangent = jax.jvp(functools.partial(f, custom_vjp=False), primals, primals)
    _, pull = jax.vjp(f, *primals)
    ct = jnp.asarray(ARGS["dy"])
    transposed = sum(jnp.vdot(g, p) for g, p in zip(pull(ct), primals, strict=True))
    close(jnp.vdot(tangent, ct), transposed)
    close(out, f(*primals))


def test_symbolic_batch():
    """A program for any batch size, as exported: in training and at inference."""
    (n,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, 3, 2), jnp.float64)
    for mask in (None, jnp.array([1, 0, 1]).reshape(1, 3, 1)):

        def f(x, mask=mask):
            return jbn.batch_norm(x, *DIFF[1:3], mask=mask, activation=jnp.tanh)

        exported = jax.export.export(jax.jit(f))(shape)
        close(exported.call(DIFF[0]), f(DIFF[0]))


def test_donated_arguments():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(batch_norm(x, *DIFF[1:3])[0])))(x)

    x = jnp.array(DIFF[0])
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(batch_norm(x, *DIFF[1:3])[0])))(DIFF[0])
    close(step(x), expected)
    assert x.is_deleted()


def test_second_call_does_not_trace_again():
    traces = []

    @jax.jit
    def step(x, scale, bias, residual, epsilon):
        traces.append(None)
        return jax.grad(functools.partial(loss, epsilon=epsilon), (0, 1))(x, scale, bias, residual)

    first = step(*DIFF, 1e-5)
    step(*(2 * d for d in DIFF), 1e-3)
    close(step(*DIFF, 1e-5), first)
    assert len(traces) == 1


@pytest.mark.parametrize("custom_vjp", [True, False])
@pytest.mark.parametrize("weights", [None, [True, False, True], [1.0, 0.0, 2.0]])
def test_gradient_by_epsilon(weights, custom_vjp):
    """That of a feature that is masked out whole, and normalized by nothing, is 0."""
    x, dy = np.random.default_rng(0).normal(size=(2, 3, 5))
    w = np.ones(x.shape) if weights is None else np.repeat(weights, 5).reshape(x.shape) * 1.0
    if weights is not None:
        w[:, 4] = 0

    def loss(x, epsilon, mask):
        y, _ = jbn.batch_norm(x, epsilon=epsilon, mask=mask, custom_vjp=custom_vjp)
        return jnp.sum(y * dy)

    def definition(x, epsilon):
        n = np.maximum(w.sum(0), 1)[None]
        mean = (w * x).sum(0, keepdims=True) / n
        var = (w * (x - mean) ** 2).sum(0, keepdims=True) / n
        y = (x - mean) / jnp.sqrt(var + epsilon)
        return jnp.sum(jnp.where(w.sum(0, keepdims=True) > 0, y, 0) * dy)

    mask = None if weights is None else w.astype(np.asarray(weights).dtype)
    actual = jax.grad(loss, (0, 1))(x, 0.1, mask)
    for a, b in zip(actual, jax.grad(definition, (0, 1))(x, 0.1), strict=True):
        close(a, b)


def test_traced_hyperparameters_are_not_checked():
    y, _ = jax.jit(lambda e: jbn.batch_norm(DIFF[0], epsilon=e))(1e-3)
    close(y, jbn.batch_norm(DIFF[0], epsilon=1e-3)[0])


def test_an_activation_may_read_a_variable_that_changes():
    """Called twice outside jit, it must not be remembered as it was."""
    slope = [0.5]

    def activation(z):
        return jnp.where(z > 0, z, slope[0] * z)

    x = jnp.asarray([[-1.0], [1.0]])
    first, _ = jbn.batch_norm(x, epsilon=0.0, activation=activation)
    slope[0] = 0.25
    second, _ = jbn.batch_norm(x, epsilon=0.0, activation=activation)
    np.testing.assert_array_equal((first, second), [[[-0.5], [1.0]], [[-0.25], [1.0]]])


def test_a_program_exported_for_every_platform():
    def f(x):
        y, pull = jax.vjp(lambda x: jbn.batch_norm(x, activation=jax.nn.relu)[0], x)
        return y, pull(y)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)))
    exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(x)
    jax.tree.map(np.testing.assert_array_equal, exported.call(x), jax.jit(f)(x))


def test_tangents_of_a_batch_far_from_zero():
    """The tangents are one for all of the batch, and a sum of the mean's rest is needed."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal((0, 20, 0), 1, (30_000, 3)), "float32")
    t = jnp.sin(x)

    def tangent(x):
        return jax.jvp(lambda x: jbn.batch_norm(x, custom_vjp=False)[0], (x,), (t,))[1]

    for row in jax.vmap(tangent)(jnp.stack([x, x])):
        np.testing.assert_allclose(row, tangent(x), atol=1e-4)


def test_activation_that_bears_the_name_of_jaxs_own():
    """`functools.wraps` makes a function look like JAX's; what it closes over is its own."""

    def loss(slope, x):
        @functools.wraps(jax.nn.relu)
        def activation(z):
            return slope * z

        return jnp.sum(jbn.batch_norm(x, activation=activation)[0] ** 3)

    x = jnp.arange(10.0).reshape(5, 2) ** 2
    for slope in (jnp.array(1.5), jnp.array(2.0)):
        for value in (loss(slope, x), jax.jit(loss)(slope, x)):
            np.testing.assert_allclose(value, slope**3 * loss(jnp.array(1.0), x), rtol=1e-12)
        grad = jax.grad(loss)(slope, x)
        np.testing.assert_allclose(grad, 3 * slope**2 * loss(jnp.array(1.0), x), rtol=1e-12)


def test_chex_leaves_no_trace():
    """It patches `jax.lax.stop_gradient` to give ones; what is traced meanwhile is used again."""
    x = jnp.asarray(np.random.default_rng(0).normal(3000, 0.01, (37, 3)), "float32")

    def f(x):
        return jnp.sum(jbn.batch_norm(x)[0] ** 3)

    jax.clear_caches()
    chex.assert_numerical_grads(f, (x,), order=1, atol=1e9, rtol=1e9, modes=["rev"])
    wide = np.asarray(x, "float64")
    np.testing.assert_allclose(jbn.moments(x).var, wide.var(0), rtol=1e-6)
    y, _ = jbn.batch_norm(x)
    exact = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5)
