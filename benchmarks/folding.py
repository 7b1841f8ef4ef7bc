"""What folding batch norm into the convolutions before it saves at inference.

    python -m benchmarks.folding

A small ResNet with Flax's layer and with jbn's, before and after: kernels, traffic and temporaries
of the compiled program, and on the CPU the time of a call, all taking turns.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jbn.linen
from benchmarks import hlo, networks, speed, traffic
from benchmarks.peers import Prepared

IMAGES = (32, 64, 64, 3)
NORMS = {"flax": networks.flax_norm, "jbn": networks.jbn_norm}
ROUNDS = 20


class Inference(NamedTuple):
    """A model at inference: its `apply`, and its variables."""

    apply_fn: Any
    variables: Any


def network(layer: str, **options: Any) -> nn.Module:
    """A ResNet with four bottlenecks, or another, that runs by its running statistics."""
    norm = functools.partial(NORMS[layer], inference=True)
    return networks.ResNet(norm, **({"stages": (2, 2), "features": 32} | options))


def random_variables(model: nn.Module, images: Any) -> Any:
    """As after training: all parameters and statistics differ from their initial values."""
    variables = jax.jit(model.init)(jax.random.key(0), images)
    leaves, treedef = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = (0.3 * abs(jax.random.normal(k, v.shape)) for k, v in zip(keys, leaves, strict=True))
    return jax.tree.map(jnp.add, variables, jax.tree.unflatten(treedef, noise))


def measure(platform: str, rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Each layer, before and after."""
    images = jax.random.normal(jax.random.key(2), IMAGES)
    rows: dict[str, dict[str, Any]] = {}
    prepared: dict[str, Prepared] = {}
    for layer in NORMS:
        model = network(layer)
        variables = random_variables(model, images)
        folded = jbn.linen.fold(model, variables, images)
        left = [norm.path for norm in folded.report if norm.into is None]
        stages = {
            layer: Inference(model.apply, variables),
            f"{layer}, folded": Inference(folded.apply_fn, folded.variables),
        }
        for name, (apply_fn, weights) in stages.items():
            compiled = traffic.compile_for(platform, apply_fn, weights, images)
            computations, _ = hlo.parse(compiled.as_text())
            rows[name] = {
                "batch norms": len(left) if name != layer else len(folded.report),
                "kernels": len(hlo.kernels(compiled)),
                "rsqrt": sum(v.op == "rsqrt" for c in computations.values() for v in c.values()),
                "traffic": hlo.moved(compiled),
                "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            }
            if platform == "cpu":
                call = functools.partial(compiled, weights, images)
                prepared[name] = Prepared(call, jax.block_until_ready, None, -1)
    turns = speed.take_turns(prepared, rounds) if prepared else {}
    for name, seconds in turns.items():
        rows[name]["seconds"] = np.quantile(seconds, (0.25, 0.5, 0.75))
    return rows


def table(platform: str, rows: dict[str, dict[str, Any]]) -> Table:
    """The rows, as printed."""
    result = Table(
        title=f"Folding batch norm into convolutions, {platform}",
        caption=f"A ResNet with four bottlenecks on {IMAGES} float32, compiled by jax "
        f"{jax.__version__}. Time: median of {ROUNDS} and quartiles, all taking turns.",
    )
    result.add_column("layer")
    for column in ("batch norms", "kernels", "rsqrt", "traffic, MB", "temporaries, MB", "time, ms"):
        result.add_column(column, justify="right")
    for name, row in rows.items():
        low, median, high = row.get("seconds", (0, 0, 0))
        result.add_row(
            name,
            *(f"{row[key]}" for key in ("batch norms", "kernels", "rsqrt")),
            *(f"{row[key] / 1e6:.1f}" for key in ("traffic", "temporaries")),
            f"{median * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})" if median else "",
        )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of one platform."""
    parser = traffic.make_parser("What folding batch norm saves at inference.")
    args = traffic.parse_args(parser, argv)
    Console().print(table(args.platform, measure(args.platform)))


if __name__ == "__main__":
    main()
