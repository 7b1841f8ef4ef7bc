"""How large a learning rate a network trains at, and how fast, with and without batch norm.

The experiment of Figures 2 and 3 of Ioffe and Szegedy, "Batch Normalization: Accelerating Deep
Network Training by Reducing Internal Covariate Shift" (2015), with a small residual network in
place of Inception and Fashion-MNIST in place of ImageNet: the network without batch norm at the
learning rate that suits it, then with batch norm, at 5 and 30 times the rate, and with sigmoids.
Reported are the steps to the highest test accuracy of the first, and the highest of each.

The base learning rate is searched for: the best of --base-rates for the network without batch norm,
after half the steps, on images held out from training and from other seeds.

    pip install -e ".[examples]"
    python examples/learning_rates.py --data-dir data

Interrupted, the same command goes on after the last network that was trained to the end.
"""

import argparse
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import optax
from common import (
    Dataset,
    HelpFormatter,
    SmallResNet,
    accuracy,
    add_data_flags,
    dataset_of,
    ending_in_one_line,
    on_device,
    output_folder,
    positive_float,
    positive_int,
    read_results,
    spread,
    training,
    write_whole,
)
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

FAILED = 0.2  # a seed that ends below this test accuracy has failed; guessing gives 0.1
SEARCH_SEEDS = 2
HELD_OUT = 12  # one of so many images to train on is held out in the search


class Arm(NamedTuple):
    """A network and its learning rate.

    Attributes:
        batch_norm: whether the network has batch norm.
        activation: of the network.
        factor: of the base learning rate.
        paper: what the paper calls it and found: the millions of steps to the highest accuracy of
            Inception, 72.2 %, and its own highest (Figure 3 and section 4.2.2).
    """

    batch_norm: bool
    activation: Callable[..., jax.Array]
    factor: int
    paper: str = ""


BASELINE = "plain x1"
ARMS = {
    BASELINE: Arm(False, nn.relu, 1, "Inception: 31.0, 72.2 %"),
    "plain x5": Arm(False, nn.relu, 5, "Inception at x5: diverged"),
    "plain x30": Arm(False, nn.relu, 30),
    "BN x1": Arm(True, nn.relu, 1, "BN-Baseline: 13.3, 72.7 %"),
    "BN x5": Arm(True, nn.relu, 5, "BN-x5: 2.1, 73.0 %"),
    "BN x30": Arm(True, nn.relu, 30, "BN-x30: 2.7, 74.8 %"),
    "BN sigmoid x5": Arm(True, nn.sigmoid, 5, "BN-x5-Sigmoid: never, 69.8 %"),
    "plain sigmoid x1": Arm(False, nn.sigmoid, 1, "Inception, sigmoid: chance"),
    "plain sigmoid x5": Arm(False, nn.sigmoid, 5),
}
COLORS = {
    (False, nn.relu): "tab:red",
    (True, nn.relu): "tab:blue",
    (True, nn.sigmoid): "tab:green",
    (False, nn.sigmoid): "tab:orange",
}
STYLES = {1: "-", 5: "--", 30: ":"}
# Of the results of `train`.
RUN = {"learning_rate": float, "seed": int, "accuracy": [float], "diverged_at": (int, type(None))}


def train(
    arm: Arm,
    data: Dataset,
    learning_rate: float,
    seed: int,
    steps: int,
    args: argparse.Namespace,
    progress: tqdm,
) -> dict[str, Any]:
    """Trains a network.

    Returns:
        The learning rate, the seed, the accuracy on the images to test on after each
        `--check-every` steps, and the first of these checks that found a loss or a parameter that
        is not finite, by its step, or None.
    """
    net = SmallResNet(arm.batch_norm, arm.activation)
    losses, accuracies, diverged_at = [], [], None
    for variables, loss in training(
        net, data, seed=seed, learning_rate=learning_rate, batch_size=args.batch_size, steps=steps
    ):
        losses.append(loss)
        if len(losses) % args.check_every == 0:
            # A loss may look fine: XLA's mean over ReLUs makes 0 of NaN on a CPU.
            size = optax.tree.norm(variables["params"])
            if diverged_at is None and not np.isfinite([*losses[-args.check_every :], size]).all():
                diverged_at = len(losses)
            accuracies.append(float(accuracy(net, variables, data.test_images, data.test_labels)))
            progress.update(args.check_every)
    return {
        "learning_rate": learning_rate,
        "seed": seed,
        "accuracy": accuracies,
        "diverged_at": diverged_at,
    }


