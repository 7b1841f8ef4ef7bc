"""The experiment of the paper's Figure 1, for a few steps on the digits."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import covariate_shift
import jax
import numpy as np
import pytest
from common import load_dataset
from covariate_shift import LAYERS, UNITS, Measured, SigmoidNet

from tests.scripts import drawn, exits, lines

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

HUGE_RATE = 1e38  # a step of it overflows float32
FLAGS = ["--dataset", "digits", "--steps", "24", "--check-every", "8", "--seeds", "2"]
FLAGS += ["--init-std", "0.1", "--learning-rates", f"{HUGE_RATE}", "1"]
CHECKS, SEEDS = 3, 2
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples/results"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run: its folder, its results, and what was called with which arguments."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    called = {"train_steps": [], "measure": []}
    with pytest.MonkeyPatch.context() as patch:
        for name, calls in called.items():
            function = getattr(covariate_shift, name)

            def recorded(*args, function=function, calls=calls):
                calls.append(args)
                return function(*args)

            patch.setattr(covariate_shift, name, recorded)
        covariate_shift.main([*FLAGS, "--output", str(folder)])
    results = json.loads((folder / "covariate_shift.json").read_text())
    return SimpleNamespace(folder=folder, results=results, **called)


def test_results(run):
    results = run.results
    settings = {"dataset": "digits", "steps": 24, "check_every": 8, "batch_size": 60, "seeds": 2}
    settings |= {"init_std": 0.1, "learning_rates": [1.0, HUGE_RATE], "shown_learning_rate": 1.0}
    assert results == settings | {"networks": results["networks"]}
    assert list(results["networks"]) == ["plain", "batch norm"]
    for network in results["networks"].values():
        accuracy = np.array(network["test_accuracy"])
        assert accuracy.shape == (2, 1 + CHECKS, SEEDS)
        assert (accuracy >= 0).all()
        assert (accuracy <= 1).all()
        percentiles = np.array(network["percentiles"])
        assert percentiles.shape == (1 + CHECKS, 3)
        assert (np.diff(percentiles) > 0).all()
        for key in ("mean_moves", "std_moves"):
            moved = np.array(network[key])
            assert moved.shape == (CHECKS, SEEDS, LAYERS)
            assert (moved > 0).all()
        assert max(network["last_loss"][0]) < 2.5
    # Batch norm begins with inputs of mean 0 and variance 1, and learns sooner.
    plain, batch_norm = results["networks"].values()
    assert np.abs(np.array(batch_norm["percentiles"][0]) - [-1, 0, 1]).max() < 0.3
    assert max(batch_norm["last_loss"][0]) < min(plain["last_loss"][0])


def test_trains_and_measures_on_black_and_white_images(run):
    """On those to train on, and on those to test on."""
    data = load_dataset("digits", Path())
    for calls, images, labels in (
        (run.train_steps, data.train_images, data.train_labels),
        (run.measure, data.test_images, data.test_labels),
    ):
        for *_, used_images, used_labels in calls:
            np.testing.assert_array_equal(used_images, images > 127)
            np.testing.assert_array_equal(used_labels, labels)


def test_both_rates_begin_at_the_same_weights(run):
    starts = run.train_steps[::CHECKS]
    assert [(call[0].batch_norm, call[4]) for call in starts] == [
        (batch_norm, rate) for batch_norm in (False, True) for rate in (1.0, HUGE_RATE)
    ]
    for one, other in (starts[:2], starts[2:]):
        jax.tree.map(np.testing.assert_array_equal, one[2], other[2])


def test_shown_is_the_best_rate_without_batch_norm():
    settings = {"learning_rates": [0.1, 0.2, 0.4]}
    history = covariate_shift.empty_history(rates=3, checks=2, seeds=2)
    for values in (history.loss, *history.measured):
        values[:] = 1.0
    history.measured.accuracy[:, :, -1, :] = np.array([[0.5, 0.7, 0.9], [0.6, 0.95, 0.9]])[
        ..., None
    ]
    history.loss[0, 2, -1] = np.nan  # the best but for this
    results = covariate_shift.results_of(settings, history)
    assert results["shown_learning_rate"] == 0.2
    history.measured.accuracy[0, 0, -1] = 0.8
    results = covariate_shift.results_of(settings, history)
    assert results["shown_learning_rate"] == 0.1


def test_divergence_is_a_result(run):
    assert [n["last_loss"][1] for n in run.results["networks"].values()] == 2 * [[None, None]]
    for network in run.results["networks"].values():
        assert np.array(network["test_accuracy"])[1, 1:].max() < 0.2
    text = accuracy_text(run.results)
    assert re.search(r"1e\+38 +│ batch norm .* >24 +│ +nan +│ 2 of 2", text)


def accuracy_text(results):
    console = covariate_shift.Console(width=120, highlight=False)
    with console.capture() as capture:
        console.print(covariate_shift.accuracy_table(results))
        console.print(covariate_shift.moves_table(results))
    return capture.get()


def test_files(run):
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == ["checkpoints", "covariate_shift.json", "covariate_shift.png"]
    png = (run.folder / "covariate_shift.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize("interrupted_at", [2, 7])
def test_resume_is_exact(run, tmp_path, monkeypatch, capsys, interrupted_at):
    """In the middle of a run, and in one of another network, with a check that was not saved."""
    monkeypatch.setattr(covariate_shift, "SAVE_EVERY", 2)
    monkeypatch.setattr(covariate_shift, "figure", lambda results: b"")  # for time
    train_steps, calls = covariate_shift.train_steps, []

    def interrupted(*args):
        if len(calls) == interrupted_at:
            raise KeyboardInterrupt
        calls.append(args)
        return train_steps(*args)

    with monkeypatch.context() as patch:
        patch.setattr(covariate_shift, "train_steps", interrupted)
        with exits(130):
            covariate_shift.main([*FLAGS, "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    # Each check has batches of its own, the same in every run.
    drawn = [np.asarray(jax.random.key_data(args[3])).tobytes() for args in calls]
    assert len(set(drawn)) == min(CHECKS, interrupted_at)
    assert drawn == [drawn[number % CHECKS] for number in range(interrupted_at)]
    covariate_shift.main([*FLAGS, "--output", str(tmp_path)])
    done = interrupted_at // 2 * 2
    assert (
        f"Restored {done} of 12 checks from {tmp_path / 'checkpoints'}" in capsys.readouterr().out
    )
    expected = (run.folder / "covariate_shift.json").read_bytes()
    assert (tmp_path / "covariate_shift.json").read_bytes() == expected


def test_finished_run_is_only_shown(run, monkeypatch):
    expected = (run.folder / "covariate_shift.json").read_bytes()
    monkeypatch.setattr(covariate_shift, "train_steps", None)  # calling it would be a TypeError
    covariate_shift.main([*FLAGS, "--output", str(run.folder)])
    assert (run.folder / "covariate_shift.json").read_bytes() == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "32"], "was saved with --steps 24, not --steps 32;"),
        (["--learning-rates", "2"], "--learning-rates [1.0, 1e+38], not --learning-rates [2.0];"),
    ],
)
def test_checkpoint_of_other_settings(run, flags, message, monkeypatch, capsys):
    before = (run.folder / "covariate_shift.json").read_bytes()
    monkeypatch.setattr(covariate_shift, "train_steps", None)
    with exits(2):
        covariate_shift.main([*FLAGS, *flags, "--output", str(run.folder)])
    assert message in capsys.readouterr().err
    assert (run.folder / "covariate_shift.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "25"], "--check-every must divide --steps, 25, not 8"),
        (["--steps", "0"], "must be a whole number from 1 to 2^31 - 1, not '0'"),
        (["--learning-rates", "0.1", "-1"], "must be a finite number above 0, not '-1'"),
        (["--init-std", "nan"], "must be a finite number above 0, not 'nan'"),
        (["--dataset", "mnist", "--data-dir", "{tmp}"], "--dataset mnist: no folder {tmp}/mnist"),
        (["--output", "{tmp}/file"], "--output must be a folder that can be created and written"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(covariate_shift, "train_steps", None)
    (tmp_path / "file").touch()
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with exits(2):
        covariate_shift.main([*FLAGS, "--output", str(tmp_path / "out"), *flags])
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help(capsys):
    with exits(0):
        covariate_shift.main(["--help"])
    text = capsys.readouterr().out
    assert "Figure 1 of Ioffe and Szegedy" in text
    assert text.count("(default:") == 8


@pytest.fixture(scope="module")
def untrained(run):
    """Networks without and with batch norm; the same as in the run, so that nothing compiles."""
    images = load_dataset("digits", Path()).train_images > 127
    keys = jax.random.split(jax.random.key(3), SEEDS)
    nets = [SigmoidNet(batch_norm, init_std=0.1) for batch_norm in (False, True)]
    return [(net, covariate_shift.init(net, keys, images)) for net in nets]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_measured(untrained, batch_norm):
    """Against NumPy, layer by layer, with batches that normalize themselves."""
    data = load_dataset("digits", Path())
    images, labels = data.test_images > 127, data.test_labels
    net, variables = untrained[batch_norm]
    found = covariate_shift.measure(net, variables, images, labels)
    layers = (SEEDS, LAYERS, UNITS)
    assert [a.shape for a in found] == [(SEEDS,), layers, layers, (SEEDS, UNITS, 3)]

    params = jax.tree.map(lambda a: np.asarray(a[1], np.float64), variables["params"])
    at_test = images.reshape(450, 64).astype(float)
    probe = at_test[:420]  # 7 whole batches of 60
    for layer in range(LAYERS):
        dense = params[f"Dense_{layer}"]
        probe, at_test = (x @ dense["kernel"] + dense.get("bias", 0) for x in (probe, at_test))
        if batch_norm:
            batches = probe.reshape(7, 60, UNITS)
            mean, var = (f(batches, axis=1, keepdims=True) for f in (np.mean, np.var))
            probe = ((batches - mean) / np.sqrt(var + 1e-5)).reshape(420, UNITS)
            at_test = at_test / np.sqrt(1 + 1e-5)  # by the statistics before any step
        np.testing.assert_allclose(found.mean[1, layer], probe.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.std[1, layer], probe.std(0), rtol=1e-4)
        if layer == LAYERS - 1:
            expected = np.percentile(probe, [15, 50, 85], axis=0).T
            np.testing.assert_allclose(found.percentiles[1], expected, atol=1e-4)
        probe, at_test = (1 / (1 + np.exp(-x)) for x in (probe, at_test))
    last = params[f"Dense_{LAYERS}"]
    logits = at_test @ last["kernel"] + last["bias"]
    assert found.accuracy[1] == pytest.approx((logits.argmax(-1) == labels).mean())


def test_moves():
    """Of 4 checks, 2 seeds, 3 layers and 5 units, by hand."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(4, 2, 3, 5)), rng.uniform(0.5, 2, (4, 2, 3, 5))
    of_mean, of_std = covariate_shift.moves(Measured(None, mean, std, None))
    assert of_mean.shape == of_std.shape == (3, 2, 3)
    for check, seed, layer in np.ndindex(3, 2, 3):
        means, stds = [], []
        for unit in range(5):
            (m0, m1), (s0, s1) = (a[check : check + 2, seed, layer, unit] for a in (mean, std))
            means.append(abs(m1 - m0) / ((s0**2 + s1**2) / 2) ** 0.5)
            stds.append(abs(np.log(s1) - np.log(s0)))
        assert of_mean[check, seed, layer] == pytest.approx(sorted(means)[2])
        assert of_std[check, seed, layer] == pytest.approx(sorted(stds)[2])


