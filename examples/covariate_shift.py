"""How the inputs of sigmoids move during training, with and without batch norm, on MNIST.

The experiment of Figure 1 of Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift" (2015): binary images of digits, three hidden layers
of 100 sigmoids, small Gaussian weights, plain SGD on batches of 60. The paper names no learning
rate: several are tried, and both networks are shown at the one where that without does best.

    pip install -e ".[examples]"
    python examples/covariate_shift.py

Interrupted, the same command goes on from the last checkpoint, to the same numbers.
"""

import argparse
import functools
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from common import (
    CLASSES,
    Dataset,
    HelpFormatter,
    add_data_flags,
    checkpoints,
    dataset_of,
    ending_in_one_line,
    loss_and_grads,
    output_folder,
    positive_float,
    positive_int,
    restore,
    save,
    spread,
    write_whole,
)
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from jbn.linen import BatchNorm

NETWORKS = {"plain": False, "batch norm": True}
LAYERS, UNITS, BATCH_SIZE = 3, 100, 60
PERCENTILES = (15, 50, 85)
PROBE_BATCHES = 20  # of test images, on which the sigmoids' inputs are measured
SAVE_EVERY = 10  # checks between checkpoints
TARGET = 0.95  # the test accuracy whose first check is reported
FAILED = 0.5  # a seed that ends below this test accuracy has failed; guessing gives 0.1


class SigmoidNet(nn.Module):
    """Three hidden layers of 100 sigmoids, and a dense layer.

    Attributes:
        batch_norm: whether batch normalization comes before each sigmoid.
        init_std: standard deviation of the initial weights, which are Gaussian.
    """

    batch_norm: bool
    init_std: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, H, W, C]; sows the sigmoids' `inputs` [N, 100]."""
        kernel_init = nn.initializers.normal(self.init_std)
        x = images.reshape(len(images), -1).astype(float)
        for _ in range(LAYERS):
            # Batch norm subtracts the mean, and with it any bias before: its own takes the place.
            x = nn.Dense(UNITS, use_bias=not self.batch_norm, kernel_init=kernel_init)(x)
            if self.batch_norm:
                x = BatchNorm(use_running_average=not train)(x)
            self.sow("intermediates", "inputs", x)
            x = nn.sigmoid(x)
        return nn.Dense(CLASSES, kernel_init=kernel_init)(x)


class Measured(NamedTuple):
    """What is measured at a check; in the history each has more axes in front.

    Attributes:
        accuracy: [], on the test images.
        mean: [layers, units], of the inputs of each sigmoid.
        std: as `mean`.
        percentiles: [units, 3], of the inputs of each sigmoid of the last hidden layer.
    """

    accuracy: Any
    mean: Any
    std: Any
    percentiles: Any


class History(NamedTuple):
    """All checks of all runs, NaN where there was none yet.

    Attributes:
        loss: [networks, rates, checks, seeds], mean of the steps before the check.
        measured: [networks, rates, 1 + checks, seeds, ...], from before the first step.
    """

    loss: np.ndarray
    measured: Measured


@functools.partial(jax.jit, static_argnames="net")
def init(net: SigmoidNet, keys: jax.Array, images: jax.Array) -> Any:
    """The variables of untrained networks, one for each key."""
    # Unlike `vmap`, `map` compiles the random numbers of one seed only.
    return jax.lax.map(lambda key: net.init(key, images[:1], train=False), keys)


