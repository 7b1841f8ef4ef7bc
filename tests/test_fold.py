"""Batch norm folded into the layer before it: the numbers, and what may be folded at all."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx

pytestmark = pytest.mark.standard_jax(x64=True)

RNG = np.random.default_rng(0)
LINEN = functools.partial(jbn.linen.BatchNorm, use_running_average=True)
FLAX = functools.partial(nn.BatchNorm, use_running_average=True)


def draw(shape, dtype="float64"):
    return RNG.normal(size=shape).astype(dtype)


def drawn(path, leaf, dtype="float64"):
    """Random weights; variances are far from 0, and integers are left."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    names = [str(getattr(key, "key", "")) for key in path]
    value = draw(leaf.shape, dtype)
    return jnp.asarray(0.5 + value**2 if "var" in names else value)


def variables_of(model, *args, dtype="float64", **kwargs):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    return jax.tree.map_with_path(lambda path, v: drawn(path, v, dtype), shapes)


def close(a, b, tolerance=1e-12):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype
        scale = max(1.0, np.abs(np.asarray(v, np.float64)).max())
        np.testing.assert_allclose(u, v, rtol=0, atol=tolerance * scale)


def check_linen(model, *args, tolerance=1e-12, variables=None, **kwargs):
    """Folds, compares the outputs and returns what was folded as {batch norm: layer or reason}."""
    variables = variables_of(model, *args, **kwargs) if variables is None else variables
    folded = jbn.linen.fold(model, variables, *args, **kwargs)
    want = jax.jit(lambda v, a: model.apply(v, *a, **kwargs))(variables, args)
    got = jax.jit(lambda v, a: folded.apply_fn(v, *a, **kwargs))(folded.variables, args)
    close(got, want, tolerance)
    return {norm.path: norm.into or norm.reason for norm in folded.report}


# --- the pure function -----------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("axis", [-1, 0, (1, -1)])
def test_pure_function(axis, with_bias):
    kernel = draw((2, 3, 4))
    axes = (axis,) if isinstance(axis, int) else axis
    shape = tuple(kernel.shape[a] for a in axes)
    mean, scale, beta = draw(shape), draw(shape), draw(shape)
    var = draw(shape) ** 2
    bias = draw(shape) if with_bias else None
    s = scale / np.sqrt(var + 1e-3)
    letters = "".join("abc"[a] for a in axes)
    want = np.einsum(f"abc,{letters}->abc", kernel, s)
    got, shift = jbn.fold_batch_norm(
        kernel, bias, mean, var, scale, beta, epsilon=1e-3, axis=axis
    )
    np.testing.assert_allclose(got, want, rtol=1e-13)
    np.testing.assert_allclose(shift, ((bias if with_bias else 0) - mean) * s + beta, rtol=1e-12)
    plain, shift = jbn.fold_batch_norm(kernel, bias, mean, var, axis=axis)
    s = 1 / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(plain, np.einsum(f"abc,{letters}->abc", kernel, s), rtol=1e-13)
    np.testing.assert_allclose(shift, ((bias if with_bias else 0) - mean) * s, rtol=1e-12)


def test_pure_function_rounds_once():
    """In bfloat16 it is what float32 gives, rounded."""
    kernel, mean, var, scale, beta = (
        jnp.asarray(v, jnp.bfloat16)
        for v in (draw((64, 8)), draw(8), 1 + draw(8) ** 2, draw(8), draw(8))
    )
    got = jbn.fold_batch_norm(kernel, None, mean, var, scale, beta)
    wide = jbn.fold_batch_norm(
        *(None if v is None else v.astype("float32") for v in (kernel,)),
        None,
        *(v.astype("float32") for v in (mean, var, scale, beta)),
    )
    for u, v in zip(got, wide, strict=True):
        assert u.dtype == jnp.bfloat16
        np.testing.assert_array_equal(u, v.astype(jnp.bfloat16))


