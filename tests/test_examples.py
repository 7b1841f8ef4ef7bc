"""The examples, run on the real digits for an epoch."""

import contextlib
import importlib
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.export
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.scripts import exits, table_rows, unwrapped

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

EXAMPLES = Path(__file__).parents[1] / "examples"
NETWORKS = ["plain", "batch norm"]
HUGE_RATE = 1e9
BATCH_SIZES = (1, 8, 32)  # fewer than the example, for time
LOOPS = ["flax_linen", "flax_nnx"]


@pytest.fixture(scope="module")
def examples():
    """The example modules, imported as a script beside them would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        modules = SimpleNamespace(
            digits=importlib.import_module("digits"),
            questions=importlib.import_module("questions"),
            flax_linen=importlib.import_module("flax_linen"),
            flax_nnx=importlib.import_module("flax_nnx"),
            serve=importlib.import_module("serve"),
        )
        yield modules
    for name in vars(modules):
        del sys.modules[name]


@pytest.fixture(scope="module")
def digits_run(examples, tmp_path_factory):
    """One run of digits.py: its folder, what it printed, and how often it traced training."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    traced = []
    train_epoch = examples.digits.train_epoch

    def counted(*args):
        traced.append(args)
        return train_epoch(*args)

    flags = ["--epochs", "1", "--seeds", "2", "--output", str(folder)]
    flags += ["--learning-rates", f"{HUGE_RATE}", "0.1"]
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(examples.digits, "train_epoch", counted)
        examples.digits.main(flags)
    return SimpleNamespace(folder=folder, stdout=stdout.getvalue(), traces=len(traced))


@pytest.fixture(scope="module")
def questions_run(examples):
    """What one run of questions.py printed."""
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(examples.questions, "BATCH_SIZES", BATCH_SIZES)
        examples.questions.main(["--epochs", "1"])
    return stdout.getvalue()


def test_digits_json_holds_every_run(digits_run):
    results = json.loads((digits_run.folder / "digits.json").read_text())
    assert results["learning_rates"] == [0.1, HUGE_RATE]
    assert (results["epochs"], results["batch_size"], results["seeds"]) == (1, 64, 2)
    assert list(results["test_accuracy"]) == NETWORKS
    for values in results["test_accuracy"].values():
        values = np.array(values)
        assert values.shape == (2, 1, 2)
        assert (values >= 0).all()
        assert (values <= 1).all()
    plain, batch_norm = (np.array(results["test_accuracy"][name]) for name in NETWORKS)
    assert batch_norm[0, 0].min() > 0.4
    assert batch_norm[0, 0].min() > plain[0, 0].max()


def test_digits_figure_is_whole(digits_run):
    png = (digits_run.folder / "digits.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert sorted(path.name for path in digits_run.folder.iterdir()) == [
        "digits.json",
        "digits.png",
    ]


def test_digits_table_and_sentences(digits_run):
    rows = table_rows(digits_run.stdout)
    assert [row[:2] for row in rows] == [
        [rate, name] for rate in ("0.1", "1e+09") for name in NETWORKS
    ]
    results = json.loads((digits_run.folder / "digits.json").read_text())
    means = [
        100 * np.mean(results["test_accuracy"][name][i][-1]) for i in range(2) for name in NETWORKS
    ]
    assert [row[2].split()[0] for row in rows] == [f"{mean:.1f}" for mean in means]
    text = unwrapped(digits_run.stdout)
    assert "Test accuracy at the best learning rate: plain" in text
    assert "Epochs to 95% at the fastest learning rate: plain" in text
    assert "Largest learning rate tried at which no seed fails: plain none, batch norm" in text


def test_digits_reports_divergence(digits_run):
    results = json.loads((digits_run.folder / "digits.json").read_text())
    for values in results["test_accuracy"].values():
        assert np.max(values[1]) < 0.2
    assert [row[-2:] for row in table_rows(digits_run.stdout)[2:]] == 2 * [[">1", "2 of 2"]]


