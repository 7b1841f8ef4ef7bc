"""What the statistics and parameters of trained batch norm layers say, for Linen and NNX."""

import dataclasses
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jbn import _graph
from jbn._calibrate import Pooled, join, whole
from jbn._fold import TRAINING

# In standard deviations: of a running mean, from which calibrating is worth it.
_DRIFT = 0.5
# As a factor, of a running variance.
_VAR_RATIO = 2.0
# A variance of 10 epsilon is normalized to 0.91 rather than 1.
_NEAR_EPSILON = 10.0
# Of the median |scale| of the model, zeros apart.
_DEAD, _EXPLODING = 1e-3, 1e2
# Elements that each feature has in a batch: the mean of 32 is off by 0.18 standard deviations.
_FEW = 32


# What keeps a batch norm from being folded in training mode: it, and statistics that are updated.
_EXPECTED = {TRAINING, _graph.transformed("mean"), _graph.transformed("var")}


class Layer(Protocol):
    """The fields of a layer that matter here."""

    epsilon: float
    unbiased: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer; a stack of layers under a scan is one.

    Attributes:
        layer: its name, the path in the model.
        features: how many there are.
        drift_median: of |running mean - mean| / sqrt(var + epsilon) over the features, where mean
            and var are those of the batches.
        drift_max: the largest.
        var_ratio_min: the least (running var + epsilon) / (var + epsilon).
        var_ratio_max: the largest.
        near_epsilon: features whose variance in the batches is less than 10 epsilon: they are
            scaled to less than unit variance.
        dead: features whose |scale| is less than 0.001 of the model's median, zeros apart.
        exploding: features whose |scale| is more than 100 times that median.
        smallest_count: the fewest elements that a feature had in a batch.
        useless_bias_of: the layer before, if batch norm takes away its bias with the mean; else
            None.
        useless_parameters: how many that bias has.
        findings: what is worth a look, in words.
    """

    layer: str
    features: int
    drift_median: float
    drift_max: float
    var_ratio_min: float
    var_ratio_max: float
    near_epsilon: int
    dead: int
    exploding: int
    smallest_count: float
    useless_bias_of: str | None
    useless_parameters: int
    findings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The batch norm layers of a model; printed, it is a table.

    Attributes:
        rows: a `Row` for each layer, in the order of the model.
        values: of each layer the arrays behind it, one number for each feature: drift, var_ratio,
            and scale if the layer has one.
    """

    rows: tuple[Row, ...]
    values: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows as plain numbers and lists, by the name of the layer, for `json.dumps`."""
        rows = (dataclasses.asdict(row) for row in self.rows)
        return {row.pop("layer"): {**row, "findings": list(row["findings"])} for row in rows}

    def __rich__(self) -> Table:
        table = Table(title="Running against batch statistics")
        table.add_column("layer", overflow="fold")
        drift, ratio = "drift / std\nmedian, max", "running var / var\nmin, max"
        for header in ("features", drift, ratio, "elements\nat least"):
            table.add_column(header, justify="right")
        table.add_column("findings", overflow="fold")
        for row in self.rows:
            table.add_row(
                Text(row.layer or "(model)"),  # a name may have brackets, which are no markup
                str(row.features),
                f"{row.drift_median:.2g}, {row.drift_max:.2g}",
                f"{row.var_ratio_min:.2g}, {row.var_ratio_max:.2g}",
                f"{row.smallest_count:g}",
                Text("\n".join(row.findings)),
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue()

    def plot(self, path: str | Path) -> None:
        """Draws the distribution over the features of each layer, to a file; needs matplotlib.

        Args:
            path: of the file, whose ending gives the format, such as .png, .svg or .pdf.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 2 + 0.3 * len(self.rows)), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        panels = (
            ("drift", "|running mean - mean| / std", "linear"),
            ("var_ratio", "running var / var", "log"),
            ("scale", "|scale|", "log"),
        )
        for ax, (key, label, scale) in zip(axes, panels, strict=True):
            for y, row in enumerate(self.rows):
                v = self.values[row.layer].get(key, np.empty(0))
                v = v[np.isfinite(v) & ((v > 0) | (scale == "linear"))]
                if v.size:  # a line over all features, a thick one over half of them, the median
                    least, low, median, high, most = np.quantile(v, (0, 0.25, 0.5, 0.75, 1))
                    ax.hlines([y, y], [least, low], [most, high], linewidth=[1, 5])
                    ax.plot(median, y, "o", color="black", zorder=3)
            ax.set(xscale=scale, xlabel=label)
        axes[0].set_yticks(range(len(self.rows)), [r.layer or "(model)" for r in self.rows])
        axes[0].invert_yaxis()
        figure.savefig(path)


class Bias(NamedTuple):
    """A bias that changes nothing: the layer that it belongs to, and how many parameters it has."""

    layer: str | None
    parameters: int