def test_moves_of_what_diverged():
    std = np.ones((3, 1, 1, 3))
    std[1] = np.nan
    std[2] = 0
    of_mean, of_std = covariate_shift.moves(Measured(None, np.zeros_like(std), std, None))
    assert np.isnan(of_mean).all()
    assert covariate_shift.rounded(of_std) == [[[None]], [[None]]]


def test_moves_of_a_single_check(run):
    """It is early, and nothing comes after."""
    results = {**run.results, "steps": run.results["check_every"]}
    table = covariate_shift.moves_table(results)
    step = results["check_every"]
    headers = [column.header for column in table.columns]
    assert headers == ["network, layer", f"mean, to step {step}", f"std, to step {step}"]


def test_typical_unit():
    """Medians that travel 6, 1 and 3, however far they end up, and however the others move."""
    medians = np.array([[0, 0, 0], [3, 0.5, 3], [0, 1, 3]])
    percentiles = np.stack([medians * [1, 1, 9], medians, medians * [1, 9, 1]], axis=-1)
    assert covariate_shift.typical_unit(percentiles) == 2


def test_steps_to_target():
    accuracies = np.array([[0.1, 0.1, 0.1], [0.95, 0.9, 0.3], [0.99, 0.96, 0.94]])
    steps = covariate_shift.steps_to_target(accuracies, check_every=500)
    assert steps.tolist() == [500, 1000, np.inf]
    assert covariate_shift.spread(steps, "g", limit=1000) == "1000 (500 to >1000)"
    assert covariate_shift.spread(np.array([2.0, 2.0]), ".1f") == "2.0"


