"""Flax's own tests of whatever touches BatchNorm, with jbn's layers in the place of Flax's.

    python -m tests.flax_suite

Run in the root of the repository. pip fetches the source distribution of the installed Flax, which
alone has the tests; they run against the Flax that is installed. Arguments are pytest's.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath


def fetch(version: str, folder: Path) -> Path:
    """Downloads a version of Flax and unpacks its tests and their settings into a folder.

    The package itself stays packed, where no test can import it.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-binary", "flax", "--dest", str(folder), f"flax=={version}"]
    done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        sys.exit(f"{done.stdout}\npip could not download the source distribution of flax {version}")
    with tarfile.open(archives[0]) as archive:
        members = [
            member
            for member in archive.getmembers()
            if PurePosixPath(member.name).parts[1:2] in (("tests",), ("pyproject.toml",))
        ]
        archive.extractall(folder, members, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def environment() -> dict[str, str]:
    """Variables of Flax's own test script, on a CPU: workers would fight over a GPU's memory.

    And programs compile without LLVM's optimizations, in three quarters of the time.
    """
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "FLAX_PROFILE": "1",
    }
    return {**defaults, **os.environ, "XLA_FLAGS": " ".join(flags)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tests and returns pytest's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.flax_suite",
        description="Run Flax's own tests that touch BatchNorm with jbn's layers in its place.",
        epilog="All other arguments are passed on to pytest, such as -x, -n 4 or -k scan.",
        allow_abbrev=False,
    )
    _, arguments = parser.parse_known_args(argv)
    version = importlib.metadata.version("flax")
    print(f"Fetching the tests of flax {version}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = fetch(version, Path(folder))
        files = [
            path
            for path in sorted(root.glob("tests/**/*_test.py"))
            if "BatchNorm" in path.read_text(encoding="utf-8")
        ]
        if not files:
            sys.exit(f"no test file of flax {version} names BatchNorm")
        # Flax's settings of pytest, not jbn's: they know the warnings that its tests give.
        pytest = [sys.executable, "-m", "pytest", "-c", str(root / "pyproject.toml")]
        pytest += ["-p", "tests.flax_suite.plugin"]
        if importlib.util.find_spec("xdist"):
            pytest += ["-n", "auto"]
        command = [*pytest, *arguments, *map(str, files)]
        return subprocess.run(command, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
