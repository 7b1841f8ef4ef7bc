"""The files of Keras: weights by layer, and a copy of a file with other weights.

Three kinds, all HDF5 within: `.h5` and `.hdf5` as Keras 1 to 3 write them, whole models or weights
alone; `.weights.h5` of Keras 3, whose variables have numbers in place of names; and `.keras`, a zip
archive of the latter with the model's config.
"""

import contextlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jbn import _files
from jbn.convert import _flax
from jbn.convert._pairs import Source

SUFFIXES = (".h5", ".hdf5", ".keras")
INNER = "model.weights.h5"  # in a .keras archive

# By class, in snake case and without the number of dimensions: the kind, and the roles in order.
CLASSES = {
    "batch_normalization": ("BatchNorm", ("gamma", "beta", "moving_mean", "moving_variance")),
    "conv": ("Conv", ("kernel", "bias")),
    "conv_transpose": ("ConvTranspose", ("kernel", "bias")),
    "depthwise_conv": ("DepthwiseConv", ("kernel", "bias")),
    "separable_conv": ("SeparableConv", ("depthwise_kernel", "pointwise_kernel", "bias")),
    "dense": ("Dense", ("kernel", "bias")),
    "embedding": ("Embed", ("embeddings",)),
}

Entries = dict[str, np.ndarray]


def read(path: str | os.PathLike[str]) -> tuple[list[Source], bool, dict[str, str]]:
    """The layers of a file, and the entries that are no layer's.

    The layers are in the model's order, or if True comes with them in that of their names.
    """
    path = pathlib.Path(path)
    entries: Entries = {}
    with _opened(path) as (file, config):
        try:
            file.visititems(lambda name, item: _collect(entries, name, item))
            numbered = not _strings(_weights(file), "layer_names")
        except (OSError, RuntimeError, TypeError, KeyError) as error:
            raise _damaged(path, error) from None
        classes = _classes(config)
        sources = (_read_numbered if numbered else _read_named)(file, entries, classes)
    is_sorted = numbered and not all(source.name in classes for source in sources)
    known = {entry for source in sources for entry in source.entries.values()}
    rest = [entry for entry in entries if entry not in known]
    for entry in rest:
        if not entry.startswith(("optimizer", "optimizer_weights")):
            raise ValueError(
                f"{path.name} holds {entry}, which is no layer's weight: was it written by Keras?"
            )
    left = dict.fromkeys(rest, "state of the optimizer")
    if not sources:
        raise ValueError(
            f"{path.name} holds no layer with weights: pass what model.save('model.keras') or "
            "model.save_weights('model.weights.h5') writes."
        )
    return [part for source in sources for part in _split(source)], is_sorted, left


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(f"{path.name} is no whole file of Keras ({error}): fetch or save it again.")


def write(
    path: str | os.PathLike[str], like: str | os.PathLike[str], entries: Mapping[str, np.ndarray]
) -> None:
    """Writes a copy of the file `like` in which the entries are replaced; whole or not at all."""
    like, path = pathlib.Path(like), _files.check_file(path)

    def make(partial: pathlib.Path) -> None:
        if like.suffix != ".keras":
            shutil.copyfile(like, partial)
            _replace(partial, entries)
            return
        with zipfile.ZipFile(like) as old, zipfile.ZipFile(partial, "w") as new:
            for item in old.infolist():
                content = old.read(item)
                if item.filename == INNER:
                    buffer = io.BytesIO(content)
                    _replace(buffer, entries)
                    content = buffer.getvalue()
                new.writestr(item, content)

    _files.make_whole(path, make)


def _replace(file: Any, entries: Mapping[str, np.ndarray]) -> None:
    with _files.require("h5py", "convert").File(file, "r+") as h5:
        for name, value in entries.items():
            h5[name][...] = value


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[Any, Any]]:
    """The HDF5 file, and the model's config if it is there."""
    _files.check_suffix(path, SUFFIXES)
    h5py = _files.require("h5py", "convert")
    with contextlib.ExitStack() as stack:
        try:
            if path.suffix == ".keras":
                archive = stack.enter_context(zipfile.ZipFile(path))
                config = json.loads(archive.read("config.json"))
                file = stack.enter_context(h5py.File(io.BytesIO(archive.read(INNER)), "r"))
            else:
                file = stack.enter_context(h5py.File(path, "r"))
                config = json.loads(file.attrs.get("model_config", "null"))
        except FileNotFoundError:
            raise
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise _damaged(path, error) from None
        yield file, config


