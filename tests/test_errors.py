"""Bad input: the error names the argument, shows what came and says what to do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

X = jnp.ones((4, 3), jnp.float32)
C = jnp.ones(3, jnp.float32)
WRONG = jnp.ones(4, jnp.float32)

train = functools.partial(jbn.batch_norm, X)
infer = functools.partial(jbn.batch_norm_inference, X)
MOMENTS = jbn.moments(X)
RUNNING = jbn.RunningStats(C, C, C)
update = functools.partial(jbn.update_running_stats, RUNNING, MOMENTS)

CASES = {
    "axis out of range": (
        lambda: train(axis=2),
        ValueError,
        "axis 2 is out of range for x = float32[4,3]: a feature axis lies between -2 and 1.",
    ),
    "axis repeated": (lambda: train(axis=(1, -1)), ValueError, "axis = (1, -1) names an axis"),
    "axis not an int": (lambda: train(axis=1.5), TypeError, "axis must be an int or ints"),
    "no axes": (lambda: jbn.batch_norm(jnp.float32(1)), ValueError, "x = float32[] has no axes"),
    "x a list": (lambda: jbn.batch_norm([[1.0]]), TypeError, "x must be an array, got list [["),
    "x None": (lambda: jbn.moments(None), TypeError, "x must be an array, got NoneType None"),
    "x an integer": (
        lambda: jbn.batch_norm(jnp.ones((4, 3), jnp.int32)),
        TypeError,
        "x must be floating point or complex, got int32[4,3]. Cast it first",
    ),
    "x boolean": (lambda: jbn.moments(X > 0), TypeError, "x must be floating point or complex"),
    "scale": (
        lambda: train(WRONG),
        ValueError,
        "scale must have the shape of the feature axes (1,) of x = float32[4,3], (3,), "
        "got float32[4].",
    ),
    "scale a float": (lambda: train(2.0), TypeError, "scale must be an array, got float 2.0"),
    "bias": (lambda: train(C, WRONG), ValueError, "bias must have the shape"),
    "bias integer": (
        lambda: train(C, jnp.ones(3, jnp.int8)),
        TypeError,
        "bias must be floating point or complex, got int8[3]",
    ),
    "mean": (lambda: infer(WRONG, C), ValueError, "mean must have the shape"),
    "mean missing": (lambda: infer(None, C), TypeError, "mean must be an array, got NoneType"),
    "var": (lambda: infer(C, WRONG), ValueError, "var must have the shape"),
    "var complex": (
        lambda: infer(C, C.astype(jnp.complex64)),
        TypeError,
        "var must be real, got complex64[3]",
    ),
    "scale at inference": (lambda: infer(C, C, WRONG), ValueError, "scale must have the shape"),
    "residual": (
        lambda: train(residual=jnp.ones((1, 3), jnp.float32)),
        ValueError,
        "residual must have the shape of x = float32[4,3], got float32[1,3]. Broadcast it first",
    ),
    "residual at inference": (lambda: infer(C, C, residual=C), ValueError, "residual must have"),
    "mask": (
        lambda: train(mask=jnp.ones(4, bool)),
        ValueError,
        "mask must broadcast to x = float32[4,3], got bool[4]. As in NumPy",
    ),
    "mask of higher rank": (
        lambda: jbn.moments(X, mask=jnp.ones((2, 4, 3), bool)),
        ValueError,
        "mask must broadcast to x",
    ),
    "mask would enlarge x": (
        lambda: jbn.moments(jnp.ones((1, 3)), mask=jnp.ones((4, 1), bool)),
        ValueError,
        "mask must broadcast to x",
    ),
    "mask of negative weights": (
        lambda: train(mask=jnp.array([[0.5], [1], [-1], [1]])),
        ValueError,
        "mask must be boolean, or hold finite weights of at least 0, got float64[4,1] with values "
        "from -1.0 to 1.0.",
    ),
    "mask a list": (lambda: train(mask=[True]), TypeError, "mask must be an array, got list"),
    "epsilon negative": (
        lambda: train(epsilon=-1e-5),
        ValueError,
        "epsilon must be at least 0, got -1e-05: it is added to the variance.",
    ),
    "epsilon nan": (lambda: infer(C, C, epsilon=np.nan), ValueError, "epsilon must be at least 0"),
    "epsilon text": (
        lambda: train(epsilon="small"),
        TypeError,
        "epsilon must be a real number, got str 'small'",
    ),
    "momentum": (
        lambda: update(momentum=1.5),
        ValueError,
        "momentum must be between 0 and 1, got 1.5: it weights the old statistics",
    ),
    "momentum negative": (lambda: update(momentum=-0.1), ValueError, "momentum must be between"),
    "momentum text": (lambda: update(momentum="0.9"), TypeError, "momentum must be a real number"),
    "activation of a sum": (
        lambda: train(activation=jnp.sum),
        ValueError,
        "activation must be elementwise, from float32[4,3] to floating point or complex numbers of "
        "the same shape, but sum gives float32[]. Apply it to the output instead.",
    ),
    "activation over halves": (
        lambda: infer(C, C, activation=lambda z: z[:, :2]),
        ValueError,
        "activation must be elementwise, from float32[4,3]",
    ),
    "activation a name": (
        lambda: train(activation="relu"),
        TypeError,
        "activation must be an elementwise function such as jax.nn.relu, got str 'relu'",
    ),
    "dtype integer": (
        lambda: train(dtype=jnp.int32),
        TypeError,
        "dtype must be a floating point or complex dtype such as jnp.float32, got int32.",
    ),
    "dtype a name": (lambda: train(dtype="foo"), TypeError, "dtype must be a floating point or"),
    "x a key": (
        lambda: jbn.moments(jax.random.split(jax.random.key(0), 3)),
        TypeError,
        "x must be floating point or complex, got key<fry>[3].",
    ),
    "x of objects": (
        lambda: jbn.moments(np.array([[None]])),
        TypeError,
        "x must be an array of numbers, got object[1,1].",
    ),
    "mask of keys": (
        lambda: train(mask=jax.random.split(jax.random.key(0), 3)),
        TypeError,
        "mask must be boolean or hold weights, got key<fry>[3].",
    ),
    "epsilon complex": (lambda: train(epsilon=1j), TypeError, "epsilon must be a real number"),
    "epsilon for each feature": (lambda: train(epsilon=C), TypeError, "epsilon must be a real"),
    "epsilon for each feature, traced": (
        lambda: jax.jit(lambda e: train(epsilon=e)).trace(C),
        TypeError,
        "epsilon must be a real number",
    ),
    "momentum for each feature, traced": (
        lambda: jax.jit(lambda m: update(momentum=m)).trace(C),
        TypeError,
        "momentum must be a real number",
    ),
    "activation to booleans": (
        lambda: train(activation=lambda z: z > 0),
        ValueError,
        "activation must be elementwise, from float32[4,3]",
    ),
    "axis name an int": (
        lambda: train(axis_name=3),
        TypeError,
        "axis_name must be the name of a mapped axis, or different names, got 3.",
    ),
    "axis name twice": (
        lambda: train(axis_name=("a", "a")),
        TypeError,
        "axis_name must be the name of a mapped axis, or different names",
    ),
    "complex variance": (
        lambda: jbn.update_running_stats(RUNNING._replace(var=C.astype(jnp.complex64)), MOMENTS),
        TypeError,
        "running.var must be real, got complex64[3].",
    ),
    "complex scale": (
        lambda: train(C.astype(jnp.complex64)),
        TypeError,
        "the output is complex but its dtype would be float32: pass dtype=jnp.complex64",
    ),
    "groups without an axis": (
        lambda: train(axis_index_groups=[[0], [1]]),
        ValueError,
        "axis_index_groups divide one named axis, got axis_name = None",
    ),
    "axis not bound": (
        lambda: train(axis_name="batch"),
        NameError,
        "axis_name 'batch' is not bound: call inside jax.vmap or jax.pmap",
    ),
    "moments a tuple": (
        lambda: jbn.update_running_stats(RUNNING, (C, C, C)),
        TypeError,
        "moments must be jbn.Moments, got tuple",
    ),
    "running a dict": (
        lambda: jbn.update_running_stats({"mean": C}, MOMENTS),
        TypeError,
        "running must be jbn.RunningStats, got dict",
    ),
    "running of another shape": (
        lambda: jbn.update_running_stats(jbn.RunningStats(WRONG, WRONG, WRONG), MOMENTS),
        ValueError,
        "running must have the shape of the moments, got running.mean = float32[4] and "
        "moments.mean = float32[3].",
    ),
    "moments of two shapes": (
        lambda: jbn.merge_moments(MOMENTS, MOMENTS._replace(var=WRONG)),
        ValueError,
        "the fields of b must have one shape, got mean = float32[3], var = float32[4]",
    ),
    "moments of other features": (
        lambda: jbn.merge_moments(MOMENTS, jbn.Moments(WRONG, WRONG, WRONG)),
        ValueError,
        "a and b must be moments of the same features, got mean = float32[3] and float32[4]",
    ),
}


@pytest.mark.parametrize("call", CASES)
def test_error(call):
    function, error, message = CASES[call]
    with pytest.raises(error, match="^" + re.escape(message)):
        function()


@pytest.mark.parametrize("call", ["scale", "activation of a sum", "mask", "axis out of range"])
def test_error_under_jit(call):
    function, error, message = CASES[call]
    with pytest.raises(error, match="^" + re.escape(message)):
        jax.jit(function)()


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_known_mask_under_jit(array):
    """Its values are checked, although operations on it would be traced."""

    def f(mask):
        return jax.jit(lambda x: jbn.moments(x, mask=mask))(X)

    assert f(array([[1.0], [0], [1], [0]])).count[0] == 2
    with pytest.raises(ValueError, match="mask must be boolean, or hold finite weights"):
        f(array([[1.0], [np.nan], [1], [0]]))


def test_numpy_arrays_are_arrays():
    x = np.arange(6, dtype="float32").reshape(3, 2)
    y, moments = jbn.batch_norm(x, np.ones(2, "float32"), np.zeros(2, "float32"))
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(moments.mean, [2, 3])
