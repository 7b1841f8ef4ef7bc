"""ResNet-20 on CIFAR-10: a whole training script, to copy and to change.

Data by Grain, augmented by padding, cropping and mirroring; SGD with Nesterov momentum, warm-up and
cosine decay, and weight decay on all but batch norm's parameters; checkpoints by Orbax; logs for
TensorBoard; one batch over all devices.

    pip install -e ".[examples]" tensorboard
    python examples/cifar_resnet.py --data-dir data
    tensorboard --logdir results/cifar_resnet/tensorboard

The defaults are for the accuracy of He et al. 2015, which takes an accelerator; on two cores,
`--epochs 8` takes about 20 minutes. Killed at any moment, the same command goes on from the last
checkpoint with the losses that would have been (on a GPU, to the bit only with
XLA_FLAGS=--xla_gpu_deterministic_ops=true). A run that diverges is reported as a result, and its
last good checkpoint is kept.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from common import (
    CLASSES,
    Dataset,
    HelpFormatter,
    add_data_flags,
    check_folder,
    checkpoints,
    dataset_of,
    ending_in_one_line,
    output_folder,
    positive_float,
    positive_int,
    restore,
    save,
    seed,
    write_whole,
)
from flax import linen as nn
from flax.training import train_state
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore # made on import
from tqdm import tqdm

from jbn.linen import BatchNorm, batch_norm_mask

LOG_EVERY = 50  # steps between points in TensorBoard, and between checks that training goes well
MIRRORED = ("cifar10", "fashion-mnist")  # a mirrored digit is none
DECISIVE = (  # flags; what they and the data are, a run is
    "network",
    "epochs",
    "batch_size",
    "learning_rate",
    "warmup",
    "weight_decay",
    "label_smoothing",
    "bfloat16",
    "seed",
)
PAPER = 91.25  # test accuracy of ResNet-20 on CIFAR-10, in percent: He et al. 2015, Table 6


class Block(nn.Module):
    """Convolutions with a shortcut around them (He et al. 2015, arXiv:1512.03385, Figure 5).

    Attributes:
        features: of the 3x3 convolutions.
        stride: of the first of them (in a bottleneck that is "v1.5", as is usual today).
        bottleneck: whether one 3x3 convolution between two of 1x1 takes the place of two of 3x3.
        projection: whether a shortcut that changes shape is a convolution (the paper's option B),
            or skips pixels and appends features of zeros (option A).
        dtype: of the computation.
    """

    features: int
    stride: int
    bottleneck: bool
    projection: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[N, H, W, C] to [N, H / stride, W / stride, features, or 4 features of a bottleneck]."""
        conv, norm = layers(train, self.dtype)
        if self.bottleneck:
            y = norm(activation=nn.relu)(conv(self.features, 1)(x))
            y = norm(activation=nn.relu)(conv(self.features, 3, self.stride)(y))
            y = conv(4 * self.features, 1)(y)
        else:
            y = norm(activation=nn.relu)(conv(self.features, 3, self.stride)(x))
            y = conv(self.features, 3)(y)
        if x.shape != y.shape and self.projection:
            x = norm()(conv(y.shape[-1], 1, self.stride)(x))
        elif x.shape != y.shape:
            x = x[:, :: self.stride, :: self.stride]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))
        return norm(activation=nn.relu)(y, residual=x)


class ResNet(nn.Module):
    """A residual network for small images: its stem is one 3x3 convolution, without pooling.

    Attributes:
        stages: number of blocks in each; the image is halved between them.
        features: of the first stage, doubled in each later one.
        bottleneck: as in `Block`.
        projection: as in `Block`.
        dtype: of the computation; parameters and logits are float32.
    """

    stages: Sequence[int]
    features: int
    bottleneck: bool = False
    projection: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits [N, 10] of images [N, H, W, C]."""
        conv, norm = layers(train, self.dtype)
        x = norm(activation=nn.relu)(conv(self.features, 3)(images))
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                stride = 2 if stage and i == 0 else 1
                features = self.features * 2**stage
                x = Block(features, stride, self.bottleneck, self.projection, self.dtype)(x, train)
        return nn.Dense(CLASSES)(x.mean((1, 2), dtype=jnp.float32))


def layers(train: bool, dtype: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What all blocks are built of: a convolution, and batch norm but for its activation."""

    def conv(features: int, size: int, stride: int = 1) -> nn.Conv:
        return nn.Conv(
            features,
            (size, size),
            stride,
            padding=size // 2,  # "SAME" would shift by a pixel from what a shortcut skips
            use_bias=False,  # batch norm's takes its place
            dtype=dtype,
            kernel_init=nn.initializers.he_normal(),
        )

    return conv, functools.partial(BatchNorm, not train, momentum=0.9, dtype=dtype)


