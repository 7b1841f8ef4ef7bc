"""Three questions about batch normalization, answered by measuring on real digits.

1. Can we do SGD, with a batch of one?
2. What happens at test time?
3. What about biases?

The data and the training loop come from `digits.py` beside this file.

    pip install -e ".[examples]"
    python examples/questions.py
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import positive_int
from digits import Digits, State, accuracy, init_state, load, train_epoch
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import jbn
from jbn.linen import BatchNorm

LEARNING_RATE = 0.1
HIDDEN = 64
BEFORE_NORM = ("Dense_0", "Dense_1")
BATCH_SIZES = (1, 2, 4, 8, 32, 128)


class Mlp(nn.Module):
    """Two hidden layers, each a dense layer, batch norm and relu.

    A feature has one element per image here, unlike in a convolution.

    Attributes:
        use_bias: whether the dense layers before batch norm have a bias of their own.
    """

    use_bias: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, 8, 8, 1]."""
        x = images.reshape(len(images), -1)
        for _ in range(2):
            x = nn.Dense(HIDDEN, use_bias=self.use_bias)(x)
            x = BatchNorm(use_running_average=not train, momentum=0.9, activation=nn.relu)(x)
        return nn.Dense(10)(x)


@functools.partial(jax.jit, static_argnames=("net", "batch_size", "epochs"))
def train(
    net: nn.Module, digits: Digits, state: State, key: jax.Array, batch_size: int, epochs: int
) -> tuple[Any, jax.Array]:
    """Trains for some epochs; returns the variables and the loss of each step."""

    def epoch(state: State, key: jax.Array) -> tuple[State, jax.Array]:
        return train_epoch(net, digits, batch_size, state, key, LEARNING_RATE)

    state, losses = jax.lax.scan(epoch, state, jax.random.split(key, epochs))
    return state.variables, losses.ravel()