def best_rate(search: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate with the highest mean of the last accuracies.

    Args:
        search: runs, as of `train`.
    """
    last: dict[float, list[float]] = {}
    for run in search:
        last.setdefault(run["learning_rate"], []).append(run["accuracy"][-1])
    return max(last, key=lambda rate: np.mean(last[rate]))


def steps_to(target: float, accuracies: Sequence[float], check_every: int) -> float:
    """The step of the first check that reaches the target; inf if none does."""
    reached = np.array(accuracies) >= target
    return float(check_every * (1 + reached.argmax())) if reached.any() else math.inf


def target_of(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The baseline's highest accuracy, the median over the seeds."""
    return float(np.median([max(run["accuracy"]) for run in runs[BASELINE]]))


def results_table(results: Mapping[str, Any]) -> Table:
    """In the form of the paper's Figure 3, with the paper's numbers beside."""
    settings, runs = results["settings"], results["runs"]
    target = target_of(runs)

    table = Table(
        title=f"{settings['dataset']}, {settings['steps']} steps, {settings['seeds']} seeds",
        caption="Over the seeds: median (min to max). Failed: seeds that "
        f"end below {FAILED:.0%} (of these, with a parameter that is not finite). The paper's "
        "steps are millions, to 72.2 % on ImageNet.",
    )
    table.add_column("network")
    table.add_column("learning rate", justify="right")
    table.add_column(f"steps to {100 * target:.1f} %", justify="right")
    table.add_column("highest accuracy, %", justify="right")
    table.add_column("failed", justify="right")
    table.add_column("the paper: steps, highest")
    for name, arm in ARMS.items():
        steps = [steps_to(target, run["accuracy"], settings["check_every"]) for run in runs[name]]
        highest = [100 * max(run["accuracy"]) for run in runs[name]]
        failed = sum(run["accuracy"][-1] < FAILED for run in runs[name])
        diverged = sum(run["diverged_at"] is not None for run in runs[name])
        table.add_row(
            name,
            f"{runs[name][0]['learning_rate']:g}",
            spread(steps, ".0f", limit=settings["steps"]),
            spread(highest, ".1f"),
            f"{failed} ({diverged})" if failed else "0",
            arm.paper,
        )
    return table


def figure(results: Mapping[str, Any]) -> bytes:
    """Test accuracy against steps, in full and near the target, as a PNG."""
    settings, runs = results["settings"], results["runs"]
    target = target_of(runs)
    fig = matplotlib.figure.Figure(figsize=(13, 5.5), layout="constrained")
    whole, near = fig.subplots(1, 2)
    highest = target
    steps = np.arange(settings["check_every"], settings["steps"] + 1, settings["check_every"])
    for name, arm in ARMS.items():
        curves = np.array([run["accuracy"] for run in runs[name]])
        highest = max(highest, curves.max())
        failed = sum(run["accuracy"][-1] < FAILED for run in runs[name])
        fails = f", {failed} of {settings['seeds']} fail" if failed else ""
        label = f"{name} ({runs[name][0]['learning_rate']:g}{fails})"
        color, style = COLORS[arm.batch_norm, arm.activation], STYLES[arm.factor]
        for axes in (whole, near):
            axes.plot(steps, 100 * curves.T, style, color=color, alpha=0.5, linewidth=0.5)
            median = 100 * np.median(curves, axis=0)
            axes.plot(steps, median, style, marker=".", markersize=3, color=color, label=label)
    for axes in (whole, near):
        label = f"{100 * target:.1f} %, the highest of {BASELINE}"
        axes.axhline(100 * target, color="black", linewidth=0.8, label=label)
        axes.set(xlabel="training steps", ylabel="test accuracy, %", xscale="log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    whole.axhline(10, color="gray", linestyle="-.", linewidth=0.8, label="guessing")
    whole.set(title="All", ylim=(0, 100))
    near.legend(
        *whole.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(1, 1),
        title="network (learning rate)",
    )
    near.set(title="Near the target", ylim=(100 * target - 8, 100 * highest + 0.5))
    fig.suptitle(
        f"{settings['dataset']}: a residual network with and without batch norm (BN) at 1, 5 and "
        f"30 times a learning rate; {settings['seeds']} seeds (thin) and their median"
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
    add("--steps", type=positive_int, default=4000, help="of training, for each network")
    add("--batch-size", type=positive_int, default=32, help="images in a step")
    add("--check-every", type=positive_int, default=100, help="steps between test accuracies")
    add("--seeds", type=positive_int, default=3, help="how many times each network is trained")
    add(
        "--base-rates",
        type=positive_float,
        nargs="+",
        default=[0.001, 0.003, 0.01, 0.03, 0.1],
        metavar="RATE",
        help="learning rates to search for x1; one alone is taken without a search",
    )
    folder = Path("results/learning_rates")
    add("--output", type=Path, default=folder, metavar="FOLDER", help="where the results go")
    return parser


@ending_in_one_line("after the last network that was trained")
def main(argv: Sequence[str] | None = None) -> None:
    """Searches the base rate, trains what is not trained yet, and shows the results."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.steps % args.check_every:
        parser.error(
            f"--steps must be a multiple of --check-every, {args.check_every}, not {args.steps}"
        )
    dataset = dataset_of(args, parser)
    held_out = len(dataset.train_labels) // HELD_OUT
    limit = len(dataset.train_labels) - held_out
    if args.batch_size > limit:
        parser.error(f"--batch-size must be at most {limit}, not {args.batch_size}")
    rates = sorted(set(args.base_rates))
    decisive = ("steps", "batch_size", "check_every", "seeds")
    settings = {"dataset": dataset.name, **{name: getattr(args, name) for name in decisive}}
    folder = output_folder(parser, args, "learning_rates.json", "learning_rates.png")
    path = folder / "learning_rates.json"
    layout = {"search": [RUN], "runs": {name: [RUN] for name in ARMS}}
    results = read_results(parser, path, settings | {"base_rates": rates}, layout)
    search, runs = results.setdefault("search", []), results.setdefault("runs", {})
    for name in ARMS:
        runs.setdefault(name, [])

    data = on_device(dataset)
    search_data = data._replace(
        train_images=data.train_images[held_out:],
        train_labels=data.train_labels[held_out:],
        test_images=data.train_images[:held_out],
        test_labels=data.train_labels[:held_out],
    )
    search_steps = math.ceil(args.steps / args.check_every / 2) * args.check_every
    trials = [
        (rate, args.seeds + i) for rate in rates for i in range(SEARCH_SEEDS) if len(rates) > 1
    ]
    total = len(trials) * search_steps + len(ARMS) * args.seeds * args.steps
    done = len(search) * search_steps + sum(map(len, runs.values())) * args.steps
    with tqdm(total=total, initial=done, unit="step") as progress:
        for rate, seed in trials[len(search) :]:
            progress.set_description(f"{BASELINE} at {rate:g}")
            run = train(ARMS[BASELINE], search_data, rate, seed, search_steps, args, progress)
            search.append(run)
            write_whole(path, json.dumps(results, indent=1).encode())
        base = best_rate(search) if search else rates[0]
        for name, arm in ARMS.items():
            progress.set_description(name)
            for seed in range(len(runs[name]), args.seeds):
                rate = arm.factor * base
                runs[name].append(train(arm, data, rate, seed, args.steps, args, progress))
                write_whole(path, json.dumps(results, indent=1).encode())

    console = Console(highlight=False)
    for rate in rates if search else ():
        found = [100 * run["accuracy"][-1] for run in search if run["learning_rate"] == rate]
        text = spread(found, ".1f")
        console.print(f"Search, {BASELINE} at {rate:g}: {text} % of the images held out")
    console.print(results_table(results))
    write_whole(path.with_suffix(".png"), figure(results))
    console.print(f"Wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
