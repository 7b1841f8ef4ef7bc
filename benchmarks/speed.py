"""Time of batch norm against the memory bandwidth of the machine.

All peers of a case are compiled first, and then take turns, so that what else the machine does
meets them alike. The yardstick takes turns with them: a copy that reads x once and writes as much
gives the bandwidth, and with it the time that the least possible traffic would take. That limit
holds for arrays that are larger than the caches.
"""

import io
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from benchmarks import peers
from benchmarks.peers import Case, Prepared

BLOCK = 20e-3  # seconds that a measurement takes at least,
MOST_CALLS = 1000  # unless that needs more calls than these
PAUSE = 10e-3  # seconds; torch's threads spin for some time after a call and slow the next peer
# The least traffic, in units of the bytes of x, of which a copy moves 2; and with a residual.
FLOOR = {"forward": 3, "forward+backward": 8, "inference": 2}
FLOOR_WITH_RESIDUAL = {"forward": 4, "forward+backward": 11, "inference": 3}


class Record(NamedTuple):
    """What was measured of one peer in one case.

    Attributes:
        peer: its name.
        shape: of x.
        dtype: of x.
        mode: as in `Case`.
        after: as in `Case`.
        seconds: of a call, the median over the rounds.
        lower_quartile: of the same.
        upper_quartile: of the same.
        compile_seconds: of tracing and compiling; None where nothing is compiled.
        copy_seconds: of a copy of x in the same rounds, the median.
        fraction_of_limit: the time of the least traffic at the copy's bandwidth, over `seconds`.
        ratio_to_linen: `seconds` over those of `flax.linen.BatchNorm`; None if it did not run.
    """

    peer: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    after: str
    seconds: float
    lower_quartile: float
    upper_quartile: float
    compile_seconds: float | None
    copy_seconds: float
    fraction_of_limit: float
    ratio_to_linen: float | None


def floor(case: Case) -> int:
    """The least traffic of a case, in units of the bytes of x."""
    return (FLOOR_WITH_RESIDUAL if case.after == "add-relu" else FLOOR)[case.mode]


def copy(x: jax.Array) -> Prepared:
    """Reads x and writes as much; as integers, since arithmetic in bfloat16 may cost more."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    compiled = jax.jit(lambda v: {"copy": v + 1}).lower(bits).compile()
    return Prepared(lambda: compiled(bits), jax.block_until_ready, None, -1)


def call_seconds(prepared: Prepared, calls: int) -> float:
    """Seconds of a call, from so many in a row after an untimed one."""
    on_cpu = jax.default_backend() == "cpu"
    result = prepared.call()
    prepared.wait(result)
    start = time.perf_counter()
    for _ in range(calls):
        result = prepared.call()
        if on_cpu:  # where calls could overlap; an accelerator runs one after the other
            prepared.wait(result)
    prepared.wait(result)
    return (time.perf_counter() - start) / calls


def take_turns(prepared: dict[str, Prepared], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of a call in every round, in which each goes once, in an order that rotates."""
    names = list(prepared)
    seconds = {name: np.zeros(rounds) for name in names}
    calls = {
        name: min(math.ceil(BLOCK / call_seconds(prepared[name], 1)), MOST_CALLS) for name in names
    }
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            seconds[name][i] = call_seconds(prepared[name], calls[name])
    return seconds


def measure(case: Case, names: Sequence[str], rounds: int) -> list[Record]:
    """Times these peers and a copy; a peer that the case would not tell apart is left out."""
    arrays = peers.draw(case)
    names = [name for name in names if peers.supports(name, case.shape)]
    prepared = {name: peers.PEERS[name].prepare(case, arrays) for name in names}
    seconds = take_turns({"copy": copy(arrays["x"])} | prepared, rounds)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    records = []
    for name in names:
        lower, upper = np.quantile(seconds[name], (0.25, 0.75)).tolist()
        records.append(
            Record(
                name,
                *case[:4],
                medians[name],
                lower,
                upper,
                prepared[name].compile_seconds,
                medians["copy"],
                floor(case) / 2 * medians["copy"] / medians[name],
                medians[name] / medians["linen"] if "linen" in medians else None,
            )
        )
    return records


