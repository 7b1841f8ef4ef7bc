"""Data-parallel training on digits, on one process or many, which resumes when any of them fails.

The network and its steps are those of `flax_linen.py`, unchanged: what is new is where arrays lie,
the state on every device and the batch cut over all devices of all processes. Under `jit` batch
norm then normalizes by the whole batch. On the devices of one process, however many:

    python examples/distributed.py

On several processes of one machine; this prints the command of each:

    python examples/distributed.py --num-processes 2

On a cluster, one command per process: with `--cluster` where JAX finds the others by itself (Slurm,
Open MPI, Kubernetes, Cloud TPU), else with `--coordinator`, `--num-processes` and `--process-id`.

If a process dies, stops or raises, the others end. The same commands again, also for another number
of processes or devices, go on from the last checkpoint with the losses that would have been.
"""

import argparse
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from common import HelpFormatter, check_folder, positive_int
from flax_linen import TEST_SIZE, TrainState, eval_step, init_state, train_step
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    process_allgather,
    sync_global_devices,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from tqdm import tqdm

DTYPE = np.dtype(jnp.result_type(float))  # float64 where JAX_ENABLE_X64 is set


class Digits(NamedTuple):
    """Pairs of image [8, 8, 1] and label to train on; images [N, 8, 8, 1] and labels to test on."""

    train: list[tuple[np.ndarray, np.ndarray]]
    test: tuple[np.ndarray, np.ndarray]


