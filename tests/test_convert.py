"""Weights of torch and Keras: layouts against the definitions, pairing, reports, bad files."""

import ast
import functools
import itertools
import json
import os
import pickle
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jbn.linen
import jbn.nnx
from jbn import convert
from tests.real_networks import keras_on_jax

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def draw_batch_norm(c, prefix=""):
    arrays = {
        "weight": draw(c),
        "bias": draw(c),
        "running_mean": draw(c),
        "running_var": draw(c) ** 2,
        "num_batches_tracked": np.array(7),
    }
    return {prefix + name: value for name, value in arrays.items()}


def template(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def exact(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        np.testing.assert_array_equal(a[name], b[name], name)


def contiguous(weights):
    """torch.tensor takes no mirrored views, and a safetensors file the bytes as they lie."""
    return all(value.flags.c_contiguous for value in weights.values())


def entries_of(report):
    return {row.source for row in report.used} | set(report.left)


# The definitions that torch documents, channels first, in float64.


def conv(x, w, stride=1, groups=1):
    (n, _, *size), (o, i, *kernel) = x.shape, w.shape
    out = [(s - k) // stride + 1 for s, k in zip(size, kernel, strict=True)]
    y = np.zeros((n, o, *out))
    for c, position in itertools.product(range(o), np.ndindex(*out)):
        group = c // (o // groups)
        window = tuple(
            slice(p * stride, p * stride + k) for p, k in zip(position, kernel, strict=True)
        )
        patch = x[(slice(None), slice(group * i, group * i + i), *window)]
        y[(slice(None), c, *position)] = (patch * w[c]).reshape(n, -1).sum(1, dtype=np.float64)
    return y


def conv_transpose(x, w, stride):
    """y[o, s p + k] += x[i, p] w[i, o, k], the transpose of `conv`."""
    (n, _, *size), (_, o, *kernel) = x.shape, w.shape
    y = np.zeros((n, o, *[(s - 1) * stride + k for s, k in zip(size, kernel, strict=True)]))
    for position, offset in itertools.product(np.ndindex(*size), np.ndindex(*kernel)):
        at = tuple(p * stride + k for p, k in zip(position, offset, strict=True))
        element, tap = x[(..., *position)], w[(..., *offset)]
        y[(..., *at)] += element.astype(np.float64) @ tap
    return y


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.parametrize(
    ("kernel", "inputs", "outputs", "groups", "stride"),
    [((3,), 2, 4, 1, 1), ((3, 2), 4, 6, 1, 2), ((2, 3), 4, 6, 2, 1), ((3, 2), 3, 6, 3, 1)],
    ids=["1d", "strided", "grouped", "depthwise"],
)
def test_conv_of_torch(kernel, inputs, outputs, groups, stride):
    x, w = draw(2, inputs, 7, 6)[..., : len(kernel) * 3], draw(outputs, inputs // groups, *kernel)
    x = x[..., 0] if len(kernel) == 1 else x
    b = draw(outputs)
    layer = nn.Conv(outputs, kernel, strides=stride, padding="VALID", feature_group_count=groups)
    state_dict = {"weight": w, "bias": b}
    variables, _ = convert.from_torch(state_dict, template(layer, channels_last(x)))
    expected = conv(x, w, stride, groups) + b.reshape(-1, *[1] * len(kernel))
    y = layer.apply(variables, channels_last(x))
    np.testing.assert_allclose(y, channels_last(expected), rtol=1e-4, atol=1e-5)
    exact(convert.to_torch(variables).weights, state_dict)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("outputs", [3, 5])
@pytest.mark.parametrize("kernel", [(3,), (2, 3)], ids=["1d", "2d"])
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_conv_transpose(transpose_kernel, outputs, kernel, framework, tmp_path):
    """Both settings of Flax's layer, and as many outputs as inputs or not."""
    x, w, b = draw(2, 3, 4, 3), draw(3, outputs, *kernel), draw(outputs)
    x = x[..., 0] if len(kernel) == 1 else x
    layer = nn.ConvTranspose(
        outputs, kernel, strides=[2] * len(kernel), padding="VALID",
        transpose_kernel=transpose_kernel,
    )  # fmt: skip
    variables = template(layer, channels_last(x))
    options = {"transpose_kernel": {"": transpose_kernel}}
    if framework == "torch":
        source = {"up.weight": w, "up.bias": b}
        options["names"] = {"": "up"}
        variables, _ = convert.from_torch(source, variables, **options)
    else:
        h5py = pytest.importorskip("h5py")
        source = {"kernel": np.moveaxis(w, (0, 1), (-1, -2)), "bias": b}
        with h5py.File(tmp_path / "up.weights.h5", "w") as file:
            for i, value in enumerate(source.values()):
                file[f"layers/conv{len(kernel)}d_transpose/vars/{i}"] = value
        variables, _ = convert.from_keras(tmp_path / "up.weights.h5", variables, **options)
    expected = conv_transpose(x, w, 2) + b.reshape(-1, *[1] * len(kernel))
    y = layer.apply(variables, channels_last(x))
    np.testing.assert_allclose(y, channels_last(expected), rtol=1e-4, atol=1e-5)
    if framework == "torch":
        weights, _ = convert.to_torch(variables, **options)
        exact(weights, source)
        assert contiguous(weights)
    else:
        convert.to_keras(
            variables, tmp_path / "b.weights.h5", like=tmp_path / "up.weights.h5", **options
        )
        again, _ = convert.from_keras(tmp_path / "b.weights.h5", variables, **options)
        jax.tree.map(np.testing.assert_array_equal, again, variables)


class Head(nn.Module):
    """Every other kind of layer, and a flatten."""

    @nn.compact
    def __call__(self, x, words):
        x = jbn.linen.BatchNorm(use_running_average=True, momentum=None)(x)
        x = x.reshape(len(x), -1)
        return nn.Dense(5, name="fc")(x) + nn.Embed(9, 5)(words)


def test_batch_norm_dense_and_embed_of_torch():
    x, words = draw(2, 3, 4, 2), np.array([1, 8])
    bn, w, b, e = draw_batch_norm(3, "bn."), draw(5, 24), draw(5), draw(9, 5)
    state_dict = {**bn, "fc.weight": w, "fc.bias": b, "words.weight": e}
    variables = template(Head(), channels_last(x), words)
    options = {"flattened": {"fc": (3, 4, 2)}}
    variables, report = convert.from_torch(
        state_dict, variables, epsilon=1e-5, momentum=0.25, **options
    )

    def column(name):
        return bn[f"bn.{name}"].astype(np.float64).reshape(-1, 1, 1)

    root = np.sqrt(column("running_var") + 1e-5)
    y = (x - column("running_mean")) / root * column("weight") + column("bias")
    expected = y.reshape(2, -1) @ w.T + b + e[words]
    y = Head().apply(variables, channels_last(x), words)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(variables["batch_stats"]["BatchNorm_0"]["count"], [7, 7, 7])
    assert report.arguments == {"BatchNorm_0": {"epsilon": 1e-5, "momentum": None}}
    assert entries_of(report) == state_dict.keys()
    again = convert.to_torch(variables, like=state_dict, **options).weights
    exact(again, state_dict)


@pytest.mark.parametrize("affine", [True, False])
def test_affine(affine):
    state_dict = draw_batch_norm(3)
    if not affine:
        del state_dict["weight"], state_dict["bias"]
    layer = jbn.linen.BatchNorm(use_running_average=True, use_scale=affine, use_bias=affine)
    variables, report = convert.from_torch(state_dict, template(layer, draw(2, 3)))
    assert ("params" in variables) == affine
    assert list(report.left) == ["num_batches_tracked"]
    exact(convert.to_torch(variables, like=state_dict).weights, state_dict)
    other = jbn.linen.BatchNorm(True, use_scale=not affine, use_bias=not affine)
    with pytest.raises(ValueError, match=f"make the layer with use_(scale|bias)={affine}"):
        convert.from_torch(state_dict, template(other, draw(2, 3)), names={"": ""})


class Stack(nn.Module):
    """Twelve layers of one shape and a different one between them."""

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, 4, kernel_init=nn.initializers.zeros)
        for _ in range(6):
            x = dense()(x)
        x = dense(use_bias=False, name="between")(x)
        for _ in range(6):
            x = dense()(x)
        return x


def stack_weights():
    names = [f"layers.{i}" for i in range(13)]
    state_dict = {f"{name}.weight": draw(4, 4) for name in names}
    return state_dict | {f"{n}.bias": draw(4) for n in names if n != "layers.6"}


def test_order_of_appearance():
    """Also of variables that are sorted by name, Dense_10 before Dense_2."""
    state_dict, x = stack_weights(), draw(1, 4)
    made = Stack().init(jax.random.key(0), x)
    expected = x.astype(np.float64)
    for i in range(13):
        expected = expected @ state_dict[f"layers.{i}.weight"].T
        expected = expected + state_dict.get(f"layers.{i}.bias", 0)
    for variables in (made, template(Stack(), x)):
        variables, report = convert.from_torch(state_dict, variables)
        y = Stack().apply(variables, x)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
        assert {row.matched for row in report.used} == {"order", "shape"}
        (told,) = (note for note in report.notes if "order alone" in note)
        by_order = {row.flax.split("/")[0] for row in report.used if row.matched == "order"}
        assert {name for name in by_order if f"{name} with layers." in told} == by_order
        assert "layers.10.weight" in str(report)
        assert str(report).startswith("- Paired by their order alone")


def test_names_and_equal_names():
    state_dict = stack_weights()
    state_dict["between.weight"] = state_dict.pop("layers.6.weight")
    names = {"Dense_0": "layers.1", "Dense_1": "layers.0"}
    variables, report = convert.from_torch(state_dict, template(Stack(), draw(1, 4)), names=names)
    params = variables["params"]
    for flax, torch in (("Dense_0", 1), ("Dense_1", 0), ("Dense_2", 2), ("Dense_11", 12)):
        np.testing.assert_array_equal(
            params[flax]["kernel"], state_dict[f"layers.{torch}.weight"].T
        )
    matched = {row.flax: row.matched for row in report.used}
    assert matched["Dense_0/kernel"] == "names"
    assert matched["between/kernel"] == "equal names"
    assert matched["Dense_5/bias"] == "order"


class Network(nnx.Module):
    """With other state than parameters and statistics."""

    def __init__(self, rngs):
        zeros = {"kernel_init": nn.initializers.zeros, "rngs": rngs}
        self.conv = nnx.Conv(2, 3, (3, 3), **zeros)
        self.norm = jbn.nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 4, **zeros))


def test_nnx():
    state_dict = {"conv.weight": draw(3, 2, 3, 3), "conv.bias": draw(3)}
    state_dict |= draw_batch_norm(3, "norm.")
    state_dict |= {"fc.weight": draw(4, 3), "fc.bias": draw(4)}
    model = Network(nnx.Rngs(0))
    state, report = convert.from_torch(state_dict, nnx.state(model))
    nnx.update(model, state)
    np.testing.assert_array_equal(model.norm.var[...], state_dict["norm.running_var"])
    np.testing.assert_array_equal(model.head.layers[1].kernel[...], state_dict["fc.weight"].T)
    assert "head/layers/0/rngs/key" in report.left
    exact(convert.to_torch(nnx.state(model), like=state_dict).weights, state_dict)
    pure, _ = convert.from_torch(state_dict, nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_array_equal(pure["norm"]["mean"], state_dict["norm.running_mean"])


def test_boxes_of_metadata_stay():
    layer = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.zeros, ("in", None)))
    variables = template(layer, draw(1, 2))
    state_dict = {"weight": draw(3, 2), "bias": draw(3)}
    kernel = convert.from_torch(state_dict, variables).weights["params"]["kernel"]
    assert kernel.names == ("in", None)
    np.testing.assert_array_equal(kernel.value, state_dict["weight"].T)


