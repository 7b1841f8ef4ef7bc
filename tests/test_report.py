"""What is told of the layers of a model: `jbn.linen.report` and `jbn.nnx.report`."""

import dataclasses
import functools
import io
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import jbn.linen
import jbn.nnx

pytestmark = [pytest.mark.standard_jax(x64=True), pytest.mark.quick_compile]

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 3)) * [1, 3, 2e-3] + [0, 7, 0]
BATCHES = np.split(X, [40, 80])
KERNEL = np.eye(3) * [1, 2, 1000]
STATS = {
    "first": {"mean": np.array([0, 1.0, 0]), "var": np.array([1, 4.0, 1e-6])},
    "second": {"mean": np.zeros(3), "var": np.array([1, 4.0, 5.0])},
}
SCALES = np.array([2, 1.5e-3, 600])


class Net(nn.Module):
    """Two layers, the second without a scale, and a dense one between them."""

    @nn.compact
    def __call__(self, x, train=True):
        x = jbn.linen.BatchNorm(not train, name="first", unbiased=True, epsilon=1e-6)(x)
        x = nn.Dense(3, use_bias=False, param_dtype=jnp.float64, name="dense")(x)
        return jbn.linen.BatchNorm(not train, name="second", use_scale=False, use_bias=False)(x)


class Model(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.first = jbn.nnx.BatchNorm(3, unbiased=True, epsilon=1e-6, rngs=rngs)
        self.dense = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.second = jbn.nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=rngs)
        self.dense.kernel.set_value(jnp.asarray(KERNEL))
        self.first.scale.set_value(jnp.asarray(SCALES))
        for name, stats in STATS.items():
            getattr(self, name).mean.set_value(jnp.asarray(stats["mean"]))
            getattr(self, name).var.set_value(jnp.asarray(stats["var"]))

    def __call__(self, x):
        return self.second(self.dense(self.first(x)))


def report_linen(batches, **options):
    first = {"scale": SCALES, "bias": np.zeros(3)}
    params = {"first": first, "dense": {"kernel": KERNEL}}
    variables = jax.tree.map(jnp.asarray, {"params": params, "batch_stats": STATS})
    return jbn.linen.report(Net().apply, variables, batches, **options)


def report_nnx(batches, **options):
    model = Model(nnx.Rngs(0))
    before = nnx.clone(nnx.state(model))
    report = jbn.nnx.report(model, batches, **options)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    return report


BOTH = pytest.mark.parametrize("report", [report_linen, report_nnx], ids=["linen", "nnx"])


def expected(x, name, ddof, epsilon):
    stats = STATS[name]
    drift = abs(stats["mean"] - x.mean(0)) / np.sqrt(x.var(0) + epsilon)
    return drift, (stats["var"] + epsilon) / (x.var(0, ddof=ddof) + epsilon)


@BOTH
def test_numbers(report):
    found = report(BATCHES)
    normalized = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) * SCALES for x in BATCHES]
    inputs = {
        "first": expected(X, "first", 1, 1e-6),
        "second": expected(np.concatenate(normalized) @ KERNEL, "second", 0, 1e-5),
    }
    assert [row.layer for row in found.rows] == list(inputs)
    for row, (drift, ratio) in zip(found.rows, inputs.values(), strict=True):
        np.testing.assert_allclose(found.values[row.layer]["drift"], drift, 1e-10, 1e-10)
        np.testing.assert_allclose(found.values[row.layer]["var_ratio"], ratio, 1e-10)
        summary = row.drift_median, row.drift_max, row.var_ratio_min, row.var_ratio_max
        wanted = np.median(drift), drift.max(), ratio.min(), ratio.max()
        np.testing.assert_allclose(summary, wanted, 1e-10, 1e-10)
    first, second = found.rows
    assert (first.dead, first.exploding, first.near_epsilon) == (1, 1, 1)
    assert (second.dead, second.exploding, second.near_epsilon) == (0, 0, 1)
    assert (first.features, first.smallest_count) == (3, 10)
    assert second.findings[-1] == "too few elements in a batch, its statistics are noisy: 10"


def test_scales_that_are_mostly_zero():
    """Those are dead, and the others are measured by themselves."""
    bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    bn.scale.set_value(jnp.array([0, 0, 2.0]))
    [row] = jbn.nnx.report(bn, [X]).rows
    assert (row.dead, row.exploding) == (2, 0)


@BOTH
def test_findings(report):
    found = report(BATCHES, max_batches=2)
    assert found.rows[0].smallest_count == 40
    assert found.rows[0].findings == (
        "running statistics are off: calibrate",
        "features that vary by little against epsilon: 1",
        "dead scales, below 0.001 of the model's median: 1",
        "exploding scales, over 100 times the median: 1",
    )


def test_nothing_to_be_found():
    """After calibration there is none, however far off the layer was."""
    bn = jbn.nnx.BatchNorm(3, epsilon=1e-9, rngs=nnx.Rngs(0))
    bn.eval()
    batches = BATCHES[:2]
    (before,), _ = vars(jbn.nnx.report(bn, batches)).values()
    assert before.findings == ("running statistics are off: calibrate",)
    jbn.nnx.calibrate(bn, batches)
    (after,), _ = vars(jbn.nnx.report(bn, batches)).values()
    assert after.findings == ()
    assert after.drift_max < 1e-6
    np.testing.assert_allclose((after.var_ratio_min, after.var_ratio_max), 1, 1e-6)
    bn.mean.set_value(bn.mean[...] + 2)  # the mean alone is off
    assert jbn.nnx.report(bn, batches).rows[0].findings == before.findings


