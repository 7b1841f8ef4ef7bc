"""Memory and traffic of whole networks, counted in compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import folding, networks, traffic
from tests.scripts import exits

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile(same_hlo=True)]

IMAGES = (4, 32, 32, 3)


@pytest.fixture
def platform(request):
    """Skips what cannot be compiled for here."""
    if packages := traffic.missing(request.param):
        pytest.skip(f"compiling for {request.param} needs: pip install {packages}")
    if request.param != "cpu" and jax.config.jax_platforms != "cpu":
        pytest.skip(f"compiling for {request.param} without one needs JAX_PLATFORMS=cpu")
    return request.param


# At the least two arrays are stacked, the inputs of the convolution and of batch norm; in float32
# Flax's layer stacks little more than three. On CPU, XLA widens bfloat16 ones whole, before the
# loop of the backward.
@pytest.mark.parametrize(
    ("platform", "dtype", "bound"),
    [
        ("cpu", "bfloat16", 0.68),
        ("cpu", "float32", 0.65),
        ("cuda", "bfloat16", 0.45),
        ("cuda", "float32", 0.65),
        ("tpu", "bfloat16", 0.45),
        ("tpu", "float32", 0.65),
    ],
    indirect=["platform"],
)
def test_scanned_temporaries(platform, dtype, bound):
    flax, ours = (
        networks.measure(
            networks.compile_step(platform, networks.SCANNED[name](), networks.SHAPE, dtype)
        ).temporaries
        for name in ("flax", "jbn")
    )
    assert ours <= bound * flax


@pytest.mark.parametrize("platform", ["cuda"], indirect=True)
def test_resnet50(platform):
    flax, plain, policy = (
        networks.measure(
            networks.compile_step(platform, networks.RESNETS[name](), networks.IMAGES, "bfloat16")
        )
        for name in ("flax", "jbn", "jbn, policy")
    )
    assert plain.traffic <= flax.traffic
    assert policy.temporaries <= 0.85 * flax.temporaries
    assert flax.convolutions == plain.convolutions == policy.convolutions
    assert policy.sums == plain.sums


@functools.cache
def small(name):
    """A step of a network with two blocks, one of them projected."""
    model = networks.RESNETS[name](stages=(2,), features=8)
    return model, networks.compile_step("cpu", model, IMAGES, "float32")


def test_policy_repeats_no_convolution_and_no_sum():
    plain, policy = (networks.measure(small(name)[1]) for name in ("jbn", "jbn, policy"))
    assert plain.convolutions > 0
    assert plain.sums > 0
    assert policy.convolutions == plain.convolutions
    assert policy.sums == plain.sums


@pytest.mark.parametrize("name", ["jbn", "jbn, policy"])
def test_all_are_one_network(name):
    model, reference = small("flax")
    images = jax.random.normal(jax.random.key(1), IMAGES)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    args = variables, images, jnp.arange(len(images), dtype="int32")

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, np.abs(b).max()))

    jax.tree.map(close, small(name)[1](*args), reference(*args))


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "missing", lambda platform: "some-package==1.0")
    with exits(2):
        networks.main(["--platform", "tpu"])
    assert "--platform tpu needs: pip install some-package==1.0" in capsys.readouterr().err


def test_folding(monkeypatch):
    """A small network: no batch norm is left, and less is moved."""
    monkeypatch.setattr(folding, "IMAGES", (2, 16, 16, 3))
    monkeypatch.delitem(folding.NORMS, "flax")
    small = functools.partial(folding.network, stages=(1,), features=4)
    monkeypatch.setattr(folding, "network", small)
    rows = folding.measure("cpu", rounds=1)
    assert list(rows) == ["jbn", "jbn, folded"]
    for name, row in rows.items():
        folded = name.endswith("folded")
        assert row["batch norms"] == (0 if folded else 5)
        assert (row["rsqrt"] == 0) == folded
        assert row["seconds"].shape == (3,)
    before, after = rows.values()
    assert after["traffic"] < before["traffic"]
    assert after["kernels"] < before["kernels"]
    table = folding.table("cpu", rows)
    assert [len(column._cells) for column in table.columns] == [2] * 7
