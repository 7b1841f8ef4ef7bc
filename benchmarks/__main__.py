"""Everything that this machine can measure of jbn and its peers.

    pip install -e ".[benchmarks,peers]"
    python -m benchmarks

Accuracy, memory traffic, whole networks, communication, overhead and speed; for a platform whose
device is missing, `--platform cuda` or `tpu` prints the memory traffic and the communication of
programs compiled for it.
"""

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from tqdm import tqdm

from benchmarks import accuracy, networks, overhead, peers, results, speed, traffic
from benchmarks.peers import AFTER, MODES, PEERS, Case

# Inputs of batch norm in a ResNet-50 and in dense networks.
SHAPES = {
    "resnet-56": (32, 56, 56, 64),
    "resnet-28": (32, 28, 28, 128),
    "resnet-14": (32, 14, 14, 256),
    "resnet-7": (32, 7, 7, 512),
    "resnet-56-wide": (32, 56, 56, 256),
    "mlp-512": (8192, 512),
    "mlp-4096": (1024, 4096),
    "small": (256, 128),
}
ACCELERATOR_BATCH = 4  # times the batch above, on a GPU or TPU
HERE = "this machine's"


def shape_name(text: str) -> str:
    """One of the names, or sizes, for argparse."""
    if text not in SHAPES:
        sizes = [int(n) for n in text.split("x")] if re.fullmatch(r"\d+(x\d+)+", text) else []
        if len(sizes) not in (2, 4) or math.prod(sizes[:-1]) < 2 or sizes[-1] < 1:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(SHAPES)}, or 2 or 4 sizes, features last and 2 rows "
                f"or more, such as 8192x512 or 32x28x28x128, not {text!r}"
            )
    return text


def shape(name: str, platform: str) -> tuple[int, ...]:
    """The sizes of x."""
    if name not in SHAPES:
        return tuple(int(n) for n in name.split("x"))
    batch, *rest = SHAPES[name]
    return (batch if platform == "cpu" else ACCELERATOR_BATCH * batch, *rest)


def has_device(platform: str) -> bool:
    """Whether JAX runs on this platform here.

    Another process looks: one that has looked for a GPU in vain can no longer compile for it.
    """
    code = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return found.stdout.split()[-1:] == [{"cuda": "gpu"}.get(platform, platform)]


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure batch norm: accuracy, memory traffic and speed, jbn's and its peers'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def add(flag: str, known: Sequence[str], text: str) -> None:
        metavar = flag.removeprefix("--").removesuffix("s").upper()
        parser.add_argument(
            flag, nargs="+", choices=known, default=known, metavar=metavar, help=text
        )

    add("--peers", list(PEERS), "layers to measure")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_name,
        default=list(SHAPES),
        metavar="SHAPE",
        help="of x: these names, whose batch is larger on an accelerator, or sizes such as "
        "32x28x28x128",
    )
    add("--dtypes", ["float32", "bfloat16"], "of x")
    add("--modes", list(MODES), "what is timed; forward is in training")
    add("--after", list(AFTER), "what follows the normalization, fused or not")
    parser.add_argument(
        "--platform",
        choices=["cpu", "cuda", "tpu"],
        default=HERE,
        help="to run on or, where its device is missing, to compile for and count memory traffic",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timings of which to take medians")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers go")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="where the plot of speed goes; that of accuracy goes beside it, to FILE-accuracy",
    )
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; `run` says whether the platform's device is there, `left_out` why not."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {args.rounds}")
    results.check_files(parser, args)
    if args.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    args.run = args.platform in (HERE, "cpu") or has_device(args.platform)
    if args.platform == HERE:
        args.platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if not args.run:
        if args.json or args.plot:
            parser.error(
                f"--json and --plot hold timings; --platform {args.platform} has no device here"
            )
        if packages := traffic.missing(args.platform):
            parser.error(
                f"--platform {args.platform} has no device here, and to compile for it "
                f"needs: pip install {packages}"
            )
        return args
    reasons = {name: peers.unavailable(name, args.platform) for name in dict.fromkeys(args.peers)}
    args.left_out = [reason for reason in reasons.values() if reason]
    args.peers = [name for name, reason in reasons.items() if not reason]
    if not args.peers:
        parser.error(f"--peers: {'; '.join(args.left_out)}")
    return args


def show_accuracy(names: Sequence[str], console: Console) -> list[accuracy.Record]:
    """Measures and prints the errors of these peers."""
    records = []
    for mean, std in tqdm(accuracy.DISTRIBUTIONS, desc="accuracy", leave=False):
        records += accuracy.measure(names, mean, std)
    for quantity in accuracy.QUANTITIES:
        console.print(accuracy.table(records, quantity), "")
    return records


def show_traffic(args: argparse.Namespace, console: Console) -> None:
    """Counts and prints the memory traffic of every shape and of whole networks."""
    if packages := traffic.missing(args.platform):
        console.print(f"Left out: memory traffic on {args.platform} needs: pip install {packages}")
        return
    for name in dict.fromkeys(args.shapes):
        console.print(traffic.table(args.platform, args.dtypes, shape(name, args.platform)), "")
    console.print(networks.table(args.platform), "")
    show_communication(args.platform)


def show_communication(platform: str) -> None:
    """Prints the collectives over many devices.

    Another process counts them: it splits the CPU into devices, which would slow down all else.
    """
    command = [sys.executable, "-m", "benchmarks.communication", "--platform", platform]
    subprocess.run(command, check=True)


def show_speed(args: argparse.Namespace, console: Console) -> list[speed.Record]:
    """Times every case and prints it as soon as it is done."""
    cases = [
        Case(shape(name, args.platform), dtype, mode, after)
        for mode, after, dtype, name in itertools.product(
            *map(dict.fromkeys, (args.modes, args.after, args.dtypes, args.shapes))
        )
    ]
    records = []
    for case in tqdm(cases, desc="speed", unit="case"):
        measured = speed.measure(case, args.peers, args.rounds)
        if measured:
            with tqdm.external_write_mode():
                console.print(speed.table(measured), "")
        records += measured
    return records


def as_json(**content: Any) -> bytes:
    """JSON, in which what is not a finite number is null."""

    def clean(record: Any) -> dict[str, Any]:
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record._asdict().items()
        }

    content = {
        k: [clean(v) for v in values] if isinstance(values, list) else values
        for k, values in content.items()
    }
    return json.dumps(content, indent=1, allow_nan=False).encode()


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables as they come, and writes the files once everything is done."""
    args = parse_args(argv)
    console = Console(highlight=False)
    if not args.run:
        jax.config.update("jax_platforms", "cpu")
        show_traffic(args, console)
        return
    origin = results.machine() | {"versions": results.versions()}
    for key, value in origin.items():
        console.print(f"{key}: {value}")
    for reason in args.left_out:
        console.print(f"Left out: {reason}")
    errors = show_accuracy(args.peers, console)
    show_traffic(args, console)
    console.print(overhead.table(), "")
    records = show_speed(args, console)
    console.print(speed.summary(records), "")
    if args.json:
        results.write_whole(args.json, as_json(**origin, speed=records, accuracy=errors))
        console.print(f"Wrote {args.json}")
    if args.plot and records:
        beside = args.plot.with_stem(f"{args.plot.stem}-accuracy")
        results.write_whole(args.plot, speed.figure(records))
        results.write_whole(beside, accuracy.figure(errors))
        console.print(f"Wrote {args.plot} and {beside}")


if __name__ == "__main__":
    main()