def test_pure_function_of_complex_numbers():
    kernel, mean = draw((3, 2)) + 1j * draw((3, 2)), draw(2) + 1j * draw(2)
    var = 1 + draw(2) ** 2
    x = draw((5, 3)) + 1j * draw((5, 3))
    new, bias = jbn.fold_batch_norm(kernel, None, mean, var)
    want = (x @ kernel - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(x @ np.asarray(new) + np.asarray(bias), want, rtol=1e-12)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"kernel": [1.0]}, TypeError, "kernel must be an array"),
        ({"kernel": np.ones((2, 3), int)}, TypeError, "kernel must be floating point"),
        ({"axis": 2}, ValueError, "axis must name .* kernel = float64.2,3.* got 2"),
        ({"axis": (0, 0)}, ValueError, "axis must name"),
        ({"axis": "last"}, TypeError, "axis must name"),
        ({"mean": np.ones(2)}, ValueError, r"mean must have the shape .* \(3,\), got float64.2"),
        ({"bias": np.ones((1, 3))}, ValueError, "bias must have the shape"),
        ({"var": None}, TypeError, "var must be an array"),
        ({"var": np.ones(3) + 0j}, TypeError, "var must be real"),
        ({"var": np.array([1, -2.0, 1])}, ValueError, r"var must not be negative .*-2 at .*\[1\]"),
        ({"var": np.array([1, 2, np.nan])}, ValueError, r"got nan at feature \[2\] \(1 of 3"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be at least 0"),
    ],
)
def test_pure_function_errors(changed, error, words):
    arguments = {"kernel": np.ones((2, 3)), "bias": None, "mean": np.ones(3), "var": np.ones(3)}
    with pytest.raises(error, match=words):
        jbn.fold_batch_norm(**{**arguments, **changed})


# --- each linear layer -----------------------------------------------------------------------

IMAGE = (2, 6, 5, 4)
KINDS = {
    "conv": (lambda: nn.Conv(6, (3, 3)), IMAGE),
    "no-bias": (lambda: nn.Conv(6, (3, 3), use_bias=False, padding="VALID"), IMAGE),
    "strided": (lambda: nn.Conv(6, (3, 3), strides=2, padding="CIRCULAR"), IMAGE),
    "dilated": (lambda: nn.Conv(6, (2, 2), kernel_dilation=2, use_bias=False), IMAGE),
    "depthwise": (lambda: nn.Conv(4, (3, 3), feature_group_count=4), IMAGE),
    "grouped": (lambda: nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False), IMAGE),
    "masked": (lambda: nn.Conv(6, (3,), mask=np.tri(3 * 4, 6).reshape(3, 4, 6)), (2, 5, 4)),
    "causal": (lambda: nn.Conv(6, (3,), padding="CAUSAL"), (2, 5, 4)),
    "3-d": (lambda: nn.Conv(3, (2, 2, 2)), (1, 3, 4, 3, 2)),
    "two-batch-axes": (lambda: nn.Conv(3, (2,)), (2, 3, 4, 2)),
    "transposed": (lambda: nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IMAGE),
    "transposed-kernel": (
        lambda: nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True, use_bias=False),
        IMAGE,
    ),
    "dense": (lambda: nn.Dense(6), (5, 4)),
    "dense-no-bias": (lambda: nn.Dense(6, use_bias=False), (2, 5, 4)),
    "general": (lambda: nn.DenseGeneral((3, 5), axis=(-2, -1)), (4, 2, 3)),
    "general-no-bias": (lambda: nn.DenseGeneral((3, 5), axis=1, use_bias=False), (4, 2, 3)),
    "general-one": (lambda: nn.DenseGeneral(3, axis=(1, 2)), (4, 2, 3)),
}
"""Linear layers of Linen, with the shape of the input."""


@pytest.mark.parametrize("kind", KINDS)
def test_linen_layers(kind):
    make, shape = KINDS[kind]
    model = nn.Sequential([make(), LINEN(axis=-1, epsilon=0.1), nn.relu])
    assert check_linen(model, draw(shape)) == {"layers_1": "layers_0"}


@pytest.mark.parametrize("axis", [-2, (2, 3), (-1, 1)])
def test_linen_feature_axes(axis):
    """Those of a layer with two, all and some; and one that is not among them."""
    x = draw((4, 2, 3))
    model = nn.Sequential([nn.DenseGeneral((3, 5)), LINEN(axis=axis)])
    (into,) = check_linen(model, x).values()
    assert into == (
        "layers_0"
        if axis != (-1, 1)
        else "its feature axes are (-3, -1), those of layers_0 are (-2, -1)"
    )


