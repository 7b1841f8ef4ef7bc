"""To be a part of common.py."""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import CLASSES, Dataset
from flax import linen as nn

from jbn.linen import BatchNorm

STAGES = ((8, 1), (16, 2), (32, 2))  # features and stride of those of `SmallResNet`
FINAL_RATE = 0.01  # what is left of the learning rate at the end of `training`


class SmallResNet(nn.Module):
    """A narrow ResNet-14, which two cores train in a minute.

    As He et al. 2015, arXiv:1512.03385, section 4.2 with n = 2: a 3x3 convolution, three stages of
    two blocks with 8, 16 and 32 features, halving the image between them, and a dense layer on the
    average. Unlike there the first convolution halves an image of more than 16 pixels too, and a
    shortcut that changes shape is a convolution.

    Attributes:
        batch_norm: whether batch normalization follows each convolution, and not a bias.
        activation: elementwise.
        momentum: of batch norm's running statistics.
    """

    batch_norm: bool
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, H, W, C]."""

        def layer(
            x: jax.Array,
            features: int,
            size: int = 3,
            stride: int = 1,
            activation: Callable[[jax.Array], jax.Array] | None = self.activation,
            residual: jax.Array | None = None,
        ) -> jax.Array:
            x = nn.Conv(
                features,
                (size, size),
                stride,
                padding=size // 2,
                use_bias=not self.batch_norm,
                kernel_init=nn.initializers.he_normal(),
            )(x)
            if self.batch_norm:
                norm = BatchNorm(not train, momentum=self.momentum, activation=activation)
                return norm(x, residual=residual)
            x = x if residual is None else x + residual
            return x if activation is None else activation(x)

        x = layer(images, STAGES[0][0], stride=2 if images.shape[1] > 16 else 1)
        for features, first_stride in STAGES:
            for stride in (first_stride, 1):
                y = layer(x, features, stride=stride)
                if stride != 1:
                    x = layer(x, features, size=1, stride=stride, activation=None)
                x = layer(y, features, residual=x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def on_device(data: Dataset) -> Dataset:
    """The data as arrays of JAX, images as floats.

    Each channel of the images to train on has mean 0 and variance 1.
    """
    mean, std = (f(data.train_images, axis=(0, 1, 2), dtype=float) for f in (np.mean, np.std))

    def standardize(images: np.ndarray) -> jax.Array:
        return jnp.asarray((images - mean.astype(np.float32)) / std.astype(np.float32))

    return data._replace(
        train_images=standardize(data.train_images),
        train_labels=jnp.asarray(data.train_labels),
        test_images=standardize(data.test_images),
        test_labels=jnp.asarray(data.test_labels),
    )


@functools.partial(jax.jit, static_argnames="net")
def init(net: nn.Module, seed: int, images: jax.Array) -> tuple[Any, optax.OptState]:
    """The variables of an untrained network, and the state of its optimizer."""
    key = jax.random.key(seed, impl="rbg")  # compiles in a quarter of the default's time
    variables: Any = net.init(key, images[:1], train=False)
    # The state of SGD does not depend on the learning rate, which `train_step` is given.
    return variables, optax.sgd(0.0, momentum=0.9).init(variables["params"])


@functools.partial(jax.jit, static_argnames="net")
def train_step(
    net: nn.Module,
    variables: Any,
    opt_state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    batch: jax.Array,
    learning_rate: jax.Array | float,
) -> tuple[Any, optax.OptState, jax.Array]:
    """One step of SGD with momentum 0.9.

    Args:
        net: the network, called with `train=True`.
        variables: of the network, before.
        opt_state: of the optimizer, before.
        images: [N, H, W, C], all there are.
        labels: [N].
        batch: [batch size], the indices of those to take.
        learning_rate: traced, so that another one does not compile again.

    Returns:
        The variables and the state after, and the loss before.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = net.apply(
            {**variables, "params": params}, images[batch], train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch])
        return losses.mean(), updated

    params = variables["params"]
    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.sgd(learning_rate, momentum=0.9).update(grads, opt_state, params)
    return {**batch_stats, "params": optax.apply_updates(params, updates)}, opt_state, loss


def training(
    net: nn.Module,
    data: Dataset,
    *,
    seed: int,
    learning_rate: float,
    batch_size: int,
    steps: int,
) -> Iterator[tuple[Any, jax.Array]]:
    """Trains a network from its start.

    The learning rate decays exponentially, to `FINAL_RATE` of itself.

    Args:
        net: the network.
        data: as of `on_device`.
        seed: decides the initial weights and the order of the images.
        learning_rate: of the first step.
        batch_size: images in a step; what does not fill one is left out of that epoch.
        steps: how many.

    Yields:
        After each step the network's variables, and the loss before it.
    """
    images, labels = data.train_images, data.train_labels
    count = len(labels)
    rng = np.random.default_rng(seed)
    epochs = -(-steps // (count // batch_size))
    whole = count // batch_size * batch_size
    order = np.concatenate([rng.permutation(count)[:whole] for _ in range(epochs)])
    variables, opt_state = init(net, seed, images)
    # In Python: on a CPU the convolutions of a `lax.scan` take 8 times as long.
    for step, batch in enumerate(order.reshape(-1, batch_size)[:steps]):
        rate = learning_rate * FINAL_RATE ** (step / steps)
        variables, opt_state, loss = train_step(
            net, variables, opt_state, images, labels, batch, rate
        )
        yield variables, loss


@functools.partial(jax.jit, static_argnames=("net", "train"))
def accuracy(
    net: nn.Module, variables: Any, images: jax.Array, labels: jax.Array, train: bool = False
) -> jax.Array:
    """Share of the images [N, H, W, C] that are recognized, in training mode or at inference."""
    logits, _ = net.apply(variables, images, train=train, mutable=["batch_stats"])
    return (logits.argmax(-1) == labels).mean()


def read_results(
    parser: argparse.ArgumentParser, path: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """The results of an interrupted run of the same settings, to go on with, or empty ones.

    Args:
        parser: tells of a file that does not fit.
        path: of the results, as JSON.
        settings: all that decides the run, as JSON can hold it, by the names of the flags.
    """
    if not path.exists():
        return {"settings": settings}
    try:
        results: Any = json.loads(path.read_bytes())
        saved = dict(results["settings"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(
            f"--output: {path} is damaged, or not of this script ({error}); move it away, or "
            "choose another folder"
        )
    if saved != settings:
        names = [name for name in {**settings, **saved} if saved.get(name) != settings.get(name)]
        was, now = (
            ", ".join(f"--{name.replace('_', '-')} {of.get(name)}" for name in names)
            for of in (saved, settings)
        )
        parser.error(
            f"--output: {path} has results of {was}, not of {now}; go on with the flags of that "
            "run, or choose another folder"
        )
    return results
