"""Memory traffic of batch norm, from compiled programs alone: exact, and no device needed.

    python -m benchmarks.traffic --platform cuda

In units of the bytes of x: what the forward moves, what it keeps for the backward, what the
backward moves as a program of its own (in a network the loss lies between the two, so XLA cannot
fuse them), and the temporaries that each allocates.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import jbn.linen
from benchmarks import hlo

SHAPE = (128, 28, 28, 128)  # the third stage of a ResNet-50
ACTIVATIONS = {"": None, "relu": jax.nn.relu, "gelu": jax.nn.gelu}
LAYERS = {"flax": nn.BatchNorm, "jbn": jbn.linen.BatchNorm}
# What compiles for a device that is not there: a module to look for, and its packages.
COMPILERS = {
    "cpu": ("jaxlib", "jaxlib"),
    "cuda": (
        "jax_plugins.xla_cuda12",
        f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} "
        "nvidia-cuda-nvcc-cu12",
    ),
    "tpu": ("libtpu", "libtpu"),
}


class Traffic(NamedTuple):
    """Bytes moved, kept and allocated, over the bytes of x."""

    forward: float
    forward_temporaries: float
    kept: float
    backward: float
    backward_temporaries: float


def missing(platform: str) -> str:
    """The packages to install before this platform can be compiled for; empty if none."""
    module, packages = COMPILERS[platform]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    return "" if found else packages


@functools.cache
def target(platform: str) -> NamedSharding | None:
    """One device of the platform to compile for; None for the CPU at hand."""
    if platform == "cpu":
        return None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if platform == "cuda":
        config = (Path(__file__).parent / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology="1x1x1", target_config=config
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("device",)), PartitionSpec())


def compile_for(platform: str, f: Callable[..., Any], *args: Any) -> Any:
    """Compiles f for arguments of these shapes and dtypes."""
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=target(platform)), args
    )
    return jax.jit(f).lower(*args).compile()


def measure(platform: str, f: Callable[..., jax.Array], x: Any, *args: Any) -> Traffic:
    """The traffic of y = f(x, *args) and of its gradient."""
    unit = x.size * x.dtype.itemsize
    forward = compile_for(platform, f, x, *args)
    y, pull = jax.eval_shape(functools.partial(jax.vjp, f), x, *args)
    backward = compile_for(platform, lambda pull, dy: pull(dy), pull, y)
    kept = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(pull))

    def temporaries(compiled: Any) -> float:
        return compiled.memory_analysis().temp_size_in_bytes / unit

    return Traffic(
        hlo.moved(forward) / unit,
        temporaries(forward),
        kept / unit,
        hlo.moved(backward) / unit,
        temporaries(backward),
    )


def batch_norm(name: str, activation: str, add: bool, dtype: Any) -> Callable[..., jax.Array]:
    """A layer in training as a function of x (and a residual) and its parameters."""
    function = ACTIVATIONS[activation]
    fused = {"activation": function} if name == "jbn" else {}
    layer = LAYERS[name](use_running_average=False, dtype=dtype, **fused)

    def f(x: jax.Array, params: Any, stats: Any, *residual: jax.Array) -> jax.Array:
        variables = {"params": params, "batch_stats": stats}
        if fused:
            kwargs = {"residual": residual[0]} if add else {}
            return layer.apply(variables, x, mutable=["batch_stats"], **kwargs)[0]
        y = layer.apply(variables, x, mutable=["batch_stats"])[0]
        y = y + residual[0] if add else y
        return y if function is None else function(y)

    return f


def table(platform: str, dtypes: Sequence[str], shape: tuple[int, ...] = SHAPE) -> Table:
    """Every layer, dtype and activation."""
    result = Table(
        title=f"Traffic of batch norm on {platform}, in units of x = {shape}",
        caption=f"Compiled by jax {jax.__version__}, not run. Temp: temporary memory.",
    )
    for column in ("dtype", "then", "layer"):
        result.add_column(column)
    for column in ("forward", "temp", "kept", "backward", "temp"):
        result.add_column(column, justify="right")
    features = jax.ShapeDtypeStruct(shape[-1:], "float32")
    params = {"scale": features, "bias": features}
    stats = {"mean": features, "var": features}
    for dtype in dtypes:
        x = jax.ShapeDtypeStruct(shape, dtype)
        for activation, add in (("", False), ("relu", False), ("gelu", False), ("relu", True)):
            for name in LAYERS:
                f = batch_norm(name, activation, add, dtype)
                traffic = measure(platform, f, x, params, stats, *([x] if add else []))
                after = f"add {activation}" if add else activation
                result.add_row(dtype, after, name, *(f"{v:.2f}" for v in traffic))
        result.add_section()
    return result


def make_parser(description: str) -> argparse.ArgumentParser:
    """With the flag of what compiles for any platform."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--platform", choices=sorted(COMPILERS), default="cpu", help="compiled for")
    return parser


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, once the platform's compiler is found."""
    args = parser.parse_args(argv)
    if packages := missing(args.platform):
        parser.error(f"--platform {args.platform} needs: pip install {packages}")
    jax.config.update("jax_platforms", "cpu")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of one platform."""
    parser = make_parser("Memory traffic of batch norm, from compiled programs alone.")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="of x",
    )
    args = parse_args(parser, argv)
    Console().print(table(args.platform, args.dtypes))


if __name__ == "__main__":
    main()