def test_layers(untrained):
    """Batch norm before each sigmoid, no bias in front of it, small Gaussian weights."""
    plain, batch_norm = (variables["params"] for _, variables in untrained)
    norms = {f"BatchNorm_{i}" for i in range(3)}
    assert set(batch_norm) == norms | {f"Dense_{i}" for i in range(4)}
    assert [set(batch_norm[f"Dense_{i}"]) for i in range(3)] == 3 * [{"kernel"}]
    assert set(batch_norm["Dense_3"]) == {"kernel", "bias"}
    for name, dense in plain.items():
        np.testing.assert_array_equal(dense["kernel"], batch_norm[name]["kernel"])
        assert not np.any(dense["bias"])
    assert plain["Dense_0"]["kernel"].shape == (SEEDS, 64, 100)
    assert np.std(plain["Dense_0"]["kernel"]) == pytest.approx(0.1, rel=0.02)


def test_figure():
    """What is drawn is in the committed results."""
    results = json.loads((RESULTS / "covariate_shift.json").read_text())
    figure = drawn(covariate_shift.figure, results)
    curves, *inputs, by_rate, mean_moves, std_moves = figure.axes
    steps = np.arange(101) * 500
    shown = results["learning_rates"].index(results["shown_learning_rate"])
    for (name, network), axes in zip(results["networks"].items(), inputs, strict=True):
        accuracies = 100 * np.array(network["test_accuracy"])
        expected = np.median(accuracies[shown], axis=-1)
        np.testing.assert_array_equal(lines(curves)[name], np.stack([steps, expected], axis=-1))
        percentiles = lines(axes)
        for column, label in enumerate(("15th percentile", "median", "85th percentile")):
            expected = [row[column] for row in network["percentiles"]]
            np.testing.assert_array_equal(percentiles[label][:, 1], expected)
        (bars,) = (bars for bars in by_rate.containers if bars.get_label() == name)
        line, _, (segments,) = bars.lines
        wrong = 100 - accuracies[:, -1]
        np.testing.assert_allclose(line.get_ydata(), np.median(wrong, axis=-1))
        ends = [segment[:, 1] for segment in segments.get_segments()]
        np.testing.assert_allclose(ends, np.stack([wrong.min(-1), wrong.max(-1)], axis=-1))
        for moved, key in ((mean_moves, "mean_moves"), (std_moves, "std_moves")):
            expected = np.median(np.array(network[key], float), axis=1)
            for layer in range(LAYERS):
                points = lines(moved)[f"{name}, layer {layer + 1}"]
                np.testing.assert_array_equal(points, np.stack([steps[1:], expected[:, layer]], -1))
    assert curves.get_ylim() == (80, 100)


