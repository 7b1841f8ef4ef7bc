"""What jbn costs beside arithmetic: tracing, compiling and calling, against Flax's layer.

    python -m benchmarks.overhead

A step forward and backward through 100 layers is traced, lowered and compiled from empty caches,
in turns, so that a busy machine slows both alike; and one layer of 256x128 is called.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.traffic import LAYERS

SHAPE = (256, 128)


class Network(nn.Module):
    """Dense layers, each with batch norm and relu."""

    layer: str
    layers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, C] to the same."""
        fused = {"activation": nn.relu} if self.layer == "jbn" else {}
        for _ in range(self.layers):
            x = nn.Dense(x.shape[-1], use_bias=False)(x)
            x = LAYERS[self.layer](use_running_average=False, **fused)(x)
            x = x if fused else nn.relu(x)
        return x


class Build(NamedTuple):
    """Seconds to make a program."""

    trace: float
    lower: float
    compile: float


def step(model: nn.Module, variables: Any, x: jax.Array) -> Any:
    """Updated statistics and gradients of a loss."""

    def loss_fn(params: Any, x: jax.Array) -> Any:
        y, updated = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.square(y).mean(), updated

    return jax.grad(loss_fn, (0, 1), has_aux=True)(variables["params"], x)


def arguments(model: nn.Module) -> tuple[Any, jax.Array]:
    """Variables and an input."""
    x = jax.random.normal(jax.random.key(1), SHAPE)
    return jax.jit(model.init)(jax.random.key(0), x), x


def build(model: nn.Module, args: tuple[Any, ...]) -> Build:
    """Times a build of the step from empty caches."""
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(functools.partial(step, model)).trace(*args)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return Build(*(b - a for a, b in itertools.pairwise(times)))


def builds(layers: int, rounds: int) -> dict[str, list[Build]]:
    """Builds of both networks, in turns; a first round, which imports, is left out."""
    models = {name: Network(name, layers) for name in LAYERS}
    args = {name: arguments(model) for name, model in models.items()}
    found: dict[str, list[Build]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name, model in models.items():
            built = build(model, args[name])
            if i:
                found[name].append(built)
    return found


def forward(model: nn.Module, variables: Any, x: jax.Array, _: jax.Array) -> Any:
    """The output and the updated statistics."""
    return model.apply(variables, x, mutable=["batch_stats"])


def forward_and_backward(model: nn.Module, variables: Any, x: jax.Array, dy: jax.Array) -> Any:
    """The same and the cotangents of parameters and input."""

    def f(params: Any, x: jax.Array) -> Any:
        return forward(model, {**variables, "params": params}, x, dy)

    y, pull, updated = jax.vjp(f, variables["params"], x, has_aux=True)
    return y, updated, pull(dy)


def calls(rounds: int, repeats: int = 200) -> dict[str, dict[str, list[float]]]:
    """Seconds of a call of one layer, by what is called and the layer, in turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for called in (forward, forward_and_backward):
        functions: dict[str, Callable[[], Any]] = {}
        for name, layer in LAYERS.items():
            model = layer(use_running_average=False)
            variables, x = arguments(model)
            function = jax.jit(functools.partial(called, model))
            functions[name] = functools.partial(function, variables, x, x)
            jax.block_until_ready(functions[name]())
        times = found[called.__name__.replace("_", " ")] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                for _ in range(repeats):
                    jax.block_until_ready(function())
                times[name].append((time.perf_counter() - start) / repeats)
    return found


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of the ratios of what was measured one right after the other."""
    pairs = zip(numerators, denominators, strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(layers: int = 100, rounds: int = 5) -> Table:
    """Medians, and the medians of the ratios."""
    result = Table(
        title=f"Overhead on {jax.default_backend()}: medians of {rounds} rounds",
        caption=f"jax {jax.__version__}, x = {SHAPE} float32.",
    )
    result.add_column("")
    for column in ("flax", "jbn", "jbn / flax"):
        result.add_column(column, justify="right")

    def add(name: str, flax: Sequence[float], ours: Sequence[float], unit: str) -> None:
        scale = {"s": 1, "us": 1e6}[unit]
        medians = (f"{statistics.median(v) * scale:.3g} {unit}" for v in (flax, ours))
        result.add_row(name, *medians, f"{ratio(ours, flax):.2f}")

    built = builds(layers, rounds)
    for part in Build._fields:
        flax, ours = ([getattr(b, part) for b in built[name]] for name in ("flax", "jbn"))
        add(f"{part}, {layers} layers", flax, ours, "s")
    flax, ours = ([sum(b) for b in built[name]] for name in ("flax", "jbn"))
    add(f"all, {layers} layers", flax, ours, "s")
    result.add_section()
    for kind, times in calls(rounds).items():
        add(f"call, {kind}", times["flax"], times["jbn"], "us")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description="Time to trace, compile and call jbn's layer and Flax's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layers", type=int, default=100, help="of the network that is compiled")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement")
    args = parser.parse_args(argv)
    Console().print(table(args.layers, args.rounds))


if __name__ == "__main__":
    main()
