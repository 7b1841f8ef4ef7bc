"""Files and folders that are written whole or not at all, and the packages that some need."""

import importlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable
from typing import Any

Path = str | os.PathLike[str]


def require(name: str, extra: str) -> Any:
    """The module, which comes with an extra of jbn."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed: pip install 'jbn[{extra}]'.", name=name
        ) from error


def check_parent(path: Path) -> pathlib.Path:
    """Returns `path` if the folder that it lies in exists."""
    path = pathlib.Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder of {path} does not exist: make it first, "
            f"pathlib.Path({str(path.parent)!r}).mkdir(parents=True)."
        )
    return path


def check_file(path: Path) -> pathlib.Path:
    """Returns `path` if a file can be written there."""
    path = check_parent(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the path of a file in it.")
    return path


def check_suffix(path: pathlib.Path, suffixes: tuple[str, ...]) -> None:
    """Checks that the name of a file says that it can be read."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path.name} must be a file {' or '.join(suffixes)}.")


def write_whole(path: pathlib.Path, content: bytes | bytearray) -> None:
    """Writes a file, in place of an earlier one."""

    def write(partial: pathlib.Path) -> None:
        with partial.open("xb") as file:
            file.write(content)

    make_whole(path, write)


def make_whole(path: pathlib.Path, make: Callable[[pathlib.Path], Any]) -> None:
    """Calls `make` with a path beside `path`, and gives what it made there its name.

    A file takes the place of an earlier one, a folder only that of an empty one.
    """
    # Not by tempfile, whose files and folders no other user may read.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        make(partial)
        if partial.is_file():
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # else a crash may leave the new name without the content
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise
