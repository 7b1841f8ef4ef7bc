"""Values, gradients, dtypes and memory: what every implementation owes, for every case."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import cases, implementations, oracle

pytestmark = pytest.mark.quick_compile

by_name = {"ids": lambda v: getattr(v, "name", getattr(v, "__name__", str(v)))}
implementation = pytest.mark.parametrize("implementation", implementations.ALL, **by_name)
case = pytest.mark.parametrize("case", cases.CASES, **by_name)


def allclose(actual, expected, rtol, name):
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale, err_msg=name)


@implementation
@case
def test_values_and_gradients(implementation, case):
    args = cases.draw(case, "float64")
    y, moments, grads = implementations.run(implementation, case, args)
    expected, mean, var, n = oracle.batch_norm(case, args)
    assert y.shape == case.shape
    allclose(y, expected, 1e-12, "y")
    allclose(moments.mean, mean, 1e-12, "mean")
    allclose(moments.var, var, 1e-12, "var")
    np.testing.assert_allclose(moments.count, n, rtol=1e-14 if case.weights else 0)
    assert all(m.shape == case.features for m in moments)
    expected = oracle.gradients(case, args)
    for output in ("y", "mean", "var"):
        assert grads[output].keys() == expected[output].keys()
        for name, value in grads[output].items():
            assert value.shape == args[name].shape
            allclose(value, expected[output][name], 1e-12, f"d{output}/d{name}")


DTYPE_CASES = tuple(
    c for c in cases.CASES if c.name in ("nhwc", "sampled sparsely", "add and relu", "weights")
)


@pytest.mark.parametrize(
    "implementation",  # the layers and large arrays differ in nothing that depends on the dtype
    [i for i in implementations.ALL if i.__name__ not in ("linen", "nnx", "large")],
    **by_name,
)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", DTYPE_CASES, **by_name)
def test_dtypes(implementation, case, dtype):
    """Errors are roundings of the accumulation dtype, and one rounding to the dtype of x."""
    if np.issubdtype(jnp.dtype(dtype), np.complexfloating) and case.activation is jax.nn.relu:
        case = cases.Case("add", case.shape, residual=True)  # relu has no complex form
    args = cases.draw(case, dtype)
    y, moments, grads = implementations.run(implementation, case, args)
    accumulated = jnp.finfo(moments.var.dtype).eps
    allowed = 32 * accumulated * np.sqrt(case.n)
    rounded = allowed + 0.51 * float(jnp.finfo(dtype).eps)
    expected, mean, var, _ = oracle.batch_norm(case, args)
    assert y.dtype == grads["y"]["x"].dtype == args["x"].dtype
    assert moments.mean.dtype == args["dmean"].dtype
    assert moments.var.dtype == moments.count.dtype == args["dvar"].dtype
    assert moments.var.dtype in (np.float32, np.float64)
    allclose(y, expected, rounded, "y")
    allclose(moments.mean, mean, allowed, "mean")
    allclose(moments.var, var, allowed, "var")
    for output, expected in oracle.gradients(case, args).items():
        for name, value in grads[output].items():
            assert value.dtype == args[name].dtype
            tolerance = rounded if name in ("x", "residual") else allowed
            allclose(value, expected[name], tolerance, f"d{output}/d{name}")


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.gelu], **by_name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dx_is_rounded_once(dtype, activation):
    """dx has two contributions; each element is the float32 sum, rounded to its nearest."""
    case = cases.Case("rounding", (64, 8), activation=activation)
    args = cases.draw(case, dtype)
    _, pull = jax.vjp(lambda x: implementations.function(case, {**args, "x": x})[0], args["x"])
    (dx,) = pull(jnp.asarray(args["dy"]))
    exact = oracle.gradients(case, args)["y"]["x"]
    nearest = exact.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    differ = np.asarray(dx) != nearest
    assert differ.mean() < 0.005  # only where float32 falls on the other side of a tie


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.n > 1], **by_name)
def test_kept_for_the_backward(case, dtype):
    """x, the mask, the residual where an activation needs it, in their own dtypes, and O(C)."""
    args = cases.draw(case, dtype)
    names = [k for k in ("x", "scale", "bias", "residual") if args[k] is not None]

    @jax.jit
    def kept(diff):
        _, pull = jax.vjp(lambda d: implementations.function(case, {**args, **d}), diff)
        return jax.tree.leaves(pull)

    big = [v for v in kept({k: jnp.asarray(args[k]) for k in names}) if v.shape == case.shape]
    expected = {"x"}
    if case.activation is not None and case.residual:
        expected.add("residual")
    found = set()
    for value in big:
        if case.mask is not None and np.array_equal(value, args["mask"] + np.zeros(case.shape)):
            assert value.dtype == args["mask"].dtype
            continue
        (name,) = [k for k in expected if np.array_equal(value, args[k])] or ["unknown"]
        assert value.dtype == args["x"].dtype
        found.add(name)
    assert found == expected
