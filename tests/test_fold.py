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

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

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
    value = draw(leaf.shape, dtype or leaf.dtype)
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
    want = model.apply(variables, *args, **kwargs)
    close(folded.apply_fn(folded.variables, *args, **kwargs), want, tolerance)
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
    got, shift = jbn.fold_batch_norm(kernel, bias, mean, var, scale, beta, epsilon=1e-3, axis=axis)
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


def test_pure_function_keeps_the_precision_of_the_kernel():
    kernel, var = draw((3, 2)), 1 + draw(2, "float32") ** 2
    got, bias = jbn.fold_batch_norm(kernel, None, np.zeros(2, "float32"), var)
    want = kernel / np.sqrt(var.astype("float64") + 1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    assert bias.dtype == np.float64


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
    activation = nn.gelu if dtype == "float32" else None
    model = nn.Sequential(
        [nn.Dense(6, dtype=dtype), LINEN(dtype=norm_dtype, activation=activation)]
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
    norm: type = LINEN

    @nn.compact
    def __call__(self, x):
        for i, features in enumerate((4, 6)):
            x = Block(features, self.fused, self.norm, name=f"block{i}")(x)
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
}


@pytest.mark.parametrize("name", RESNETS)
def test_linen_resnet(name):
    assert check_linen(RESNETS[name], draw((2, 5, 5, 4))) == RESNET


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LINEN(activation=nn.relu, name="bn")(nn.Dense(4, name="dense")(x))


class Lifted(nn.Module):
    """Two like blocks under `nn.jit` or `nn.remat`."""

    layer: type

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = self.layer(name=f"block{i}")(x)
        return x


JITTED, REMATTED = nn.jit(Layer), nn.remat(Layer)


LIFTED = {"block0/bn": "block0/dense", "block1/bn": "block1/dense"}


@pytest.mark.parametrize("layer", [JITTED, REMATTED])
def test_linen_lifted(layer):
    assert check_linen(Lifted(layer), draw((3, 4))) == LIFTED


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
    dense, norm = nn.Dense(4, name="dense"), LINEN(name="bn")
    return norm(dense(nn.relu(norm(dense(x)))))


def vmapped(_, x):
    dense, norm = nn.Dense(4, name="dense"), LINEN(axis=0, name="bn")
    return jax.vmap(jax.vmap(lambda v: norm(dense(v))), in_axes=1, out_axes=2)(x[:, None])


def mapped_apart(_, x):
    dense, norm = nn.Dense(4, name="dense"), LINEN(axis=1, name="bn")
    return jax.vmap(norm, in_axes=1)(jax.vmap(dense)(x[:, None]))


def half_mapped(_, x):
    return LINEN(name="bn")(jax.vmap(nn.Dense(4, name="dense"))(x))


def dropout(_, x):
    y = nn.Dense(4, name="dense")(x)
    return LINEN(name="bn")(nn.Dropout(0.5, deterministic=True)(y))


def of_a_mask(_, x):
    y = nn.Dense(4, name="dense")(x)
    return LINEN(name="bn")(x=y, mask=x > 0)


FOLDED = {
    f.__name__: f for f in (shared_layers, vmapped, mapped_apart, half_mapped, dropout, of_a_mask)
}


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


class OwnInput(nn.Module):
    """A table that decides which of its own rows are taken."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(4, 4, name="embed")
        return LINEN(name="bn")(embed(jnp.argsort(embed.embedding[:, 0]))) + x


class Steps(nn.Module):
    """A layer outside a scan, and the batch norm of its output in it."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda norm, carry, x: (carry, norm(x)),
            variable_broadcast=["params", "batch_stats"],
            split_rngs={"params": False},
        )
        return scan(LINEN(name="bn"), None, nn.Dense(4, name="dense")(x))[1]


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


def stacked_statistics(_, x):
    """One kernel for all, and statistics for each."""
    over = nn.vmap(
        lambda module, x: module(x),
        in_axes=None,
        variable_axes={"params": None, "batch_stats": 0},
        split_rngs={"params": False},
        axis_size=3,
    )
    return over(Layer(), x)


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
    "stacked": (stacked_statistics, "are not stacked alike"),
    "weight-norm": (weight_norm, ""),
    "tied": (Tied(), "something else reads the embedding of embed as well"),
    "own-input": (OwnInput(), "something else reads the embedding of embed as well"),
    "steps": (Steps(), "is not the output of a linear layer, but of scan"),
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
    left = {norm.path.split("/")[-1]: norm for norm in folded.report}["bn"]
    assert left.into is None
    assert reason in left.reason
    assert left.reason in str(folded.report)
    jax.tree.map(np.testing.assert_array_equal, folded.variables, variables)
    close(
        folded.apply_fn(folded.variables, x, mutable=mutable),
        model.apply(variables, x, mutable=mutable),
    )