def test_digits_traces_once_per_network(digits_run):
    assert digits_run.traces == len(NETWORKS)


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--epochs", "0"], "must be a whole number from 1 to 2^31 - 1, not '0'"),
        (["--seeds", "two"], "must be a whole number from 1 to 2^31 - 1, not 'two'"),
        (["--batch-size", "-3"], "must be a whole number from 1 to 2^31 - 1, not '-3'"),
        (["--batch-size", "1348"], "at most 1347, the number of training images, not 1348"),
        (["--learning-rates", "0.1", "-1"], "must be a finite number above 0, not '-1'"),
        (["--learning-rates", "nan"], "must be a finite number above 0, not 'nan'"),
        (["--learning-rates", "fast"], "must be a finite number above 0, not 'fast'"),
        (["--learning-rates"], "expected at least one argument"),
    ],
)
def test_digits_bad_flags(examples, flags, allowed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(examples.digits, "train", None)  # calling it would be a TypeError
    folder = tmp_path / "out"
    with exits(2):
        examples.digits.main([*flags, "--output", str(folder)])
    assert allowed in unwrapped(capsys.readouterr().err)
    assert not folder.exists()


def test_digits_output_that_cannot_be_a_folder(examples, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(examples.digits, "train", None)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for folder in (taken, taken / "below"):
        with exits(2):
            examples.digits.main(["--output", str(folder)])
        error = unwrapped(capsys.readouterr().err)
        assert "--output must be a folder that can be created and written" in error
    assert list(tmp_path.iterdir()) == [taken]
    assert taken.read_text() == "a file"


def test_epochs_to_target(examples):
    accuracies = np.array([[0.5, 0.96, 0.2], [0.95, 0.9, 0.3], [0.99, 0.99, 0.94]])
    epochs = examples.digits.epochs_to_target(accuracies)
    assert epochs.tolist() == [2, 1, math.inf]
    assert examples.digits.epochs_text(epochs, trained=3) == "2 (1 to >3)"
    assert examples.digits.epochs_text(np.array([math.inf, math.inf]), trained=3) == ">3"


def test_effects_name_the_best_rates(examples):
    curves = {
        "plain": np.array([[[0.8, 0.9], [0.96, 0.97]], [[0.1, 0.9], [0.1, 0.98]]]),
        "batch norm": np.array([[[0.96, 0.9], [0.97, 0.97]], [[0.96, 0.96], [0.98, 1.0]]]),
    }
    assert examples.digits.effects([0.1, 1.0], curves) == [
        "Test accuracy at the best learning rate: plain 96.5 (96.0 to 97.0) % at 0.1, "
        "batch norm 99.0 (98.0 to 100.0) % at 1.",
        "Epochs to 95% at the fastest learning rate: plain 2 at 0.1, batch norm 1 at 1.",
        "Largest learning rate tried at which no seed fails: plain 0.1, batch norm 1.",
    ]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("digits", ["--epochs", "--batch-size", "--learning-rates", "--seeds", "--output"]),
        ("questions", ["--epochs", "--seed"]),
        ("flax_linen", ["--epochs", "--checkpoint-dir"]),
        ("flax_nnx", ["--epochs", "--checkpoint-dir"]),
        ("serve", ["--steps", "--momentum", "--seed", "--repeats", "--output"]),
    ],
)
def test_help(examples, name, flags, capsys):
    with exits(0):
        getattr(examples, name).main(["--help"])
    text = unwrapped(capsys.readouterr().out)
    assert all(flag in text for flag in flags)
    assert text.count("(default: ") == len(flags)


def test_questions_batch_of_one(questions_run):
    rows = table_rows(questions_run)[: len(BATCH_SIZES)]
    assert [row[0] for row in rows] == [f"{size}" for size in BATCH_SIZES]
    assert rows[0][1:3] == ["0", "0"]
    assert all(float(row[1]) > 0.5 and float(row[2]) > 0.5 for row in rows[1:])
    accuracies = {int(row[0]): float(row[3]) for row in rows}
    assert accuracies[1] < 25
    assert accuracies[8] > 80


