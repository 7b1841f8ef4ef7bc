"""Accuracy of the variance and the output, far from zero, against the definition in float64."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import matplotlib.figure
import numpy as np
import rich.box
from matplotlib.axes import Axes
from rich.table import Table

from benchmarks.peers import EPSILON, PEERS, Case

SHAPE = (128, 28, 28, 4)
# Mean and standard deviation of the normal distributions.
DISTRIBUTIONS = ((0.0, 1.0), *((10.0**i, 1.0) for i in range(7)), (3000.0, 0.01))
QUANTITIES = {
    "variance_error": "Relative error of the variance",
    "y_error": "Largest error of the output",
}


class Record(NamedTuple):
    """The errors of one peer on samples in float32 of one distribution.

    Attributes:
        peer: its name.
        mean: of the distribution.
        std: of the distribution.
        variance_error: of the batch's variance, relative; the largest of the features.
        y_error: the largest of all outputs; scale is 1 and bias 0.
    """

    peer: str
    mean: float
    std: float
    variance_error: float
    y_error: float


def measure(names: Sequence[str], mean: float, std: float) -> list[Record]:
    """The errors of these peers."""
    # Without weight on the old ones, the running statistics are those of the batch.
    case = Case(SHAPE, "float32", "forward", momentum=0.0)
    rows, features = math.prod(SHAPE[:-1]), SHAPE[-1]
    x = np.random.default_rng(0).normal(mean, std, SHAPE).astype(np.float32)
    ones, zeros = np.ones(features, np.float32), np.zeros(features, np.float32)
    arrays = {"x": x, "scale": ones, "bias": zeros, "mean": zeros, "var": ones}
    wide = x.astype(np.float64)
    var = wide.var(axis=(0, 1, 2))
    y = (wide - wide.mean(axis=(0, 1, 2))) / np.sqrt(var + EPSILON)
    records = []
    for name in names:
        found = PEERS[name].prepare(case, jax.device_put(arrays)).outputs()
        # torch's running variance is the unbiased one.
        biased = (rows - 1) / rows if PEERS[name].module == "torch" else 1.0
        error = np.abs(biased * found["var"].astype(np.float64) / var - 1).max()
        records.append(Record(name, mean, std, float(error), float(np.abs(found["y"] - y).max())))
    return records


def table(records: Sequence[Record], quantity: str) -> Table:
    """One of the `QUANTITIES`, a row for each peer and a column for each distribution."""
    result = Table(
        title=f"{QUANTITIES[quantity]}, float32, {math.prod(SHAPE[:-1])} rows",
        box=rich.box.SIMPLE,
        padding=0,
    )
    result.add_column("mean\nstd")
    for mean, std in dict.fromkeys((r.mean, r.std) for r in records):
        result.add_column(f"{mean:g}\n{std:g}", justify="right")
    for name in dict.fromkeys(r.peer for r in records):
        result.add_row(name, *(f"{getattr(r, quantity):.0e}" for r in records if r.peer == name))
    return result


def figure(records: Sequence[Record]) -> bytes:
    """Both quantities against mean over standard deviation, as a PNG."""
    fig = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    panels = fig.subplots(1, 2)
    for axes, (quantity, title) in zip(panels, QUANTITIES.items(), strict=True):
        draw_panel(axes, records, quantity)
        axes.set(title=title, xlabel="mean / standard deviation")
        axes.set_xscale("symlog", linthresh=1)  # which has a 0
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[1].legend()  # crosses are on this side, if any
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=150)
    return png.getvalue()


def draw_panel(axes: Axes, records: Sequence[Record], quantity: str) -> None:
    """A line for each peer, and a cross at the top edge where its result is not a number."""
    for i, name in enumerate(PEERS):
        own = sorted((r.mean / r.std, getattr(r, quantity)) for r in records if r.peer == name)
        if not own:
            continue
        # An error of 0 is drawn at that of one part in ten thousand million.
        axes.plot(
            [x for x, _ in own],
            [max(error, 1e-10) for _, error in own],
            color=f"C{i}",
            marker="o",
            markersize=4,
            linewidth=1,
            label=name,
        )
        lost = [x for x, error in own if not math.isfinite(error)]
        if lost:
            axes.plot(
                lost,
                [1.0] * len(lost),
                "x",
                color=f"C{i}",
                markersize=10,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                label=f"{name}: not a number",
            )