def test_linen_axis_under_vmap():
    """The feature axis is that of the whole array."""

    def across(_, x):
        y = nn.Dense(4, name="dense")(x)
        return jax.vmap(LINEN(axis=0, name="bn"), in_axes=1)(y)

    done = check_linen(functional(across), draw((4, 4)))
    assert done == {"bn": "its feature axes are (-2,), those of dense are (-1,)"}


class Modes(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, use_bias=False)(x)
        return jbn.linen.BatchNorm(activation=nn.relu)(x, not train)


def test_linen_folded_does_not_train():
    x = draw((3, 4))
    variables = variables_of(Modes(), x, train=False)
    folded = jbn.linen.fold(Modes(), variables, x, train=False)
    assert list(folded.variables) == ["params"]
    assert list(folded.variables["params"]) == ["Dense_0"]
    with pytest.raises(ValueError, match=r"BatchNorm_0 was folded .* train the model"):
        folded.apply_fn(folded.variables, x, train=True)


def test_linen_errors():
    x = draw((3, 4))
    model = Modes()
    variables = variables_of(model, x, train=False)
    with pytest.raises(TypeError, match=r"must be a flax.linen.Module, got Linear"):
        jbn.linen.fold(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), variables, x)
    with pytest.raises(ValueError, match="must have the collection batch_stats, got params:"):
        jbn.linen.fold(model, {"params": variables["params"]}, x, train=False)
    with pytest.raises(TypeError, match=r"'batch_stats'.*'mean'\] must be an array, got the shape"):
        jbn.linen.fold(model, jax.eval_shape(lambda: variables), x, train=False)
    params = variables["params"]["Dense_0"]
    with pytest.raises(ValueError, match="has no batch norm to fold"):
        jbn.linen.fold(nn.Dense(4, use_bias=False), {"params": params, "batch_stats": {}}, x)
    with pytest.raises(Exception, match="Cannot update variable") as error:
        jbn.linen.fold(model, variables, x, train=True)
    assert "the arguments of inference" in "".join(error.value.__notes__)
    for bad in (-1.0, np.nan):
        stats = {"BatchNorm_0": {"mean": np.ones(4), "var": np.array([1, 1, bad, 1])}}
        with pytest.raises(
            ValueError, match=r"the running var of BatchNorm_0 must not be negative"
        ):
            jbn.linen.fold(model, {**variables, "batch_stats": stats}, x, train=False)
    stats = {"BatchNorm_0": {"mean": np.ones(3), "var": np.ones(3)}}
    with pytest.raises(ValueError, match="the running mean must have the shape"):
        jbn.linen.fold(model, {**variables, "batch_stats": stats}, x, train=False)


def test_linen_of_abstract_arguments_frozen_and_jitted():
    """Nothing is computed from the arguments; FrozenDict stays one; jit may hold it all."""
    x = draw((3, 4))
    frozen = nn.FrozenDict(variables_of(Modes(), x, train=False))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    folded = jbn.linen.fold(Modes(), frozen, shape, train=False)
    assert isinstance(folded.variables, nn.FrozenDict)
    want = Modes().apply(frozen, x, train=False)
    close(folded.apply_fn(folded.variables, x, train=False), want)

    @jax.jit
    def whole(variables, x):
        folded = jbn.linen.fold(Modes(), variables, x, train=False)
        return folded.apply_fn(folded.variables, x, train=False)

    close(whole(frozen, x), want)


def test_linen_jitted_blocks_are_traced_anew():
    """The caches of `nn.jit` neither hide the marks nor hand on a folded call."""
    model, x = Lifted(JITTED), draw((3, 4))
    variables = variables_of(model, x)
    want = model.apply(variables, x)
    folded = jbn.linen.fold(model, variables, x)
    assert all(norm.into for norm in folded.report)
    close(folded.apply_fn(folded.variables, x), want)
    assert "jbn_layer" not in str(jax.make_jaxpr(model.apply)(variables, x))
    np.testing.assert_array_equal(model.apply(variables, x), want)
    x, narrow = x.astype("float32"), jax.tree.map(lambda v: v.astype("float32"), variables)
    wide = {
        name: block | {"bn": variables["params"][name]["bn"]}
        for name, block in narrow["params"].items()
    }
    for given in (narrow, narrow | {"params": wide}):  # which differ in what was folded alone
        folded = jbn.linen.fold(model, given, x)
        close(folded.apply_fn(folded.variables, x), model.apply(given, x), 1e-4)