def _collect(entries: Entries, name: str, item: Any) -> None:
    """Takes a dataset; `visititems` follows no links, which could lead to other files."""
    if hasattr(item, "dtype") and hasattr(item, "shape"):
        if item.external or item.is_virtual:
            raise ValueError(f"{name} lies in another file: save the model again, as one file.")
        entries[name] = np.asarray(item)


def _weights(file: Any) -> Any:
    """Where the layers are: a whole model has them beside the state of the optimizer."""
    return file.get("model_weights", file)


def _classes(config: Any, within: str = "") -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and arguments of each layer in a model's config, by its path of names."""
    inner = (config or {}).get("config", {})
    layers = inner if isinstance(inner, list) else inner.get("layers", [])
    if isinstance(inner, dict) and isinstance(inner.get("layer"), dict):
        layers = [inner["layer"]]  # of a wrapper such as TimeDistributed
    found = {}
    for layer in layers:
        arguments = layer.get("config", {})
        name = layer.get("name") or (
            arguments.get("name", "") if isinstance(arguments, dict) else ""
        )
        path = f"{within}{name}"
        found[path] = (_snake(layer["class_name"]), arguments)
        found |= _classes(layer, f"{path}/")
    return found


def _read_named(file: Any, entries: Entries, classes: Mapping[str, Any]) -> list[Source]:
    """The layers of a file whose weights have names: `layer/layer/kernel:0`."""
    root = _weights(file)
    start = root.name.strip("/") + "/" if root.name != "/" else ""
    sources: dict[str, Source] = {}
    for layer in [*_strings(root, "layer_names"), "top_level_model_weights"]:
        weights = _strings(root[layer], "weight_names") if layer in root else []
        scopes = {weight.split("/")[0] for weight in weights}
        for weight in weights:
            entry = f"{start}{layer}/{weight}"
            if entry not in entries:
                raise ValueError(
                    f"layer {layer}: its weight {weight} is missing in the file, which names it: "
                    "fetch or save the file again."
                )
            scope, *inner, role = weight.split("/") if "/" in weight else (layer, weight)
            # Weights of several scopes in one group are those of a model within the model.
            within = [scope, *inner] if len(scopes) > 1 else inner
            name = "/".join([layer, *within])
            if name not in classes and inner[:1] == [layer]:  # the scope is the whole model's name
                name = "/".join([layer, *inner[1:]])
            kind, config = _kind(classes.get(name, ("", {})))
            source = sources.setdefault(name, Source(name, {}, {}, kind, config))
            _add(source, role.partition(":")[0], entry, entries[entry])
    return list(sources.values())


def _read_numbered(file: Any, entries: Entries, classes: Mapping[str, Any]) -> list[Source]:
    """The layers of a file whose weights have numbers: `layers/conv2d_1/vars/0`."""
    groups: dict[str, list[str]] = {}
    for entry in sorted(entries, key=_flax.natural):
        group, _, _ = entry.rpartition("/")
        if group.endswith("vars") and not entry.startswith("optimizer/"):
            groups.setdefault(group, []).append(entry)
    order = list(classes)
    sources = {}
    for group, members in groups.items():
        name = _name(file, group)
        if name in sources:
            raise ValueError(f"two layers of the file are called {name}: rename one in Keras.")
        plain = re.sub(r"_\d+$", "", group.removesuffix("/vars").rpartition("/")[2])
        kind, config = _kind(classes.get(name, (plain, {})))
        roles = _numbered_roles(kind, config, [entries[entry] for entry in members])
        sources[name] = source = Source(name, {}, {}, kind, config)
        for role, entry in zip(roles, members, strict=True):
            _add(source, role, entry, entries[entry])
    known = [name for name in order if name in sources]
    return [sources[name] for name in known + [name for name in sources if name not in known]]


