"""Communication of batch norm over many devices, from compiled programs alone.

    python -m benchmarks.communication --platform tpu

Three tables: the collectives of one layer in training, and how many numbers each device puts into
them; the bytes that each device must then send, for one layer and for the 53 of a ResNet-50; and
what share of a ResNet-50's training step that is, by published speeds. For 256 devices it compiles
about 400 programs, in six minutes on two cores.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import jbn.linen
from benchmarks import hlo, networks, results, traffic
from benchmarks.traffic import LAYERS

FEATURES = (64, 256, 2048)
LOCAL = (8, 14, 14)  # batch, height and width of each device's part of x
RESNET50 = "ResNet-50"
AXIS = "batch"
CPU_DEVICES = 16  # simulated
MOST_DEVICES = 256
# Topologies of a TPU v5e, by number of chips. Of one of them XLA takes all chips or one alone.
TPU_TOPOLOGIES = {
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
PER_NODE = 8  # GPUs
# By default XLA writes a small all-gather over a whole slice of 64 chips or more as an all-reduce
# of the gathered array, zeros but for each chip's own part: 128 times the bytes of a sum.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "tpu": {"xla_tpu_prefer_async_allgather_to_allreduce": True}
}
GROUPS = (2, 4, 8, 16, 32)
PLOTTED_GROUP = 8


class Setting(NamedTuple):
    """Where a layer runs.

    Attributes:
        layer: one of `LAYERS`.
        how: "axis_name" and "axis_index_groups" are `jax.shard_map` with these arguments of the
            layer; "jit, auto" and "jit, explicit" are `jax.jit` of sharded arrays, by the type of
            the mesh.
        devices: over which the batch is split.
        group: number of devices that share their statistics.
    """

    layer: str
    how: str
    devices: int
    group: int

    @property
    def mapped(self) -> bool:
        """Whether it runs under `jax.shard_map`."""
        return self.how.startswith("axis")


class Record(NamedTuple):
    """The collectives of one program.

    Attributes:
        setting: where it runs.
        features: of the one layer, or "ResNet-50" for the sum over its layers.
        program: "forward", in training, or "step": forward and backward.
        collectives: how many there are.
        numbers: that each device contributes to them.
        sent: bytes that each device sends, at the least.
        ops: number of collectives by their names.
    """

    setting: Setting
    features: int | str
    program: str
    collectives: int
    numbers: int
    sent: float
    ops: dict[str, int]


def device_counts(platform: str) -> list[int]:
    """The numbers of devices that can be compiled for: powers of two."""
    if platform == "tpu":
        return [1, *TPU_TOPOLOGIES]
    most = jax.device_count() if platform == "cpu" else MOST_DEVICES
    return [2**i for i in range(most.bit_length())]


@functools.cache
def devices(platform: str, count: int) -> list[Any]:
    """Devices to compile for; the platform is not asked whether it has them."""
    if platform == "cpu":
        return jax.devices()[:count]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if platform == "tpu":
        name = "x".join(map(str, TPU_TOPOLOGIES[max(count, 4)]))
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{name}")
    else:
        nodes = math.ceil(count / PER_NODE)
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name="h100",
            topology=f"1x{nodes}x{min(count, PER_NODE)}",
            target_config=(Path(__file__).parent / "h100.txtpb").read_text(),
        )
    return topology.devices[:count]


def settings(platform: str) -> list[Setting]:
    """Every way, and every number of devices or of those in a group, for both layers."""
    counts = device_counts(platform)
    most = counts[-1]
    ways = {how: [(n, n) for n in counts] for how in ("axis_name", "jit, auto", "jit, explicit")}
    ways["axis_index_groups"] = [(most, group) for group in GROUPS if group < most]
    return [
        Setting(layer, how, n, group)
        for how, sizes in ways.items()
        for layer in LAYERS
        for n, group in sizes
    ]


def arguments_of(setting: Setting) -> dict[str, Any]:
    """What the layer is told of the devices."""
    if not setting.mapped:
        return {}
    if setting.how == "axis_name":
        return {"axis_name": AXIS}
    starts = range(0, setting.devices, setting.group)
    groups = [list(range(start, start + setting.group)) for start in starts]
    return {"axis_name": AXIS, "axis_index_groups": groups}


def one_layer(setting: Setting, features: int, inference: bool = False) -> tuple[nn.Module, Any]:
    """A layer and its x."""
    layer = LAYERS[setting.layer](use_running_average=inference, **arguments_of(setting))
    return layer, jax.ShapeDtypeStruct(
        (LOCAL[0] * setting.devices, *LOCAL[1:], features), "float32"
    )


def network(setting: Setting, **kwargs: Any) -> nn.Module:
    """A ResNet-50 whose layers run so, or a smaller one."""

    def norm(x: jax.Array, activation: Any = None, residual: Any = None) -> jax.Array:
        layer = LAYERS[setting.layer](use_running_average=False, **arguments_of(setting))
        y = layer(x) if residual is None else layer(x) + residual
        return y if activation is None else activation(y)

    return networks.ResNet(norm, **kwargs)


def collectives(
    platform: str, setting: Setting, program: str, model: nn.Module, x: Any
) -> list[hlo.Collective]:
    """Those of batch norm in a model, "forward" or in a "step".

    The step takes gradients of x and of the parameters of batch norm alone: the sums of all other
    gradients are not batch norm's.
    """

    def forward(x: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
        return model.apply(variables, x, mutable=["batch_stats"])

    def step(x: jax.Array, variables: Any) -> Any:
        is_norm = jbn.linen.batch_norm_mask(variables)

        def loss(x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
            params = jax.tree.map(
                lambda p, trained: p if trained else jax.lax.stop_gradient(p), params, is_norm
            )
            y, updated = forward(x, variables | {"params": params})
            return jnp.sin(y).sum(), updated  # a loss whose gradient needs y

        return jax.grad(loss, (0, 1), has_aux=True)(x, variables["params"])

    explicit = setting.how == "jit, explicit"
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    mesh = Mesh(np.array(devices(platform, setting.devices)), (AXIS,), axis_types=(axis_type,))
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))
    variables = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, whole)),
        variables,
    )
    f, outputs = {"forward": (forward, (split, whole)), "step": (step, ((split, whole), whole))}[
        program
    ]
    if setting.mapped:
        # Flax's layer takes groups only without the check. Gradients of parameters then stay each
        # device's own, for the caller to sum with all others.
        checked = setting.how == "axis_name"
        f = jax.shard_map(
            f, mesh=mesh, in_specs=(split, whole), out_specs=outputs, check_vma=checked
        )
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        compiled = jax.jit(f).lower(x, variables).compile(COMPILER_OPTIONS.get(platform))
    return [c for c in hlo.collectives(compiled) if c.group > 1]


def record(
    setting: Setting, features: int | str, program: str, found: Sequence[hlo.Collective]
) -> Record:
    """Adds collectives up."""
    ops = dict(sorted(collections.Counter(c.op for c in found).items()))
    numbers, sent = sum(c.numbers for c in found), sum(c.sent for c in found)
    return Record(setting, features, program, len(found), numbers, sent, ops)


@functools.cache
def widths() -> dict[int, int]:
    """The layers of batch norm in a ResNet-50: how many there are of each number of features."""
    images = jax.ShapeDtypeStruct(networks.IMAGES, "float32")
    model = networks.ResNet(networks.flax_norm)
    stats = jax.eval_shape(model.init, jax.random.key(0), images)["batch_stats"]
    sizes = [v.size for path, v in jax.tree.leaves_with_path(stats) if path[-1].key == "mean"]
    return dict(sorted(collections.Counter(sizes).items()))


def measure(platform: str) -> list[Record]:
    """All settings: the step, and on the most devices the forward pass.

    Each width of a ResNet-50 is compiled once, and counts as often as the network has it.
    """
    most = device_counts(platform)[-1]
    tasks = [
        (setting, program, features)
        for setting in settings(platform)
        for program in ("forward", "step")
        if program == "step" or setting.devices == most
        for features in (widths() if program == "step" else FEATURES)
    ]
    records = []
    by_width: dict[int, list[hlo.Collective]] = {}
    for setting, program, features in tqdm(tasks, desc="communication", unit="program"):
        found = collectives(platform, setting, program, *one_layer(setting, features))
        by_width[features] = found
        if features in FEATURES:
            records.append(record(setting, features, program, found))
        if program == "step" and features == max(FEATURES):
            every = [c for width, n in widths().items() for c in n * by_width[width]]
            records.append(record(setting, RESNET50, program, every))
    return records


def counts_table(platform: str, records: Sequence[Record]) -> Table:
    """Collectives of one layer, and the numbers that go into them."""
    most = max(r.setting.devices for r in records)
    result = Table(
        title=f"Collectives of one layer in training over {most} devices, {platform}",
        caption=f"Compiled by jax {jax.__version__}, not run. Numbers: contributed by each device, "
        "over the features. Backward: a whole step less its forward pass.",
    )
    for column in ("how", "in a group", "layer", "C"):
        result.add_column(column)
    for column in ("forward", "numbers", "backward", "numbers"):
        result.add_column(column, justify="right")
    found = {(r.setting, r.features, r.program): r for r in records}
    for setting, rows in itertools.groupby(
        (r for r in records if r.program == "forward"), lambda r: r.setting
    ):
        cells: dict[tuple[str, ...], list[str]] = {}  # widths that count the same share a row
        for forward in rows:
            step = found[setting, forward.features, "step"]
            counts = tuple(
                text
                for count, numbers in (
                    (forward.collectives, forward.numbers),
                    (step.collectives - forward.collectives, step.numbers - forward.numbers),
                )
                for text in (str(count), f"{numbers / float(forward.features):.4g} C")
            )
            cells.setdefault(counts, []).append(str(forward.features))
        for counts, features in cells.items():
            where = setting.how, str(setting.group), setting.layer
            result.add_row(*where, ", ".join(features), *counts)
    return result


def bytes_table(platform: str, records: Sequence[Record]) -> Table:
    """Bytes sent, against devices; where there are groups, against devices in a group."""
    counts = device_counts(platform)
    result = Table(
        title=f"KB that each device sends in a training step, {platform}",
        caption=f"Of one layer with C features, and of the {sum(widths().values())} layers of a "
        "ResNet-50. By the collectives compiled and a ring for each. Groups: on "
        f"{counts[-1]} devices.",
    )
    for column in ("how", "layer", "C"):
        result.add_column(column)
    for n in counts:
        result.add_column(f"{n}", justify="right")
    grouped: dict[tuple[str, str], dict[Any, dict[int, float]]] = {}
    for r in records:
        layer, how, _, group = r.setting
        if r.program == "step":
            by_features = grouped.setdefault((how, layer), {})
            by_features.setdefault(r.features, {})[group] = r.sent
    for (how, layer), by_features in grouped.items():
        for features, sent in by_features.items():
            cells = [f"{sent[n] / 1e3:,.1f}" if n in sent else "" for n in counts]
            result.add_row(how, layer, str(features), *cells)
        result.add_section()
    return result


# What a step takes, and what a collective takes, by published figures. Nothing overlaps: a layer
# needs its statistics before it can go on.


@dataclasses.dataclass(frozen=True)
class Machine:
    """An accelerator in a cluster.

    Attributes:
        name: of it.
        platform: of XLA.
        images: of a ResNet-50's training, a second and a device.
        bandwidth: bytes a second that each device can send, by the size of the group.
        latency: seconds of a collective that moves nothing, by its name and the size of the group.
    """

    name: str
    platform: str
    images: float
    bandwidth: Callable[[int], float]
    latency: Callable[[str, int], float]

    def step(self, images: int) -> float:
        """Seconds of a training step with so many images on each device."""
        return images / self.images

    def seconds(self, r: Record) -> tuple[float, float]:
        """Of its collectives: for the bytes, and for the latency."""
        group = r.setting.group
        if group == 1:
            return 0.0, 0.0
        latency = sum(n * self.latency(op, group) for op, n in r.ops.items())
        return r.sent / self.bandwidth(group), latency


def nccl_latency(op: str, group: int) -> float:
    """Of NCCL's low-latency protocol, as NCCL itself models it to choose an algorithm.

    Ring, or for an all-reduce a tree if it is faster. From ncclTopoTuneModel in src/graph/tuning.cc
    of github.com/NVIDIA/nccl at b647562 (baseLat, hwLat, getNetOverhead on Intel's processors).
    """
    nodes = math.ceil(group / PER_NODE)
    within = 0.6 if nodes == 1 else 1.0
    rounds = 2 if op == "all-reduce" else 1
    between = 0 if nodes == 1 else 2 * nodes if op == "all-reduce" else nodes - 1
    ring = 6.6 + (rounds * (group - 1) - between) * within + between * 2.7
    tree = 6.8 + 2 * ((group / nodes - 1) * 0.6 + math.log2(nodes) * 5.0)
    return 1e-6 * (min(ring, tree) if op == "all-reduce" else ring)


def ici_latency(op: str, group: int) -> float:
    """1 us for each hop along both axes of the slice, there and for an all-reduce back.

    "How to Scale Your Model", part 3, "A note on ICI latency" (jax-ml.github.io/scaling-book/
    sharding). Only an axis of 16 chips is closed to a ring, in which half the hops do.
    """
    axes = TPU_TOPOLOGIES.get(group, (1, group))
    hops = sum(n // 2 if n == 16 else n - 1 for n in axes)
    return 1e-6 * hops * (2 if op == "all-reduce" else 1)


MACHINES = (
    Machine(
        "H100, 8 in a node",
        "cuda",
        # MLPerf Training 3.0, closed division, one DGX H100: tracked_stats of epoch 27 in
        # NVIDIA/results/dgxh100_ngc23.04_mxnet/resnet/result_0.txt of
        # github.com/mlcommons/training_results_v3.0.
        images=56_084 / 8,
        # NVLink: 900 GB/s, both directions together ("18x 4th Gen NVLink, 900GB/s", NVIDIA's system
        # descriptions in MLPerf). InfiniBand: eight ConnectX-7 of 400 Gb/s for eight GPUs
        # (docs.nvidia.com, "DGX BasePOD reference architecture", core components).
        bandwidth=lambda group: 900e9 / 2 if group <= PER_NODE else 400e9 / 8,
        latency=nccl_latency,
    ),
    Machine(
        "TPU v5e",
        "tpu",
        # No training of a ResNet-50 is published. 64 images move 24.01 GB through memory (the step
        # compiled with jbn's layer, benchmarks/results/networks-cuda.txt), which lasts 29 ms at
        # 819 GB/s ("TPU v5e", docs.cloud.google.com/tpu/docs/v5e): 27 % of the 197 TFLOP/s there,
        # at 3 * 8.2 GFLOP an image. A slower step makes every share smaller.
        images=64 * 819e9 / 24.01e9,
        # ICI: 400 GB/s over four links and both directions (the same page); a ring takes one link.
        bandwidth=lambda group: 400e9 / 4 / 2,
        latency=ici_latency,
    ),
)
IMAGES = (64, 256)  # on each device
LIMIT = 0.01


def share_table(machine: Machine, records: Sequence[Record]) -> Table:
    """What batch norm's collectives add to a step of a ResNet-50, by the size of the group."""
    steps = ", ".join(f"{n} images {machine.step(n) * 1e3:.1f} ms" for n in IMAGES)
    result = Table(
        title=f"Communication of a ResNet-50's batch norm, {machine.name}",
        caption=f"Statistics over so many devices (axis_name). A step without it: {steps}. Bytes "
        "over the links' published speed, and latency by a published model; not measured.",
    )
    result.add_column("devices", justify="right")
    result.add_column("layer")
    for column in ("MB", "bytes, ms", "latency, ms"):
        result.add_column(column, justify="right")
    for n in IMAGES:
        for part in ("bytes", "with latency"):
            result.add_column(f"% of {n} images, {part}", justify="right")
    shown = [
        r
        for r in records
        if (r.setting.how, r.features, r.program) == ("axis_name", RESNET50, "step")
        and r.setting.group > 1
    ]
    for r in sorted(shown, key=lambda r: r.setting.group):
        moving, waiting = machine.seconds(r)
        shares = [
            f"{100 * seconds / machine.step(n):.2f}"
            for n in IMAGES
            for seconds in (moving, moving + waiting)
        ]
        times = (f"{seconds * 1e3:.3f}" for seconds in (moving, waiting))
        layer, _, _, group = r.setting
        result.add_row(str(group), layer, f"{r.sent / 1e6:.2f}", *times, *shares)
    return result


def answers(machine: Machine, records: Sequence[Record]) -> list[str]:
    """The largest groups whose communication stays below 1 % of the step."""
    found = [
        r
        for r in records
        if (r.setting.how, r.features, r.program) == ("axis_name", RESNET50, "step")
    ]
    lines = []
    for layer, n in itertools.product(LAYERS, IMAGES):
        limit = LIMIT * machine.step(n)
        of_layer = [r for r in found if r.setting.layer == layer]
        by_bytes, by_both = (
            max(r.setting.group for r in of_layer if cost(machine.seconds(r)) <= limit)
            for cost in (lambda seconds: seconds[0], sum)
        )
        lines.append(
            f"{machine.name}, {layer}, {n} images: below {LIMIT:.0%} of a step up to {by_bytes} "
            f"devices by bytes alone, up to {by_both} with latency."
        )
    return lines


def figure(platform: str, records: Sequence[Record]) -> bytes:
    """Bytes of a ResNet-50's step against devices, as a PNG."""
    import matplotlib.figure  # which an environment that only compiles may lack

    fig = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = fig.subplots()
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for r in records:
        if r.program == "step" and r.features == RESNET50 and r.setting.group > 1:
            by_group = lines.setdefault((r.setting.layer, r.setting.how), {})
            by_group[r.setting.group] = r.sent / 1e6
    most = max(r.setting.devices for r in records)
    for layer, color in (("flax", "tab:orange"), ("jbn", "tab:blue")):
        for how, style in (("axis_name", "o-"), ("jit, auto", "x:")):
            points = sorted(lines.get((layer, how), {}).items())
            label = f"{layer}, {how}: all devices"
            axes.plot([n for n, _ in points], [mb for _, mb in points], style, c=color, label=label)
        # What a device sends does not depend on how many groups there are.
        if grouped := lines.get((layer, "axis_index_groups"), {}).get(PLOTTED_GROUP):
            label = f"{layer}, axis_index_groups: groups of {PLOTTED_GROUP}"
            axes.plot([PLOTTED_GROUP, most], [grouped, grouped], "--", c=color, label=label)
    axes.set(
        title=f"Batch norm's communication in a ResNet-50's training step, {platform}",
        xlabel="devices",
        ylabel="MB that each device sends",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = [n for n in device_counts(platform) if 1 < n <= most]
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=150)
    return png.getvalue()


def as_json(platform: str, records: Sequence[Record]) -> bytes:
    """All numbers."""
    rows = [
        r.setting._asdict() | {k: v for k, v in r._asdict().items() if k != "setting"}
        for r in records
    ]
    return json.dumps(
        {"platform": platform, "versions": results.versions(), "communication": rows}, indent=1
    ).encode()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables of one platform, and writes the files once everything is done."""
    parser = traffic.make_parser("Communication of batch norm, from compiled programs alone.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers go")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the plot of bytes goes")
    args = traffic.parse_args(parser, argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs: pip install matplotlib")
    results.check_files(parser, args)
    with contextlib.suppress(RuntimeError):  # JAX has started, with what devices it has
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    records = measure(args.platform)
    console = Console(highlight=False)
    console.print(counts_table(args.platform, records), "")
    console.print(bytes_table(args.platform, records), "")
    for machine in MACHINES:
        if machine.platform == args.platform:
            console.print(share_table(machine, records), "")
            for line in answers(machine, records):
                console.print(line, soft_wrap=True)
    if args.json:
        results.write_whole(args.json, as_json(args.platform, records))
        console.print(f"Wrote {args.json}")
    if args.plot:
        results.write_whole(args.plot, figure(args.platform, records))
        console.print(f"Wrote {args.plot}")


if __name__ == "__main__":
    main()