NETWORKS = {  # the first: He et al. 2015, section 4.2 with n = 3; the others: Table 1
    "resnet20": functools.partial(ResNet, (3, 3, 3), 16, projection=False),
    "resnet18": functools.partial(ResNet, (2, 2, 2, 2), 64),
    "resnet50": functools.partial(ResNet, (3, 4, 6, 3), 64, bottleneck=True),
}


class TrainState(train_state.TrainState):
    """All that is saved: parameters, the optimizer's state, running statistics.

    Attributes:
        batch_stats: of batch norm.
        totals: loss and accuracy, summed over the steps of this epoch.
    """

    batch_stats: Any
    totals: Any


def learning_rate_schedule(settings: Mapping[str, Any], steps: int) -> optax.Schedule:
    """By step: a line from 0 to the peak over a share of the steps, then half a cosine to 0."""
    warmup_steps = int(settings["warmup"] * steps)
    return optax.warmup_cosine_decay_schedule(0, settings["learning_rate"], warmup_steps, steps)


def init_state(settings: Mapping[str, Any], steps: int, images: jax.Array) -> TrainState:
    """An untrained network and its optimizer.

    The decay is of all parameters but batch norm's: a layer that batch norm follows computes the
    same whatever the scale of its weights, so that decay of these only sets their learning rate,
    while decay of batch norm's own would hold back what the network computes.
    """
    dtype = jnp.bfloat16 if settings["bfloat16"] else jnp.float32
    model = NETWORKS[settings["network"]](dtype=dtype)
    variables: Any = model.init(jax.random.key(settings["seed"]), images, train=False)
    decayed = jax.tree.map(lambda is_batch_norm: not is_batch_norm, batch_norm_mask(variables))
    optimizer = optax.chain(
        optax.add_decayed_weights(settings["weight_decay"], decayed),
        optax.sgd(learning_rate_schedule(settings, steps), momentum=0.9, nesterov=True),
    )
    totals = {"loss": jnp.zeros(()), "accuracy": jnp.zeros(())}
    return TrainState.create(apply_fn=model.apply, tx=optimizer, totals=totals, **variables)


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array, label_smoothing: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of SGD, normalizing by the batch.

    Args:
        state: before the step.
        images: [N, H, W, C].
        labels: [N].
        label_smoothing: share of each target spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567, section 7).

    Returns:
        The state after it, and loss and accuracy before it.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (updated["batch_stats"], (logits.argmax(-1) == labels).mean())

    (loss, (batch_stats, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss, "accuracy": accuracy}
    totals = jax.tree.map(jnp.add, state.totals, metrics)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats, totals=totals), metrics


