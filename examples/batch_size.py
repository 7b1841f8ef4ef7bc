"""At which batch sizes batch norm works, and what its running statistics cost.

A dense and a residual network learn Fashion-MNIST with batch norm, in batches of 2 to 512 images
and without batch norm for comparison. Each trained network is tested four ways: normalizing by its
running statistics, at two momenta; by exact statistics (`jbn.linen.calibrate`); and by those of
each batch of test images, of the size that it was trained with.

All batch sizes see the same images equally often, so small ones take more steps. The learning rate
is proportional to the batch size (Goyal et al. 2017, arXiv:1706.02677), up to a limit.

    pip install -e ".[examples]"
    python examples/batch_size.py --data-dir data

Interrupted, the same command goes on after the last network that was trained to the end.
"""

import argparse
import functools
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import optax
from common import (
    CLASSES,
    Dataset,
    HelpFormatter,
    SmallResNet,
    accuracy,
    add_data_flags,
    dataset_of,
    ending_in_one_line,
    init,
    on_device,
    output_folder,
    positive_int,
    read_results,
    training,
    write_whole,
)
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jbn.linen

# At batch size 32, and the largest, with and without batch norm: of steps of about 3, what was best
# on 5000 images held out and two or three other seeds.
LEARNING_RATES = {
    ("dense", False): (0.03, 0.1),
    ("dense", True): (0.05, 0.4),
    ("residual", False): (0.01, 0.03),
    ("residual", True): (0.05, 0.4),
}
MOMENTA = (0.9, 0.99)  # torch's default, and Flax's and Keras's, as weights of the old value
RUNNING = {momentum: f"running, {momentum}" for momentum in MOMENTA}
CALIBRATION_IMAGES = 8192
RUN = {  # of the results of `train`
    "network": str,
    "batch_norm": bool,
    "batch_size": int,
    "seed": int,
    "learning_rate": float,
    "steps": int,
    "diverged": bool,
    "accuracy": ({"plain": float}, dict.fromkeys((*RUNNING.values(), "exact", "batch"), float)),
}