def test_linen_boxes_and_shardings():
    """A box stays, the new bias takes batch norm's, and a kernel stays where it is sharded."""
    split = functools.partial(nn.with_partitioning, nn.initializers.ones)
    model = nn.Sequential(
        [
            nn.Dense(8, use_bias=False, kernel_init=split((None, "model"))),
            LINEN(bias_init=split(("model",))),
        ]
    )
    x = draw((3, 4))
    variables = variables_of(model, x)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = nn.get_partition_spec(variables)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    variables = jax.device_put(variables, shardings)
    folded = jbn.linen.fold(model, variables, x)
    dense = folded.variables["params"]["layers_0"]
    assert dense["kernel"].names == (None, "model")
    assert dense["bias"].names == ("model",)
    assert dense["kernel"].value.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, jax.P(None, "model")), 2
    )
    close(folded.apply_fn(folded.variables, x), model.apply(variables, x))


@pytest.mark.parametrize("name", ["fused", "apart"])
def test_nothing_of_batch_norm_is_left(name):
    x = draw((2, 5, 5, 4))
    variables = variables_of(RESNETS[name], x)
    folded = jbn.linen.fold(RESNETS[name], variables, x)
    assert " rsqrt " in str(jax.make_jaxpr(RESNETS[name].apply)(variables, x))
    jaxpr = str(jax.make_jaxpr(folded.apply_fn)(folded.variables, x))
    assert "rsqrt" not in jaxpr
    assert "jbn_layer" not in jaxpr


# --- models of NNX ---------------------------------------------------------------------------


def nnx_norm(*args, cls=jbn.nnx.BatchNorm, **kwargs):
    return cls(*args, use_running_average=True, rngs=nnx.Rngs(0), **kwargs)


flax_nnx_norm = functools.partial(nnx_norm, cls=nnx.BatchNorm)


def filled(make, dtype="float64"):
    """A model of random weights, its initializers not run."""
    model = nnx.eval_shape(make)
    fill = functools.partial(drawn, dtype=dtype)
    nnx.update(model, jax.tree.map_with_path(fill, nnx.state(model)))
    return model


def check_nnx(make, *args, tolerance=1e-12, **kwargs):
    model = filled(make)
    before = jax.tree.map(np.asarray, nnx.state(model))
    method = kwargs.get("method", "__call__")
    want = getattr(model, method)(*args)
    folded, report = jbn.nnx.fold(model, *args, **kwargs)
    close(getattr(folded, method)(*args), want, tolerance)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    return {norm.path: norm.into or norm.reason for norm in report}


NNX_KINDS = {
    "conv": (lambda: nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), 6, IMAGE),
    "no-bias": (
        lambda: nnx.Conv(4, 6, (3, 3), strides=2, use_bias=False, rngs=nnx.Rngs(0)),
        6,
        IMAGE,
    ),
    "depthwise": (
        lambda: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)),
        4,
        IMAGE,
    ),
    "masked": (lambda: nnx.Conv(4, 6, 1, mask=np.tri(4, 6)[None], rngs=nnx.Rngs(0)), 6, (2, 5, 4)),
    "transposed": (lambda: nnx.ConvTranspose(4, 6, (3, 3), (2, 2), rngs=nnx.Rngs(0)), 6, IMAGE),
    "transposed-kernel": (
        lambda: nnx.ConvTranspose(
            4, 6, (3, 3), (2, 2), transpose_kernel=True, use_bias=False, rngs=nnx.Rngs(0)
        ),
        6,
        IMAGE,
    ),
    "linear": (lambda: nnx.Linear(4, 6, rngs=nnx.Rngs(0)), 6, (5, 4)),
    "linear-no-bias": (lambda: nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)), 6, (5, 4)),
    "general": (
        lambda: nnx.LinearGeneral((2, 3), (4, 6), axis=(1, 2), rngs=nnx.Rngs(0)),
        6,
        (5, 2, 3),
    ),
    "general-no-bias": (
        lambda: nnx.LinearGeneral(3, (4, 6), use_bias=False, rngs=nnx.Rngs(0)),
        6,
        (5, 3),
    ),
}
"""Linear layers of NNX, with their features and the shape of the input."""


@pytest.mark.parametrize("kind", NNX_KINDS)
def test_nnx_layers(kind):
    make, features, shape = NNX_KINDS[kind]
    norm = functools.partial(nnx_norm, features, epsilon=0.1)
    done = check_nnx(lambda: nnx.Sequential(make(), norm(), nnx.relu), draw(shape))
    assert done == {"layers/1": "layers/0"}