@jax.jit
def eval_step(state: TrainState, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Sums of loss and of right answers, normalizing by the running statistics.

    Args:
        state: of the network.
        images: [N, H, W, C].
        labels: [N]; an image of label -1 only fills the batch, and does not count.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    losses = jnp.where(labels >= 0, losses, 0)
    return {"loss": losses.sum(), "accuracy": (logits.argmax(-1) == labels).sum()}


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether the losses of this epoch and the parameters are."""
    return jnp.isfinite(state.totals["loss"] + optax.tree.norm(state.params))


def standardizer(images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Makes floats of mean 0 and variance 1 of uint8, in each channel, by these images [..., C]."""
    axes = tuple(range(images.ndim - 1))
    mean = images.mean(axes)
    std = np.sqrt(np.square(images, dtype=np.uint16).mean(axes) - mean**2)
    return lambda some: (some - mean.astype(np.float32)) / std.astype(np.float32)


def augment(images: np.ndarray, rng: np.random.Generator, mirror: bool) -> np.ndarray:
    """Crops each image [N, H, W, C] from itself padded, and mirrors half of them if asked to.

    By 4 pixels of 32, as in He et al. 2015, section 4.2, and by an eighth of another height. Zeros
    are the mean colour here.
    """
    count, height, width, _ = images.shape
    padding = max(1, height // 8)
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    top, left = rng.integers(2 * padding + 1, size=(2, count))
    crops = np.moveaxis(windows, 3, -1)[np.arange(count), top, left]
    mirrored = rng.random(count) < 0.5 * mirror
    crops[mirrored] = crops[mirrored, :, ::-1]
    return crops


def train_batches(
    settings: Mapping[str, Any],
    dataset: Dataset,
    standardize: Callable[[np.ndarray], np.ndarray],
) -> grain.MapDataset[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each step, by its number: that alone says where in the data a run is.

    Grain draws the order from the seed and the epoch, and what `augment` does from the seed and the
    step. Images that do not fill an epoch's last batch are left out of that epoch.
    """

    def load(indices: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        images = standardize(dataset.train_images[indices])
        return augment(images, rng, dataset.name in MIRRORED), dataset.train_labels[indices]

    count, size = len(dataset.train_labels), settings["batch_size"]
    order = grain.MapDataset.range(count).seed(settings["seed"]).shuffle()[: count // size * size]
    # In a new order in each epoch.
    return order.batch(size).random_map(load).repeat(settings["epochs"])


def evaluate(
    state: TrainState,
    dataset: Dataset,
    standardize: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    sharding: NamedSharding,
) -> dict[str, float]:
    """Mean loss and accuracy on the images to test on."""
    totals, count = [], len(dataset.test_labels)
    for start in range(0, count, batch_size):
        images = standardize(dataset.test_images[start : start + batch_size])
        labels = dataset.test_labels[start : start + batch_size]
        missing = batch_size - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(labels, (0, missing), constant_values=-1)
        totals.append(eval_step(state, *jax.device_put((images, labels), sharding)))
    return {key: float(sum(total[key] for total in totals)) / count for key in totals[0]}


def log(writer: EventsWriter, step: int, **fields: Any) -> None:
    """Writes an event for TensorBoard, which is on the disk after `writer.flush()`.

    tensorboardX's `SummaryWriter` writes in a thread, for which its `flush` does not wait, and
    whose failure on a full disk it does not see.
    """
    writer.write_event(Event(wall_time=time.time(), step=step, **fields))


def train(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    dataset: Dataset,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Trains from the last checkpoint to the last epoch, or until the run diverges.

    Returns:
        What came out of each epoch. The step where a loss or a parameter was found not to be finite
        is in `diverged_at_step`, if there was one.
    """
    standardize = standardizer(dataset.train_images)
    batches = train_batches(settings, dataset, standardize)
    last, epoch_steps = len(batches), len(batches) // settings["epochs"]
    schedule: Any = learning_rate_schedule(settings, last)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([], ["data"]))
    init = functools.partial(init_state, settings, last)
    state = jax.jit(init, out_shardings=everywhere)(standardize(dataset.train_images[:1]))

    manager = checkpoints(args.output / "checkpoints")
    state, epochs, start = restore(parser, manager, state, settings)
    epochs = epochs or []
    if start:
        print(f"Restored step {start} of {last} from {manager.directory}")
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    data = batches[start:].to_iter_dataset(reading) if start < last else ()
    numbered = enumerate(data, start + 1)
    steps = tqdm(numbered, settings["network"], total=last, initial=start, unit="step")
    writer = EventsWriter(f"{args.output / 'tensorboard' / 'events'}")
    diverged_at = None
    with contextlib.closing(manager), contextlib.closing(writer), steps:
        # Purged is what a killed run logged after that step.
        log(writer, start + 1, session_log=SessionLog(status=SessionLog.START))
        for step, batch in steps:
            batch = jax.device_put(batch, split)
            state, metrics = train_step(state, *batch, settings["label_smoothing"])
            logged, ends = step % LOG_EVERY == 0, step % epoch_steps == 0
            saves = step % args.checkpoint_every == 0 or step == last
            if not (logged or ends or saves):
                continue  # to the next one, without waiting for the devices
            tests = {}
            if ends:
                tests = evaluate(state, dataset, standardize, settings["batch_size"], split)
            if not (is_finite(state) and all(map(math.isfinite, tests.values()))):
                diverged_at, good = step, manager.latest_step()
                kept = f"The last good checkpoint, of step {good}," if good else "No checkpoint"
                another = " and another --output" if good else ""
                tqdm.write(
                    f"Diverged: at step {step} of {last} a loss or a parameter is not finite. "
                    f"{kept} is kept. Try a lower --learning-rate{another}."
                )
                break
            rate = float(schedule(step - 1))
            if logged:
                for name, value in {**metrics, "learning_rate": rate}.items():
                    log(writer, step, summary=summary.scalar(f"train/{name}", float(value)))
            if ends:
                epoch = {"epoch": step // epoch_steps, "learning_rate": rate}
                for name, total in state.totals.items():
                    epoch[f"train_{name}"] = float(total) / epoch_steps
                epoch |= {f"test_{name}": value for name, value in tests.items()}
                epochs.append(epoch)
                tqdm.write(
                    f"epoch {epoch['epoch']}: loss {epoch['train_loss']:.3f}, test loss "
                    f"{tests['loss']:.3f}, test accuracy {100 * tests['accuracy']:.2f} %"
                )
                for name, value in tests.items():
                    log(writer, step, summary=summary.scalar(f"test/{name}", value))
                for path, x in flatten_dict(state.batch_stats, sep="/").items():
                    histogram = summary.histogram(f"batch_stats/{path}", np.asarray(x), bins=30)
                    log(writer, step, summary=histogram)
                state = state.replace(totals=jax.tree.map(jnp.zeros_like, state.totals))
            if saves:
                writer.flush()  # what is logged until here is not logged again
                save(manager, step, state, settings, epochs)
    return {
        "settings": settings,
        "parameters": sum(param.size for param in jax.tree.leaves(state.params)),
        "steps_per_epoch": epoch_steps,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "diverged_at_step": diverged_at,
        "epochs": epochs,
    }


def figure(results: Mapping[str, Any]) -> bytes:
    """Loss, accuracy and learning rate against the epoch, as a PNG."""
    settings, epochs = results["settings"], results["epochs"]
    fig = matplotlib.figure.Figure(figsize=(13, 4.2), layout="constrained")
    loss, accuracy, rate = fig.subplots(1, 3)
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes, name, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for part, label in (("train", "training, augmented"), ("test", "test")):
            values = [factor * epoch[f"{part}_{name}"] for epoch in epochs]
            axes.plot(numbers, values, marker=".", label=label)
    if (settings["network"], settings["dataset"]) == ("resnet20", "cifar10"):
        label = f"He et al. 2015, test: {PAPER} %"
        accuracy.axhline(PAPER, color="gray", linestyle="--", label=label)
    epoch_steps = results["steps_per_epoch"]
    steps = np.arange(settings["epochs"] * epoch_steps)
    schedule = learning_rate_schedule(settings, len(steps))
    rate.plot(steps / epoch_steps, schedule(steps), color="tab:green", label="of SGD")
    loss.set(title="Loss", ylabel="cross entropy, nats")
    accuracy.set(title="Accuracy", ylabel="images recognized, %")
    rate.set(title="Learning rate", ylabel="learning rate")
    for axes in (loss, accuracy, rate):
        if results["diverged_at_step"]:
            axes.axvline(
                results["diverged_at_step"] / epoch_steps,
                color="tab:red",
                linestyle=":",
                label="diverged",
            )
        axes.set(xlabel="epoch", xlim=(0, settings["epochs"]))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    outcome = "diverged"
    if results["diverged_at_step"] is None:
        outcome = f"{100 * epochs[-1]['test_accuracy']:.2f} % test accuracy"
    passes = "1 epoch" if settings["epochs"] == 1 else f"{settings['epochs']} epochs"
    fig.suptitle(
        f"{settings['network']} on {settings['dataset']}, {passes}, one seed "
        f"({settings['seed']}): {outcome}"
    )
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=150)
    return png.getvalue()


def fraction(text: str) -> float:
    """A number from 0 to below 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, not {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add_data_flags(parser, default="cifar10")
    add("--network", choices=NETWORKS, default="resnet20", help="what is trained")
    add("--epochs", type=positive_int, default=200, help="passes over the training images")
    add("--batch-size", type=positive_int, default=128, help="images in a step, on all devices")
    add("--learning-rate", type=positive_float, default=0.1, help="the largest, after warm-up")
    add("--warmup", type=fraction, default=0.05, help="share of the steps over which it rises")
    add("--weight-decay", type=fraction, default=5e-4, help="not of batch norm's parameters")
    add("--label-smoothing", type=fraction, default=0.0, help="share of targets spread evenly")
    add("--bfloat16", action="store_true", help="compute in it; parameters stay float32")
    add("--seed", type=seed, default=0, help="decides weights, order and augmentation")
    add("--checkpoint-every", type=positive_int, default=500, help="steps between checkpoints")
    folder = Path("results/cifar_resnet")
    add("--output", type=Path, default=folder, metavar="FOLDER", help="checkpoints, logs, results")
    return parser


@ending_in_one_line("from the last checkpoint")
def main(argv: Sequence[str] | None = None) -> None:
    """Checks the flags, trains, and writes the numbers and the figure."""
    parser = make_parser()
    args = parser.parse_args(argv)
    devices = jax.device_count()
    if args.batch_size % devices:
        parser.error(f"--batch-size must divide among {devices} devices, not {args.batch_size}")
    dataset = dataset_of(args, parser)
    if args.batch_size > len(dataset.train_labels):
        images = len(dataset.train_labels)
        parser.error(f"--batch-size must be at most {images}, the images, not {args.batch_size}")
    folder = output_folder(parser, args, "cifar_resnet.json", "cifar_resnet.png")
    check_folder(parser, "--output", folder / "tensorboard")
    settings = {"dataset": dataset.name, **{name: getattr(args, name) for name in DECISIVE}}
    results = train(parser, args, dataset, settings)
    write_whole(folder / "cifar_resnet.json", json.dumps(results, indent=1).encode())
    write_whole(folder / "cifar_resnet.png", figure(results))
    print(f"Wrote {folder / 'cifar_resnet.json'} and {folder / 'cifar_resnet.png'}")


if __name__ == "__main__":
    main()
