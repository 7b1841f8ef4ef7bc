"""`examples/learning_rates.py` on the real digits, and the training that it shares."""

import contextlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import common
import jax
import jax.numpy as jnp
import learning_rates
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from jbn.linen import BatchNorm
from tests.scripts import drawn, exits, lines, table_rows, unwrapped

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS, CHECK_EVERY, SEEDS, RATES = 12, 4, 2, (0.01, 0.1)
FLAGS = ["--dataset", "digits", "--steps", f"{STEPS}", "--check-every", f"{CHECK_EVERY}"]
FLAGS += ["--seeds", f"{SEEDS}", "--base-rates", *(f"{rate}" for rate in RATES)]
DIVERGES = "plain x30"
ARMS = {name: learning_rates.ARMS[name] for name in ("plain x1", DIVERGES, "BN x5")}
ARMS[DIVERGES] = ARMS[DIVERGES]._replace(factor=10**38)


class Small(nn.Module):
    """Takes the place of the residual network, which compiles ten times as long."""

    batch_norm: bool
    activation: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(32)(images.reshape(len(images), -1))
        if self.batch_norm:
            x = BatchNorm(not train, momentum=0.5)(x)
        return nn.Dense(10)(self.activation(x))


def run(folder, *flags):
    """What the example prints with fewer and smaller networks."""
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(learning_rates, "ARMS", ARMS)
        patch.setattr(learning_rates, "STYLES", {arm.factor: "-" for arm in ARMS.values()})
        patch.setattr(learning_rates, "SmallResNet", Small)
        patch.setenv("COLUMNS", "200")
        learning_rates.main([*FLAGS, *flags, "--output", str(folder)])
    return stdout.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run: its folder, what it printed and its results."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    stdout = run(folder)
    results = json.loads((folder / "learning_rates.json").read_text())
    return SimpleNamespace(folder=folder, stdout=stdout, results=results)


def test_numbers(finished):
    settings, search, runs = (finished.results[key] for key in ("settings", "search", "runs"))
    assert settings == {
        "dataset": "digits",
        "steps": STEPS,
        "batch_size": 32,
        "check_every": CHECK_EVERY,
        "seeds": SEEDS,
        "base_rates": list(RATES),
    }
    tried = [(run["learning_rate"], run["seed"], len(run["accuracy"])) for run in search]
    assert tried == [(rate, seed, 2) for rate in RATES for seed in (SEEDS, SEEDS + 1)]
    base = learning_rates.best_rate(search)
    assert list(runs) == list(ARMS)
    for name, arm in ARMS.items():
        assert [run["seed"] for run in runs[name]] == [0, 1]
        assert {run["learning_rate"] for run in runs[name]} == {arm.factor * base}
    for run in runs["BN x5"]:
        assert run["diverged_at"] is None
        assert len(run["accuracy"]) == STEPS // CHECK_EVERY
        assert run["accuracy"][-1] > 0.5
    assert runs["BN x5"][0]["accuracy"] != runs["BN x5"][1]["accuracy"]


def test_divergence_is_a_result(finished):
    for run in finished.results["runs"][DIVERGES]:
        assert run["diverged_at"] == CHECK_EVERY
        assert len(run["accuracy"]) == STEPS // CHECK_EVERY
        assert run["accuracy"][-1] < 0.2
    (row,) = (row for row in table_rows(finished.stdout) if row[0] == DIVERGES)
    assert row[2] == f">{STEPS}"
    assert row[4] == f"{SEEDS} ({SEEDS})"