def test_figure_shows_low_accuracies(run):
    """Where the last of them are below those of MNIST."""
    last = [np.array(n["test_accuracy"])[0, -1] for n in run.results["networks"].values()]
    assert np.min(last) < 0.8
    curves = drawn(covariate_shift.figure, run.results).axes[0]
    assert curves.get_ylim()[0] < 100 * np.min(last)


def test_figure_where_all_diverged(run):
    nothing = json.loads(json.dumps(run.results))
    for network in nothing["networks"].values():
        for key in ("percentiles", "mean_moves", "std_moves", "last_loss"):
            network[key] = np.full(np.shape(network[key]), None).tolist()
    assert covariate_shift.figure(nothing).endswith(b"IEND\xaeB`\x82")
    assert "nan" in accuracy_text(nothing)


def cells(table):
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_readme_figures():
    """They are those of the committed runs."""
    section = (ROOT / "examples/README.md").read_text().split("## Internal covariate shift\n")[1]
    section = section.split("\n## ")[0]
    small, large = (
        json.loads((RESULTS / f"covariate_shift{suffix}.json").read_text())
        for suffix in ("", "_std0.1")
    )
    lines = (line for line in section.splitlines() if line.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    accuracies = [cells(covariate_shift.accuracy_table(results)) for results in (small, large)]
    expected = [[*a[:4], *b[2:4]] for a, b in zip(*accuracies, strict=True)]
    assert rows[2:12] == expected
    for shown, results in ((rows[14:20], small), (rows[22:28], large)):
        assert shown == cells(covariate_shift.moves_table(results))
    assert len(rows) == 28
    assert rows[12][0] == f"std 0.01, learning rate {small['shown_learning_rate']:g}"
    assert rows[20][0] == f"std 0.1, learning rate {large['shown_learning_rate']:g}"

    text = " ".join(section.split())

    def moved(results, key, checks):
        """Median [layers] of the plain network and of that with batch norm."""
        found = (np.array(network[key], float) for network in results["networks"].values())
        return [np.median(values[checks], axis=(0, 1)) for values in found]

    def times(results, checks):
        plain, batch_norm = moved(results, "mean_moves", checks)
        low, high = (f(plain / batch_norm) for f in (np.min, np.max))
        return f"{low:.0f} to {high:.0f} times"

    early, late = slice(10), slice(10, None)
    assert f"move {times(small, early)} as far, and later {times(small, late)}" in text
    assert f"still move {times(large, early)} as far in the first 5000 steps" in text
    plain, batch_norm = moved(small, "std_moves", slice(1))
    assert "move by {:.1f}, {:.1f} and {:.1f} in its".format(*plain) in text
    assert f"batch norm by {min(batch_norm):.1f} to {max(batch_norm):.1f}" in text
    for results in (small, large):
        plain, batch_norm = moved(results, "std_moves", late)
        assert (plain < batch_norm)[:2].all()
    plain, batch_norm = moved(large, "mean_moves", slice(60, None))
    first, second, last = (f"{ratio:.1f}" for ratio in plain / batch_norm)
    assert f"{last} times as far; those of the others {first} and {second} times" in text

    medians = {
        name: [
            100 * np.median(np.array(results["networks"][name]["test_accuracy"])[:, -1], axis=-1)
            for results in (small, large)
        ]
        for name in small["networks"]
    }
    ends = [f"{f(medians[n]):.1f}" for n in ("batch norm", "plain") for f in (np.min, np.max)]
    medians = "with batch norm go from {} to {} %, those of the plain network from {} to {} %"
    assert medians.format(*ends) in text
    widths = [
        f"{high - low:.1f}"
        for network in small["networks"].values()
        for low, _, high in (network["percentiles"][1], network["percentiles"][-1])
    ]
    assert "from {} to {} without batch norm, and from {} to {} with".format(*widths) in text
    plain, batch_norm = (np.median(n["last_loss"][2]) for n in large["networks"].values())
    assert f"its loss is {plain:.2g}, with batch norm {batch_norm:.2g}" in text