class DenseNet(nn.Module):
    """Three hidden layers of 100 ReLUs, and a dense layer.

    Attributes:
        batch_norm: whether batch normalization comes before each ReLU, and not a bias.
        momentum: of batch norm's running statistics.
    """

    batch_norm: bool
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, H, W, C]."""
        x = images.reshape(len(images), -1)
        for _ in range(3):
            x = nn.Dense(
                100, use_bias=not self.batch_norm, kernel_init=nn.initializers.he_normal()
            )(x)
            if self.batch_norm:
                x = jbn.linen.BatchNorm(not train, momentum=self.momentum, activation=nn.relu)(x)
            else:
                x = nn.relu(x)
        return nn.Dense(CLASSES)(x)


NETWORKS = {"dense": DenseNet, "residual": SmallResNet}


@jax.jit
def update_averages(averages: dict[float, Any], batch_stats: Any) -> dict[float, Any]:
    """Running statistics by their momentum, after another batch."""
    return {
        momentum: jax.tree.map(
            lambda old, new, momentum=momentum: momentum * old + (1 - momentum) * new,
            average,
            batch_stats,
        )
        for momentum, average in averages.items()
    }


def batches(order: np.ndarray, size: int) -> np.ndarray:
    """Indices [N] cut into batches [N // size, size] without the rest, or one [1, N] of too few."""
    count = len(order) // size
    return order[: count * size].reshape(count, size) if count else order[None]


def evaluate(
    net: nn.Module, data: Dataset, variables: Any, averages: dict[float, Any], size: int, seed: int
) -> dict[str, float]:
    """Test accuracy with batch norm, by the statistics that normalize.

    Args:
        net: the network.
        data: as of `on_device`.
        variables: of the trained network.
        averages: its running statistics by their momentum.
        size: of a batch.
        seed: decides which images are together in a batch.
    """
    rng = np.random.default_rng(seed)
    images, labels = data.test_images, data.test_labels
    found = {
        RUNNING[momentum]: accuracy(net, {**variables, "batch_stats": average}, images, labels)
        for momentum, average in averages.items()
    }
    order = rng.permutation(len(data.train_labels))[:CALIBRATION_IMAGES]
    calibrated = jbn.linen.calibrate(
        functools.partial(net.apply, train=True),
        variables,
        (data.train_images[batch] for batch in batches(order, size)),
        progress=False,
    )
    found["exact"] = accuracy(net, calibrated, images, labels)
    found["batch"] = np.mean(
        [
            accuracy(net, variables, images[batch], labels[batch], train=True)
            for batch in batches(rng.permutation(len(labels)), size)
        ]
    )
    return {name: float(value) for name, value in found.items()}


def train(
    network: str,
    batch_norm: bool,
    size: int,
    seed: int,
    data: Dataset,
    epochs: int,
    progress: tqdm,
) -> dict[str, Any]:
    """Trains a network and tests it.

    Returns:
        What was trained, whether it diverged, and the test accuracies by name.
    """
    base, limit = LEARNING_RATES[network, batch_norm]
    rate = min(base * size / 32, limit)
    steps = epochs * (len(data.train_labels) // size)
    # With momentum 0 the running statistics are those of the last batch, to be averaged here.
    net = NETWORKS[network](batch_norm, momentum=0.0)
    variables, _ = init(net, seed, data.train_images)
    averages = dict.fromkeys(MOMENTA, variables["batch_stats"]) if batch_norm else {}
    loss: Any = None
    for variables, loss in training(  # noqa: B007
        net, data, seed=seed, learning_rate=rate, batch_size=size, steps=steps
    ):
        if batch_norm:
            averages = update_averages(averages, variables["batch_stats"])
        progress.update(size)
    run = {"network": network, "batch_norm": batch_norm, "batch_size": size, "seed": seed}
    # The loss may look fine: XLA's mean over ReLUs makes 0 of NaN on a CPU.
    diverged = not math.isfinite(loss + optax.tree.norm(variables["params"]))
    run |= {"learning_rate": rate, "steps": steps, "diverged": diverged}
    if batch_norm and not diverged:
        return run | {"accuracy": evaluate(net, data, variables, averages, size, seed)}
    found = float(accuracy(net, variables, data.test_images, data.test_labels))
    names = (*RUNNING.values(), "exact", "batch") if batch_norm else ("plain",)
    return run | {"accuracy": dict.fromkeys(names, found)}


def accuracies(results: Mapping[str, Any], network: str, name: str) -> np.ndarray:
    """Test accuracies in percent [batch sizes, seeds].

    Args:
        results: of the run.
        network: a key of `NETWORKS`.
        name: "plain", one of `RUNNING`, "exact" or "batch".
    """
    found = [
        run["accuracy"][name]
        for run in results["runs"]
        if run["network"] == network and name in run["accuracy"]
    ]
    return 100 * np.array(found).reshape(-1, results["settings"]["seeds"])


def mean_text(values: np.ndarray) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{deviation}"


def results_table(results: Mapping[str, Any], network: str) -> Table:
    """One row for each batch size."""
    settings = results["settings"]
    sizes, seeds = settings["batch_sizes"], settings["seeds"]
    table = Table(
        title=f"{settings['dataset']}, {network} network: test accuracy in % "
        f"(epochs: {settings['epochs']}, seeds: {seeds})",
        caption="Mean ± standard deviation over the seeds; with batch norm, by the statistics that "
        "normalize. Diverged: networks with a parameter that is not finite.",
    )
    for title in ("batch size", "plain", *RUNNING.values(), "exact", "batch", "diverged"):
        table.add_column(title, justify="right")
    columns = [
        accuracies(results, network, name)
        for name in ("plain", *RUNNING.values(), "exact", "batch")
    ]
    for i, size in enumerate(sizes):
        diverged = sum(
            run["diverged"]
            for run in results["runs"]
            if (run["network"], run["batch_size"]) == (network, size)
        )
        table.add_row(f"{size}", *(mean_text(column[i]) for column in columns), f"{diverged}")
    return table


def findings(results: Mapping[str, Any], network: str) -> list[str]:
    """Where batch norm stops working, and what the running statistics have to do with it."""
    sizes = results["settings"]["batch_sizes"]
    exact, plain = (accuracies(results, network, name).mean(-1) for name in ("exact", "plain"))
    means = zip(sizes, exact, plain, strict=True)
    better = [f"{size}" for size, with_it, without in means if without > with_it]
    sentences = [
        f"{network}: without batch norm it does better at batch sizes {', '.join(better)}."
        if better
        else f"{network}: with batch norm it does better at all batch sizes."
    ]
    best = int(exact.argmax())
    for i in sorted({0, len(sizes) - 1} - {best}):
        changes = " and ".join(
            f"{round(accuracies(results, network, name)[i].mean() - exact[i], 1) + 0:+.1f} at "
            f"momentum {momentum}"
            for momentum, name in RUNNING.items()
        )
        sentences.append(
            f"{network}: batch size {sizes[i]} is at {exact[i]:.1f} % by exact statistics, "
            f"{exact[best] - exact[i]:.1f} points below batch size {sizes[best]}; running "
            f"statistics change that by {changes}."
        )
    return sentences


def figure(results: Mapping[str, Any]) -> bytes:
    """Accuracy against batch size, and what is lost to exact statistics, as a PNG."""
    settings = results["settings"]
    sizes = settings["batch_sizes"]
    fig = matplotlib.figure.Figure(figsize=(12, 8), layout="constrained")
    top, bottom = fig.subplots(2, len(NETWORKS), squeeze=False, sharex=True, sharey="row")
    styles = {
        "plain": ("tab:red", "s", "no batch norm"),
        "exact": ("black", "o", "batch norm, exact statistics"),
        RUNNING[0.9]: ("tab:blue", "v", "batch norm, running statistics, momentum 0.9"),
        RUNNING[0.99]: ("tab:cyan", "^", "batch norm, running statistics, momentum 0.99"),
        "batch": ("tab:green", "D", "batch norm, statistics of the test batch"),
    }
    for column, network in enumerate(NETWORKS):
        exact = accuracies(results, network, "exact")
        for name, (color, marker, label) in styles.items():
            found = accuracies(results, network, name)
            lines = [(top[column], found)]
            if name not in ("plain", "exact"):
                lines.append((bottom[column], found - exact))
            for axes, values in lines:
                mean, low, high = (f(values, axis=-1) for f in (np.mean, np.min, np.max))
                axes.errorbar(
                    sizes,
                    mean,
                    (mean - low, high - mean),
                    color=color,
                    marker=marker,
                    markersize=4,
                    capsize=3,
                    lw=1.2,
                    label=label,
                )
        top[column].set(title=f"{network} network", ylabel="test accuracy, %")
        bottom[column].axhline(0, color="black", lw=1, label="exact statistics")
        bottom[column].set(
            ylabel="accuracy against exact statistics, points", xlabel="batch size, images"
        )
        bottom[column].set_yscale("symlog", linthresh=1)
        bottom[column].set_xscale("log", base=2)
        bottom[column].set_xticks(sizes, [f"{size}" for size in sizes])
        bottom[column].yaxis.set_major_formatter("{x:g}")
    for row in (top, bottom):
        row[0].legend(fontsize="small")
        for axes in row:
            axes.grid(alpha=0.3)
    fig.suptitle(
        f"{settings['dataset']} in batches of different sizes (epochs: {settings['epochs']}): mean "
        f"and range of {settings['seeds']} seeds"
    )
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=130)
    return png.getvalue()


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add_data_flags(parser, default="fashion-mnist")
    add("--epochs", type=positive_int, default=1, help="passes over the images to train on")
    add(
        "--batch-sizes",
        type=positive_int,
        nargs="+",
        default=[2**i for i in range(1, 10)],
        metavar="IMAGES",
        help="images in a step",
    )
    add("--seeds", type=positive_int, default=3, help="how many times each network is trained")
    folder = Path("results/batch_size")
    add("--output", type=Path, default=folder, metavar="FOLDER", help="where the results go")
    return parser


@ending_in_one_line("after the last network that was trained")
def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is not trained yet, and shows the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    dataset = dataset_of(args, parser)
    sizes, limit = sorted(set(args.batch_sizes)), len(dataset.train_labels)
    for size in sizes:
        if not 2 <= size <= limit:
            parser.error(
                f"--batch-sizes must be from 2, as one image has no variance, to {limit}, the "
                f"images to train on, not {size}"
            )
    settings = {"dataset": dataset.name, "epochs": args.epochs, "batch_sizes": sizes}
    path = output_folder(parser, args, "batch_size.json", "batch_size.png") / "batch_size.json"
    results = read_results(parser, path, settings | {"seeds": args.seeds}, {"runs": [RUN]})
    runs = results.setdefault("runs", [])
    arms = list(itertools.product(NETWORKS, (False, True), sizes, range(args.seeds)))
    data = on_device(dataset)

    def images(arms: Sequence[tuple[str, bool, int, int]]) -> int:
        return sum(args.epochs * (limit // size * size) for _, _, size, _ in arms)

    with tqdm(
        total=images(arms), initial=images(arms[: len(runs)]), unit="image", unit_scale=True
    ) as progress:
        for network, batch_norm, size, seed in arms[len(runs) :]:
            progress.set_description(f"{network}, {'BN' if batch_norm else 'plain'}, {size}")
            runs.append(train(network, batch_norm, size, seed, data, args.epochs, progress))
            write_whole(path, json.dumps(results, indent=1).encode())

    console = Console(highlight=False)
    for network in NETWORKS:
        console.print(results_table(results, network))
    for network in NETWORKS:
        for sentence in findings(results, network):
            console.print(sentence)
    write_whole(path.with_suffix(".png"), figure(results))
    console.print(f"Wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