def test_files(finished):
    names = ["learning_rates.json", "learning_rates.png"]
    assert sorted(path.name for path in finished.folder.iterdir()) == names
    png = (finished.folder / "learning_rates.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    for name in names:
        assert f"{finished.folder / name}" in finished.stdout


def test_search_holds_images_out(finished, tmp_path, monkeypatch):
    given = []

    def train(arm, data, *args):
        given.append(data)
        if len(given) > len(RATES) * 2:
            raise KeyboardInterrupt
        return made_run(0.5, rate=args[0])

    monkeypatch.setattr(learning_rates, "train", train)
    with exits(130):
        run(tmp_path)
    search, trained = given[0], given[-1]
    assert len(trained.train_labels) == 1347
    assert len(trained.test_labels) == 450
    for name in ("images", "labels"):
        parts = getattr(search, f"test_{name}"), getattr(search, f"train_{name}")
        assert len(parts[0]) == 1347 // 12
        np.testing.assert_array_equal(np.concatenate(parts), getattr(trained, f"train_{name}"))


def test_resumes_where_it_was_interrupted(finished, tmp_path, monkeypatch):
    trained = []
    train = learning_rates.train

    def interrupted(arm, data, rate, seed, *args):
        trained.append((arm, rate, seed))
        if len(trained) in (2, 6):
            raise KeyboardInterrupt
        return train(arm, data, rate, seed, *args)

    monkeypatch.setattr(learning_rates, "train", interrupted)
    for _ in range(2):
        with exits(130):
            run(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["learning_rates.json"]
    assert run(tmp_path).split("Wrote")[0] == finished.stdout.split("Wrote")[0]
    assert json.loads((tmp_path / "learning_rates.json").read_text()) == finished.results
    assert len(trained) == len(RATES) * 2 + len(ARMS) * SEEDS + 2
    before = len(trained)
    run(tmp_path)
    assert len(trained) == before


def test_other_settings_are_refused(finished, capsys):
    before = (finished.folder / "learning_rates.json").read_bytes()
    with exits(2):
        run(finished.folder, "--steps", "8")
    error = unwrapped(capsys.readouterr().err)
    assert f"learning_rates.json was saved with --steps {STEPS}, not --steps 8;" in error
    assert "choose another folder" in error
    assert (finished.folder / "learning_rates.json").read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"settings": 3}', '{"settings": {"se', "runs"]
)
def test_damaged_results_are_refused(finished, content, tmp_path, capsys):
    path = tmp_path / "learning_rates.json"
    content = json.dumps(finished.results | {"runs": 3}) if content == "runs" else content
    path.write_text(content)
    with exits(2):
        run(tmp_path)
    assert f"{path} is damaged, or not of this script" in unwrapped(capsys.readouterr().err)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "10"], "--steps must be a multiple of --check-every, 4, not 10"),
        (["--batch-size", "1236"], "--batch-size must be at most 1235, not 1236"),
        (["--base-rates", "0"], "must be a finite number above 0, not '0'"),
        (["--seeds", "0"], "must be a whole number from 1 to 2^31 - 1, not '0'"),
        (["--output", "{file}"], "--output must be a folder that can be created and written"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning_rates, "train", None)  # calling it would be a TypeError
    file = tmp_path / "file"
    file.touch()
    flags = [flag.format(file=file) for flag in flags]
    with exits(2):
        learning_rates.main([*FLAGS, "--output", str(tmp_path / "out"), *flags])
    assert message in unwrapped(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [file]


def test_help(capsys):
    with exits(0):
        learning_rates.main(["--help"])
    text = unwrapped(capsys.readouterr().out)
    assert "Ioffe and Szegedy" in text
    for flag in ("steps", "batch-size", "check-every", "seeds", "base-rates", "output", "dataset"):
        assert f"--{flag} " in text


def test_steps_to_target():
    accuracies = [0.1, 0.5, 0.49, 0.8]
    steps = [learning_rates.steps_to(target, accuracies, 10) for target in (0.1, 0.5, 0.6, 0.81)]
    assert steps == [10, 20, 40, math.inf]
    assert learning_rates.steps_to(0.1, [], 10) == math.inf


def made_run(*accuracies, diverged_at=None, rate=0.1):
    return {"learning_rate": rate, "accuracy": list(accuracies), "diverged_at": diverged_at}


def test_best_rate_is_that_of_all_seeds():
    search = [
        made_run(0.9, 0.7, rate=0.1),
        made_run(0.5, 0.6, rate=0.1),
        made_run(0.9, 0.95, rate=0.3),
        made_run(0.95, 0.1, diverged_at=15, rate=0.3),
    ]
    assert learning_rates.best_rate(search) == 0.1


def test_table():
    """Of results made by hand: the target is the baseline's median, 0.7."""
    runs = {name: [made_run(0.1, 0.1, rate=1.0)] * 3 for name in learning_rates.ARMS}
    runs["plain x1"] = [made_run(0.5, 0.7), made_run(0.6, 0.5), made_run(0.2, 0.95)]
    runs["BN x5"] = [made_run(0.7, 0.9), made_run(0.75, 0.6), made_run(0.69, 0.9)]
    runs["BN x30"] = [
        made_run(0.71, 0.1, diverged_at=20),
        made_run(0.1, 0.1, diverged_at=10),
        made_run(0.1, 0.1),
    ]
    settings = {"dataset": "digits", "steps": 20, "check_every": 10, "seeds": 3}
    console = Console(file=io.StringIO(), width=200)
    console.print(learning_rates.results_table({"settings": settings, "runs": runs}))
    text = console.file.getvalue()
    assert "steps to 70.0 %" in text
    rows = {row[0]: row[1:] for row in table_rows(text)}
    paper = "Inception: 31.0, 72.2 %"
    assert rows["plain x1"] == ["0.1", "20 (20 to >20)", "70.0 (60.0 to 95.0)", "0", paper]
    assert rows["BN x5"][:4] == ["0.1", "10 (10 to 20)", "90.0 (75.0 to 90.0)", "0"]
    assert rows["BN x30"][:4] == ["0.1", ">20 (10 to >20)", "10.0 (10.0 to 71.0)", "3 (2)"]
    assert rows["plain sigmoid x5"] == ["1", ">20", "10.0", "3 (0)", ""]


def test_figure():
    """Medians of the committed curves, and the target, in both parts."""
    results = json.loads((EXAMPLES / "results/learning_rates.json").read_text())
    for axes in drawn(learning_rates.figure, results).axes:
        shown = lines(axes)
        target = 100 * learning_rates.target_of(results["runs"])
        (label,) = (label for label in shown if label.startswith(f"{target:.1f} %"))
        assert set(shown[label][:, 1]) == {target}
        for name, runs in results["runs"].items():
            (label,) = (label for label in shown if label.startswith(f"{name} ("))
            assert label.startswith(f"{name} ({runs[0]['learning_rate']:g}")
            failed = sum(run["accuracy"][-1] < 0.2 for run in runs)
            assert (f", {failed} of 3 fail" in label) == bool(failed)
            median = 100 * np.median([run["accuracy"] for run in runs], axis=0)
            expected = np.stack([np.arange(100, 4001, 100), median], axis=-1)
            np.testing.assert_allclose(shown[label], expected)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(10, use_bias=False)(images.reshape(len(images), -1))


def test_training_is_sgd_with_momentum():
    """Of a linear network, against the formulas in float64."""
    data = common.on_device(common.load_dataset("digits", Path()))
    images, labels = (np.asarray(x) for x in (data.train_images, data.train_labels))
    size, steps, rate = 500, 5, 0.5  # in two epochs, of two batches each, and a part of a third
    trained = list(
        common.training(Linear(), data, seed=3, learning_rate=rate, batch_size=size, steps=steps)
    )
    assert len(trained) == steps
    initial, _ = common.init(Linear(), 3, images)
    weights = np.asarray(initial["params"]["Dense_0"]["kernel"], float)
    rng, velocity, order = np.random.default_rng(3), 0, []
    for _ in range(3):
        order += np.split(rng.permutation(len(labels))[: 2 * size], 2)
    for step, (variables, loss) in enumerate(trained):
        x, y = images[order[step]].reshape(size, -1).astype(float), labels[order[step]]
        logits = x @ weights
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        assert np.isclose(loss, -np.log(p[range(size), y]).mean(), rtol=1e-5)
        velocity = 0.9 * velocity + x.T @ (p - np.eye(10)[y]) / size
        weights = weights - rate * 0.01 ** (step / steps) * velocity
        np.testing.assert_allclose(variables["params"]["Dense_0"]["kernel"], weights, atol=1e-5)
    right = common.accuracy(Linear(), trained[-1][0], data.test_images, data.test_labels)
    logits = np.asarray(data.test_images).reshape(450, -1) @ weights
    assert np.isclose(right, (logits.argmax(1) == data.test_labels).mean())
    assert right > 0.5


def test_images_are_standardized():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 2)).astype(np.uint8)
    labels = np.zeros(20, np.int32)
    data = common.Dataset("digits", images[:15], labels[:15], images[15:], labels[15:])
    found = common.on_device(data)
    wide = images.astype(float)
    train = wide[:15].reshape(-1, 2)
    expected = (wide - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(found.train_images, expected[:15], atol=1e-5)
    np.testing.assert_allclose(found.test_images, expected[15:], atol=1e-5)
    assert found.train_images.dtype == jnp.float32


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("height", "first", "last"), [(28, 14, 4), (8, 8, 2)])
def test_small_resnet(batch_norm, height, first, last):
    """14 layers, as named, and 2 shortcuts; images of more than 16 pixels are halved once more."""
    net, seen = common.SmallResNet(batch_norm), []

    def note(next_fn, args, kwargs, context):
        y = next_fn(*args, **kwargs)
        if isinstance(context.module, nn.Conv):
            seen.append((context.module.kernel_size[0], y.shape[1:]))
        return y

    with nn.intercept_methods(note):
        variables = jax.eval_shape(
            lambda x: net.init(jax.random.key(0), x, train=True), jnp.zeros((2, height, height, 3))
        )
    assert [size for size, _ in seen].count(3) == 13
    assert [size for size, _ in seen].count(1) == 2
    assert seen[0][1] == (first, first, 8)
    assert seen[-1] == (3, (last, last, 32))
    assert ("bias" in variables["params"]["Conv_0"]) != batch_norm
    assert len(variables.get("batch_stats", {})) == 15 * batch_norm


