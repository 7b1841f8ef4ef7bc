"""From trained to served: calibrate, fold, export, and load where there is only JAX.

Trains the network of `flax_linen.py` on digits for a moment, with a momentum that is too slow for
so few steps: its running statistics are not yet those of the data. Then, each stage compared with
the one before:

- calibrated: the running statistics of all training images, computed anew;
- folded: batch norm folded into the convolutions before it;
- exported: a file for CPU, CUDA and TPU, run by a process that has neither the code of the model
  nor Flax nor jbn; and, where TensorFlow is installed, a SavedModel that TensorFlow itself runs.

    pip install -e ".[examples,export]" && python examples/serve.py
"""

import argparse
import functools
import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import HelpFormatter, check_folder
from flax_linen import BATCH_SIZE, OPTIMIZER, TEST_SIZE, ConvNet, TrainState, train_step
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tqdm import trange

import jbn.export
import jbn.linen

REPEATS = 200
ALLOWED = 1e-4  # between the logits of stages that compute the same in float32


def median_time(predict: Callable[[Any], Any], x: Any, repeats: int) -> float:
    """Seconds of a call, from an array of NumPy to one."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.asarray(predict(x))
        times.append(time.perf_counter() - start)
    return float(np.median(times[len(times) // 10 :]))  # without the first, which are slower


# A program of its own: it imports nothing of this project.
SERVER = f"""
from __future__ import annotations
import json, sys, time
import numpy as np

{inspect.getsource(median_time)}

kind, path, images, logits, repeats = sys.argv[1:]
start = time.perf_counter()
if kind == "jax":
    import jax, jax.export
    with open(path, "rb") as file:
        predict = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
else:
    import tensorflow as tf
    predict = tf.saved_model.load(path)
images = np.load(images)
np.save(logits, np.asarray(predict(images)))
ready = time.perf_counter() - start
latencies = [median_time(predict, x, int(repeats)) for x in (images[:1], images)]
foreign = {{"flax", "jbn", "optax"}} & set(sys.modules)
assert not foreign, foreign
print(json.dumps({{"ready": ready, "latencies": latencies}}))
"""


def load() -> tuple[Any, Any, Any, Any]:
    """Images [N, 8, 8, 1] and labels [N]: those to train on, then those to test on."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [TEST_SIZE])
    return images[train], labels[train], images[test], labels[test]


def train(model: ConvNet, images: Any, labels: Any, steps: int, seed: int) -> Mapping[str, Any]:
    """The variables after some steps."""
    variables = model.init(jax.random.key(seed), images[:1], train=False)
    state = TrainState.create(apply_fn=model.apply, tx=OPTIMIZER, **variables)
    rng = np.random.default_rng(seed)
    for _ in trange(steps, desc="train", unit="step"):
        batch = rng.choice(len(images), BATCH_SIZE, replace=False)
        state, _ = train_step(state, images[batch], labels[batch])
    return {"params": state.params, "batch_stats": state.batch_stats}


def calibrate(model: ConvNet, variables: Mapping[str, Any], images: Any) -> Any:
    """The variables with the statistics of all images."""
    images = np.random.default_rng(0).permutation(images)
    batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
    return jbn.linen.calibrate(functools.partial(model.apply, train=True), variables, batches)


def stage(predict: Callable[[Any], jax.Array], images: Any, repeats: int) -> dict[str, Any]:
    """What a stage of this process answers, and how fast."""
    logits = np.asarray(predict(images))
    return {
        "logits": logits,
        "latencies": [median_time(predict, x, repeats) for x in (images[:1], images)],
    }