def load() -> Digits:
    """The digits, split at random but always alike."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(DTYPE)
    test, train = np.split(np.random.default_rng(0).permutation(len(labels)), [TEST_SIZE])
    return Digits([(images[i], labels[i]) for i in train], (images[test], labels[test]))


def local_batches(digits: Digits, batch_size: int, seed: int, epochs: int) -> grain.MapDataset:
    """What this process loads of each global batch, by step.

    All processes draw one order from the seed and the epoch, and each takes its slice of every
    batch: the step alone says where in the data a run is, whatever the number of processes.
    (Grain's iterators can be checkpointed too, but only for the number of processes they had.)
    Images that do not fill an epoch's last batch are left out of that epoch.
    """
    processes = jax.process_count()
    order = grain.MapDataset.source(digits.train).seed(seed).shuffle()
    order = order[: len(digits.train) // batch_size * batch_size]
    local = order.batch(batch_size // processes)[jax.process_index() :: processes]
    return local.repeat(epochs)  # in a new order each


def initial_state(seed: int) -> TrainState:
    """An untrained network, as `flax_linen.py` makes it but for float64."""
    state = init_state(seed)
    return jax.tree.map(lambda a: a.astype(DTYPE) if a.dtype == jnp.float32 else a, state)


def restore(
    parser: argparse.ArgumentParser, manager: ocp.CheckpointManager, state: TrainState, order: str
) -> tuple[TrainState, int]:
    """The last state saved, laid out as `state` is, and its step; `state` and 0 if there is none.

    Args:
        parser: tells of a checkpoint that does not fit.
        manager: of the checkpoints.
        state: of an untrained network.
        order: the flags that decide the order of the data, which the checkpoint must have too.
    """
    step = manager.latest_step()
    if step is None:
        return state, 0
    path = manager.directory / f"{step}"
    try:
        saved = (manager.metadata(step).custom_metadata or {})["order"]
        if saved != order:
            parser.error(
                f"--checkpoint-dir: {path} was saved with {saved}, and {order} would change the "
                "order of the data; choose another folder"
            )
        restored: Any = manager.restore(step, args=ocp.args.StandardRestore(state))
    except Exception as error:  # Orbax has no one kind for what is damaged or not its own
        parser.error(
            f"--checkpoint-dir: {path} is damaged, or not of this script ({type(error).__name__}); "
            "move it away to go on from the one before, or choose another folder"
        )
    return restored, step


def train(parser: argparse.ArgumentParser, args: argparse.Namespace, digits: Digits) -> None:
    """Trains from the last checkpoint to the last epoch; process 0 reports."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    cut = NamedSharding(mesh, PartitionSpec("data"))
    state = jax.jit(initial_state, out_shardings=everywhere)(args.seed)

    # Atomic: all processes write to a folder of another name, renamed once they are done.
    manager = ocp.CheckpointManager(
        args.checkpoint_dir.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2),
        item_handlers=ocp.StandardCheckpointHandler(),
    )
    order = f"--batch-size {args.batch_size} --seed {args.seed} in {DTYPE}"
    state, start = restore(parser, manager, state, order)

    batches = local_batches(digits, args.batch_size, args.seed, args.epochs)
    data, last = iter(batches[start:].to_iter_dataset()), len(batches)
    reports = jax.process_index() == 0
    if reports and start:
        done = "; nothing is left to do" if start >= last else ""
        print(f"Restored step {start} of {last} from {args.checkpoint_dir}{done}")
    left = range(start + 1, last + 1)
    steps = tqdm(left, initial=start, total=last, disable=not (reports and left))
    for step in steps:
        images, labels = jax.make_array_from_process_local_data(cut, next(data))
        state, loss = train_step(state, images, labels)
        if step % args.checkpoint_every == 0 or step == last:
            items = ocp.args.StandardSave(state)
            manager.save(step, args=items, custom_metadata={"order": order})
        if step % (last // args.epochs) == 0:
            accuracy = eval_step(state, *digits.test)  # the same on every device
            if reports:
                tqdm.write(f"step {step}: loss {loss:.3f}, test accuracy {accuracy:.1f} %")
    manager.close()  # not in a `finally`: a process that raised would wait here for the others


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--epochs", type=positive_int, default=10, help="passes over the training images")
    add("--batch-size", type=positive_int, default=64, help="images in a step, on all devices")
    add("--seed", type=int, default=0, help="decides the network and the order of the images")
    folder = Path("results/distributed")
    add("--checkpoint-dir", type=Path, default=folder, help="one folder, seen by all processes")
    add("--checkpoint-every", type=positive_int, default=21, help="steps between checkpoints")
    add("--num-processes", type=positive_int, help="how many processes there are")
    add("--process-id", type=int, help="which of them this is, from 0")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is to be reached")
    add("--cluster", action="store_true", help="have JAX find out these three")
    add("--start-timeout", type=positive_int, default=60, help="seconds to wait for the others")
    add(
        "--heartbeat-timeout",
        type=positive_int,
        default=10,
        help="seconds of silence after which a process counts as dead, and all end",
    )
    return parser


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What needs no other process to be seen wrong."""
    given = [args.coordinator, args.num_processes, args.process_id]
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, not {args.seed}")
    if args.cluster and given != [None] * 3:
        parser.error("--cluster finds --coordinator, --num-processes and --process-id by itself")
    if args.num_processes is None:
        if given != [None] * 3:
            parser.error("--coordinator and --process-id need --num-processes")
    elif args.process_id not in (None, *range(args.num_processes)):
        allowed = f"from 0 to {args.num_processes - 1}"
        parser.error(f"--process-id must be {allowed}, not {args.process_id}")
    if args.process_id is not None and args.coordinator is None:
        parser.error("--process-id needs --coordinator")
    if args.coordinator is not None:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            parser.error(f"--coordinator must be HOST:PORT, not {args.coordinator!r}")


def print_commands(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """The command of each process on this machine."""
    if args.coordinator is None:
        with socket.create_server(("localhost", 0)) as server:  # a free port
            flags = [*flags, "--coordinator", f"localhost:{server.getsockname()[1]}"]
    print("Run each of these in a shell of its own:")
    for i in range(args.num_processes):
        print(shlex.join([sys.executable, sys.argv[0], *flags, "--process-id", f"{i}"]))


def await_coordinator(address: str, seconds: float) -> None:
    """Returns once process 0 listens.

    `jax.distributed.initialize` would wait too, but then abort without a word on the address.

    Raises:
        OSError: It does not within that time.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def join(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Makes the devices of all processes known to each."""
    if args.process_id:
        try:
            await_coordinator(args.coordinator, args.start_timeout)
        except OSError as error:
            parser.error(
                f"--coordinator: nothing answered at {args.coordinator} for {args.start_timeout} s "
                f"({error}); process 0 must run there"
            )
    elif args.process_id == 0:
        try:
            socket.create_server(("", int(args.coordinator.rpartition(":")[2]))).close()
        except OSError as error:  # JAX would crash
            parser.error(f"--coordinator: process 0 cannot listen at {args.coordinator} ({error})")
        print(
            f"Waiting at {args.coordinator} for {args.num_processes} processes; JAX aborts after "
            f"{args.start_timeout} s if one does not come (start them all)",
            flush=True,
        )
    # Else SIGTERM, which is what plain `kill` and a scheduler send, would only be noted.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            initialization_timeout=args.start_timeout,
            # JAX's own 100 and 300 s are long to wait for a process that is gone.
            heartbeat_timeout_seconds=args.heartbeat_timeout,
            shutdown_timeout_seconds=args.heartbeat_timeout,
        )
    except ValueError as error:
        parser.error(f"--cluster: JAX finds no cluster here ({error})")


def check_batch_size(parser: argparse.ArgumentParser, size: int, images: int) -> None:
    """A batch must divide among the devices, and the images fill one."""
    devices = jax.devices()
    if len(set(Counter(device.process_index for device in devices).values())) > 1:
        parser.error(f"all processes must have equally many devices, not {devices}")
    below = size // len(devices) * len(devices)
    if below != size:
        near = " or ".join(f"{n}" for n in (below, below + len(devices)) if n)
        parser.error(f"--batch-size must divide among {len(devices)} devices: {near}, not {size}")
    if size > images:
        parser.error(f"--batch-size must be at most {images}, the training images, not {size}")


def check_agreement(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """All processes were given the same flags, and see the one folder."""
    flags = ("seed", "batch_size", "epochs", "checkpoint_every")
    own = np.array([*(getattr(args, flag) for flag in flags), DTYPE.itemsize], np.uint32)
    for name, values in zip((*flags, "JAX_ENABLE_X64"), process_allgather(own).T, strict=True):
        if len(set(values.tolist())) > 1:
            name = name if name.isupper() else f"--{name.replace('_', '-')}"
            parser.error(f"{name} must be the same for all processes, not {values.tolist()}")
    mark = args.checkpoint_dir / f".seen-{broadcast_one_to_all(np.uint32(time.time_ns() % 2**32))}"
    if jax.process_index() == 0:
        mark.touch()
    sync_global_devices("marked")
    seen = process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        parser.error(
            f"--checkpoint-dir must be one folder for all processes; {args.checkpoint_dir} is "
            f"another for {np.flatnonzero(~seen).tolist()}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks the flags, joins the other processes and trains."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.num_processes and args.process_id is None:
        print_commands(args, sys.argv[1:] if argv is None else argv)
        return
    if args.cluster or args.num_processes:
        join(parser, args)
    digits = load()
    check_batch_size(parser, args.batch_size, len(digits.train))
    check_folder(parser, "--checkpoint-dir", args.checkpoint_dir)
    if jax.process_count() > 1:
        check_agreement(parser, args)
    train(parser, args, digits)


if __name__ == "__main__":
    main()
