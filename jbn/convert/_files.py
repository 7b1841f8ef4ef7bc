"""Files of weights: how they are opened, and written whole or not at all."""

import contextlib
import importlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


def optional(module: str) -> Any:
    """Imports a package of the extra `convert`."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"{module} is needed for this file: pip install 'jbn[convert]'."
        ) from None


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a path beside `path` to write to, and moves it there if nothing fails."""
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = pathlib.Path(folder, path.name)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file that needs no unpickling; refuses those that do."""
    path = pathlib.Path(path)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path.name} is a pickle, which can run any code when it is read, so jbn does not. "
            "Where torch is installed, load it safely and pass the mapping, "
            f'from_torch(torch.load("{path.name}", map_location="cpu", weights_only=True), ...), '
            "or save it once with safetensors.torch.save_file and pass that file."
        )
    check_suffix(path, (".safetensors",))
    load_file = optional("safetensors.numpy").load_file
    error_type = optional("safetensors").SafetensorError
    try:
        return load_file(path)
    except (error_type, ValueError) as error:
        raise ValueError(
            f"{path.name} is no whole safetensors file ({error}): fetch or save it again."
        ) from None


def write_safetensors(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors, whole or not at all."""
    check_suffix(pathlib.Path(path), (".safetensors",))
    save_file = optional("safetensors.numpy").save_file
    with written_whole(path) as temporary:
        # The writer takes the bytes as they lie, transposed ones too.
        contiguous = {name: np.asarray(value, order="C") for name, value in weights.items()}
        save_file(contiguous, temporary, metadata={"format": "pt"})


def check_suffix(path: pathlib.Path, suffixes: tuple[str, ...]) -> None:
    """Checks that the name of the file says that jbn can read it."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path.name} must be a file {' or '.join(suffixes)}.")
