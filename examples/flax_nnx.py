"""A training loop with `jbn.nnx.BatchNorm` to copy from; `flax_linen.py` is its twin in Linen.

A small network learns scikit-learn's bundled digits, is saved with its `BatchStat`s and restored.

    pip install -e ".[examples]" && python examples/flax_nnx.py
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
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

from jbn.nnx import BatchNorm

BATCH_SIZE, TEST_SIZE = 64, 450
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


class ConvNet(nnx.Module):
    """Three convolutions from 8x8 pixels down to 2x2, averaged, and a dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        layers, channels = [], 1
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            # Batch norm adds the bias.
            layers.append(nnx.Conv(channels, features, (3, 3), stride, use_bias=False, rngs=rngs))
            # The default momentum, 0.99, is too slow for the 21 steps of an epoch.
            layers.append(BatchNorm(features, momentum=0.9, activation=nnx.relu, rngs=rngs))
            channels = features
        self.layers = nnx.Sequential(*layers)
        self.dense = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [N, 10] of images [N, 8, 8, 1]."""
        return self.dense(self.layers(x).mean(axis=(1, 2)))


def init_state(seed: int) -> dict[str, Any]:
    """An untrained network and its optimizer: all that is saved."""
    model = ConvNet(nnx.Rngs(seed))
    return {"model": model, "optimizer": nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)}


@nnx.jit
def train_step(
    model: ConvNet, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """One step, normalizing by the batch; updates the model and optimizer, returns the loss."""

    def loss_fn(model: ConvNet) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def eval_step(model: ConvNet, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Percentage of the images recognized, normalizing by the running statistics."""
    logits = nnx.view(model, use_running_average=True)(images)
    return 100 * (logits.argmax(axis=-1) == labels).mean()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked; the checkpoint's folder is there and can be written afterwards."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--checkpoint-dir", type=Path, default="results/flax_nnx", help="folder")
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
    model, optimizer = state["model"], state["optimizer"]
    for epoch in tqdm(range(1, args.epochs + 1), unit="epoch"):
        losses, order = [], np.random.default_rng(epoch).permutation(train)
        for batch in order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            losses.append(train_step(model, optimizer, images[batch], labels[batch]))
        accuracy = eval_step(model, images[test], labels[test])
        tqdm.write(f"epoch {epoch}: loss {np.mean(losses):.3f}, test accuracy {accuracy:.1f} %")

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(args.path, nnx.state(state), force=True)  # atomic, in the background
        checkpointer.wait_until_finished()
        restored = init_state(seed=1)
        nnx.update(restored, checkpointer.restore(args.path, nnx.state(restored)))
    accuracy = eval_step(restored["model"], images[test], labels[test])
    print(f"from {args.path}: test accuracy {accuracy:.1f} %")


if __name__ == "__main__":
    main()