def useless_biases(
    norms: Iterable[_graph.Norm], arrays: Mapping[_graph.Path, Any]
) -> dict[str, Bias]:
    """The biases of layers that nothing but a batch norm reads, by the name of that batch norm.

    Args:
        norms: of the model's call in training mode.
        arrays: the model's variables by path.
    """
    found = {}
    for norm in norms:
        feeder = norm.feeder
        if feeder is None or "bias" not in feeder.variables:
            continue
        bias = feeder.variables["bias"]
        if not set(norm.obstacles) <= _EXPECTED or (bias.stacked and not norm.layer.variables):
            continue
        if len(norm.layer.positions) == len(feeder.call.axes):  # else it varies within a feature
            size = arrays[bias.path].size
            found[join(norm.layer.path)] = Bias(join(feeder.path), size)
    return found


def make(
    layers: Mapping[str, tuple[Layer, Pooled]],
    stats: Mapping[str, Mapping[str, Any]],
    scales: Mapping[str, Any],
    biases: Mapping[str, Bias],
) -> Report:
    """The report.

    Args:
        layers: each layer and its moments over the batches, by name.
        stats: the running mean and var of each layer.
        scales: the scale of each layer that has one.
        biases: of the layers before these, those that are useless.
    """
    values = {
        name: _compared(layer, stats[name], pooled) for name, (layer, pooled) in layers.items()
    }
    sizes = {
        name: abs(np.asarray(whole(scale)).astype(np.float64)) for name, scale in scales.items()
    }
    for name in layers.keys() & sizes.keys():
        values[name]["scale"] = sizes[name].ravel()
    nonzero = [v["scale"][v["scale"] > 0] for v in values.values() if "scale" in v]
    every = np.concatenate(nonzero or [np.ones(1)])
    median = float(np.median(every)) if every.size else 1.0
    none = Bias(None, 0)
    rows = (
        _row(name, *layers[name], values[name], median, biases.get(name, none)) for name in layers
    )
    return Report(tuple(rows), values)


def _compared(layer: Layer, stats: Mapping[str, Any], pooled: Pooled) -> dict[str, np.ndarray]:
    """Drift and ratio of variances of the features, NaN where no batch had elements of one."""
    n, var = pooled.count, pooled.var
    if layer.unbiased:
        var = var * (n / np.where(n >= 2, n - 1, 1))
    mean, running_var = (np.asarray(whole(stats[name])) for name in ("mean", "var"))
    running_var = running_var.astype(np.float64)
    drift = abs(mean - pooled.mean) / np.sqrt(pooled.var + layer.epsilon)
    ratio = (running_var + layer.epsilon) / (var + layer.epsilon)
    seen = n > 0
    return {
        "drift": np.where(seen, drift, np.nan).ravel(),
        "var_ratio": np.where(seen, ratio, np.nan).ravel(),
    }


def _row(
    name: str,
    layer: Layer,
    pooled: Pooled,
    values: Mapping[str, np.ndarray],
    median: float,
    bias: Bias,
) -> Row:
    seen = pooled.count.ravel() > 0
    drift, ratio = (values[key][seen] if seen.any() else np.nan for key in ("drift", "var_ratio"))
    scale = values.get("scale", np.empty(0))
    row = Row(
        layer=name,
        features=seen.size,
        drift_median=float(np.median(drift)),
        drift_max=float(np.max(drift)),
        var_ratio_min=float(np.min(ratio)),
        var_ratio_max=float(np.max(ratio)),
        near_epsilon=int((pooled.var.ravel()[seen] < _NEAR_EPSILON * layer.epsilon).sum()),
        dead=int((scale < _DEAD * median).sum()),
        exploding=int((scale > _EXPLODING * median).sum()),
        smallest_count=float(pooled.smallest.min(initial=np.inf)),
        useless_bias_of=bias.layer,
        useless_parameters=bias.parameters,
        findings=(),
    )
    return dataclasses.replace(row, findings=_findings(row, pooled, scale))


def _findings(row: Row, pooled: Pooled, scale: np.ndarray) -> tuple[str, ...]:
    """What is worth a look, each with what to do about it."""
    lowest, highest = row.var_ratio_min, row.var_ratio_max
    # So that NaN, which running statistics may be, is not within.
    within = row.drift_max <= _DRIFT and lowest >= 1 / _VAR_RATIO and highest <= _VAR_RATIO
    drifted = (pooled.count > 0).any() and not within
    left_out = int((pooled.left_out > 0).sum())
    broken = int((~np.isfinite(scale)).sum())
    told = {
        "running statistics are off: calibrate": drifted,
        f"features that vary by little against epsilon: {row.near_epsilon}": row.near_epsilon,
        f"dead scales, below {_DEAD:g} of the model's median: {row.dead}": row.dead,
        f"exploding scales, over {_EXPLODING:g} times the median: {row.exploding}": row.exploding,
        f"too few elements in a batch, its statistics are noisy: {row.smallest_count:g}": (
            row.smallest_count < _FEW
        ),
        f"features with moments that are not finite: {left_out}": left_out,
        f"scales that are not finite: {broken}": broken,
        f"the bias of {row.useless_bias_of or 'the layer before'} changes nothing: "
        f"use_bias=False saves {row.useless_parameters} parameters": row.useless_parameters,
    }
    return tuple(words for words, holds in told.items() if holds)