def test_leave():
    """What is left keeps the template's values, and in the state_dict its own."""
    model = nn.Sequential([nn.Dense(n, kernel_init=nn.initializers.ones) for n in (3, 2)])
    made = model.init(jax.random.key(0), draw(1, 4))
    state_dict = {"body.weight": draw(3, 4), "body.bias": draw(3)}
    state_dict |= {"fc.weight": draw(7, 3), "fc.bias": draw(7)}
    options = {"leave": ("layers_1", "fc")}
    variables, report = convert.from_torch(state_dict, made, **options)
    np.testing.assert_array_equal(
        variables["params"]["layers_1"]["kernel"], made["params"]["layers_1"]["kernel"]
    )
    assert report.left.keys() == {"layers_1/kernel", "layers_1/bias", "fc.weight", "fc.bias"}
    exact(convert.to_torch(variables, like=state_dict, **options).weights, state_dict)
    with pytest.raises(ValueError, match=r"layers_1.*pass what model.init returns"):
        convert.from_torch(state_dict, template(model, draw(1, 4)), **options)


def test_dtypes():
    """Those of the template; what that rounds is said."""
    w = draw(3, 2)
    for dtype, rounded in (("float32", False), ("bfloat16", True)):
        variables = template(nn.Dense(3, use_bias=False, param_dtype=dtype), draw(1, 2))
        variables, report = convert.from_torch({"weight": w}, variables)
        assert variables["params"]["kernel"].dtype == dtype
        assert any("rounded from float32 to bfloat16" in n for n in report.notes) == rounded
    half = {"weight": w.astype(jnp.bfloat16)}
    variables = template(nn.Dense(3, use_bias=False), draw(1, 2))
    variables, report = convert.from_torch(half, variables)
    assert not report.notes
    exact(convert.to_torch(variables, like=half).weights, half)
    variables = template(nn.Dense(3, use_bias=False, param_dtype="float16"), draw(1, 2))
    with pytest.raises(ValueError, match="too large for float16"):
        convert.from_torch({"weight": w * 1e6}, variables)


def test_report_says_what_a_state_dict_lacks():
    state_dict = draw_batch_norm(3)
    variables = template(jbn.linen.BatchNorm(True), draw(2, 3))
    report = convert.from_torch(state_dict, variables).report
    text = " ".join(str(report).split())
    for said in ("unbiased=True", "torch's is 1e-5", "momentum=0.9.", "running_var", "left"):
        assert said in text, said
    assert report.arguments == {"": {}}
    report = convert.from_torch(state_dict, variables, epsilon=1e-3, momentum=0.1).report
    assert report.arguments == {"": {"epsilon": 1e-3, "momentum": 0.9}}
    assert "epsilon=0.001, momentum=0.9" in str(report)
    assert not any("not in a state_dict" in note for note in report.notes)


CONV, BN = {"c.weight": draw(3, 2, 3, 3), "c.bias": draw(3)}, draw_batch_norm(3, "n.")


class ConvNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jbn.linen.BatchNorm(True)(nn.Conv(3, (3, 3))(x))


def without(name):
    return {k: v for k, v in {**CONV, **BN}.items() if k != name}


def changed(name, value):
    return {**CONV, **BN, name: value}