def test_nnx_embedding():
    def make():
        embed = nnx.Embed(7, 4, param_dtype="float64", rngs=nnx.Rngs(0))
        return nnx.Sequential(embed, nnx_norm(4, use_scale=False))

    assert check_nnx(make, np.array([[0, 3, 1], [2, 2, 6]])) == {"layers/1": "layers/0"}


@pytest.mark.parametrize("norm", [nnx_norm, flax_nnx_norm], ids=["jbn", "flax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nnx_dtypes(norm, dtype):
    model = filled(
        lambda: nnx.Sequential(
            nnx.Linear(16, 6, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)),
            norm(6, param_dtype=dtype, use_bias=False),
        ),
        dtype=None,
    )
    x = draw((8, 16), dtype)
    folded, _ = jbn.nnx.fold(model, x)
    close(folded(x), model(x), 1e-4 if dtype == "float32" else 0.05)
    assert folded.layers[0].kernel.dtype == dtype


class NNXBlock(nnx.Module):
    def __init__(self, channels, features, fused, norm):
        self.conv1 = nnx.Conv(channels, features, (3, 3), rngs=nnx.Rngs(0))
        self.bn1 = norm(features)
        self.conv2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
        self.bn2 = norm(features, activation=nnx.relu) if fused else norm(features)
        self.fused, self.projects = fused, channels != features
        if self.projects:
            self.conv3, self.bn3 = (
                nnx.Conv(channels, features, (1, 1), rngs=nnx.Rngs(0)),
                norm(features),
            )

    def __call__(self, x):
        y = self.conv2(nnx.relu(self.bn1(self.conv1(x))))
        if self.projects:
            x = self.bn3(self.conv3(x))
        return self.bn2(y, residual=x) if self.fused else nnx.relu(self.bn2(y) + x)


class NNXResNet(nnx.Module):
    def __init__(self, fused, norm=nnx_norm, remat=False):
        self.block0 = NNXBlock(4, 4, fused, norm)
        self.block1 = NNXBlock(4, 6, fused, norm)
        self.head, self.remat = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), remat

    def __call__(self, x):
        for block in (self.block0, self.block1):
            x = nnx.remat(lambda b, x: b(x))(block, x) if self.remat else block(x)
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("fused", "norm", "remat"),
    [(True, nnx_norm, False), (False, flax_nnx_norm, False), (True, nnx_norm, True)],
)
def test_nnx_resnet(fused, norm, remat):
    make, x = functools.partial(NNXResNet, fused, norm, remat), draw((2, 5, 5, 4))
    assert check_nnx(make, x) == RESNET
    folded, _ = jbn.nnx.fold(filled(make), x)
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert isinstance(folded.block0, NNXBlock)
    graphdef, state = nnx.split(folded)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)
    assert "rsqrt" not in str(jaxpr)


class Stacked(nnx.Module):
    """Layers stacked by `nnx.vmap` and scanned over, or run side by side."""

    def __init__(self, scanned):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0)
        def make(rngs):
            layer = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            return nnx.Sequential(layer, nnx_norm(4), jnp.tanh)

        self.layers, self.scanned = make(nnx.Rngs(0)), scanned

    def __call__(self, x):
        if self.scanned:
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, self.layers)
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)


@pytest.mark.parametrize("scanned", [False, True])
def test_nnx_stacked(scanned):
    done = check_nnx(functools.partial(Stacked, scanned), draw((5, 4)))
    assert done == {"layers/layers/1": "layers/layers/0"}


class Several(nnx.Module):
    """What may and what may not be folded, at once."""

    def __init__(self):
        self.layers = nnx.data((nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx_norm(4), nnx_norm(4)))
        self.shared = nnx.Dict(
            dense=nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)), bn=nnx_norm(4)
        )
        self.tied = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.again = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.again.kernel = self.tied.kernel
        self.bn, self.unused = nnx_norm(4), nnx_norm(4)
        self.training, self.first = nnx_norm(4), nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        dense, bn, after = self.layers
        x = after(nnx.relu(bn(dense(x))))
        for _ in range(2):
            x = self.shared["bn"](self.shared["dense"](x))
        x = self.again(self.bn(self.tied(x)))
        return self.training(self.first(x), use_running_average=False)

    def tail(self, x):
        return self.bn(self.tied(x))