def test_linen_embedding():
    tokens = np.array([[0, 3, 1], [2, 2, 6]])
    model = nn.Sequential([nn.Embed(7, 4), LINEN()])
    assert check_linen(model, tokens) == {"layers_1": "layers_0"}


@pytest.mark.parametrize("norm", [LINEN, FLAX], ids=["jbn", "flax"])
@pytest.mark.parametrize("options", [{"use_scale": False}, {"use_bias": False, "epsilon": 0.5}])
def test_linen_options(norm, options):
    model = nn.Sequential([nn.Dense(3, use_bias=False), norm(**options)])
    assert check_linen(model, draw((5, 4))) == {"layers_1": "layers_0"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm_dtype", [None, "float32", "bfloat16"])
def test_linen_dtypes(dtype, norm_dtype):
    """The output's dtype is as before, float32 keeps 1e-4, bfloat16 its own rounding."""
    x = draw((8, 16), "float32")
    model = nn.Sequential(
        [nn.Dense(6, dtype=dtype), LINEN(dtype=norm_dtype, activation=nn.gelu), nn.Dense(2)]
    )
    variables = variables_of(model, x, dtype="float32")
    tolerance = 1e-4 if "bfloat16" not in (dtype, norm_dtype) else 0.05
    assert check_linen(model, x, variables=variables, tolerance=tolerance) == {
        "layers_1": "layers_0"
    }


# --- models of Linen -------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block, its sum and activation within jbn's layer or beside it."""

    features: int
    fused: bool
    norm: type = LINEN

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm(name="bn1")(nn.Conv(self.features, (3, 3), name="conv1")(x)))
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = self.norm(name="bn3")(nn.Conv(self.features, (1, 1), name="conv3")(x))
        if self.fused:
            return self.norm(activation=nn.relu, name="bn2")(y, residual=x)
        return nn.relu(self.norm(name="bn2")(y) + x)


class ResNet(nn.Module):
    fused: bool
    block: type = Block
    norm: type = LINEN

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate((4, 6)):
            x = self.block(features, self.fused, self.norm, name=f"block{i}")(x)
        return nn.Dense(3)(x.mean((1, 2)))


RESNET = {
    "block0/bn1": "block0/conv1",
    "block0/bn2": "block0/conv2",
    "block1/bn1": "block1/conv1",
    "block1/bn2": "block1/conv2",
    "block1/bn3": "block1/conv3",
}
RESNETS = {
    "fused": ResNet(fused=True),
    "apart": ResNet(fused=False),
    "flax": ResNet(fused=False, norm=FLAX),
    "remat": ResNet(fused=True, block=nn.remat(Block)),
    "jit": ResNet(fused=True, block=nn.jit(Block)),
}


@pytest.mark.parametrize("name", RESNETS)
def test_linen_resnet(name):
    assert check_linen(RESNETS[name], draw((2, 5, 5, 4))) == RESNET


