"""`examples/batch_size.py` on the real digits."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import batch_size
import common
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.scripts import drawn, exits, table_rows, unwrapped

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES, SEEDS = (8, 500), 2
FLAGS = ["--dataset", "digits", "--batch-sizes", *(f"{size}" for size in reversed(SIZES))]
FLAGS += ["--seeds", f"{SEEDS}"]
NETWORKS = {"dense": batch_size.DenseNet}  # the residual one takes long to compile
MODES = ["running, 0.9", "running, 0.99", "exact", "batch"]


def run(folder, *flags):
    """What the example prints with the dense network alone."""
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(batch_size, "NETWORKS", NETWORKS)
        patch.setenv("COLUMNS", "200")
        batch_size.main([*FLAGS, *flags, "--output", str(folder)])
    return stdout.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run: its folder, what it printed and its results."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    stdout = run(folder)
    results = json.loads((folder / "batch_size.json").read_text())
    return SimpleNamespace(folder=folder, stdout=stdout, results=results)


@pytest.fixture(scope="module")
def digits():
    return common.on_device(common.load_dataset("digits", Path()))


def test_numbers(finished):
    settings, runs = finished.results["settings"], finished.results["runs"]
    assert settings == {"dataset": "digits", "epochs": 1, "batch_sizes": [8, 500], "seeds": SEEDS}
    assert [tuple(run.values())[:4] for run in runs] == [
        (network, batch_norm, size, seed)
        for network in NETWORKS
        for batch_norm in (False, True)
        for size in SIZES
        for seed in range(SEEDS)
    ]
    rates = {(False, 8): 0.0075, (False, 500): 0.1, (True, 8): 0.0125, (True, 500): 0.4}
    for run in runs:
        assert run["learning_rate"] == rates[run["batch_norm"], run["batch_size"]]
        assert run["steps"] == 1347 // run["batch_size"]
        assert run["diverged"] is False
        assert list(run["accuracy"]) == (MODES if run["batch_norm"] else ["plain"])
        if run["batch_size"] == 8:
            assert min(run["accuracy"].values()) > 0.5
    assert runs[4]["accuracy"] != runs[5]["accuracy"]


def test_running_statistics_are_the_layers(finished, digits):
    """They are those of a network whose layers average by themselves."""
    net = batch_size.DenseNet(batch_norm=True, momentum=0.9)
    for variables, _ in common.training(  # noqa: B007
        net, digits, seed=1, learning_rate=0.0125, batch_size=8, steps=1347 // 8
    ):
        pass
    found = common.accuracy(net, variables, digits.test_images, digits.test_labels)
    (run,) = (
        run
        for run in finished.results["runs"]
        if run["batch_norm"] and run["batch_size"] == 8 and run["seed"] == 1
    )
    assert run["accuracy"]["running, 0.9"] == float(found)


def test_averages():
    """Of numbers by hand, each by its own momentum."""
    start = {"mean": jnp.array([1.0, 2.0])}
    averages = batch_size.update_averages(
        {0.9: start, 0.99: start}, {"mean": jnp.array([3.0, 2.0])}
    )
    np.testing.assert_allclose(averages[0.9]["mean"], [1.2, 2.0], rtol=1e-6)
    np.testing.assert_allclose(averages[0.99]["mean"], [1.02, 2.0], rtol=1e-6)


def forward(params, images, statistics):
    """The dense network in float64, and the moments of what each batch norm gets.

    Args:
        params: of the network.
        images: [N, H, W, C].
        statistics: mean and variance of each batch norm, or None for those of the images.
    """
    x, moments = np.asarray(images, float).reshape(len(images), -1), []
    for i in range(3):
        x = x @ np.asarray(params[f"Dense_{i}"]["kernel"], float)
        moments.append((x.mean(0), x.var(0)))
        mean, var = moments[i] if statistics is None else statistics[i]
        bn = params[f"BatchNorm_{i}"]
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * bn["scale"] + bn["bias"], 0)
    return x @ np.asarray(params["Dense_3"]["kernel"]) + params["Dense_3"]["bias"], moments


def test_ways_to_test(digits):
    """Against the network written out: each way differs by the statistics alone."""
    net, size, seed = batch_size.DenseNet(batch_norm=True, momentum=0.0), 4, 5
    for variables, _ in common.training(  # noqa: B007
        net, digits, seed=0, learning_rate=0.0125, batch_size=size, steps=40
    ):
        pass
    params, stats = variables["params"], variables["batch_stats"]
    found = batch_size.evaluate(net, digits, variables, {0.9: stats}, size, seed)
    assert list(found) == ["running, 0.9", "exact", "batch"]
    images, labels = np.asarray(digits.test_images), np.asarray(digits.test_labels)

    def right(images, labels, statistics):
        return (forward(params, images, statistics)[0].argmax(1) == labels).mean()

    running = [(stats[f"BatchNorm_{i}"]["mean"], stats[f"BatchNorm_{i}"]["var"]) for i in range(3)]
    assert np.isclose(found["running, 0.9"], right(images, labels, running), atol=3e-3)

    rng = np.random.default_rng(seed)
    train = np.asarray(digits.train_images)[rng.permutation(1347)[: 1347 // size * size]]
    moments = [forward(params, batch, None)[1] for batch in np.split(train, 1347 // size)]
    exact = []
    for i in range(3):
        means, variances = (np.array([m[i][k] for m in moments]) for k in range(2))
        exact.append((means.mean(0), variances.mean(0) + means.var(0)))
    assert np.isclose(found["exact"], right(images, labels, exact), atol=3e-3)

    order = rng.permutation(450)[: 450 // size * size]
    batch = [right(images[b], labels[b], None) for b in np.split(order, 450 // size)]
    assert np.isclose(found["batch"], np.mean(batch), atol=3e-3)
    assert len({*found.values()}) == 3


def test_batches():
    order = np.array([3, 1, 0, 2, 4])
    assert batch_size.batches(order, 2).tolist() == [[3, 1], [0, 2]]
    assert batch_size.batches(order, 5).tolist() == [[3, 1, 0, 2, 4]]
    assert batch_size.batches(order, 6).tolist() == [[3, 1, 0, 2, 4]]


def test_files(finished):
    names = ["batch_size.json", "batch_size.png"]
    assert sorted(path.name for path in finished.folder.iterdir()) == names
    png = (finished.folder / "batch_size.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    for name in names:
        assert f"{finished.folder / name}" in finished.stdout


def test_resumes_where_it_was_interrupted(finished, tmp_path, monkeypatch):
    trained, train = [], batch_size.train

    def interrupted(*args):
        trained.append(args[:4])
        if len(trained) == 6:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(batch_size, "train", interrupted)
    with exits(130):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["batch_size.json"]
    assert run(tmp_path).split("Wrote")[0] == finished.stdout.split("Wrote")[0]
    assert json.loads((tmp_path / "batch_size.json").read_text()) == finished.results
    assert len(trained) == len(finished.results["runs"]) + 1
    assert trained[5] == trained[6]


def test_other_settings_are_refused(finished, capsys):
    before = (finished.folder / "batch_size.json").read_bytes()
    with exits(2):
        run(finished.folder, "--epochs", "2")
    error = unwrapped(capsys.readouterr().err)
    assert "batch_size.json was saved with --epochs 1, not --epochs 2;" in error
    assert (finished.folder / "batch_size.json").read_bytes() == before


def test_damaged_results_are_refused(finished, tmp_path, capsys):
    runs = [finished.results["runs"][0] | {"accuracy": 0.5}]
    (tmp_path / "batch_size.json").write_text(json.dumps(finished.results | {"runs": runs}))
    with exits(2):
        run(tmp_path)
    assert "batch_size.json is damaged, or not of this script" in unwrapped(capsys.readouterr().err)


def test_divergence_is_a_result(digits, monkeypatch):
    rates = dict.fromkeys(batch_size.LEARNING_RATES, (1e38, 1e38))
    monkeypatch.setattr(batch_size, "LEARNING_RATES", rates)
    for batch_norm, names in ((False, ["plain"]), (True, MODES)):
        found = batch_size.train(
            "dense", batch_norm, 500, 0, digits, 1, SimpleNamespace(update=int)
        )
        assert found["diverged"] is True
        assert list(found["accuracy"]) == names
        assert max(found["accuracy"].values()) < 0.2


@pytest.mark.parametrize(("parameter", "loss"), [(np.nan, 2.3), (1.0, np.nan), (1.0, 2.3)])
def test_divergence_shows_in_loss_or_parameters(parameter, loss, digits, monkeypatch):
    trained = [({"params": [parameter]}, jnp.float32(loss))]
    monkeypatch.setattr(batch_size, "training", lambda *args, **kwargs: trained)
    monkeypatch.setattr(batch_size, "accuracy", lambda *args: 0.5)
    found = batch_size.train("dense", False, 500, 0, digits, 1, SimpleNamespace(update=int))
    assert found["diverged"] is not np.isfinite(parameter + loss).item()


def made_results():
    """Batch norm fails at 2, and its running statistics at 2 and 512."""
    accuracy = {
        "plain": {2: 0.8, 16: 0.8, 512: 0.7},
        "exact": {2: 0.6, 16: 0.9, 512: 0.85},
        "running, 0.9": {2: 0.5, 16: 0.9, 512: 0.84},
        "running, 0.99": {2: 0.58, 16: 0.89, 512: 0.45},
        "batch": {2: 0.3, 16: 0.8, 512: 0.85},
    }
    runs = [
        {
            "network": network,
            "batch_norm": batch_norm,
            "batch_size": size,
            "seed": seed,
            "diverged": (batch_norm, size, seed) == (False, 512, 1),
            "accuracy": {
                name: values[size] + 0.01 * seed
                for name, values in accuracy.items()
                if (name != "plain") == batch_norm
            },
        }
        for network in ("dense", "residual")
        for batch_norm in (False, True)
        for size in (2, 16, 512)
        for seed in range(2)
    ]
    settings = {"dataset": "digits", "epochs": 1, "batch_sizes": [2, 16, 512], "seeds": 2}
    return {"settings": settings, "runs": runs}


def test_table():
    console = Console(file=io.StringIO(), width=200)
    console.print(batch_size.results_table(made_results(), "dense"))
    rows = table_rows(console.file.getvalue())
    assert rows[0] == ["2", *(f"{x} ± 0.7" for x in (80.5, 50.5, 58.5, 60.5, 30.5)), "0"]
    assert rows[2] == ["512", *(f"{x} ± 0.7" for x in (70.5, 84.5, 45.5, 85.5, 85.5)), "1"]


def test_findings():
    results = made_results()
    assert batch_size.findings(results, "dense") == [
        "dense: without batch norm it does better at batch sizes 2.",
        "dense: batch size 2 is at 60.5 % by exact statistics, 30.0 points below batch size 16; "
        "running statistics change that by -10.0 at momentum 0.9 and -2.0 at momentum 0.99.",
        "dense: batch size 512 is at 85.5 % by exact statistics, 5.0 points below batch size 16; "
        "running statistics change that by -1.0 at momentum 0.9 and -40.0 at momentum 0.99.",
    ]
    for run in results["runs"]:
        if not run["batch_norm"]:
            run["accuracy"]["plain"] = 0.1
    (first, *_) = batch_size.findings(results, "dense")
    assert first == "dense: with batch norm it does better at all batch sizes."


def test_figure():
    """Means and ranges over the seeds, and below what is lost to exact statistics."""
    results = json.loads((EXAMPLES / "results/batch_size.json").read_text())
    sizes = results["settings"]["batch_sizes"]
    figure = drawn(batch_size.figure, results)
    top, bottom = figure.axes[:2], figure.axes[2:]
    for axes, lost in zip((*top, *bottom), (False, False, True, True), strict=True):
        network = top[axes in (top[1], bottom[1])].get_title().removesuffix(" network")
        exact = batch_size.accuracies(results, network, "exact")
        shown = {}
        for bars in axes.containers:
            line, _, (segments,) = bars.lines
            ranges = [segment[:, 1] for segment in segments.get_segments()]
            shown[bars.get_label()] = np.column_stack([line.get_xydata(), ranges])
        labels = {
            "plain": "no batch norm",
            "exact": "batch norm, exact statistics",
            "running, 0.9": "batch norm, running statistics, momentum 0.9",
            "running, 0.99": "batch norm, running statistics, momentum 0.99",
            "batch": "batch norm, statistics of the test batch",
        }
        for name in labels if not lost else MODES:
            if lost and name == "exact":
                continue
            values = batch_size.accuracies(results, network, name) - (exact if lost else 0)
            expected = [sizes, values.mean(-1), values.min(-1), values.max(-1)]
            found = shown.pop(labels[name])
            np.testing.assert_allclose(found, np.transpose(expected), atol=1e-9)
        assert not shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sizes", "1", "8"], "--batch-sizes must be from 2, as one image has no variance"),
        (["--batch-sizes", "1348"], "to 1347, the images to train on, not 1348"),
        (["--batch-sizes", "0"], "must be a whole number from 1 to 2^31 - 1, not '0'"),
        (["--epochs", "x"], "must be a whole number from 1 to 2^31 - 1, not 'x'"),
        (["--output", "{file}"], "--output must be a folder that can be created and written"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch_size, "train", None)  # calling it would be a TypeError
    file = tmp_path / "file"
    file.touch()
    flags = [flag.format(file=file) for flag in flags]
    with exits(2):
        batch_size.main([*FLAGS, "--output", str(tmp_path / "out"), *flags])
    assert message in unwrapped(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [file]


def test_help(capsys):
    with exits(0):
        batch_size.main(["--help"])
    text = unwrapped(capsys.readouterr().out)
    assert "At which batch sizes batch norm works" in text
    for flag in ("epochs", "batch-sizes", "seeds", "output", "dataset", "data-dir"):
        assert f"--{flag} " in text


def test_readme_figures():
    """They are those of the committed run."""
    text = "".join(path.read_text() for path in EXAMPLES.glob("README*.md"))
    section = unwrapped(text.split("## Batch sizes")[1].split("\n## ")[0])
    results = json.loads((EXAMPLES / "results/batch_size.json").read_text())
    for network in ("dense", "residual"):
        console = Console(file=io.StringIO(), width=200)
        console.print(batch_size.results_table(results, network))
        table = section.split(f"| {network}, batch size |")[1]
        rows = table_rows(console.file.getvalue())
        assert len(rows) == 9
        for *row, diverged in rows:
            assert f"| {' | '.join(row)} |" in table
            assert diverged == "0"
    means = {
        (network, name): batch_size.accuracies(results, network, name).mean(-1)
        for network in ("dense", "residual")
        for name in (*MODES, "plain")
    }

    def lost(network, name, i):
        return f"{means[network, 'exact'][i] - means[network, name][i]:.1f}"

    dense, residual = (means[network, "exact"] for network in ("dense", "residual"))
    for phrase in (
        f"It ends at {dense[0]:.1f} % there, {dense.max() - dense[0]:.1f} points below its best",
        f"it loses {residual.max() - residual[0]:.1f} points",
        f"{lost('dense', 'running, 0.9', 0)} points back at 2 and momentum 0.9",
        f"{lost('dense', 'running, 0.99', 0)} points at momentum 0.99",
        f"The ResNet loses {lost('residual', 'running, 0.99', -1)} points",
        f"the dense network {lost('dense', 'running, 0.99', -1)};",
        f"{lost('dense', 'batch', 0)} points at 2 in the dense network",
        f"{lost('residual', 'batch', 1)} at 4 in the ResNet",
        f"loses {np.ptp(means['dense', 'plain'][[0, -1]]):.1f} points from 2 to 512",
    ):
        assert phrase in section
    assert f"leave {0.99**117:.0%}".replace("%", " %") in section
    assert (means["residual", "plain"] < residual).all()
    ahead = np.array(results["settings"]["batch_sizes"])[means["dense", "plain"] < dense]
    assert ahead.tolist() == [16, 32, 64, 128, 256, 512]