def test_nnx_folds_and_leaves():
    assert check_nnx(Several, draw((3, 4)), method="tail")["bn"] == "tied"
    model = filled(Several)
    x = draw((3, 4))
    folded, report = jbn.nnx.fold(model, x)
    done = {norm.path: norm.into or norm.reason for norm in report}
    assert done["layers/1"] == "layers/0"
    assert "but of relu" in done["layers/2"]
    assert done["shared/bn"] == "shared/dense"
    assert done["bn"] == "something else reads the kernel of tied as well"
    assert "does not call it" in done["unused"]
    assert "it runs in training mode" in done["training"]
    close(folded(x), model(x))


class Varies(nnx.Module):
    def __init__(self):
        self.dense, self.bn = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx_norm(4)

    def __call__(self, x):
        for epsilon in (0.1, 0.5):
            self.bn.epsilon = epsilon
            x = self.bn(self.dense(x))
        return x


def test_nnx_settings_of_each_call():
    assert check_nnx(Varies, draw((3, 4))) == {"bn": "its settings differ from call to call"}


def test_nnx_modes_and_views():
    model = filled(
        lambda: nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx_norm(3, activation=nnx.relu))
    )
    x = draw((2, 4))
    model.train()
    _, report = jbn.nnx.fold(model, x)
    assert str(report) == "layers/1  left: it runs in training mode"
    model.eval()
    folded, _ = jbn.nnx.fold(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    close(nnx.view(folded, use_running_average=True)(x), model(x))
    folded.train()
    with pytest.raises(ValueError, match="this batch norm was folded"):
        folded(x)


def test_nnx_metadata():
    """The variables keep theirs, and the new bias takes that of batch norm's."""

    def make():
        options = {"use_bias": False, "kernel_metadata": {"tag": "kernel"}}
        layer = nnx.Linear(4, 3, **options, rngs=nnx.Rngs(0))
        return nnx.Sequential(layer, nnx_norm(3, bias_metadata={"tag": "bias"}))

    model = filled(make)
    folded, _ = jbn.nnx.fold(model, draw((2, 4)))
    assert folded.layers[0].kernel.get_metadata()["tag"] == "kernel"
    assert folded.layers[0].bias.get_metadata()["tag"] == "bias"
    assert model.layers[0].bias is None


def test_nnx_errors():
    x = draw((2, 4))
    with pytest.raises(TypeError, match=r"must be a flax.nnx.Module, got Dense"):
        jbn.nnx.fold(nn.Dense(3), x)
    with pytest.raises(ValueError, match="has no batch norm to fold"):
        jbn.nnx.fold(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), x)
    model = filled(lambda: nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx_norm(3)))
    model.layers[1].var[...] = jnp.array([1, np.nan, -1])
    with pytest.raises(ValueError, match=r"the running var of layers/1 .*2 of 3"):
        jbn.nnx.fold(model, x)


class Chain(nn.Module):
    """A layer that takes its own output, of which the last alone is normalized."""

    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            return self.over_steps(x)
        dense = nn.Dense(4, name="dense")
        return LINEN(name="bn")(dense(nn.relu(dense(x))))

    def over_steps(self, x):
        def step(module, carry, _):
            carry = nn.Dense(4, name="dense")(carry)
            return carry, LINEN(name="bn")(carry)

        axes = {"params": 0, "batch_stats": 0}
        scan = nn.scan(step, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(self, x, None)[1]


@pytest.mark.parametrize("scanned", [False, True])
def test_linen_layer_that_feeds_itself(scanned):
    report = check_linen(Chain(scanned), draw((3, 4)))
    assert report == {"bn": "something else reads the output of dense as well"}


class CrossedAxes(nn.Module):
    """A dense layer for each element of the first axis, and a batch norm for each of the second."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        dense = nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": True}, out_axes=1)
        norm = nn.vmap(LINEN, variable_axes=axes, split_rngs={"params": True})
        return norm(name="bn")(dense(4, name="dense")(x))


def test_linen_mapped_over_different_axes():
    report = check_linen(CrossedAxes(), draw((3, 3, 4)))
    assert report == {"bn": "its input is not the output of a linear layer, but of transpose"}


def test_variables_that_are_none_and_a_mean_that_is_nan():
    model, x = Chain(False), draw((3, 4))
    with pytest.raises(ValueError, match="must have the collection batch_stats, got NoneType"):
        jbn.linen.fold(model, None, x)
    with pytest.raises(ValueError, match="must have the collection batch_stats, got ndarray"):
        jbn.linen.fold(model, x, x)
    with pytest.raises(ValueError, match=r"mean must be finite, but is not at feature \[1\]"):
        jbn.fold_batch_norm(np.ones((3, 2)), None, np.array([0, np.nan]), np.ones(2))