def probe(shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest |y - bias| and |dx| of batch norm, for random x, bias and dy."""
    x_key, bias_key, dy_key = jax.random.split(key, 3)
    x, dy = jax.random.normal(x_key, shape), jax.random.normal(dy_key, shape)
    bias = jax.random.normal(bias_key, shape[-1:])
    y, vjp = jax.vjp(lambda x: jbn.batch_norm(x, jnp.ones_like(bias), bias)[0], x)
    (dx,) = vjp(dy)
    return jnp.abs(y - bias).max(), jnp.abs(dx).max()


def batch_of_one(digits: Digits, key: jax.Array, epochs: int, console: Console) -> None:
    """Question 1: what batch norm passes on, and what a network learns, by batch size."""
    table = Table(
        title="1. Can we do SGD, with a batch of one?",
        caption=f"Each trained for {epochs} epochs. Guessing gives 10 %.",
    )
    for column in ("batch size", "max |y - bias|", "max |dx|", "test accuracy, %"):
        table.add_column(column, justify="right")
    net = Mlp()
    state = init_state(net, digits.train_images, key)
    percent = {}
    for batch_size in BATCH_SIZES:
        variables, _ = train(net, digits, state, key, batch_size, epochs)
        recognized = accuracy(net, variables, digits.test_images, digits.test_labels)
        percent[batch_size] = 100 * float(recognized)
        output, dx = probe((batch_size, HIDDEN), key)
        table.add_row(f"{batch_size}", f"{output:.3g}", f"{dx:.3g}", f"{percent[batch_size]:.1f}")
    console.print(table)
    output, dx = probe((1, 8, 8, HIDDEN), key)
    console.print(
        f"No: one image is its own mean, so the output is the bias, no gradient passes, and the "
        f"network ends at {percent[1]:.1f} %, against {percent[32]:.1f} % with 32 images; only a "
        f"convolution has more to average over, the pixels of the one image (8x8: max |y - bias| "
        f"{output:.3g}, max |dx| {dx:.3g}).\n"
    )


def pooled_statistics(net: nn.Module, variables: Any, digits: Digits, batch_size: int) -> Any:
    """`batch_stats` of the whole training set, normalized batch by batch as in training.

    Each layer hands out its batch's moments in the collection `batch_moments`; merged, they are
    those of all images together, although the last batch is smaller.
    """

    @jax.jit
    def batch_moments(images: jax.Array) -> Any:
        collections = ["batch_stats", "batch_moments"]
        _, updated = net.apply(variables, images, train=True, mutable=collections)
        return updated["batch_moments"]

    def is_moments(node: Any) -> bool:
        return isinstance(node, jbn.Moments)

    @jax.jit
    def merge(a: Any, b: Any) -> Any:
        return jax.tree.map(jbn.merge_moments, a, b, is_leaf=is_moments)

    starts = range(0, len(digits.train_images), batch_size)
    batches = (digits.train_images[start : start + batch_size] for start in starts)
    pooled = functools.reduce(merge, map(batch_moments, batches))
    return {
        name: {"mean": layer["moments"].mean, "var": layer["moments"].var}
        for name, layer in pooled.items()
    }


def test_time(digits: Digits, key: jax.Array, epochs: int, console: Console) -> None:
    """Question 2: one trained network, tested with three kinds of statistics."""
    net, batch_size = Mlp(), 32
    state = init_state(net, digits.train_images, key)
    variables, _ = train(net, digits, state, key, batch_size, epochs)
    pooled = {**variables, "batch_stats": pooled_statistics(net, variables, digits, batch_size)}

    labels = np.asarray(digits.test_labels)
    everything = np.arange(len(labels))
    groups = {
        "batches of 1": np.split(everything, len(labels)),
        "of 8": np.split(everything, range(8, len(labels), 8)),
        f"all {len(labels)}": [everything],
        "one class each": [np.flatnonzero(labels == label) for label in range(10)],
    }

    @functools.partial(jax.jit, static_argnames="train")
    def correct(variables: Any, batch: np.ndarray, train: bool) -> jax.Array:
        # With train=True batch norm takes the batch's statistics; the updated ones are dropped.
        images = digits.test_images[batch]
        logits, _ = net.apply(variables, images, train=train, mutable=["batch_stats"])
        return (jnp.argmax(logits, axis=-1) == digits.test_labels[batch]).sum()

    def percents(variables: Any, train: bool) -> list[float]:
        counts = (
            sum(int(correct(variables, batch, train)) for batch in group)
            for group in groups.values()
        )
        return [100 * count / len(labels) for count in counts]

    rows = {
        "of the test batch": percents(variables, train=True),
        "running average": percents(variables, train=False),
        "of the training set": percents(pooled, train=False),
    }
    table = Table(title="2. What happens at test time? Test accuracy, %")
    table.add_column("statistics")
    for name in groups:
        table.add_column(name, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in values))
    console.print(table)
    (alone, _, together, one_class), (running, *_), (exact, *_) = rows.values()
    console.print(
        f"With the test batch's own statistics an answer depends on the rest of the batch, "
        f"{together:.1f} % all together, {one_class:.1f} % class by class and {alone:.1f} % alone; "
        f"with fixed ones it does not, {running:.1f} % with the running average of the last "
        f"batches and {exact:.1f} % with the statistics of the whole training set.\n"
    )


def biases(digits: Digits, key: jax.Array, epochs: int, console: Console) -> None:
    """Question 3: the dense layers before batch norm, with a bias of their own and without.

    To be run under `jax.enable_x64`: float64 leaves little rounding beside what should be zero.
    """
    init_key, bias_key, train_key = jax.random.split(key, 3)
    batch_size = 32
    biased, bare = Mlp(use_bias=True), Mlp(use_bias=False)
    state = init_state(biased, digits.train_images, init_key)
    digits = digits._replace(train_images=digits.train_images.astype(jnp.float64))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.variables)
    params = variables["params"]

    @jax.jit
    def outputs(params: Any) -> tuple[jax.Array, jax.Array]:
        """The loss and logits of one batch."""
        images, labels = digits.train_images[:batch_size], digits.train_labels[:batch_size]
        logits, _ = biased.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    grads, logits = jax.jit(jax.grad(outputs, has_aux=True))(params)
    bias_grad, weight_grad = (
        max(np.abs(grads[layer][name]).max() for layer in BEFORE_NORM)
        for name in ("bias", "kernel")
    )

    # The same weights with random biases, and with none.
    random, none = dict(params), dict(params)
    for layer, layer_key in zip(BEFORE_NORM, jax.random.split(bias_key), strict=True):
        kernel, bias = params[layer]["kernel"], params[layer]["bias"]
        random[layer] = {"kernel": kernel, "bias": jax.random.normal(layer_key, bias.shape)}
        none[layer] = {"kernel": kernel}
    output_change = np.abs(outputs(random)[1] - logits).max()

    losses = []
    for net, start in ((biased, random), (bare, none)):
        start = state._replace(variables={**variables, "params": start})
        losses.append(train(net, digits, start, train_key, batch_size, epochs)[1])
    loss_change = np.abs(losses[0] - losses[1]).max()

    table = Table(title="3. What about biases?", caption="A bias before batch norm, in float64.")
    table.add_column("measured")
    table.add_column("value", justify="right")
    rows = {
        "largest gradient of a weight": weight_grad,
        "largest gradient of a bias": bias_grad,
        "largest logit": np.abs(logits).max(),
        "largest change of a logit by random biases": output_change,
        f"largest loss in a run of {len(losses[0])} steps": losses[1].max(),
        "largest change of a loss by them": loss_change,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:.2g}")
    console.print(table)
    console.print(
        f"Batch norm subtracts it, so it is left out: its gradient is "
        f"{bias_grad / weight_grad:.0e} of a weight's, random values of it change no output by "
        f"more than {output_change:.0e}, and no loss of {len(losses[0])} steps by more than "
        f"{loss_change:.0e}; the bias of batch norm itself takes its place."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Answers the questions one after the other."""
    parser = argparse.ArgumentParser(
        description="Three questions about batch norm, answered by measuring on digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--epochs", type=positive_int, default=10, help="of each training run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of images")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, not {args.seed}")
    digits, key, console = load(), jax.random.key(args.seed), Console(highlight=False)
    batch_of_one(digits, key, args.epochs, console)
    test_time(digits, key, args.epochs, console)
    with jax.enable_x64(True):
        biases(digits, key, args.epochs, console)


if __name__ == "__main__":
    main()