def served(kind: str, path: Path, images: Any, repeats: int) -> dict[str, Any]:
    """The same of a file, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        given, taken = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(given, images)
        # -I: no module is found beside the script or by PYTHONPATH.
        command = [sys.executable, "-I", "-c", SERVER, kind]
        arguments = [str(argument) for argument in (path.absolute(), given, taken, repeats)]
        process = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, check=True)
        return json.loads(process.stdout.splitlines()[-1]) | {"logits": np.load(taken)}


def stages(model: ConvNet, args: argparse.Namespace, images: Any) -> dict[str, dict[str, Any]]:
    """Every stage, from trained to served, on the images to test on."""
    train_images, train_labels, *_ = load()
    variables = train(model, train_images, train_labels, args.steps, args.seed)
    calibrated = calibrate(model, variables, train_images)
    folded = jbn.linen.fold(model, calibrated, images, train=False)
    print(folded.report)

    def bound(apply_fn: Callable[..., Any], variables: Any) -> Callable[[Any], Any]:
        return jax.jit(lambda x: apply_fn(variables, x, train=False))

    found = {}
    functions = {
        "trained": bound(model.apply, variables),
        "calibrated": bound(model.apply, calibrated),
        "folded": bound(folded.apply_fn, folded.variables),
    }
    for name, predict in functions.items():
        found[name] = stage(predict, images, args.repeats)
    for name, source in (("exported", "calibrated"), ("exported, folded", "folded")):
        path = args.output / f"{source}.jax"
        jbn.export.save(path, functions[source], images)
        found[name] = served("jax", path, images, args.repeats) | {"bytes": path.stat().st_size}
    if importlib.util.find_spec("tensorflow"):
        with tempfile.TemporaryDirectory(dir=args.output) as folder:
            path = Path(folder, "saved_model")
            jbn.export.save_tensorflow(path, functions["folded"], images)
            found["SavedModel, folded"] = served("tensorflow", path, images, args.repeats)
    else:
        print("TensorFlow is not installed: no SavedModel (pip install 'jbn[tensorflow]')")
    return found


def check(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How far the logits of each stage after calibration are from those of it."""
    expected = found["calibrated"]["logits"]
    largest = np.abs(expected).max()
    apart = {
        name: float(np.abs(values["logits"] - expected).max() / largest)
        for name, values in found.items()
        if name != "trained"
    }
    assert max(apart.values()) < ALLOWED, apart
    return apart


def report(rows: Mapping[str, Mapping[str, Any]], images: int) -> Table:
    """The stages as a table."""
    table = Table(
        title="From trained to served",
        caption="Times: median of a call, from NumPy to NumPy, on this machine. Ready: from the "
        "start of the import of the framework to the first answer, in a fresh process. Apart: "
        "the largest difference of a logit from the calibrated model's, over the largest logit.",
    )
    table.add_column("stage")
    for column in ("test accuracy, %", "apart", "1 image, us", f"{images} images, ms", "ready, s"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        one, all_images = row["latencies"]
        table.add_row(
            name,
            f"{row['accuracy']:.1f}",
            f"{row['apart']:.1e}" if "apart" in row else "",
            f"{one * 1e6:.0f}",
            f"{all_images * 1e3:.2f}",
            f"{row['ready']:.2f}" if "ready" in row else "",
        )
    return table


def positive_int(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; the output folder is there and can be written afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--steps", type=positive_int, default=42, help="steps of 64 images to train for")
    add("--momentum", type=float, default=0.99, help="of the running statistics, from 0 to 1")
    add("--seed", type=int, default=0, help="of the network and the order of the images")
    add("--repeats", type=positive_int, default=REPEATS, help="calls to time")
    add("--output", type=Path, default=Path("results/serve"), help="folder of files and results")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, not {args.seed}")
    if not 0 <= args.momentum <= 1:
        parser.error(f"--momentum must be from 0 to 1, not {args.momentum}")
    check_folder(parser, "--output", args.output)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Goes through all stages and prints the table."""
    args = parse_args(argv)
    *_, images, labels = load()
    found = stages(ConvNet(args.momentum), args, images)
    apart = check(found)
    rows = {}
    for name, values in found.items():
        accuracy = 100 * float((values.pop("logits").argmax(-1) == labels).mean())
        rows[name] = {"accuracy": accuracy, **values}
        if name in apart:
            rows[name]["apart"] = apart[name]
    Console().print(report(rows, len(images)))
    path = args.output / "serve.json"
    versions = {"jax": jax.__version__, "jbn": jbn.__version__}
    path.write_text(json.dumps({"versions": versions, "stages": rows}, indent=2) + "\n")
    print(f"Wrote {path}, calibrated.jax and folded.jax")


if __name__ == "__main__":
    main()