class Setup(nn.Module):
    """Written with setup; `tail` is a method of its own."""

    def setup(self):
        self.dense, self.bn = nn.Dense(4), LINEN(activation=jnp.tanh)
        self.layers = [nn.Dense(3), LINEN()]

    def __call__(self, x):
        return self.tail(self.bn(self.dense(x)))

    def tail(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_linen_setup():
    assert check_linen(Setup(), draw((3, 4))) == {"bn": "dense", "layers_1": "layers_0"}


def test_linen_method():
    x = draw((3, 4))
    variables = variables_of(Setup(), x)
    done = check_linen(Setup(), x, variables=variables, method="tail")
    assert done["layers_1"] == "layers_0"
    assert "does not call it" in done["bn"]


class Scanned(nn.Module):
    """Two layers that are stacked along an axis, or shared by two steps."""

    axis: int = 0
    shared: bool = False

    @nn.compact
    def __call__(self, x):
        def step(module, x, _):
            x = module.norm(module.dense(x))
            return nn.relu(x), None

        class Step(nn.Module):
            def setup(self):
                self.dense, self.norm = nn.Dense(4, use_bias=False), LINEN()

        axes = {"params": self.axis, "batch_stats": self.axis}
        collections = list(axes)
        options = {"variable_broadcast": collections} if self.shared else {"variable_axes": axes}
        scan = nn.scan(step, **options, split_rngs={"params": not self.shared}, length=3)
        return scan(Step(name="step"), x, None)[0]


@pytest.mark.parametrize("shared", [False, True])
def test_linen_scan(shared):
    done = check_linen(Scanned(shared=shared), draw((5, 4)))
    assert done == {"step/norm": "step/dense"}


def test_linen_scan_along_another_axis():
    done = check_linen(Scanned(axis=1), draw((5, 4)))
    assert "not used as it is stored" in done["step/norm"]


@pytest.mark.parametrize("axis", [0, 1])
def test_linen_vmap(axis):
    """An ensemble: stacked along the leading axis it is folded, along another it is left."""

    def member(module, x):
        return module(x)

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            over = nn.vmap(
                member,
                in_axes=None,
                variable_axes={"params": axis, "batch_stats": axis},
                split_rngs={"params": True},
                axis_size=3,
            )
            return over(nn.Sequential([nn.Dense(4), LINEN(axis=-1), nn.tanh]), x)

    (done,) = check_linen(Ensemble(), draw((5, 2))).values()
    assert ("Dense" in done or "layers_0" in done) if axis == 0 else "not used as it is" in done


def functional(function):
    """A Linen module of a function of (module, x)."""

    class Functional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(self, x)

    return Functional()


def shared_layers(_, x):
    conv, norm = nn.Dense(4, name="dense"), LINEN(name="bn")
    return norm(conv(nn.relu(norm(conv(x)))))


def vmapped(_, x):
    dense, norm = nn.Dense(4, name="dense"), LINEN(axis=0, name="bn")
    return jax.vmap(lambda v: norm(dense(v)), in_axes=1, out_axes=2)(x[:, None])


def casts_and_dropout(_, x):
    y = nn.Dense(4, name="dense")(x)
    return LINEN(name="bn")(nn.Dropout(0.5, deterministic=True)(y))


def of_a_mask(_, x):
    y = nn.Dense(4, name="dense")(x)
    return LINEN(name="bn")(x=y, mask=x > 0)


FOLDED = {f.__name__: f for f in (shared_layers, vmapped, casts_and_dropout, of_a_mask)}


@pytest.mark.parametrize("name", FOLDED)
def test_linen_folds(name):
    assert check_linen(functional(FOLDED[name]), draw((4, 4))) == {"bn": "dense"}


class Own(nn.Dense):
    """A layer derived from Flax's, that does something else."""

    def __call__(self, x):
        return super().__call__(x) ** 2


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(4, 4, name="embed")
        return embed.attend(LINEN(name="bn")(embed(jnp.arange(4))) + x)


class OwnWeights(nn.Module):
    """A kernel that is read by name beside its layer's call."""

    @nn.compact
    def __call__(self, x):
        y = LINEN(name="bn")(nn.Dense(4, name="dense")(x))
        return y, jnp.sum(self.get_variable("params", "dense")["kernel"])


class OwnScale(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = LINEN(name="bn")(nn.Dense(4, name="dense")(x))
        return y, jnp.sum(self.get_variable("params", "bn")["scale"])


def two_norms(_, x):
    y = nn.Dense(4, name="dense")(x)
    return LINEN(name="bn")(y) + LINEN(name="other")(y)


def two_layers(_, x):
    norm = LINEN(name="bn")
    return norm(nn.Dense(4, name="dense")(x)) + norm(nn.Dense(4, name="other")(x))


def one_call_without(_, x):
    dense = nn.Dense(4, name="dense")
    return dense(LINEN(name="bn")(dense(x)))


def sown(module, x):
    y = nn.Dense(4, name="dense")(x)
    module.sow("intermediates", "y", y)
    return LINEN(name="bn")(y)


def its_own_residual(_, x):
    y = nn.Dense(4, name="dense")(x)
    return LINEN(name="bn")(y, residual=y)


def in_a_branch(_, x):
    y = nn.Dense(4, name="dense")(x)
    z = LINEN(name="bn")(y)
    return jax.lax.cond(x[0, 0] > 0, lambda: z, lambda: y)


def in_a_loop(_, x):
    y = nn.Dense(4, name="dense")(x)
    z = LINEN(name="bn")(y)
    return jax.lax.fori_loop(0, 3, lambda _, c: c * y, z)


def in_a_carry(_, x):
    """What a scan carries reaches its output after a step or two only."""
    y = nn.Dense(4, name="dense")(x)
    z = LINEN(name="bn")(y)
    return z + jax.lax.scan(lambda c, _: ((c[1], c[2], c[2]), None), (z, z, y), None, 3)[0][0]


def in_a_callback(_, x):
    y = nn.Dense(4, name="dense")(x)
    jax.debug.callback(lambda _: None, y)
    return LINEN(name="bn")(y)


def a_gradient(_, x):
    dense, norm = nn.Dense(4, name="dense"), LINEN(name="bn")
    return jax.grad(lambda x: jnp.sum(norm(dense(x))))(x)


def weight_norm(_, x):
    dense = nn.Dense(4, name="dense")
    return LINEN(name="bn")(nn.WeightNorm(dense, name="weight_norm")(x))


def dot_general(_, x):
    dense = nn.Dense(4, dot_general=lambda x, k, *a, **b: jax.lax.dot_general(x, k**2, *a, **b))
    return LINEN(name="bn")(dense(x))


def another_promotion(_, x):
    dense = nn.Dense(4, promote_dtype=lambda x, k, b, dtype: (x, abs(k), b))
    return LINEN(name="bn")(dense(x))


def batch_axes(_, x):
    return LINEN(name="bn")(nn.DenseGeneral(4, batch_dims=0, name="dense")(x))


def training(_, x):
    return LINEN(use_running_average=None, name="bn")(nn.Dense(4)(x), use_running_average=False)


LEFT = {
    "activation": (lambda _, x: LINEN(name="bn")(nn.relu(nn.Dense(4)(x))), "but of relu"),
    "sum": (lambda _, x: LINEN(name="bn")(nn.Dense(4)(x) + x), "but of add"),
    "first": (lambda _, x: LINEN(name="bn")(x), "but of an argument of the model"),
    "norm": (lambda _, x: LINEN(name="bn")(LINEN(name="one")(x)), "but of batch norm"),
    "reshape": (lambda _, x: LINEN(name="bn")(nn.Dense(4)(x).reshape(-1, 2)), "but of reshape"),
    "axis": (lambda _, x: LINEN(axis=0, name="bn")(nn.Dense(4)(x)), "feature axes are"),
    "training": (training, "it runs in training mode"),
    "two-norms": (two_norms, "something else reads the output of dense as well"),
    "two-layers": (two_layers, "is called on different inputs: dense, other"),
    "one-call-without": (one_call_without, "something else reads the output of dense"),
    "sown": (sown, "something else reads the output of dense"),
    "its-own-residual": (its_own_residual, "something else reads the output of dense"),
    "cond": (in_a_branch, "something else reads the output of dense"),
    "loop": (in_a_loop, "something else reads the output of dense"),
    "carry": (in_a_carry, "something else reads the output of dense"),
    "callback": (in_a_callback, "something else reads the output of dense"),
    "gradient": (a_gradient, "something else reads the"),
    "derived": (lambda _, x: LINEN(name="bn")(Own(4)(x)), "but of "),
    "dot-general": (dot_general, "of Dense_0, its dot_general is not JAX's"),
    "promotion": (another_promotion, "of Dense_0, its promote_dtype is not Flax's"),
    "batch-axes": (batch_axes, "of dense, its kernel has batch axes"),
    "weight-norm": (weight_norm, ""),
    "tied": (Tied(), "something else reads the embedding of embed as well"),
    "weights": (OwnWeights(), "something else reads the kernel of dense as well"),
    "scale": (OwnScale(), "something else reads the scale of bn as well"),
}


@pytest.mark.parametrize("name", LEFT)
def test_linen_leaves(name):
    model, reason = LEFT[name]
    model = model if isinstance(model, nn.Module) else functional(model)
    x = draw((4, 4))
    variables = variables_of(model, x)
    mutable = ["batch_stats", "intermediates"] if name in ("training", "sown") else False
    folded = jbn.linen.fold(model, variables, x, mutable=mutable)
    left = {norm.path: norm for norm in folded.report}["bn"]
    assert left.into is None
    assert reason in left.reason
    assert left.reason in str(folded.report)
    jax.tree.map(np.testing.assert_array_equal, folded.variables, variables)
    close(
        folded.apply_fn(folded.variables, x, mutable=mutable),
        model.apply(variables, x, mutable=mutable),
    )