def test_questions_test_time(questions_run):
    start = len(BATCH_SIZES)
    batch, running, pooled = (
        list(map(float, row[1:])) for row in table_rows(questions_run)[start : start + 3]
    )
    alone, of_eight, together, one_class = batch
    assert alone < 30
    assert one_class < 50
    assert alone < of_eight < together
    for fixed in (running, pooled):
        assert fixed == 4 * [fixed[0]]
        assert fixed[0] > 80


def test_questions_biases(questions_run):
    start = len(BATCH_SIZES) + 3
    weight_grad, bias_grad, logit, logit_change, loss, loss_change = (
        float(row[1]) for row in table_rows(questions_run)[start:]
    )
    assert min(weight_grad, logit, loss) > 1e-3
    assert bias_grad < 1e-13 * weight_grad
    assert logit_change < 1e-12 * logit
    assert loss_change < 1e-12 * loss


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--epochs", "0"], "must be a whole number from 1 to 2^31 - 1, not '0'"),
        (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1, not -1"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_questions_bad_flags(examples, flags, allowed, capsys):
    with exits(2):
        examples.questions.main(flags)
    assert allowed in unwrapped(capsys.readouterr().err)


@pytest.fixture(scope="module", params=LOOPS)
def loop_run(request, examples, tmp_path_factory):
    """One run of a training loop: what it printed and saved, and what each test was of."""
    folder = tmp_path_factory.mktemp("run") / "new" / "folder"
    module, evaluated = getattr(examples, request.param), []
    eval_step = module.eval_step

    def recorded(state, *batch):
        evaluated.append(jax.tree.map(np.array, jax.tree.leaves(state)))
        return eval_step(state, *batch)

    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(module, "eval_step", recorded)
        module.main(["--epochs", "2", "--checkpoint-dir", str(folder)])
    return SimpleNamespace(
        main=module.main, folder=folder, stdout=stdout.getvalue(), evaluated=evaluated
    )


def test_loop_accuracies(loop_run):
    *epochs, restored = loop_run.stdout.splitlines()
    lines = [re.fullmatch(r"epoch \d: loss (.*), test accuracy (.*) %", line) for line in epochs]
    (first_loss, _), (last_loss, accuracy) = (line.groups() for line in lines)
    assert float(first_loss) > 4 * float(last_loss)
    assert float(accuracy) > 90
    assert restored == f"from {loop_run.folder / 'digits'}: test accuracy {accuracy} %"


def test_loop_restores_what_it_saved(loop_run):
    first, trained, restored = loop_run.evaluated
    assert len(trained) >= 17  # 3 kernels, 12 arrays of batch norm, a kernel and a bias
    for before, saved, after in zip(first, trained, restored, strict=True):
        assert saved.dtype == after.dtype
        np.testing.assert_array_equal(after, saved)
        assert (before != saved).any()


def saved_step(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(folder / "digits")
    return saved["optimizer"]["step"]["value"] if "optimizer" in saved else saved["step"]


def test_loop_checkpoint_is_whole(loop_run):
    assert [path.name for path in loop_run.folder.iterdir()] == ["digits"]
    assert saved_step(loop_run.folder) == 2 * (1347 // 64)


def test_loop_replaces_its_checkpoint_alone(loop_run, tmp_path):
    folder = shutil.copytree(loop_run.folder, tmp_path / "copy")
    (folder / "notes").write_text("kept")
    loop_run.main(["--epochs", "1", "--checkpoint-dir", str(folder)])
    assert saved_step(folder) == 1347 // 64
    assert sorted(path.name for path in folder.iterdir()) == ["digits", "notes"]
    assert (folder / "notes").read_text() == "kept"


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (["--epochs", "0"], "--epochs must be 1 or more, not 0"),
        (["--epochs", "-2"], "--epochs must be 1 or more, not -2"),
        (["--epochs", "two"], "invalid int value: 'two'"),
    ],
)
def test_loop_bad_flags(examples, name, flags, allowed, tmp_path, monkeypatch, capsys):
    module = getattr(examples, name)
    monkeypatch.setattr(module, "load_digits", None)  # calling it would be a TypeError
    folder = tmp_path / "out"
    with exits(2):
        module.main([*flags, "--checkpoint-dir", str(folder)])
    assert allowed in unwrapped(capsys.readouterr().err)
    assert not folder.exists()


@pytest.mark.parametrize("name", LOOPS)
def test_loop_leaves_what_is_no_checkpoint(examples, name, tmp_path, monkeypatch, capsys):
    module = getattr(examples, name)
    monkeypatch.setattr(module, "load_digits", None)
    mine = tmp_path / "digits" / "mine.csv"
    mine.parent.mkdir()
    mine.write_text("data")
    with pytest.raises(SystemExit):
        module.main(["--checkpoint-dir", str(tmp_path)])
    assert "is there and no checkpoint" in unwrapped(capsys.readouterr().err)
    assert mine.read_text() == "data"


@pytest.mark.parametrize("name", LOOPS)
def test_loop_folder_that_cannot_be(examples, name, tmp_path, monkeypatch, capsys):
    module = getattr(examples, name)
    monkeypatch.setattr(module, "load_digits", None)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for folder in (taken, taken / "below"):
        with exits(2):
            module.main(["--checkpoint-dir", str(folder)])
        error = unwrapped(capsys.readouterr().err)
        assert "--checkpoint-dir must be a folder that can be created and written" in error
    assert list(tmp_path.iterdir()) == [taken]
    assert taken.read_text() == "a file"


@pytest.fixture(scope="module")
def serve_run(examples, tmp_path_factory):
    """One run of serve.py: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("serve") / "new"
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(examples.serve.importlib.util, "find_spec", lambda name: None)
        patch.setenv("COLUMNS", "120")
        examples.serve.main(["--repeats", "3", "--output", str(folder)])
    return SimpleNamespace(folder=folder, stdout=stdout.getvalue())


STAGES = ["trained", "calibrated", "folded", "exported", "exported, folded"]


def test_serve_stages(serve_run):
    found = json.loads((serve_run.folder / "serve.json").read_text())["stages"]
    assert list(found) == STAGES
    trained, *later = (found[name]["accuracy"] for name in STAGES)
    assert trained < 92 < 94 < min(later)
    assert max(later) - min(later) < 0.3
    assert [found[name]["apart"] < 1e-5 for name in STAGES[1:]] == [True] * 4
    rows = {name: cells for name, *cells in table_rows(serve_run.stdout)}
    for name in STAGES:
        assert rows[name][0] == f"{found[name]['accuracy']:.1f}"
        assert (rows[name][-1] != "") == name.startswith("exported")
        assert min(found[name]["latencies"]) > 0
    assert serve_run.stdout.startswith("BatchNorm_0  folded into Conv_0\n")
    assert "no SavedModel (pip install 'jbn[tensorflow]')" in serve_run.stdout


def test_serve_files(serve_run):
    """They hold what a model with and without batch norm computes, for any batch size."""
    names = sorted(path.name for path in serve_run.folder.iterdir())
    assert names == ["calibrated.jax", "folded.jax", "serve.json"]
    images = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    calibrated, folded = (
        jax.export.deserialize(bytearray((serve_run.folder / name).read_bytes()))
        for name in names[:2]
    )
    assert np.ptp(calibrated.call(images)) > 1
    np.testing.assert_allclose(folded.call(images), calibrated.call(images), atol=1e-4)
    assert "rsqrt" in calibrated.mlir_module()
    assert "rsqrt" not in folded.mlir_module()


def test_serve_tells_stages_that_differ(examples):
    stages = {"calibrated": {"logits": np.ones((2, 3))}, "folded": {"logits": np.ones((2, 3))}}
    assert examples.serve.check(stages) == {"calibrated": 0, "folded": 0}
    stages["folded"]["logits"][1, 2] = 1.001
    with pytest.raises(AssertionError, match="folded"):
        examples.serve.check(stages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "must be a whole number, 1 or more, not '0'"),
        (["--momentum", "1.5"], "--momentum must be from 0 to 1, not 1.5"),
        (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1, not -1"),
        (["--output", "{file}"], "--output must be a folder that can be created and written"),
    ],
)
def test_serve_bad_flags(examples, flags, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    with exits(2):
        examples.serve.parse_args(flags)
    assert message in unwrapped(capsys.readouterr().err)
