"""Where results come from and where they go: machine, versions, whole files."""

import argparse
import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that are measured; None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """What a timing depends on besides the versions."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((v.split(": ")[1] for v in lines if v.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": jax.devices()[0].device_kind,
        # Memory that is kept costs no page faults again; the others set threads and the compiler.
        "environment": {
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith(("MALLOC_", "OMP_", "MKL_", "XLA_"))
        },
    }


def check_files(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The files of --json and --plot can be written, their folders are there afterwards."""
    for flag in ("json", "plot"):
        if path := getattr(args, flag):
            try:
                if path.is_dir():
                    raise IsADirectoryError(f"{path} is a folder")
                path.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path.parent).close()
            except OSError as error:
                parser.error(f"--{flag} must be a file that can be written: {error}")
    if args.json and args.json == args.plot:
        parser.error(f"--json and --plot must be two files, not {args.json} both")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