@pytest.mark.parametrize(
    ("parameter", "loss", "at"), [(1.0, 2.3, None), (np.nan, 2.3, 20), (1.0, np.inf, 20)]
)
def test_divergence_shows_in_loss_or_parameters(parameter, loss, at, monkeypatch):
    def training(*args, steps, **kwargs):
        for step in range(1, steps + 1):
            good = step != 15
            yield {"params": [parameter if step > 10 else 1.0]}, jnp.float32(2.3 if good else loss)

    monkeypatch.setattr(learning_rates, "training", training)
    monkeypatch.setattr(learning_rates, "accuracy", lambda *args: 0.5)
    args = SimpleNamespace(batch_size=32, check_every=10)
    data, progress = (
        SimpleNamespace(test_images=None, test_labels=None),
        SimpleNamespace(update=int),
    )
    found = learning_rates.train(ARMS["plain x1"], data, 0.1, 0, 30, args, progress)
    assert found["diverged_at"] == at
    assert found["accuracy"] == 3 * [0.5]


def test_readme_figures():
    """They are those of the committed run."""
    text = "".join(path.read_text() for path in EXAMPLES.glob("README*.md"))
    section = unwrapped(text.split("## Higher learning rates")[1].split("\n## ")[0])
    results = json.loads((EXAMPLES / "results/learning_rates.json").read_text())
    console = Console(file=io.StringIO(), width=200)
    console.print(learning_rates.results_table(results))
    rows = table_rows(console.file.getvalue())
    assert [row[0] for row in rows] == list(learning_rates.ARMS)
    for row in rows:
        assert f"| {' | '.join(row)} |".replace("|  |", "| |") in section
    for rate in results["settings"]["base_rates"]:
        tried = [run for run in results["search"] if run["learning_rate"] == rate]
        text = learning_rates.spread([100 * run["accuracy"][-1] for run in tried], ".1f")
        assert f"| {text} |" in section
    runs, target = results["runs"], learning_rates.target_of(results["runs"])
    assert f"{100 * target:.1f} % is the yardstick's median" in section

    def median_steps(name):
        every = results["settings"]["check_every"]
        return np.median(
            [learning_rates.steps_to(target, run["accuracy"], every) for run in runs[name]]
        )

    before, after = median_steps("plain x1"), median_steps("BN x5")
    assert f"{before:.0f} steps becoming {after:.0f}, {before / after:.1f} times fewer" in section
    overflowed = [run["diverged_at"] for name in runs for run in runs[name] if run["diverged_at"]]
    assert overflowed == [run["diverged_at"] for run in runs["plain x30"] if run["diverged_at"]]
    assert (
        f"{len(overflowed)} of them with parameters that overflow in the first "
        f"{max(overflowed)} steps"
    ) in section
    low, *_, high = sorted(100 * max(run["accuracy"]) for run in runs["plain x1"])
    assert f"takes it to {low:.1f} or to {high:.1f} %" in section
    ranges = [
        100 * np.ptp([max(run["accuracy"]) for run in runs[name]]) for name in runs if "BN" in name
    ]
    assert f"differ by at most {max(ranges):.1f} points" in section
    x5, x30 = (100 * np.median([max(r["accuracy"]) for r in runs[f"BN x{k}"]]) for k in (5, 30))
    assert f"{x30:.1f}" == f"{x5:.1f}"
    assert f"highest accuracies of BN x30 and of BN x5 have one median, {x5:.1f} %" in section