BAD = {
    "missing bias": (without("c.bias"), {}, "no layer of the source fits Conv_0.*c .weight"),
    "missing variance": (without("n.running_var"), {}, r"BatchNorm_0 .*n \(weight"),
    "surplus": (changed("d.weight", draw(2, 2)), {}, "no Flax layer fits d .*leave"),
    "width": (changed("c.weight", draw(4, 2, 3, 3)), {}, "Conv_0.*c .weight float32.4,2,3,3"),
    "kernel layout": (changed("c.weight", draw(3, 3, 2, 3)), {}, "Conv_0.*3,3,2,3"),
    "two": (CONV | BN | draw_batch_norm(3, "m."), {}, "BatchNorm_0.*n, m: 1 against 2"),
    "named misfit": ({**CONV, **BN}, {"names": {"Conv_0": "n"}}, r"Conv_0 .*does not fit n "),
    "no layer": ({**CONV, **BN}, {"names": {"Conv_1": "c"}}, "Conv_1.*there are .*'Conv_0'"),
    "no source": ({**CONV, **BN}, {"names": {"Conv_0": "d"}}, "'d'.*there are 'c', 'n'"),
    "left nothing": ({**CONV, **BN}, {"leave": ["d"]}, "leave names 'd'"),
    "transposed": ({**CONV, **BN}, {"transpose_kernel": {"C": True}}, "transpose_kernel.*'C'"),
    "flattened": ({**CONV, **BN}, {"flattened": {"Conv_0": (1, 2)}}, "no Dense layer"),
    "int8": (changed("c.weight", np.ones((3, 2, 3, 3), np.int8)), {}, r"c.weight is int8\[3,2,3,3"),
    "bool": (changed("n.bias", np.ones(3, bool)), {}, r"n.bias is bool.*BatchNorm_0.*leave"),
    "complex": (changed("c.bias", np.ones(3, "complex64")), {}, r"numbers, got complex64\[3\]"),
    "epsilon": ({**CONV, **BN}, {"epsilon": -1}, "epsilon must be at least 0"),
    "NaN": (changed("n.weight", np.array([1, np.nan, 2])), {}, "layer n: 1 of the 3 .*n.weight"),
    "infinite": (changed("c.bias", np.full(3, np.inf)), {}, "layer c: 3 of the 3"),
    "negative": (changed("n.running_var", np.array([1, -2.0, 3])), {}, "n.running_var are negat"),
    "nested": ({"state_dict": CONV, "epoch": 3}, {}, r"checkpoint\['state_dict'\]"),
    "objects": (changed("c.weight", object()), {}, "c.weight.*array of numbers"),
    "not a mapping": ([1, 2], {}, "module.state_dict"),
    "weight norm": (
        {**BN, "c.weight_g": draw(3, 1, 1, 1), "c.weight_v": draw(3, 2, 3, 3), "c.bias": draw(3)},
        {},
        "Conv_0.*c .weight_g",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    state_dict, options, message = BAD[case]
    variables = template(ConvNorm(), draw(1, 5, 5, 2))
    with pytest.raises((ValueError, TypeError), match=message):
        convert.from_torch(state_dict, variables, **options)


@pytest.mark.parametrize("shape", [4, (2.0, 2), "ab", (4,), (-2, -2), (2, 3)])
def test_flattened_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"flattened gives a .*4 inputs: give \(C, H, W\)"):
        convert.to_torch(kernels_of(a=(4, 2)), flattened={"a": shape})


def test_safetensors_of_float8(tmp_path):
    """A dtype that NumPy lacks."""
    pytest.importorskip("safetensors")
    tensor = {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}
    header = json.dumps({"a.weight": tensor}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(TypeError, match=r"model.safetensors holds .*float8_e4m3fn.*float32"):
        convert.from_torch(tmp_path / "model.safetensors", kernels_of(a=(2, 2)))


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    with pytest.raises(ValueError, match="weights_only=True"):
        convert.from_torch(path, {"params": {}})


def test_two_layers_of_one_name():
    variables = Stack().init(jax.random.key(0), draw(1, 4))
    names = {"Dense_0": "fc", "Dense_1": "fc"}
    with pytest.raises(ValueError, match="Dense_0 and Dense_1 would both be called 'fc'"):
        convert.to_torch(variables, names=names)
    state_dict = {"fc.weight": draw(4, 4), "fc.bias": draw(4)}
    with pytest.raises(ValueError, match="'fc' to several Flax layers: Dense_0, Dense_1"):
        convert.from_torch(state_dict, variables, names=names)


def test_bad_variables():
    with pytest.raises(TypeError, match=r"nnx.state\(model\)"):
        convert.from_torch(CONV, Network(nnx.Rngs(0)))
    with pytest.raises(TypeError, match="/bias has a shape but no values"):
        convert.to_torch(template(ConvNorm(), draw(1, 5, 5, 2)))
    unknown = {"params": {"scale_of_all": jnp.ones(3)}}
    with pytest.raises(ValueError, match="scale_of_all"):
        convert.to_torch(unknown)


def test_safetensors(tmp_path):
    """Written whole or not at all; a damaged file is refused."""
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    state_dict = stack_weights()
    variables, _ = convert.from_torch(state_dict, template(Stack(), draw(1, 4)))
    names = {f"Dense_{i}": f"layers.{i + (i > 5)}" for i in range(12)} | {"between": "layers.6"}
    convert.to_torch(variables, path, names=names)
    assert os.listdir(tmp_path) == [path.name]
    again, _ = convert.from_torch(path, template(Stack(), draw(1, 4)))
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    exact(convert.to_torch(again, like=path).weights, state_dict)

    other = path.with_name("other.safetensors")
    like = draw_batch_norm(3, "n.") | {"fc.weight": np.asfortranarray(draw(2, 3))}
    options = {"names": {"": "n"}, "leave": ["fc"]}
    norm, _ = convert.from_torch(like, template(jbn.linen.BatchNorm(True), draw(1, 3)), **options)
    convert.to_torch(norm, other, like=like, **options)
    exact(convert.to_torch(norm, like=other, **options).weights, like)
    other.unlink()

    before = path.read_bytes()
    broken = jax.tree.map(lambda v: v * np.nan, variables)
    with pytest.raises(ValueError, match="NaN"):
        convert.to_torch(broken, path, names=names)
    assert path.read_bytes() == before
    for content in (before[:-5], b"", b"foreign"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no whole safetensors file"):
            convert.from_torch(path, variables)


# Keras: a model of each kind of layer, in each kind of file, against Keras's own output.


@pytest.fixture(scope="module")
def keras():
    with keras_on_jax() as keras:
        yield keras


@pytest.fixture(scope="module")
def keras_model(keras):
    layers = keras.layers
    inputs = keras.Input((9, 9, 2))
    x = layers.Conv2D(4, 3, name="stem")(inputs)
    x = layers.BatchNormalization(scale=False, epsilon=0.01, momentum=0.5)(x)
    x = layers.DepthwiseConv2D(2, depth_multiplier=2)(x)
    x = layers.BatchNormalization(center=False)(x)
    x = layers.SeparableConv2D(6, 2)(x)
    x = layers.Conv2DTranspose(6, 3, strides=2, name="up")(x)
    inner = [layers.Conv2D(6, 3, groups=3), layers.BatchNormalization()]
    x = keras.Sequential(inner, name="part")(x)
    x = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.set_weights(
        [draw(*w.shape) ** 2 if "variance" in w.path else draw(*w.shape) for w in model.weights]
    )
    return model


class LikeKeras(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm(x, **options):
            return jbn.linen.BatchNorm(True, **{"epsilon": 1e-3, **options})(x)

        x = norm(nn.Conv(4, (3, 3), padding="VALID")(x), use_scale=False, epsilon=0.01)
        x = nn.Conv(8, (2, 2), padding="VALID", feature_group_count=4)(x)
        x = norm(x, use_bias=False)
        x = nn.Conv(8, (2, 2), padding="VALID", feature_group_count=8, use_bias=False)(x)
        x = nn.Conv(6, (1, 1))(x)
        x = nn.ConvTranspose(6, (3, 3), strides=(2, 2), padding="VALID", name="up")(x)
        x = norm(nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3)(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


OPTIONS = {"transpose_kernel": {"up": False}}


# Keras's own, on saving.
KERAS_WARNS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@KERAS_WARNS
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5", "old.h5"])
def test_keras(name, keras, keras_model, tmp_path):
    path = tmp_path / name
    save = keras_model.save_weights if "weights" in name else keras_model.save
    save(path)
    if name == "old.h5":  # weights alone in the older format
        import h5py

        with h5py.File(tmp_path / "model.h5", "w") as old, h5py.File(path) as whole:
            weights = whole["model_weights"]
            old.attrs.update(weights.attrs)
            for layer in weights:
                whole.copy(weights[layer], old)
        path = tmp_path / "model.h5"
    x = draw(2, 9, 9, 2)
    variables, report = convert.from_keras(path, template(LikeKeras(), x), **OPTIONS)
    y = np.asarray(keras_model(x))
    np.testing.assert_allclose(LikeKeras().apply(variables, x), y, rtol=1e-3, atol=1e-3)
    arguments = report.arguments["BatchNorm_0"]
    if name in ("model.keras", "model.h5"):
        assert arguments == {"epsilon": 0.01, "momentum": 0.5}
        assert report.arguments["BatchNorm_2"] == {"epsilon": 1e-3, "momentum": 0.99}
    else:
        assert arguments == {}
        assert any("epsilon=1e-3" in note for note in report.notes)
    assert len(report.used) == len(keras_model.weights)

    changed = jax.tree.map(lambda v: v * 0.5, variables)
    converted = convert.to_keras(changed, path, like=path, **OPTIONS)
    assert {row.source for row in converted.report.used} == converted.weights.keys()
    again, _ = convert.from_keras(path, variables, **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, again, changed)
    before = keras_model.get_weights()
    if "weights" in name:
        keras_model.load_weights(path)
        loaded = keras_model.get_weights()
        keras_model.set_weights(before)
    elif name != "old.h5":
        loaded = keras.models.load_model(path, compile=False).get_weights()
    else:
        return
    for new, old in zip(loaded, before, strict=True):
        np.testing.assert_array_equal(new, old * np.float32(0.5))


@KERAS_WARNS
def test_keras_says_what_a_transposed_convolution_needs(keras_model, tmp_path):
    """Keras's file tells a Conv2DTranspose, but not Flax's argument."""
    keras_model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"up .*transpose_kernel"):
        convert.from_keras(tmp_path / "model.keras", template(LikeKeras(), draw(1, 9, 9, 2)))


@KERAS_WARNS
@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_keras_scale_or_bias(name, keras, tmp_path):
    """Numbered variables of which one is missing: the config knows which, or the Flax layer."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(scale=False)])
    model.set_weights([draw(3), draw(3), draw(3) ** 2])
    (model.save if name == "model.keras" else model.save_weights)(tmp_path / name)

    def load(**options):
        layer = jbn.linen.BatchNorm(True, **options)
        return convert.from_keras(tmp_path / name, template(layer, draw(1, 3))).weights

    np.testing.assert_array_equal(load(use_scale=False)["params"]["bias"], model.get_weights()[0])
    with pytest.raises(ValueError, match=r"no layer of the source fits"):
        load()
    with pytest.raises(ValueError, match=r"no layer of the source fits"):
        load(use_scale=False, use_bias=False)
    if name == "model.keras":
        with pytest.raises(ValueError, match=r"no layer of the source fits.* beta "):
            load(use_bias=False)


@KERAS_WARNS
def test_keras_bad_files(keras_model, tmp_path):
    variables = template(LikeKeras(), draw(1, 9, 9, 2))
    good, bad = tmp_path / "good.keras", tmp_path / "bad.keras"
    keras_model.save(good)
    content = good.read_bytes()
    for broken in (content[:-100], content[: len(content) // 2], b"", b"foreign"):
        bad.write_bytes(broken)
        with pytest.raises(ValueError, match=r"bad.keras is no whole file of Keras"):
            convert.from_keras(bad, variables)
    keras_model.save_weights(tmp_path / "good.weights.h5")
    content = (tmp_path / "good.weights.h5").read_bytes()
    bad = tmp_path / "bad.weights.h5"
    for broken in (content[:-100], b"foreign"):
        bad.write_bytes(broken)
        with pytest.raises(ValueError, match=r"bad.weights.h5 is no whole file of Keras"):
            convert.from_keras(bad, variables)
    with pytest.raises(FileNotFoundError):
        convert.from_keras(tmp_path / "none.h5", variables)
    with pytest.raises(ValueError, match=r"model.pth must be a file .h5"):
        convert.from_keras(tmp_path / "model.pth", variables)


@KERAS_WARNS
def test_keras_foreign_entries(keras_model, tmp_path):
    import h5py

    path, x = tmp_path / "model.weights.h5", draw(1, 9, 9, 2)
    keras_model.save_weights(path)
    variables, _ = convert.from_keras(path, template(LikeKeras(), x), **OPTIONS)
    before = path.read_bytes()
    wrong = jax.tree.map(lambda v: -jnp.abs(v), variables)
    with pytest.raises(ValueError, match=r"BatchNorm_\d: .*BatchNorm_\d/var are negative"):
        convert.to_keras(wrong, path, like=path, **OPTIONS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]

    with h5py.File(path, "r+") as file:
        file["layers/batch_normalization/vars/2"][...] = -1
    with pytest.raises(ValueError, match=r"batch_normalization.*negative, down to -1"):
        convert.from_keras(path, variables, **OPTIONS)
    with h5py.File(path, "r+") as file:
        del file["layers/conv2d/vars/0"]
    with pytest.raises(ValueError, match=r"Conv_0"):
        convert.from_keras(path, variables, **OPTIONS)
    with h5py.File(path, "w") as file:
        file["data"] = np.ones(3)
    with pytest.raises(ValueError, match=r"data.*written by Keras"):
        convert.from_keras(path, variables)
    with h5py.File(path, "w"):
        pass
    with pytest.raises(ValueError, match=r"holds no layer"):
        convert.from_keras(path, variables)


def test_keras_2_models_within_models(tmp_path):
    """Weights of several layers in one group, which is the inner model's."""
    h5py = pytest.importorskip("h5py")
    kernels = {"c1/kernel:0": draw(3, 4), "c2/kernel:0": draw(3, 4)}
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.attrs["layer_names"] = [b"part"]
        group = file.create_group("part")
        group.attrs["weight_names"] = [name.encode() for name in kernels]
        for name, kernel in kernels.items():
            group[name] = kernel
    variables = {"params": {name: {"kernel": jnp.zeros((3, 4))} for name in ("a", "b")}}
    names = {"a": "part/c2", "b": "part/c1"}
    params = convert.from_keras(tmp_path / "model.h5", variables, names=names).weights["params"]
    np.testing.assert_array_equal(params["a"]["kernel"], kernels["c2/kernel:0"])
    np.testing.assert_array_equal(params["b"]["kernel"], kernels["c1/kernel:0"])


def test_what_is_not_clear_is_refused():
    """A square matrix that may be of Dense or Embed, and names equal to several."""
    square = {"Dense_0": {"kernel": jnp.ones((4, 4))}, "Embed_0": {"embedding": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="fits layers of different kinds, Dense_0 and Embed_0"):
        convert.from_torch({"w.weight": draw(4, 4)}, {"params": square})
    with pytest.raises(ValueError, match="1 against 2"):
        convert.from_torch({"v.weight": draw(4, 4), "w.weight": draw(4, 4)}, {"params": square})
    variables = {"params": {name: {"kernel": jnp.ones((4, 4))} for name in ("c", "a_b")}}
    state_dict = {"a_b.weight": draw(4, 4), "a.b.weight": draw(4, 4)}
    report = convert.from_torch(state_dict, variables).report
    assert {row.matched for row in report.used} == {"order"}


def dense_params(*names):
    """Layers of one kind and shape, in this order and as `init` does, the kernel first."""
    return {"params": {n: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for n in names}}


def torch_linears(*names):
    shapes = {"weight": (2, 2), "bias": (2,)}
    return {f"{n}.{role}": draw(*shape) for n in names for role, shape in shapes.items()}


def test_names_that_are_equal_by_accident():
    """torch counts the activations of a Sequential too: its layers are 0, 2 and 4."""
    variables = dense_params("layers_0", "layers_1", "layers_2")
    state_dict = torch_linears("layers.0", "layers.2", "layers.4")
    with pytest.raises(
        convert.OrderError, match=r"layers_2 and layers.2 have equal names, but by the order"
    ) as caught:
        convert.from_torch(state_dict, variables)
    names = {"layers_1": "layers.2", "layers_2": "layers.4"}
    assert caught.value.names == names | {"layers_0": "layers.0"}
    weights = convert.from_torch(state_dict, variables, names=names).weights["params"]
    np.testing.assert_array_equal(weights["layers_1"]["bias"], state_dict["layers.2.bias"])
    # Where the order confirms the equal names it serves the others too.
    agreeing = torch_linears("layers.0", "layers.1", "last")
    weights = convert.from_torch(agreeing, variables).weights["params"]
    np.testing.assert_array_equal(weights["layers_2"]["bias"], agreeing["last.bias"])


def kernels_of(**shapes):
    """Flax layers of these kernels, in this order as `init` has it."""
    return {"params": {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}}


def weights_of(**shapes):
    """torch's layers of these weights, in this order."""
    return {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}


def test_an_order_that_other_layers_deny():
    """A residual block whose shortcut torch defines last, and Flax calls first, or last as well."""
    state_dict = weights_of(main=(4, 3), end=(4, 4), shortcut=(4, 3))
    made = kernels_of(skip=(3, 4), inner=(3, 4), out=(4, 4))
    numbered = kernels_of(Dense_0=(3, 4), Dense_1=(3, 4), Dense_2=(4, 4))  # and sorted
    for variables in (made, numbered):
        skip, inner, out = variables["params"]
        message = f"{inner} and shortcut .*{out} and end come before.*Pair {skip}, {inner} in names"
        with pytest.raises(ValueError, match=message):
            convert.from_torch(state_dict, variables)
        names = {skip: "shortcut", inner: "main"}
        params = convert.from_torch(state_dict, variables, names=names).weights["params"]
        np.testing.assert_array_equal(params[skip]["kernel"], state_dict["shortcut.weight"].T)
    last = kernels_of(Dense_0=(3, 4), Dense_1=(4, 4), Dense_2=(3, 4))
    params = convert.from_torch(state_dict, last).weights["params"]
    np.testing.assert_array_equal(params["Dense_2"]["kernel"], state_dict["shortcut.weight"].T)


def test_a_head_that_is_defined_first():
    """What crosses all of a group says nothing of the order within it."""
    norm = {"scale": jnp.ones(2), "bias": jnp.ones(2)}
    kernels = kernels_of(stem=(3, 2), mid=(2, 2), end=(2, 2), head=(2, 5))["params"]
    params = {"stem": kernels["stem"], "p": norm, "mid": kernels["mid"], "q": norm}
    params |= {"end": kernels["end"], "head": kernels["head"]}
    stats = {name: {"mean": jnp.ones(2), "var": jnp.ones(2)} for name in "pq"}
    state_dict = weights_of(first=(5, 2), a=(2, 3)) | norms_of("b") | weights_of(c=(2, 2))
    state_dict |= norms_of("d") | weights_of(e=(2, 2))
    variables = {"params": params, "batch_stats": stats}
    weights = convert.from_torch(state_dict, variables).weights
    np.testing.assert_array_equal(weights["params"]["end"]["kernel"], state_dict["e.weight"].T)
    np.testing.assert_array_equal(weights["batch_stats"]["q"]["var"], state_dict["d.running_var"])


def test_an_order_that_numbers_confirm():
    """All layers of one shape before those of another, where Flax has them in turns."""
    variables = kernels_of(in1=(3, 3), out1=(2, 2), in2=(3, 3), out2=(2, 2))
    state_dict = weights_of(conv1=(3, 3), conv2=(3, 3), bn1=(2, 2), bn2=(2, 2))
    weights = convert.from_torch(state_dict, variables).weights["params"]
    for path, name in zip(variables["params"], ("conv1", "bn1", "conv2", "bn2"), strict=True):
        np.testing.assert_array_equal(weights[path]["kernel"], state_dict[f"{name}.weight"].T)
    # Linen's own numbers are those of the calls, which may be in another order than the source's.
    linens = kernels_of(Dense_0=(3, 3), Dense_1=(2, 2), Dense_2=(3, 3), Dense_3=(2, 2))
    with pytest.raises(convert.OrderError, match="different orders") as refused:
        convert.from_torch(state_dict, linens)
    guess = {"Dense_0": "conv1", "Dense_1": "bn1", "Dense_2": "conv2", "Dense_3": "bn2"}
    assert refused.value.names == guess
    kernels = convert.from_torch(state_dict, linens, names=guess).weights["params"]
    np.testing.assert_array_equal(kernels["Dense_2"]["kernel"], state_dict["conv2.weight"].T)
    # Statistics alone, which Linen has after all parameters.
    norms = {name: {"mean": jnp.ones(2), "var": jnp.ones(2)} for name in ("stem_norm", "end_norm")}
    variables = {**kernels_of(stem=(3, 3), end=(2, 2)), "batch_stats": norms}
    state_dict = {}
    for name, shape in (("stem", (3, 3)), ("end", (2, 2))):
        state_dict |= weights_of(**{name: shape})
        state_dict |= {f"{name}_bn.running_{role}": draw(2) ** 2 for role in ("mean", "var")}
    stats = convert.from_torch(state_dict, variables).weights["batch_stats"]
    np.testing.assert_array_equal(stats["end_norm"]["var"], state_dict["end_bn.running_var"])


def test_modules_of_equal_names():
    """Two towers, which the models define in different orders."""
    linens = {f"Dense_{i}": {"kernel": jnp.ones((4, 4))} for i in range(2)}
    stem = kernels_of(stem=(3, 4))["params"]  # so that names are not sorted
    variables = {"params": {**stem, "user": linens, "item": linens}}
    towers = ("item.0", "item.2", "user.0", "user.2")
    state_dict = weights_of(stem=(4, 3), **dict.fromkeys(towers, (4, 4)))
    with pytest.raises(convert.OrderError, match="both models have layers of that kind in 'item'"):
        convert.from_torch(state_dict, variables)
    variables = {"params": {**stem, "item": linens, "user": linens}}
    weights = convert.from_torch(state_dict, variables).weights["params"]
    kernel = weights["user"]["Dense_1"]["kernel"]
    np.testing.assert_array_equal(kernel, state_dict["user.2.weight"].T)


def test_an_order_that_numbers_deny(keras, tmp_path):
    """Keras lists the layers of branches by depth, and numbers them as they are made."""
    with pytest.raises(ValueError, match=r"order of fc2, fc1, .*numbers say another: pair a, b in"):
        convert.from_torch(torch_linears("fc2", "fc1"), dense_params("a", "b"))
    convert.from_torch(torch_linears("fc", "fc.out"), dense_params("a", "b"))  # without numbers
    x = keras.Input((2,))
    branches = []
    for i in range(2):
        y = keras.layers.Dense(2, name=f"dense_{2 * i}")(x)
        branches.append(keras.layers.Dense(2, name=f"dense_{2 * i + 1}")(y))
    model = keras.Model(x, keras.layers.Concatenate()(branches))
    with warnings.catch_warnings(action="ignore"):
        model.save(tmp_path / "model.keras")
    variables = dense_params(*(f"Dense_{i}" for i in range(4)))
    with pytest.raises(ValueError, match="order of dense_0, dense_2, dense_1, dense_3"):
        convert.from_keras(tmp_path / "model.keras", variables)
    names = {f"Dense_{i}": f"dense_{i}" for i in range(4)}
    report = convert.from_keras(tmp_path / "model.keras", variables, names=names).report
    assert {row.matched for row in report.used} == {"names"}


def test_kernels_that_are_those_of_others_transposed():
    """The two 1x1 convolutions of a bottleneck: each has the shape of a ConvTranspose too."""
    variables = kernels_of(Conv_0=(1, 1, 4, 8), Conv_1=(1, 1, 8, 4))
    state_dict = weights_of(b=(8, 4, 1, 1), a=(4, 8, 1, 1))
    weights = convert.from_torch(state_dict, variables).weights["params"]
    np.testing.assert_array_equal(
        weights["Conv_1"]["kernel"][0, 0], state_dict["a.weight"][..., 0, 0].T
    )
    # Two of one shape in Flax of which the second must be a ConvTranspose.
    variables = kernels_of(make=(1, 1, 4, 8), grow=(1, 1, 4, 8))
    weights = convert.from_torch(state_dict, variables).weights["params"]
    np.testing.assert_array_equal(
        weights["grow"]["kernel"][0, 0], state_dict["a.weight"][..., 0, 0]
    )


def test_an_order_that_sorting_hides(tmp_path):
    """Of names that more than numbers tell apart; equal names need no order."""
    made, state_dict = dense_params("stem", "down", "mid"), torch_linears("a", "c", "b")
    weights = convert.from_torch(state_dict, made).weights["params"]
    np.testing.assert_array_equal(weights["mid"]["bias"], state_dict["b.bias"])
    by_name = jax.tree.map(lambda v: v, made)  # which sorts
    with pytest.raises(
        ValueError, match=r"order of down, mid, stem.* what a Linen model's init.*pair down"
    ):
        convert.from_torch(state_dict, by_name)
    named = torch_linears("stem", "down", "mid")
    weights = convert.from_torch(named, by_name).weights["params"]
    np.testing.assert_array_equal(weights["down"]["bias"], named["down.bias"])
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"order of a, b, c.* the source is sorted by name"):
        convert.from_torch(tmp_path / "model.safetensors", made)


def test_numbers_say_the_order_of_sorted_names():
    """Also of a mapping, in which 10 came before 2."""
    names = [f"layers.{i}" for i in range(12)]
    state_dict = torch_linears(*names)
    variables = dense_params(*(f"Dense_{i}" for i in range(12)))
    by_name = dict(sorted(state_dict.items()))
    weights = convert.from_torch(by_name, variables).weights["params"]
    for i, name in enumerate(names):
        np.testing.assert_array_equal(weights[f"Dense_{i}"]["bias"], state_dict[f"{name}.bias"])


@pytest.mark.parametrize("option", ["names", "transpose_kernel", "flattened"])
def test_options_that_are_no_mappings(option):
    for call in (convert.from_torch, convert.to_torch):
        args = [{}] if call is convert.from_torch else []
        with pytest.raises(TypeError, match=f"{option} must map paths of Flax layers, got"):
            call(*args, dense_params("a"), **{option: ["a"]})


def test_a_flatten_that_is_not_said():
    """A note names the layer: its inputs are a multiple of the channels."""
    variables = kernels_of(Conv_0=(3, 3, 1, 4), Dense_0=(24, 8), Dense_1=(8, 8))
    state_dict = weights_of(conv=(4, 1, 3, 3), fc=(8, 24), out=(8, 8))
    told = "Dense_0 has 24 inputs.*give flattened={'Dense_0': "
    for call in (functools.partial(convert.from_torch, state_dict), convert.to_torch):
        report = call(variables).report
        (note,) = [note for note in report.notes if "flattened" in note]
        assert re.search(told, note)
        assert not call(variables, flattened={"Dense_0": (4, 3, 2)}).report.notes
    pooled = kernels_of(Conv_0=(3, 3, 1, 4), Conv_1=(3, 3, 4, 24), Dense_0=(24, 8))
    one_channel = kernels_of(Conv_0=(3, 3, 4, 1), Dense_0=(24, 8))
    assert not convert.to_torch(pooled).report.notes
    assert not convert.to_torch(one_channel).report.notes


def test_a_square_kernel_that_may_be_transposed(tmp_path):
    """A note names it where its own name speaks of upsampling."""
    variables, state_dict = kernels_of(Conv_0=(2, 2, 3, 3)), weights_of(upconv=(3, 3, 2, 2))
    (note,) = convert.from_torch(state_dict, variables).report.notes
    assert note.startswith("Conv_0 and upconv are taken as a Conv")
    for value in (True, False):
        options = {"transpose_kernel": {"Conv_0": value}}
        assert not convert.from_torch(state_dict, variables, **options).report.notes
    assert convert.from_torch(weights_of(**{"ups.0": (3, 3, 2, 2)}), variables).report.notes
    plain = ("group", (3, 3, 2, 2)), ("ups.0.conv", (3, 3, 2, 2)), ("up", (3, 2, 2, 2))
    for name, shape in plain:
        variables = kernels_of(Conv_0=(2, 2, shape[1], 3))
        assert not convert.from_torch(weights_of(**{name: shape}), variables).report.notes


def test_bfloat16_in_torch(tmp_path):
    """The two ways that `to_torch` tells, bit for bit."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    kernel = draw(3, 2).astype(jnp.bfloat16)
    path = tmp_path / "model.safetensors"
    weights, _ = convert.to_torch({"params": {"fc": {"kernel": jnp.asarray(kernel)}}}, path)
    viewed = torch.tensor(weights["fc.weight"].view("int16")).view(torch.bfloat16)
    for tensor in (viewed, load_file(path)["fc.weight"]):
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), kernel.T.astype(np.float32))


def test_keras_h5_of_a_sequential_model(tmp_path):
    """Its weights are scoped by the model's name, which is none of the layer's."""
    with keras_on_jax() as keras:
        layers = keras.layers
        norm = layers.BatchNormalization(epsilon=0.5, momentum=0.7, name="stem")
        model = keras.Sequential([keras.Input((3,)), norm, layers.Dense(2, name="head")])
        with warnings.catch_warnings(action="ignore"):
            model.save(tmp_path / "model.h5")
    norm = {"scale": jnp.ones(3), "bias": jnp.ones(3)}
    variables = {
        "params": {"stem": norm, "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}},
        "batch_stats": {"stem": {"mean": jnp.ones(3), "var": jnp.ones(3)}},
    }
    report = convert.from_keras(tmp_path / "model.h5", variables).report
    assert {row.matched for row in report.used} == {"equal names"}
    assert report.arguments == {"stem": {"epsilon": 0.5, "momentum": 0.7}}
    assert not report.notes


def test_an_order_that_a_loader_of_safetensors_hides(tmp_path):
    """It gives a mapping that is sorted by dtype and name, as the file is."""
    safetensors = pytest.importorskip("safetensors.numpy")
    state_dict = torch_linears("stem", "down", "mid")
    state_dict["head.weight"] = draw(5, 2).astype(np.float16)
    safetensors.save_file(state_dict, tmp_path / "model.safetensors")
    loaded = safetensors.load_file(tmp_path / "model.safetensors")
    assert list(loaded) != sorted(loaded)
    variables = dense_params("a", "b", "c")
    variables["params"]["d"] = {"kernel": jnp.ones((2, 5))}
    with pytest.raises(ValueError, match=r"order of down, mid, stem.* the source is sorted"):
        convert.from_torch(loaded, variables)
    weights = convert.from_torch(state_dict, variables).weights["params"]
    np.testing.assert_array_equal(weights["a"]["bias"], state_dict["stem.bias"])


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("stem", "down", "mid"):
            x = nn.Dense(2, name=name)(x)
        return x


@pytest.mark.parametrize("transform", [nn.remat, nn.jit])
def test_an_order_that_a_transformation_hides(transform):
    """What init returns of a block under nn.remat or nn.jit is sorted, and not all of it."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(transform(Inner)()(x))

    variables = Model().init(jax.random.key(0), jnp.ones((1, 2)))
    state_dict = torch_linears("a", "b", "c") | {"d.weight": draw(3, 2), "d.bias": draw(3)}
    with pytest.raises(ValueError, match=r"order of \w+/down, \w+/mid, \w+/stem.* is not known"):
        convert.from_torch(state_dict, variables)


def norms_of(*names):
    return {
        f"{name}.{role}": draw(2) ** 2
        for name in names
        for role in ("weight", "bias", "running_mean", "running_var")
    }


class Block(nn.Module):
    """Two convolutions and a shortcut, each with a batch norm of two features."""

    shortcut_first: bool

    @nn.compact
    def __call__(self, x):
        sizes = [(3, 3), (3, 3), (1, 1)]
        for size in sizes[::-1] if self.shortcut_first else sizes:
            x = jbn.linen.BatchNorm(True)(nn.Conv(2, size, use_bias=False)(x))
        return x


@pytest.mark.parametrize("how", ["init", "sorted", "remat"])
@pytest.mark.parametrize("separate", ["in turns", "in the main branch", "all"])
def test_an_order_that_other_kinds_deny(how, separate):
    """Batch norms of one shape, whose order only the convolutions beside them show."""
    names = [f"block.conv{i}" for i in (1, 2)] + ["block.shortcut.0"]
    norms = [f"block.bn{i}" for i in (1, 2)] + ["block.shortcut.1"]
    convs = {
        f"{name}.weight": draw(2, 2, size, size)
        for name, size in zip(names, (3, 3, 1), strict=True)
    }
    state_dict = {}
    if separate != "in turns":
        state_dict = {**convs, **norms_of(*norms)}
    if separate == "in the main branch":
        state_dict = {k: state_dict[k] for k in sorted(state_dict, key=lambda k: "shortcut" in k)}
    if separate == "in turns":
        for (name, value), norm in zip(convs.items(), norms, strict=True):
            state_dict |= {name: value} | norms_of(norm)

    def template(shortcut_first):
        model = (nn.remat(Block) if how == "remat" else Block)(shortcut_first)
        variables = model.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
        return jax.tree.map(lambda v: v, variables) if how == "sorted" else variables

    weights = convert.from_torch(state_dict, template(False)).weights["batch_stats"]
    for i, norm in enumerate(norms):
        np.testing.assert_array_equal(
            weights[f"BatchNorm_{i}"]["mean"], state_dict[f"{norm}.running_mean"]
        )
    with pytest.raises(ValueError, match="Pair BatchNorm_0, BatchNorm_1, BatchNorm_2 in names"):
        convert.from_torch(state_dict, template(True))


def test_shortcuts_of_keras(keras, tmp_path):
    """Keras numbers its layers as they are made, here the shortcut last."""
    x = keras.Input((4, 4, 2))
    y = x
    for size in (3, 3):
        y = keras.layers.Conv2D(2, size, padding="same", use_bias=False)(y)
        y = keras.layers.BatchNormalization()(y)
    z = keras.layers.BatchNormalization()(keras.layers.Conv2D(2, 1, use_bias=False)(x))
    with warnings.catch_warnings(action="ignore"):
        keras.Model(x, y + z).save(tmp_path / "model.keras")
    variables = Block(shortcut_first=True).init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    with pytest.raises(ValueError, match="in names"):
        convert.from_keras(tmp_path / "model.keras", variables)


def test_numbers_that_are_not_next_to_each_other_deny_an_order():
    state_dict = torch_linears("fc2", "mid", "fc1")
    with pytest.raises(ValueError, match="their numbers say another"):
        convert.from_torch(state_dict, dense_params("a", "b", "c"))


def test_leave_a_single_entry():
    """Such as a parameter of the whole module, whose layer has no name."""
    state_dict = {"cls_token": draw(1, 2), "scale": draw(), **torch_linears("fc")}
    report = convert.from_torch(state_dict, dense_params("a"), leave=["cls_token", "scale"]).report
    assert report.left == {"cls_token": "leave", "scale": "leave"}
    # One of Flax, of a module that holds layers.
    variables = {"params": {"block": {"gamma": jnp.full(3, 7.0), **dense_params("a")["params"]}}}
    weights, report = convert.from_torch(
        state_dict, variables, leave=["cls_token", "scale", "block/gamma"]
    )
    assert report.left == {"cls_token": "leave", "scale": "leave", "block/gamma": "leave"}
    np.testing.assert_array_equal(weights["params"]["block"]["gamma"], np.full(3, 7.0))
    np.testing.assert_array_equal(
        weights["params"]["block"]["a"]["kernel"], state_dict["fc.weight"].T
    )
    like = convert.to_torch(dense_params("a"), like=state_dict, leave=["cls_token", "scale"])
    np.testing.assert_array_equal(like.weights["cls_token"], state_dict["cls_token"])


def test_a_flatten_that_a_later_layer_hides():
    """As in an autoencoder, whose decoder begins with as many features."""
    variables = kernels_of(conv=(3, 3, 1, 2), encode=(8, 3), decode=(3, 8))
    state_dict = weights_of(conv=(2, 1, 3, 3), encode=(3, 8), decode=(8, 3))
    notes = convert.from_torch(state_dict, variables).report.notes
    assert any("encode has 8 inputs" in note for note in notes)


def test_long_names_are_shown_whole():
    path = "/".join(["stage", "block"] * 12) + "/end"
    state_dict = torch_linears(path.replace("/", "."))
    variables = {"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    for name in reversed(path.split("/")):
        variables["params"] = {name: variables["params"]}
    assert "…" not in str(convert.from_torch(state_dict, variables).report)


def test_the_work_grows_with_the_layers():
    """And not with their square, by the calls of functions."""

    def calls(n):
        norms = {f"BatchNorm_{i}": {"scale": jnp.ones(2), "bias": jnp.ones(2)} for i in range(n)}
        stats = {name: {"mean": jnp.ones(2), "var": jnp.ones(2)} for name in norms}
        params = {f"Dense_{i}": dense_params("a")["params"]["a"] for i in range(n)}
        state_dict = {}
        for i in range(n):
            state_dict |= torch_linears(f"conv{i}") | norms_of(f"bn{i}")
        count = 0

        def profile(frame, event, _):
            nonlocal count
            count += event == "call" and "convert" in frame.f_code.co_filename

        sys.setprofile(profile)
        try:
            convert.from_torch(state_dict, {"params": params | norms, "batch_stats": stats})
        finally:
            sys.setprofile(None)
        return count

    assert calls(240) < 4.4 * calls(60)


def test_a_guess_to_paste():
    """A refusal ends with names for all layers that their order does not pair."""
    variables = dense_params("a", "b", "c")
    variables["params"] |= kernels_of(d=(3, 4), e=(3, 4))["params"]
    state_dict = torch_linears("fc2", "mid", "fc1") | weights_of(up2=(4, 3), up1=(4, 3))
    with pytest.raises(convert.OrderError, match="their numbers say another") as caught:
        convert.from_torch(state_dict, variables)
    _, told = str(caught.value).split("A guess by order, to be corrected: names=")
    names = ast.literal_eval(told)
    assert names == {"a": "fc2", "b": "mid", "c": "fc1", "d": "up2", "e": "up1"}
    assert names == pickle.loads(pickle.dumps(caught.value)).names
    names |= {"a": "fc1", "c": "fc2"}
    weights = convert.from_torch(state_dict, variables, names=names).weights["params"]
    np.testing.assert_array_equal(weights["a"]["bias"], state_dict["fc1.bias"])
    # Equal names that the order would deny are kept, unless by a bare number.
    variables = dense_params("in_1", "last", "mid")
    with pytest.raises(convert.OrderError, match="have equal names, but by the order") as caught:
        convert.from_torch(torch_linears("mid", "in.1", "end"), variables)
    assert caught.value.names == {"in_1": "in.1", "last": "end", "mid": "mid"}
    # Many are shown in part.
    many = list("abcdefghijkl")
    with pytest.raises(convert.OrderError, match=r", \.\.\.}, all of it in .* names$") as caught:
        convert.from_torch(torch_linears("z1", "z0", *many), dense_params("y", "x", *many))
    assert caught.value.names == {"y": "z1", "x": "z0"} | dict(zip(many, many, strict=True))
    assert "'j': 'j', ...}" in str(caught.value)
    assert "'k'" not in str(caught.value)


def test_numbers_of_layers_that_are_called_in_another_order():
    """Linen numbers layers as they are made, and init has them as they are called."""

    class Nested(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Dense(2)(nn.relu(nn.Dense(2)(x)))))

    x, state_dict = draw(3, 2), torch_linears("0", "2", "4")
    made = Nested().init(jax.random.key(0), x)
    assert list(made["params"]) == ["Dense_2", "Dense_1", "Dense_0"]
    variables, _ = convert.from_torch(state_dict, made)
    expected = x
    for name in ("0", "2", "4"):
        expected = expected @ state_dict[f"{name}.weight"].T + state_dict[f"{name}.bias"]
        expected = expected if name == "4" else np.maximum(expected, 0)
    y = np.asarray(Nested().apply(variables, x))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="their numbers say another"):  # the user's own numbers
        convert.from_torch(state_dict, dense_params("fc2", "fc1", "fc0"))


class ResidualNet(nnx.Module):
    """As torch has it, but for the Sequential."""

    def __init__(self, rngs, norm="bn1"):
        self.conv1 = nnx.Conv(1, 2, (3, 3), use_bias=False, rngs=rngs)
        setattr(self, norm, jbn.nnx.BatchNorm(2, rngs=rngs))
        blocks = []
        for _ in range(2):
            block = nnx.Module()
            for i in (1, 2):
                conv = nnx.Conv(2, 2, (3, 3), use_bias=False, rngs=rngs)
                setattr(block, f"conv{i}", conv)
                setattr(block, f"bn{i}", jbn.nnx.BatchNorm(2, rngs=rngs))
            blocks.append(block)
        self.layer1 = nnx.Sequential(*blocks)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_short_names(prefix):
    """Without the `layers` of a Sequential, and what all names of one side begin with."""
    state_dict = {f"{prefix}conv1.weight": draw(2, 1, 3, 3)} | norms_of(f"{prefix}bn1")
    for block, i in itertools.product((0, 1), (1, 2)):
        name = f"{prefix}layer1.{block}"
        state_dict |= {f"{name}.conv{i}.weight": draw(2, 2, 3, 3)} | norms_of(f"{name}.bn{i}")
    state, report = convert.from_torch(state_dict, nnx.state(ResidualNet(nnx.Rngs(0))))
    assert {row.matched for row in report.used} == {"equal names"}
    np.testing.assert_array_equal(
        state["layer1"]["layers"][1]["bn2"]["mean"][...],
        state_dict[f"{prefix}layer1.1.bn2.running_mean"],
    )
    with pytest.raises(convert.OrderError, match="as NNX sorts them: pair") as caught:
        convert.from_torch(state_dict, nnx.state(ResidualNet(nnx.Rngs(0), norm="stem")))
    assert "init" not in str(caught.value)
    guess = {
        f"layer1/layers/{b}/bn{i}": f"{prefix}layer1.{b}.bn{i}" for b in (0, 1) for i in (1, 2)
    }
    assert caught.value.names == guess | {"stem": f"{prefix}bn1"}


def test_short_names_that_are_equal_by_accident():
    """Bare numbers, where torch counts the activations: the order decides, as without them."""
    variables = dense_params("layers_0", "layers_1", "layers_2")
    state_dict = torch_linears("0", "2", "4")
    weights = convert.from_torch(state_dict, variables).weights["params"]
    np.testing.assert_array_equal(weights["layers_2"]["bias"], state_dict["4.bias"])
    # A name that is equal as a whole goes before one that is so in short.
    variables = dense_params("fc", "layers_0_fc", "0_fc")
    state_dict = torch_linears("fc", "0.fc", "layers.0.fc")
    weights = convert.from_torch(state_dict, variables).weights["params"]
    np.testing.assert_array_equal(weights["0_fc"]["bias"], state_dict["0.fc.bias"])


def test_equal_names_of_layers_that_do_not_fit():
    """As where jbn's layer holds the activation that torch counts: then the order decides."""
    norm = {"scale": jnp.ones(2), "bias": jnp.ones(2)}
    dense = dense_params("a")["params"]["a"]
    variables = {
        "params": {"fs": {"0": dense, "1": norm, "2": dense, "3": norm}},
        "batch_stats": {"fs": {i: {"mean": jnp.ones(2), "var": jnp.ones(2)} for i in "13"}},
    }
    state_dict = torch_linears("fs.0") | norms_of("fs.1") | torch_linears("fs.3") | norms_of("fs.4")
    weights = convert.from_torch(state_dict, variables).weights
    np.testing.assert_array_equal(weights["params"]["fs"]["2"]["bias"], state_dict["fs.3.bias"])
    mean = weights["batch_stats"]["fs"]["3"]["mean"]
    np.testing.assert_array_equal(mean, state_dict["fs.4.running_mean"])
    with pytest.raises(ValueError, match=r"fc .*does not fit fc .*matched by equal names"):
        convert.from_torch(weights_of(fc=(3, 2), b=(2, 2)), kernels_of(fc=(2, 2), b=(2, 3)))


def test_an_order_that_a_long_list_of_nnx_hides():
    """NNX sorts the layers of a list by their numbers, and all else by name."""
    model = nnx.Module()
    for name in ("stem", "down", "mid"):
        setattr(model, name, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    layers = [nnx.Linear(2, 3, rngs=nnx.Rngs(0)) for _ in range(12)]
    setattr(model, "layers", nnx.List(layers))  # noqa: B010
    state_dict = torch_linears("a", "b", "c")
    for i in range(12):
        state_dict |= {f"layers.{i}.weight": draw(3, 2), f"layers.{i}.bias": draw(3)}
    with pytest.raises(convert.OrderError, match="order of down, mid, stem"):
        convert.from_torch(state_dict, nnx.state(model))


def notes_of(variables, state_dict, **options):
    return convert.from_torch(state_dict, variables, **options).report.notes


def test_square_transposed_convolutions_of_any_name():
    variables = kernels_of(ConvTranspose_0=(4, 4, 3, 3))
    (note,) = notes_of(variables, weights_of(a=(3, 3, 4, 4)))
    assert "give transpose_kernel={'ConvTranspose_0': True}" in note
    options = {"transpose_kernel": {"ConvTranspose_0": False}}
    assert not notes_of(variables, weights_of(a=(3, 3, 4, 4)), **options)
    # By an even kernel, and by the kernel of a ConvTranspose that its features tell.
    (note,) = notes_of(kernels_of(a=(4, 4, 3, 3)), weights_of(a=(3, 3, 4, 4)))
    assert "give transpose_kernel={'a': False}, or True" in note
    told = kernels_of(a=(3, 3, 2, 5), b=(3, 3, 5, 5)), weights_of(a=(2, 5, 3, 3), b=(5, 5, 3, 3))
    (note,) = notes_of(*told)
    assert note.startswith("b and b are taken as a Conv")
    assert not notes_of(kernels_of(b=(3, 3, 5, 5)), weights_of(b=(5, 5, 3, 3)))


def test_outputs_that_are_viewed_as_an_image():
    """By torch as (C, H, W), as in a generator; where they are as many as the inputs, as in SE."""
    variables = kernels_of(fc=(2, 12), up=(3, 3, 3, 2))
    (note,) = notes_of(variables, weights_of(fc=(12, 2), up=(3, 2, 3, 3)))
    assert "fc has 12 outputs, a multiple of the 3 inputs of up" in note
    # What it says to do, here of a bias.
    v, (c, h, w) = draw(12), (3, 2, 2)
    expected = channels_last(v.reshape(1, c, h, w)).reshape(-1)
    (formula,) = re.findall(r"v\.reshape\(C.*?v\.shape\)", note)
    flax = eval(formula, {"v": v, "C": c, "H": h, "W": w})
    np.testing.assert_array_equal(flax, expected)
    for outputs, inputs in ((3, 3), (12, 1), (12, 5)):
        variables = kernels_of(fc=(2, outputs), up=(3, 3, inputs, 2))
        assert not notes_of(variables, weights_of(fc=(outputs, 2), up=(inputs, 2, 3, 3)))
    # Not where another layer is next, in the one order that is known: torch's, or Flax's.
    variables = kernels_of(up=(3, 3, 3, 2), fc=(2, 12), z=(12, 3))
    state_dict = weights_of(up=(3, 2, 3, 3), fc=(12, 2), z=(3, 12))
    assert not notes_of(jax.tree.map(lambda v: v, variables), state_dict)
    assert not notes_of(variables, dict(sorted(state_dict.items())))


@pytest.mark.parametrize("given", [False, True])
def test_batch_norm_of_a_flatten(given):
    params = {
        **kernels_of(conv=(3, 3, 1, 4))["params"],
        "bn": {"scale": jnp.ones(24), "bias": jnp.ones(24)},
        **kernels_of(fc=(24, 7))["params"],
    }
    stats = {"bn": {"mean": jnp.ones(24), "var": jnp.ones(24)}}
    variables = {"params": params, "batch_stats": stats}
    state_dict = weights_of(conv=(4, 1, 3, 3)) | draw_batch_norm(24, "bn.") | weights_of(fc=(7, 24))
    options = {"flattened": {"fc": (4, 3, 2)}} if given else {}
    notes = notes_of(variables, state_dict, **options)
    assert sum("bn may be between a flatten and fc" in note for note in notes) == 1
    assert any("give flattened={'fc'" in note for note in notes) != given


@pytest.mark.parametrize("kind", ["params", "collection", "nnx"])
def test_variables_without_statistics(kind):
    state_dict = {**CONV, **BN}
    made = ConvNorm().init(jax.random.key(0), draw(1, 5, 5, 2))
    variables = {
        "params": made["params"],
        "collection": {"params": made["params"]},
        "nnx": nnx.state(Network(nnx.Rngs(0)), nnx.Param),
    }[kind]
    with pytest.raises(ValueError, match=r"running statistics, of n first.*params and batch_stats"):
        convert.from_torch(state_dict, variables)