def test_features_without_elements_and_values_that_are_not_finite():
    bn = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    x = np.where([True, False, True], BATCHES[0], np.nan)
    found = jbn.nnx.report(bn, [x])
    (row,) = found.rows
    assert np.isnan(found.values[""]["drift"]).tolist() == [False, True, False]
    assert "features with moments that are not finite: 1" in row.findings
    assert np.isfinite(row.drift_max)
    (row,) = jbn.nnx.report(bn, [x * np.nan]).rows
    assert np.isnan(row.drift_max)


def test_table_dict_and_plot(tmp_path):
    found = report_nnx(BATCHES)
    printed = io.StringIO()
    Console(file=printed, width=120).print(found)
    assert str(found) == printed.getvalue()
    for row in found.rows:
        (line,) = (line for line in str(found).splitlines() if f"│ {row.layer} " in line)
        assert f"{row.drift_median:.2g}, {row.drift_max:.2g}" in line
        assert f"{row.var_ratio_min:.2g}, {row.var_ratio_max:.2g}" in line
    read = json.loads(json.dumps(found.to_dict()))
    assert read == found.to_dict()
    assert read["second"]["drift_max"] == found.rows[1].drift_max
    marked = dataclasses.replace(found, rows=[dataclasses.replace(found.rows[0], layer="[red]x")])
    assert "│ [red]x " in str(marked)
    found.plot(tmp_path / "report.png")
    image = matplotlib.image.imread(tmp_path / "report.png")
    assert image.shape[0] > 100
    blue = abs(image[..., :3] - [0.12, 0.47, 0.71]).max(-1) < 0.02
    assert blue.sum() > 200  # of the lines


def test_bad_input_is_that_of_calibrate():
    with pytest.raises(ValueError, match="batches is empty"):
        report_linen([])
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        report_nnx(X)


class Biased(nn.Module):
    """Seven batch norms, of which the first two take a bias away."""

    @nn.compact
    def __call__(self, x):
        def norm(name, x, **kwargs):
            return jbn.linen.BatchNorm(use_running_average=False, name=name, **kwargs)(x)

        x = nn.relu(norm("a", nn.Dense(5, name="useless")(x)))
        x = norm("b", nn.DenseGeneral((2, 3), name="pair")(x), axis=(-2, -1), activation=nn.relu)
        x = norm("c", nn.DenseGeneral((2, 3), axis=(-2, -1), name="rows")(x))  # 3 of 6 features
        x = norm("d", nn.relu(nn.Dense(4, name="rectified")(x)))
        x = norm("e", nn.Dense(4, use_bias=False, name="without")(x))
        logits = nn.Dense(4, name="read")(x)
        x = norm("f", logits) + logits
        again = nn.Dense(4, name="again")
        return norm("g", again(nn.relu(again(x))))


class BiasedModel(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        def norm(*features, **kwargs):
            return jbn.nnx.BatchNorm(*features, rngs=rngs, **kwargs)

        self.useless, self.a = nnx.Linear(3, 5, rngs=rngs), norm(5)
        self.pair = nnx.LinearGeneral(5, (2, 3), rngs=rngs)
        self.b = norm((2, 3), axis=(-2, -1), activation=nnx.relu)
        self.rows = nnx.LinearGeneral((2, 3), (2, 3), axis=(-2, -1), rngs=rngs)
        self.c = norm(3)
        self.rectified, self.d = nnx.Linear(3, 4, rngs=rngs), norm(4)
        self.without, self.e = nnx.Linear(4, 4, use_bias=False, rngs=rngs), norm(4)
        self.read, self.f = nnx.Linear(4, 4, rngs=rngs), norm(4)
        self.again, self.g = nnx.Linear(4, 4, rngs=rngs), norm(4)

    def __call__(self, x):
        x = nnx.relu(self.a(self.useless(x)))
        x = self.c(self.rows(self.b(self.pair(x))))
        x = self.e(self.without(self.d(nnx.relu(self.rectified(x)))))
        logits = self.read(x)
        x = self.f(logits) + logits
        return self.g(self.again(nnx.relu(self.again(x))))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_useless_biases(kind):
    if kind == "nnx":
        found = jbn.nnx.report(BiasedModel(nnx.Rngs(0)), BATCHES)
    else:
        variables = Biased().init(jax.random.key(0), X)
        found = jbn.linen.report(Biased().apply, variables, BATCHES)
    told = {row.layer: (row.useless_bias_of, row.useless_parameters) for row in found.rows}
    useless = {"a": ("useless", 5), "b": ("pair", 6)}
    assert told == dict.fromkeys("cdefg", (None, 0)) | useless
    words = "the bias of pair changes nothing: use_bias=False saves 6 parameters"
    assert [words in row.findings for row in found.rows] == [row.layer == "b" for row in found.rows]


def test_what_is_not_finite_is_found():
    variables = {"params": {"scale": jnp.array([1, jnp.nan, 1])}, "batch_stats": STATS["first"]}
    variables["params"]["bias"] = jnp.zeros(3)
    variables = jax.tree.map(jnp.asarray, variables)
    variables["batch_stats"]["var"] = jnp.full(3, jnp.nan)
    train = functools.partial(jbn.linen.BatchNorm().apply, use_running_average=False)
    (row,) = jbn.linen.report(train, variables, [X[:, :3]]).rows
    assert "running statistics are off: calibrate" in row.findings
    assert "scales that are not finite: 1" in row.findings