@functools.partial(jax.jit, static_argnames=("net", "steps"))
def train_steps(
    net: SigmoidNet,
    steps: int,
    variables: Any,
    keys: jax.Array,
    rate: jax.Array | float,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[Any, jax.Array]:
    """Trains the networks of all seeds.

    Args:
        net: the network.
        steps: how many.
        variables: of the networks before; all leaves have seeds in front.
        keys: [seeds], decide which images each step takes, each as likely as any other.
        rate: of SGD; traced, so that another one does not compile again.
        images: [N, H, W, C] to train on.
        labels: [N].

    Returns:
        The variables after, and the mean loss [seeds].
    """
    optimizer = optax.sgd(rate)

    def step(variables: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        loss, batch_stats, grads = loss_and_grads(net, variables, images[batch], labels[batch])
        params = variables["params"]
        updates, _ = optimizer.update(grads, optimizer.init(params))  # plain SGD has no state
        return {**batch_stats, "params": optax.apply_updates(params, updates)}, loss

    def train_one(variables: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        batches = jax.random.randint(key, (steps, BATCH_SIZE), 0, len(labels))
        variables, losses = jax.lax.scan(step, variables, batches)
        return variables, losses.mean()

    return jax.vmap(train_one)(variables, keys)


@functools.partial(jax.jit, static_argnames="net")
def measure(net: SigmoidNet, variables: Any, images: jax.Array, labels: jax.Array) -> Measured:
    """Measures the networks of all seeds on the images to test on.

    The accuracy is that of inference. The sigmoids' inputs are those of training, where batch norm
    normalizes each batch by its own statistics, on the same images at every check.
    """
    batches = min(PROBE_BATCHES, len(labels) // BATCH_SIZE)
    probe = images[: batches * BATCH_SIZE].reshape(batches, BATCH_SIZE, *images.shape[1:])

    def measure_one(variables: Any) -> Measured:
        logits: Any = net.apply(variables, images, train=False)
        _, updated = jax.vmap(
            lambda batch: net.apply(
                variables, batch, train=True, mutable=["batch_stats", "intermediates"]
            )
        )(probe)
        sown: Any = updated["intermediates"]["inputs"]
        inputs = jnp.stack(sown).reshape(LAYERS, -1, UNITS)
        return Measured(
            accuracy=(logits.argmax(axis=-1) == labels).mean(),
            mean=inputs.mean(axis=1),
            std=inputs.std(axis=1),
            percentiles=jnp.percentile(inputs[-1], np.array(PERCENTILES), axis=0).T,
        )

    return jax.vmap(measure_one)(variables)


def moves(measured: Measured) -> tuple[np.ndarray, np.ndarray]:
    """How far the inputs of a layer's sigmoids moved from each check to the next.

    Args:
        measured: [..., checks, seeds, layers, units] in `mean` and `std`.

    Returns:
        Two arrays [..., checks - 1, seeds, layers], each the median over the units of a layer: of
        the distance of the means over the root mean square of the two standard deviations; and of
        the distance of the natural logarithms of the standard deviations.
    """
    mean, std = np.asarray(measured.mean), np.asarray(measured.std)
    before, after = std[..., :-1, :, :, :], std[..., 1:, :, :, :]
    with np.errstate(all="ignore"):  # networks that diverged
        of_mean = np.abs(np.diff(mean, axis=-4)) / np.sqrt((before**2 + after**2) / 2)
        of_std = np.abs(np.log(after / before))
    return np.median(of_mean, axis=-1), np.median(of_std, axis=-1)


def typical_unit(percentiles: np.ndarray) -> int:
    """The unit whose median travels neither much nor little, of those of a layer.

    Args:
        percentiles: [checks, units, 3].
    """
    travelled = np.abs(np.diff(percentiles[..., 1], axis=0)).sum(axis=0)
    return int(travelled.argsort()[len(travelled) // 2])


def empty_history(rates: int, checks: int, seeds: int) -> History:
    """A history of nothing yet."""

    def nans(*shape: int) -> np.ndarray:
        return np.full((len(NETWORKS), rates, *shape), np.nan, np.float32)

    before = (1 + checks, seeds)
    return History(
        loss=nans(checks, seeds),
        measured=Measured(
            accuracy=nans(*before),
            mean=nans(*before, LAYERS, UNITS),
            std=nans(*before, LAYERS, UNITS),
            percentiles=nans(*before, UNITS, len(PERCENTILES)),
        ),
    )


def record(history: History, place: tuple[int, int, int], measured: Measured) -> None:
    """Writes what was measured to its place, [networks, rates, 1 + checks]."""
    for values, value in zip(history.measured, measured, strict=True):
        values[place] = value


def settings_of(args: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """What decides the numbers."""
    return {
        "dataset": dataset.name,
        "steps": args.steps,
        "check_every": args.check_every,
        "batch_size": BATCH_SIZE,
        "init_std": args.init_std,
        "learning_rates": sorted(set(args.learning_rates)),
        "seeds": args.seeds,
    }


def experiment(
    parser: argparse.ArgumentParser, settings: dict[str, Any], dataset: Dataset, folder: Path
) -> History:
    """Trains each network at each learning rate, going on from the last checkpoint.

    Args:
        parser: tells of a checkpoint that does not fit.
        settings: those of `settings_of`.
        dataset: what to train and test on.
        folder: of the checkpoints.
    """
    # Black and white, as in the paper.
    train_images, test_images = (
        jnp.asarray(images > 127) for images in (dataset.train_images, dataset.test_images)
    )
    train_labels, test_labels = map(jnp.asarray, (dataset.train_labels, dataset.test_labels))
    rates, check_every = settings["learning_rates"], settings["check_every"]
    checks = settings["steps"] // check_every
    nets = {name: SigmoidNet(norm, settings["init_std"]) for name, norm in NETWORKS.items()}

    def keys(number: int) -> jax.Array:
        """One for each seed, the same in every run: 0 for the weights, then of each check."""
        return jax.random.split(jax.random.fold_in(jax.random.key(0), number), settings["seeds"])

    untrained = {name: init(net, keys(0), train_images) for name, net in nets.items()}
    # Of each network the variables of its last run.
    state = {
        "variables": dict(untrained),
        "history": empty_history(len(rates), checks, settings["seeds"]),
    }
    manager = checkpoints(folder)
    state, _, done = restore(parser, manager, state, settings)
    variables, history = state["variables"], jax.tree.map(np.array, state["history"])
    runs = list(itertools.product(enumerate(nets.items()), enumerate(rates)))
    left = range(done, len(runs) * checks)
    if done:
        print(f"Restored {done} of {left.stop} checks from {folder}")

    progress = tqdm(left, initial=done, total=left.stop, unit="check", disable=not left)
    for number in progress:
        run, check = divmod(number, checks)
        (i, (name, net)), (j, rate) = runs[run]
        progress.set_description(f"{name}, learning rate {rate:g}")
        if check == 0:
            variables[name] = untrained[name]
            record(history, (i, j, 0), measure(net, variables[name], test_images, test_labels))
        variables[name], history.loss[i, j, check] = train_steps(
            net, check_every, variables[name], keys(1 + check), rate, train_images, train_labels
        )
        measured = measure(net, variables[name], test_images, test_labels)
        record(history, (i, j, 1 + check), measured)
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == left.stop:
            save(manager, number + 1, {"variables": variables, "history": history}, settings)
    manager.close()
    return history


def rounded(values: np.ndarray) -> Any:
    """As lists, of four significant digits; None where a value is not finite."""
    if values.ndim:
        return [rounded(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def results_of(settings: dict[str, Any], history: History) -> dict[str, Any]:
    """What is written as JSON, and shown."""
    # Moves can be compared at one learning rate only: the best one of the network without.
    trained = np.isfinite(history.loss[0, :, -1]).all(axis=-1)
    median = np.median(history.measured.accuracy[0, :, -1], axis=-1)
    shown = int(np.where(trained, median, -1).argmax())
    networks = {}
    for i, name in enumerate(NETWORKS):
        measured = Measured(*(values[i, shown] for values in history.measured))
        unit = typical_unit(measured.percentiles[:, 0])
        mean_moves, std_moves = moves(measured)
        networks[name] = {
            # [learning rates, 1 + checks, seeds]
            "test_accuracy": rounded(history.measured.accuracy[i]),
            # [learning rates, seeds], training loss of the steps before the last check
            "last_loss": rounded(history.loss[i, :, -1]),
            # What follows is of the learning rate shown: [1 + checks, percentiles] of the unit of
            # the last hidden layer of the first seed, and twice [checks, seeds, layers].
            "unit": unit,
            "percentiles": rounded(measured.percentiles[:, 0, unit]),
            "mean_moves": rounded(mean_moves),
            "std_moves": rounded(std_moves),
        }
    return {
        **settings,
        "shown_learning_rate": settings["learning_rates"][shown],
        "networks": networks,
    }


def array(values: Any) -> np.ndarray:
    """Numbers of the results, NaN for None."""
    return np.array(values, float)


def steps_to_target(accuracies: np.ndarray, check_every: int) -> np.ndarray:
    """Steps before the first check that reaches the target; inf where none does.

    Args:
        accuracies: [..., 1 + checks, seeds].
        check_every: steps between checks.

    Returns:
        Steps [..., seeds].
    """
    reached = accuracies >= TARGET
    return np.where(reached.any(axis=-2), reached.argmax(axis=-2) * check_every, np.inf)


def accuracy_table(results: dict[str, Any]) -> Table:
    """One row for each learning rate and network."""
    table = Table(
        title=f"{results['steps']} steps on {results['dataset']}, weights of std "
        f"{results['init_std']:g}, {results['seeds']} seeds",
        caption=f"Median (min to max) of the seeds. Failed: ends below {FAILED:.0%}.",
    )
    table.add_column("rate", justify="right")
    table.add_column("network")
    for column in ("test accuracy, %", f"steps to {TARGET:.0%}", "loss", "failed"):
        table.add_column(column, justify="right")
    for j, rate in enumerate(results["learning_rates"]):
        for name, network in results["networks"].items():
            accuracies = array(network["test_accuracy"][j])
            steps = steps_to_target(accuracies, results["check_every"])
            table.add_row(
                f"{rate:g}",
                name,
                spread(100 * accuracies[-1], ".1f"),
                spread(steps, "g", limit=results["steps"]),
                f"{np.median(array(network['last_loss'][j])):.2g}",
                f"{(accuracies[-1] < FAILED).sum()} of {results['seeds']}",
            )
        table.add_section()
    return table


def moves_table(results: dict[str, Any]) -> Table:
    """One row for each network and layer."""
    checks = results["steps"] // results["check_every"]
    early = max(1, checks // 10)
    table = Table(
        title=f"How far the sigmoids' inputs move in {results['check_every']} steps",
        caption=f"At learning rate {results['shown_learning_rate']:g}; median over the checks, the "
        "seeds and the units of a layer. Mean: in standard deviations. Std: its natural logarithm.",
    )
    table.add_column("network, layer")
    parts = {f"to step {early * results['check_every']}": slice(early)}
    if early < checks:
        parts["after"] = slice(early, None)
    for quantity, part in itertools.product(("mean", "std"), parts):
        table.add_column(f"{quantity}, {part}", justify="right")
    for name, network in results["networks"].items():
        for layer in range(LAYERS):
            cells = [
                f"{np.median(array(network[key])[part, :, layer]):.3f}"
                for key in ("mean_moves", "std_moves")
                for part in parts.values()
            ]
            table.add_row(f"{name}, {layer + 1}", *cells)
        table.add_section()
    return table


def figure(results: dict[str, Any]) -> bytes:
    """Accuracies, percentiles and moves, as a PNG."""
    networks, check_every = results["networks"], results["check_every"]
    rates, shown = results["learning_rates"], results["shown_learning_rate"]
    steps = np.arange(results["steps"] // check_every + 1) * check_every
    fig = matplotlib.figure.Figure(figsize=(16, 9), layout="constrained")
    grid: Any = fig.subplots(2, 3)
    (curves, *inputs), (by_rate, *moved) = grid
    inputs[1].sharey(inputs[0])
    lowest = 80.0  # of accuracies, to see the difference, unless a seed ends below
    for (name, network), color, axes in zip(
        networks.items(), ("tab:red", "tab:blue"), inputs, strict=True
    ):
        percent = 100 * array(network["test_accuracy"])
        values = percent[rates.index(shown)]
        curves.plot(steps, np.median(values, axis=-1), color=color, label=name)
        low, high = values.min(axis=-1), values.max(axis=-1)
        curves.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        lowest = min(lowest, 0.9 * low[-1])

        wrong = 100 - percent[:, -1]
        median = np.median(wrong, axis=-1)
        errors = (median - wrong.min(axis=-1), wrong.max(axis=-1) - median)
        by_rate.errorbar(rates, median, errors, color=color, marker="o", capsize=3, label=name)

        low, middle, high = array(network["percentiles"]).T
        axes.plot(steps, high, color=color, linestyle="--", label=f"{PERCENTILES[2]}th percentile")
        axes.plot(steps, middle, color=color, label="median")
        axes.plot(steps, low, color=color, linestyle=":", label=f"{PERCENTILES[0]}th percentile")
        axes.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
        axes.set(title=f"{name}: one sigmoid of the last hidden layer")
        axes.set(ylabel="input of the sigmoid, first seed")

        for axes, key in zip(moved, ("mean_moves", "std_moves"), strict=True):
            for layer, style in enumerate((":", "--", "-")):
                of_seeds = array(network[key])[..., layer]
                middle = np.median(of_seeds, axis=-1)
                label = f"{name}, layer {layer + 1}"
                axes.plot(steps[1:], middle, color=color, linestyle=style, label=label)
                low, high = of_seeds.min(axis=-1), of_seeds.max(axis=-1)
                axes.fill_between(steps[1:], low, high, color=color, alpha=0.1, linewidth=0)
    curves.set(title="Test accuracy", ylabel="test accuracy, %", ylim=(lowest, 100))
    by_rate.axhline(90, color="gray", linestyle="--", label="guessing")
    by_rate.axvline(shown, color="gray", linestyle=":", label="learning rate of the other plots")
    by_rate.set(title=f"All learning rates, after {results['steps']:,} steps")
    by_rate.set(ylabel="test error, %", xlabel="learning rate", xscale="log")
    by_rate.set_xticks(rates, [f"{rate:g}" for rate in rates])
    for axes in (by_rate, *moved):
        if axes.dataLim.minposy < np.inf:  # else all diverged, and a log scale would raise
            axes.set(yscale="log")
    by_rate.set_yticks(ticks := (1, 2, 3, 5, 10, 20, 50, 100), [f"{tick}" for tick in ticks])
    by_rate.minorticks_off()
    for axes, what, unit in zip(
        moved, ("mean", "std"), ("standard deviations", "change of the natural log"), strict=True
    ):
        axes.set(title=f"How far the {what} of a sigmoid's input moves in {check_every} steps")
        axes.set(ylabel=f"median of the layer's {UNITS}, {unit}")
    for axes in grid.flat:
        if axes is not by_rate:
            axes.set(xlabel="training steps")
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    fig.suptitle(
        f"{results['dataset']}: three layers of {UNITS} sigmoids, initial weights of std "
        f"{results['init_std']:g}, learning rate {shown:g} (median and range of "
        f"{results['seeds']} seeds)"
    )
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=110)
    return png.getvalue()


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The flags, checked, and what tells of more that is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add_data_flags(parser, default="mnist")
    add("--steps", type=positive_int, default=50_000, help="of training, each of 60 images")
    add("--check-every", type=positive_int, default=500, help="steps between measurements")
    add(
        "--learning-rates",
        type=positive_float,
        nargs="+",
        default=[0.1, 0.3, 1.0, 3.0, 10.0],
        metavar="RATE",
        help="of SGD, each tried with each network",
    )
    add(
        "--init-std",
        type=positive_float,
        default=0.01,
        help="standard deviation of the initial weights",
    )
    add("--seeds", type=positive_int, default=3, help="how many times each network is trained")
    add(
        "--output",
        type=Path,
        default=Path("results/covariate_shift"),
        metavar="FOLDER",
        help="where covariate_shift.png, covariate_shift.json and the checkpoints go",
    )
    args = parser.parse_args(argv)
    if args.steps % args.check_every:
        parser.error(f"--check-every must divide --steps, {args.steps}, not {args.check_every}")
    return parser, args


@ending_in_one_line("from the last checkpoint")
def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the tables, and writes the figure and the numbers."""
    parser, args = parse_args(argv)
    dataset = dataset_of(args, parser)
    folder = output_folder(parser, args, "covariate_shift.json", "covariate_shift.png")
    settings = settings_of(args, dataset)
    results = results_of(settings, experiment(parser, settings, dataset, folder / "checkpoints"))
    console = Console(highlight=False)
    console.print(accuracy_table(results), moves_table(results))
    write_whole(folder / "covariate_shift.json", json.dumps(results, indent=1).encode())
    write_whole(folder / "covariate_shift.png", figure(results))
    console.print(f"Wrote {folder / 'covariate_shift.png'} and {folder / 'covariate_shift.json'}")


if __name__ == "__main__":
    main()
