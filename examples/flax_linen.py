"""Training on digits with `jbn.linen.BatchNorm`, saved and restored; `flax_nnx.py` is its twin.

Run it by `pip install -e ".[examples]" && python examples/flax_linen.py`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits
from tqdm import tqdm

from jbn.linen import BatchNorm

BATCH_SIZE, TEST_SIZE = 64, 450
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class ConvNet(nn.Module):
    """Three convolutions from 8x8 pixels down to 2x2, averaged, and a dense layer."""

    momentum: float = 0.9  # BatchNorm's default, 0.99, is too slow for the 21 steps of an epoch

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, 8, 8, 1]."""
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            x = nn.Conv(features, (3, 3), stride, use_bias=False)(x)  # batch norm adds the bias
            x = BatchNorm(not train, momentum=self.momentum, activation=nn.relu)(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


class TrainState(train_state.TrainState):
    """The parameters, the optimizer's state and the running statistics: all that is saved."""

    batch_stats: Any


@jax.jit
def init_state(seed: int) -> TrainState:
    """An untrained network."""
    variables = ConvNet().init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)
    return TrainState.create(apply_fn=ConvNet().apply, tx=OPTIMIZER, **variables)


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, Any]:
    """One step, normalizing by the batch; returns the new state and the loss."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def eval_step(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Percentage of the images recognized, normalizing by the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    return 100 * (logits.argmax(axis=-1) == labels).mean()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked; the checkpoint's folder is there and can be written afterwards."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--checkpoint-dir", type=Path, default="results/flax_linen", help="folder")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be 1 or more, not {args.epochs}")
    args.path = args.checkpoint_dir.absolute() / "digits"  # relative, Orbax would refuse it
    if args.path.exists() and not (args.path / "_CHECKPOINT_METADATA").exists():
        parser.error(f"--checkpoint-dir: {args.path} is there and no checkpoint; choose another")
    try:
        args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.checkpoint_dir).close()
    except OSError as error:
        parser.error(f"--checkpoint-dir must be a folder that can be created and written: {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Trains, saves, restores, and prints the test accuracies."""
    args = parse_args(argv)
    images, labels = map(jnp.asarray, load_digits(return_X_y=True))
    images = images.reshape(-1, 8, 8, 1) / 16
    test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [TEST_SIZE])
    state = init_state(seed=0)
    for epoch in tqdm(range(1, args.epochs + 1), unit="epoch"):
        losses, order = [], np.random.default_rng(epoch).permutation(train)
        for batch in order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            state, loss = train_step(state, images[batch], labels[batch])
            losses.append(loss)
        accuracy = eval_step(state, images[test], labels[test])
        tqdm.write(f"epoch {epoch}: loss {np.mean(losses):.3f}, test accuracy {accuracy:.1f} %")

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(args.path, state, force=True)  # atomic, in the background
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(args.path, init_state(seed=1))
    print(
        f"from {args.path}: test accuracy {eval_step(restored, images[test], labels[test]):.1f} %"
    )


if __name__ == "__main__":
    main()