def _name(file: Any, group: str) -> str:
    """The layer's name after those of the models around it, which the file has as attributes."""
    names, path = [], ""
    for part in group.removesuffix("vars").strip("/").split("/"):
        path = f"{path}/{part}".lstrip("/")
        if f"{path}/vars" in file:
            names.append(str(file[f"{path}/vars"].attrs.get("name", part)))
        elif part not in ("layers", ""):
            names.append(part)
    return "/".join(names)


def _numbered_roles(kind: str, config: Mapping[str, Any], arrays: list[np.ndarray]) -> list[str]:
    """The roles of a layer's variables, which have no names but an order."""
    roles = list(dict(CLASSES.values()).get(kind or _guess(arrays), ()))
    if not kind and [array.ndim for array in arrays] == [2]:
        roles = ["kernel or embeddings"]
    if "gamma" in roles:
        affine = {"gamma": config.get("scale", True), "beta": config.get("center", True)}
        roles = [role for role in roles if affine.get(role, True)]
        if len(arrays) < len(roles):  # there is no config: the Flax layer decides
            roles = [*["gamma or beta"][: len(arrays) - 2], *roles[2:]]
    if len(arrays) > len(roles):
        return [str(i) for i in range(len(arrays))]
    return roles[: len(arrays)]


def _guess(arrays: list[np.ndarray]) -> str:
    """The kind of a layer whose class is not known, by the ranks of its arrays."""
    ranks = [array.ndim for array in arrays]
    if ranks in ([1] * 3, [1] * 4):
        return "BatchNorm"
    if ranks in ([2], [2, 1]):
        return "Dense"
    if ranks[0] > 2 and ranks[1:] in ([], [1]):
        return "Conv"
    return ""


def _split(source: Source) -> list[Source]:
    """A separable convolution as the two that it consists of; a depthwise one by its new name."""
    if "depthwise_kernel" not in source.arrays:
        return [source]
    if "pointwise_kernel" not in source.arrays:  # Keras 2 calls a DepthwiseConv2D's so
        return [_part(source, source.name, "DepthwiseConv", "depthwise_kernel", "bias")]
    return [
        _part(source, f"{source.name}/depthwise", "DepthwiseConv", "depthwise_kernel"),
        _part(source, f"{source.name}/pointwise", "Conv", "pointwise_kernel", "bias"),
    ]


def _part(source: Source, name: str, kind: str, *roles: str) -> Source:
    """Some of the weights of a layer as a layer of its own, the first one being the kernel."""
    kept = {role: "kernel" if role == roles[0] else role for role in roles if role in source.arrays}
    arrays = {new: source.arrays[role] for role, new in kept.items()}
    entries = {new: source.entries[role] for role, new in kept.items()}
    return Source(name, arrays, entries, kind, source.config)


def _add(source: Source, role: str, entry: str, value: np.ndarray) -> None:
    if role in source.arrays:
        raise ValueError(f"layer {source.name} has two weights {role}: {entry} is one of them.")
    source.arrays[role] = value
    source.entries[role] = entry


def _kind(found: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The kind of a class that is written as conv2d_transpose, and its arguments."""
    name, config = found
    plain = re.sub(r"[123]d", "", name)
    if ("conv" in name) != (plain != name):  # not Keras's name for a class
        return "", config
    return CLASSES.get(plain, ("", ()))[0], config


def _snake(name: str) -> str:
    """Conv2DTranspose as Keras writes it, conv2d_transpose."""
    name = re.sub(r"([123])D", r"\1d", name)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _strings(group: Any, name: str) -> list[str]:
    """An attribute that lists names, which Keras splits into numbered ones if it is long."""
    numbered = itertools.takewhile(
        group.attrs.__contains__, (f"{name}{i}" for i in itertools.count())
    )
    parts = [name] if name in group.attrs else numbered
    values = [value for part in parts for value in np.asarray(group.attrs[part]).ravel()]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