def table(records: Sequence[Record]) -> Table:
    """The peers of one case."""
    first = records[0]
    result = Table(
        title=f"{first.dtype} {'x'.join(map(str, first.shape))}, {what(first.mode, first.after)}",
        caption=f"A copy takes {1e3 * first.copy_seconds:.3g} ms; "
        f"limit: {floor(Case(*first[1:5]))} times reading or writing x.",
    )
    result.add_column("layer")
    for column in ("ms", "quartiles", "% of\nlimit", "time /\nlinen", "compile,\ns"):
        result.add_column(column, justify="right")
    for r in records:
        result.add_row(
            r.peer,
            f"{1e3 * r.seconds:.3g}",
            f"{1e3 * r.lower_quartile:.3g} to {1e3 * r.upper_quartile:.3g}",
            f"{r.fraction_of_limit:.0%}"[:-1],
            "" if r.ratio_to_linen is None else f"{r.ratio_to_linen:.2f}",
            "" if r.compile_seconds is None else f"{r.compile_seconds:.2f}",
        )
    return result


def ratios(records: Sequence[Record]) -> dict[tuple[str, str, str, str], list[float]]:
    """Times over Linen's at every shape, by peer, dtype, mode and what follows."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for r in records:
        if r.ratio_to_linen is not None:
            found.setdefault((r.peer, r.dtype, r.mode, r.after), []).append(r.ratio_to_linen)
    return found


def summary(records: Sequence[Record]) -> Table:
    """Every peer's time over Linen's: the geometric mean over the shapes, and the range."""
    found = ratios(records)
    result = Table(
        title="Time / Linen's, geometric means and ranges over the shapes",
        caption="Below 1 is faster than flax.linen.BatchNorm.",
    )
    result.add_column("layer")
    columns = list(dict.fromkeys(key[1:] for key in found))
    for dtype, mode, after in columns:
        result.add_column(f"{dtype}\n{mode}\n{after}", justify="right")
    for peer in dict.fromkeys(key[0] for key in found):
        cells = (found.get((peer, *column), []) for column in columns)
        result.add_row(peer, *(geometric_mean_and_range(cell) for cell in cells))
    return result


def geometric_mean_and_range(values: Sequence[float]) -> str:
    """As text; empty if there are no values."""
    if not values:
        return ""
    return f"{np.exp(np.log(values).mean()):.2f}\n{min(values):.2f} to {max(values):.2f}"


def what(mode: str, after: str) -> str:
    """What was timed, for titles."""
    return mode if after == "none" else f"{mode}, then {after}"


def figure(records: Sequence[Record]) -> bytes:
    """Time and fraction of the limit against the size of x, as a PNG."""
    rows = list(dict.fromkeys((r.mode, r.after) for r in records))
    dtypes = list(dict.fromkeys(r.dtype for r in records))
    fig = matplotlib.figure.Figure(
        figsize=(9 * len(dtypes), 3.4 * len(rows) + 0.8), layout="constrained"
    )
    panels = fig.subplots(len(rows), 2 * len(dtypes), squeeze=False)
    handles = {}
    for row, (mode, after) in zip(panels, rows, strict=True):
        for i, dtype in enumerate(dtypes):
            chosen = [r for r in records if (r.mode, r.after, r.dtype) == (mode, after, dtype)]
            draw_panels(row[2 * i], row[2 * i + 1], chosen)
            row[2 * i].set_title(f"{dtype}, {what(mode, after)}")
            handles |= {h.get_label(): h for h in row[2 * i + 1].get_lines()}
    for axes in panels[-1]:
        axes.set_xlabel("size of x, MB")
    fig.legend(handles=list(handles.values()), loc="outside upper center", ncols=len(handles))
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=100)
    return png.getvalue()


def draw_panels(times: Axes, fractions: Axes, records: Sequence[Record]) -> None:
    """One mode, dtype and what follows, left in milliseconds and right in percent."""
    limits = {}
    for i, name in enumerate(peers.PEERS):
        own = sorted((megabytes(r), r) for r in records if r.peer == name)
        if not own:
            continue
        sizes = [size for size, _ in own]
        medians, lower, upper = (
            1e3 * np.array([getattr(r, key) for _, r in own])
            for key in ("seconds", "lower_quartile", "upper_quartile")
        )
        style = {"color": f"C{i}", "marker": "o", "markersize": 4, "linewidth": 1, "label": name}
        times.errorbar(sizes, medians, (medians - lower, upper - medians), capsize=2, **style)
        fractions.plot(sizes, [100 * r.fraction_of_limit for _, r in own], **style)
        limits |= {size: 1e3 * r.seconds * r.fraction_of_limit for size, r in own}
    times.plot(sorted(limits), [limits[size] for size in sorted(limits)], "k:")
    fractions.axhline(100, color="black", linestyle=":", label="limit")
    times.set(xscale="log", yscale="log", ylabel="ms")
    fractions.set(xscale="log", ylim=(0, None), ylabel="% of the limit")
    for axes in (times, fractions):
        axes.grid(alpha=0.3)


def megabytes(record: Record) -> float:
    """The size of x."""
    return math.prod(record.shape) * np.dtype(record.dtype).itemsize / 1e6
