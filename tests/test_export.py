"""Models as files, run by processes that have neither their code nor Flax."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import flax.errors
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.export
import jbn.linen
import jbn.nnx
from jbn import _files

pytest.importorskip("flatbuffers", reason="the extra `export` is not installed")
pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

ROOT = pathlib.Path(__file__).parent.parent
SIZES = (1, 5)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
RNG = np.random.default_rng(0)
INPUTS = {n: RNG.normal(1, 2, (n, 6, 5, 4)).astype(np.float32) for n in SIZES}
X = jax.ShapeDtypeStruct((2, 6, 5, 4), jnp.float32)


class Linen(nn.Module):
    """Two convolutions with batch norm, the second with a residual, and a classifier."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, train=False):
        conv = functools.partial(nn.Conv, 4, (3, 3), use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            jbn.linen.BatchNorm,
            use_running_average=not train,
            activation=jax.nn.relu,
            dtype=self.dtype,
        )
        y = norm()(conv()(x))
        y = norm()(conv()(y), residual=x)
        return nn.Dense(3)(y.mean((1, 2)).astype(jnp.float32))


class Nnx(nnx.Module):
    def __init__(self, dtype="float32"):
        rngs = nnx.Rngs(0)
        conv = functools.partial(nnx.Conv, 4, 4, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(
            jbn.nnx.BatchNorm, 4, activation=jax.nn.relu, dtype=dtype, rngs=rngs
        )
        self.convs = nnx.List([conv(), conv()])
        self.norms = nnx.List([norm(), norm()])
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        y = self.norms[0](self.convs[0](x))
        y = self.norms[1](self.convs[1](y), residual=x)
        return self.dense(y.mean((1, 2)).astype(jnp.float32))


def trained(tree):
    """Numbers as after training, so that no part of a layer is without effect."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: v + rng.uniform(0, 0.5, v.shape).astype(v.dtype), tree)


def linen(dtype="float32", **options):
    model = Linen(dtype)
    variables = trained(model.init(jax.random.key(0), jnp.zeros(X.shape, dtype)))
    return functools.partial(model.apply, variables, **options)


def nnx_model(dtype="float32"):
    model = Nnx(dtype)
    nnx.update(model, trained(nnx.state(model)))
    model.eval()
    return model


# A dense layer and its batch norm, folded by hand.
KERNEL, SCALE, BIAS, MEAN = RNG.normal(size=(4, 4)), *RNG.normal(size=(3, 4))
VAR = RNG.uniform(0.5, 2, 4)
FACTOR = SCALE / np.sqrt(VAR + 1e-5)
FOLDED = jnp.asarray(KERNEL * FACTOR, jnp.float32), jnp.asarray(BIAS - MEAN * FACTOR, jnp.float32)

MODELS = {
    **{f"linen-{dtype}": functools.partial(linen, dtype) for dtype in DTYPES},
    **{f"nnx-{dtype}": functools.partial(nnx_model, dtype) for dtype in DTYPES},
    "linen-train-float32": functools.partial(linen, train=True, mutable=["batch_stats"]),
    "folded-float32": lambda: lambda x: jax.nn.relu(x @ FOLDED[0] + FOLDED[1]),
}

FRESH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ImportError(f"{name} is not installed here")

refused = {"flax", "jbn", "optax", "chex", "tests"}
sys.meta_path.insert(0, Refuse())
import pathlib
import jax, numpy as np

folder = pathlib.Path(sys.argv[1])
for path in folder.glob("*.jax"):
    program = jax.export.deserialize(open(path, "rb").read())
    assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
    assert program.nr_devices == 1
    for n in (1, 5):
        x = np.load(folder / f"{n}.npy").astype(program.in_avals[0].dtype)
        y = jax.tree.map(np.asarray, program.call(x))
        np.savez(folder / f"{path.stem}-{n}.npz", *jax.tree.leaves(y))
assert not refused & {name.partition(".")[0] for name in sys.modules}
"""


def run(code, *args, isolated=True, **env):
    return subprocess.run(
        [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The outputs of every model, computed in one fresh process."""
    folder = tmp_path_factory.mktemp("export")
    for n, x in INPUTS.items():
        np.save(folder / f"{n}.npy", x)
    for name, make in MODELS.items():
        x = jax.ShapeDtypeStruct(X.shape, DTYPES[name.rpartition("-")[2]])
        jbn.export.save(folder / f"{name}.jax", make(), x)
    result = run(FRESH, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_gives_the_outputs_of_the_model(folder, name, n):
    dtype = DTYPES[name.rpartition("-")[2]]
    expected = jax.tree.leaves(jax.jit(MODELS[name]())(jnp.asarray(INPUTS[n], dtype)))
    with np.load(folder / f"{name}-{n}.npz") as arrays:
        computed = list(arrays.values())
    assert len(computed) == len(expected) == (5 if "train" in name else 1)
    for a, b in zip(computed, expected, strict=True):
        atol = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("n", SIZES)
def test_a_fresh_process_gives_what_was_folded(folder, n):
    """Against float64 in NumPy, of the layers unfolded."""
    z = (INPUTS[n] @ KERNEL - MEAN) * FACTOR + BIAS
    with np.load(folder / f"folded-float32-{n}.npz") as arrays:
        np.testing.assert_allclose(arrays["arr_0"], np.maximum(z, 0), rtol=1e-5, atol=1e-5)


def test_load(folder):
    predict = jbn.export.load(folder / "nnx-float32.jax")
    assert predict.__doc__ == "float32[batch,6,5,4] -> float32[batch,3], for cpu, cuda, tpu."
    assert predict.__name__ == "Nnx"
    with np.load(folder / "nnx-float32-5.npz") as arrays:
        np.testing.assert_allclose(predict(INPUTS[5]), arrays["arr_0"], atol=1e-5)
    with pytest.raises(ValueError, match="expected float32 and called with bfloat16"):
        predict(jnp.ones(X.shape, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"called with \(2, 6, 5, 3\)"):
        predict(jnp.ones((2, 6, 5, 3)))


def test_arguments_in_a_tree(tmp_path):
    def f(x, scale):
        return {"y": x["a"] * scale, "all": [x["b"]]}

    x = {"a": jnp.ones((2, 3)), "b": jnp.ones((2,))}
    jbn.export.save(tmp_path / "f", f, x, jnp.ones((2, 1)), platforms="cpu")
    loaded = jbn.export.load(tmp_path / "f")
    assert loaded.__doc__ == (
        "{a: float32[batch,3], b: float32[batch]}, float32[batch,1] -> "
        "{all: [float32[batch]], y: float32[batch,3]}, for cpu."
    )
    x = {"a": np.ones((4, 3), np.float32), "b": np.arange(4, dtype=np.float32)}
    out = loaded(x, np.full((4, 1), 3, np.float32))
    np.testing.assert_array_equal(out["y"], np.full((4, 3), 3))
    np.testing.assert_array_equal(out["all"][0], x["b"])


@pytest.mark.parametrize(
    ("x", "batch_axis", "expected"),
    [
        (np.ones((3, 2)), 1, "float32[3,batch]"),
        (np.ones((3, 2)), -1, "float32[3,batch]"),
        (np.ones((3, 2)), None, "float32[3,2]"),
        (np.ones(()), None, "float32[]"),
        (np.ones((3, 2), "int16"), 0, "int16[batch,2]"),
        (jax.ShapeDtypeStruct((1,), jnp.bfloat16), 0, "bfloat16[batch]"),
        (jax.random.key(0), None, "key<fry>[]"),
        (lambda: jax.export.symbolic_shape("n, n"), 0, "float32[n,n]"),
    ],
)
def test_shapes_and_dtypes(tmp_path, x, batch_axis, expected):
    x = jax.ShapeDtypeStruct(x(), jnp.float32) if callable(x) else x
    jbn.export.save(tmp_path / "f", lambda x: x, x, batch_axis=batch_axis, platforms=["cpu"])
    doc = jbn.export.load(tmp_path / "f").__doc__
    assert doc == f"{expected} -> {expected}, for cpu."


def test_any_file_of_jax_export_is_read(tmp_path):
    """One with derivatives too."""
    model = MODELS["folded-float32"]()
    x = jnp.asarray(INPUTS[5])
    content = jax.export.export(jax.jit(model))(x).serialize(vjp_order=1)
    (tmp_path / "f").write_bytes(content)
    predict = jbn.export.load(tmp_path / "f")
    dx = jax.grad(lambda x: jnp.sum(predict(x) ** 2))(x)
    expected = jax.grad(lambda x: jnp.sum(model(x) ** 2))(x)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)


def test_many_devices(tmp_path):
    """The file is for one; sharded weights are gathered, and a sharded batch is split by XLA."""
    f = linen()
    x = jnp.asarray(np.tile(INPUTS[1], (8, 1, 1, 1)))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in ((), ("d",)))
    f_sharded = functools.partial(f.func, jax.device_put(f.args[0], whole))
    jbn.export.save(tmp_path / "f", f_sharded, jax.device_put(x, split))
    predict = jbn.export.load(tmp_path / "f")
    y = predict(jax.device_put(x, split))
    assert y.sharding.is_equivalent_to(split, 2)
    for computed in (y, predict(x)):
        np.testing.assert_allclose(computed, f(x), atol=1e-5)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    weights = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, jax.P()))
    with pytest.raises(ValueError, match=r"jax\.device_get"):
        jbn.export.save(tmp_path / "g", lambda x: x @ weights, X)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"for 8 devices.*jax\.set_mesh"):
        jbn.export.save(tmp_path / "g", lambda x: x + 1, X)
    assert os.listdir(tmp_path) == ["f"]


@pytest.fixture(scope="module")
def content():
    """Of a small file."""
    bias = jnp.arange(3.0)
    exported = jax.export.export(jax.jit(lambda x: x + bias), platforms=["cpu", "tpu"])
    return bytes(exported(jnp.ones((2, 3))).serialize())


def test_a_byte_that_has_changed(tmp_path):
    """Also among the weights, where jax would read other numbers, and in what was added to."""
    weights = RNG.normal(size=3).astype(np.float32)
    jbn.export.save(tmp_path / "f", lambda x: x + weights, jnp.ones((2, 3)), platforms=["cpu"])
    np.testing.assert_array_equal(jbn.export.load(tmp_path / "f")(np.zeros((1, 3))), [weights])
    content = (tmp_path / "f").read_bytes()
    digest = range(len(content) - 32, len(content))
    for i in (content.index(weights.tobytes()), *range(0, len(content) - 64, 40), *digest):
        changed = content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        for damaged in [changed, content[:i]] if i in digest else [changed, changed + b"\n"]:
            (tmp_path / "f").write_bytes(damaged)
            with pytest.raises(ValueError, match="f' is damaged, as its checksum shows"):
                jbn.export.load(tmp_path / "f")


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.25, 0.5, 0.75, 0.9, -50, -16])
def test_a_file_that_is_cut_off(tmp_path, content, kept):
    end = int(kept * len(content)) if isinstance(kept, float) else kept
    (tmp_path / "f").write_bytes(content[:end])
    with pytest.raises(ValueError, match=r"f', .* bytes, is not a file of jax\.export, or is cut"):
        jbn.export.load(tmp_path / "f")


@pytest.mark.parametrize(
    "foreign", [b"PK\3\4" * 100, bytes(10_000), b"\x93NUMPY" + bytes(200), b"hello\n", b"\4\0" * 9]
)
def test_a_foreign_file(tmp_path, foreign):
    (tmp_path / "f").write_bytes(foreign)
    with pytest.raises(ValueError, match=r"is not a file of jax\.export"):
        jbn.export.load(tmp_path / "f")


def test_a_program_that_this_jax_cannot_read(tmp_path, content):
    assert content.count(b"ML\xefR\rStableHLO") == 1
    (tmp_path / "f").write_bytes(content.replace(b"ML\xefR", b"ML\xefX"))
    with pytest.raises(ValueError, match=rf"jax {jax.__version__} cannot read.*later jax wrote"):
        jbn.export.load(tmp_path / "f")


BAD = {
    "function": (TypeError, "fn must be a function of arrays, got int 3", (3, X), {}),
    "none": (ValueError, "args must hold the arguments of fn", (jnp.sin,), {}),
    "number": (
        TypeError,
        r"args\[1\]\['a'\] must be an array .*, got float 2.0",
        (jnp.sin, X, {"a": 2.0}),
        {},
    ),
    "scalar": (
        ValueError,
        r"batch_axis 0 is out of range for args\[0\] = float32\[\].*symbolic_shape",
        (jnp.sin, jax.ShapeDtypeStruct((), jnp.float32)),
        {},
    ),
    "sizes": (
        ValueError,
        r"one size along batch_axis 0, got float32\[2\], float32\[3\]",
        (jnp.add, *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3))),
        {},
    ),
    "axis": (TypeError, "batch_axis must be an int or None", (jnp.sin, X), {"batch_axis": "0"}),
    "axis bool": (TypeError, "None, got bool True", (jnp.sin, X), {"batch_axis": True}),
    "platform": (ValueError, "cpu, cuda, rocm, tpu, got 'gpu'", (jnp.sin, X), {"platforms": "gpu"}),
    "platforms": (ValueError, r"got \[\]", (jnp.sin, X), {"platforms": []}),
    "no platforms": (ValueError, "tpu, got None", (jnp.sin, X), {"platforms": None}),
    "nested platforms": (ValueError, r"\[\['cpu'\]\]", (jnp.sin, X), {"platforms": [["cpu"]]}),
    "output": (TypeError, "fn must take and return arrays in.*Moments", (jbn.batch_norm, X), {}),
    "size": (
        Exception,  # of jax, not public
        "batch_axis=None",
        (lambda x: x.reshape(int(x.shape[0]), -1), X),
        {},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(tmp_path, case):
    """An error before anything is written: the file that is there stays."""
    error, message, args, options = BAD[case]
    (tmp_path / "f").write_text("before")
    with pytest.raises(error, match=message):
        jbn.export.save(tmp_path / "f", *args, **options)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_model_that_trains(tmp_path):
    with pytest.raises(flax.errors.TraceContextError, match=r"eval\(\) first"):
        jbn.export.save(tmp_path / "f", Nnx(), X)


def test_weights_that_a_file_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(jbn.export, "_LIMIT", 1000)
    weights = RNG.normal(size=(4, 100)).astype(np.float32)
    with pytest.raises(ValueError, match=r"takes \d{4} bytes .* less than 1000: hand the weights"):
        jbn.export.save(tmp_path / "f", lambda x: x @ weights, X)
    assert os.listdir(tmp_path) == []


def test_no_folder(tmp_path):
    for save in (jbn.export.save, jbn.export.save_tensorflow):
        with pytest.raises(FileNotFoundError, match=r"the folder of .*no/f does not exist.*mkdir"):
            save(tmp_path / "no" / "f", jnp.sin, X)
    with pytest.raises(IsADirectoryError, match=rf"^{tmp_path} is a folder: give the path"):
        jbn.export.save(tmp_path, jnp.sin, X)


def test_what_is_not_installed(tmp_path, monkeypatch, content):
    (tmp_path / "f").write_bytes(content)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for call in (jbn.export.load, lambda path: jbn.export.save(path, jnp.sin, X)):
        with pytest.raises(ImportError, match=r"flatbuffers is not .* pip install 'jbn\[export\]'"):
            call(tmp_path / "f")
    with pytest.raises(ImportError, match=r"pip install 'jbn\[tensorflow\]'"):
        jbn.export.save_tensorflow(tmp_path / "t", jnp.sin, X)
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("f", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists: delete it first"):
            jbn.export.save_tensorflow(tmp_path / name, jnp.sin, X)


def test_a_disk_that_fails(tmp_path, monkeypatch):
    """Neither a part of a file nor of a folder is left, and what was there stays."""
    (tmp_path / "f").write_text("before")

    def fail(*_):
        raise OSError("disk full")

    def make(partial):
        partial.mkdir()
        (partial / "part").touch()
        fail()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            _files.write_whole(tmp_path / "f", b"after")
    with pytest.raises(OSError, match="disk full"):
        _files.make_whole(tmp_path / "g", make)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    _files.write_whole(tmp_path / "f", b"after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["after"]


SAVE_TENSORFLOW = """
import pathlib, sys
import jax, jbn.export
from tests import test_export

for dtype in test_export.DTYPES:
    model = test_export.linen(dtype)
    x = jax.ShapeDtypeStruct(test_export.X.shape, dtype)
    path = pathlib.Path(sys.argv[1]) / dtype
    jbn.export.save_tensorflow(path, lambda x: {"logits": model(x)}, x)
sizes = jax.export.symbolic_shape("b, 2*b")
args = [jax.ShapeDtypeStruct((size,), "float32") for size in sizes]
jbn.export.save_tensorflow(path.with_name("pair"), lambda x, y: x + y[::2], *args)
"""
SERVE = """
import pathlib, sys
sys.modules["jax"] = sys.modules["flax"] = sys.modules["jbn"] = None  # not to be imported
import numpy as np, tensorflow as tf

for path in map(pathlib.Path, sys.argv[2:]):
    served = tf.saved_model.load(path)
    signature = served.signatures["serving_default"]
    ((name, spec),) = signature.structured_input_signature[1].items()
    assert spec.shape.as_list() == [None, 6, 5, 4]
    for n in (1, 5):
        x = tf.cast(np.load(pathlib.Path(sys.argv[1]) / f"{n}.npy"), spec.dtype)
        y = served(x)["logits"]
        np.save(path / f"{n}.npy", y)
        np.testing.assert_array_equal(signature(**{name: x})["logits"], y)
pair = tf.saved_model.load(path.with_name("pair"))
np.testing.assert_array_equal(pair(tf.ones(2), tf.range(4.0)), [1, 3])
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="the extra `tensorflow` is not installed",
)
def test_tensorflow_serves_the_model(tmp_path, folder):
    result = run(SAVE_TENSORFLOW, tmp_path, isolated=False, PYTHONPATH=str(ROOT))
    if tuple(map(int, jax.__version__.split(".")[:3])) >= (0, 11, 2):
        assert "Known to work are jax 0.10.0 to 0.11.1 with TensorFlow 2.20" in result.stderr
        assert os.listdir(tmp_path) == []
        return
    assert result.returncode == 0, result.stderr
    result = run(SERVE, folder, *(tmp_path / dtype for dtype in DTYPES))
    assert result.returncode == 0, result.stderr
    for name, dtype in DTYPES.items():
        for n in SIZES:
            expected = linen(name)(jnp.asarray(INPUTS[n], dtype))
            atol = 8 * float(jnp.finfo(dtype).eps) * float(jnp.abs(expected).max())
            computed = np.load(tmp_path / name / f"{n}.npy")
            np.testing.assert_allclose(computed, expected, rtol=0, atol=atol)
