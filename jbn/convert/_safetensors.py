"""Files of safetensors, and not of pickles."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from jbn import _files

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file that needs no unpickling; refuses those that do."""
    path = pathlib.Path(path)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path.name} is a pickle, which can run any code when it is read, so jbn does not. "
            "Where torch is installed, load it safely and pass the mapping, "
            f'from_torch(torch.load("{path.name}", map_location="cpu", weights_only=True), ...), '
            "or save it once with safetensors.torch.save_file and pass that file."
        )
    _files.check_suffix(path, (".safetensors",))
    load_file = _files.require("safetensors.numpy", "convert").load_file
    error_type = _files.require("safetensors", "convert").SafetensorError
    try:
        return load_file(path)
    except FileNotFoundError:
        raise
    except AttributeError as error:
        raise TypeError(
            f"{path.name} holds {error.name or error}, a dtype that NumPy lacks: convert these "
            "tensors in torch, tensor.to(torch.float32), and save the file again."
        ) from None
    except (error_type, OSError, ValueError) as error:
        raise ValueError(
            f"{path.name} is no whole safetensors file ({error}): fetch or save it again."
        ) from None


def write(path: str | os.PathLike[str], weights: Mapping[str, np.ndarray]) -> None:
    """Writes the tensors, whole or not at all."""
    path = _files.check_file(path)
    _files.check_suffix(path, (".safetensors",))
    save = _files.require("safetensors.numpy", "convert").save
    # The writer takes the bytes as they lie, transposed ones too.
    contiguous = {name: np.asarray(value, order="C") for name, value in weights.items()}
    _files.write_whole(path, save(contiguous, metadata={"format": "pt"}))
