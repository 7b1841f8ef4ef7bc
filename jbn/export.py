"""Trained models as files that run without the code of the model: for JAX and for TensorFlow.

    import jbn.export

    jbn.export.save("model.jax", lambda x: model.apply(variables, x), x)
    predict = jbn.export.load("model.jax")

`save` and `load` need the extra `export`, `pip install 'jbn[export]'`, and `save_tensorflow` the
extra `tensorflow`. A file of `save` is `jax.export`'s own format and after it a checksum, which jax
ignores, so a server needs jax and flatbuffers alone:
`jax.export.deserialize(open("model.jax", "rb").read()).call`.
"""

import hashlib
import importlib
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.export
from jax.extend.mlir import ir

from jbn import _axes, _files

Path = str | os.PathLike[str]

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ALL = ("cpu", "cuda", "tpu")
_LIMIT = 1 << 31  # of flatbuffers
_SEAL = b"\njbn.export sha256 "  # between the program and the digest of it


def save(
    path: Path,
    fn: Callable[..., Any],
    *args: Any,
    batch_axis: int | None = 0,
    platforms: Sequence[str] = _ALL,
) -> None:
    """Writes a function of arrays to a file, for any batch size and several platforms.

    The arrays that `fn` closes over, such as the weights of a model, go into the file, up to 2 GiB.
    Call Linen models as `lambda x: model.apply(variables, x)`, NNX models after `model.eval()`. The
    outputs of the file are those of `jax.jit(fn)` up to rounding: XLA may fuse the two differently.

    The file is for one device, whatever devices `args` lie on. Called with a batch that is sharded,
    XLA splits the program as any other. jax reads files that it wrote itself up to six months
    before, and often not those of a later jax.

    It holds no derivatives. A file that does is written by
    `jax.export.export(jax.jit(fn), platforms=...)(*args).serialize(vjp_order=1)`, and `load`
    reads it as well.

    Args:
        path: of the file. One that exists is replaced, and stays if anything fails.
        fn: takes and returns arrays in tuples, lists and dicts.
        *args: arguments such as `fn` is called with, arrays or `jax.ShapeDtypeStruct`s. Only
            shapes and dtypes count.
        batch_axis: the axis of every array in `args` that may have any size from 1 up. With None,
            or where a size in `args` is symbolic already (`jax.export.symbolic_shape`), all sizes
            are taken as they are.
        platforms: those that the file runs on, of cpu, cuda, rocm and tpu.

    Raises:
        ImportError: if flatbuffers is not installed.
        FileNotFoundError: if the folder of `path` does not exist.
        IsADirectoryError: if `path` is a folder.
        TypeError, ValueError: if `fn`, `args`, `batch_axis` or `platforms` are not as above, or
            arrays that `fn` closes over are typed by a mesh of several devices, or take too much.
            What jax raises where `fn` cannot be traced comes with a note.

    Example:
        >>> import jax, jax.numpy as jnp, jbn, jbn.export, os, tempfile
        >>> mean, var = jnp.array([1.0, 2.0]), jnp.array([4.0, 1.0])
        >>> path = os.path.join(tempfile.mkdtemp(), "model.jax")
        >>> x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
        >>> jbn.export.save(path, lambda x: jbn.batch_norm_inference(x, mean, var, epsilon=0.0), x)
        >>> predict = jbn.export.load(path)
        >>> predict(jnp.array([[3.0, 2.0], [1.0, 3.0], [5.0, 1.0]])).tolist()
        [[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]
    """
    path = _files.check_file(path)
    _files.require("flatbuffers", "export")
    platforms = _check_platforms(platforms)
    program = _check_function(fn)
    specs = _symbolic(args, batch_axis)
    exported = _trace(lambda: jax.export.export(jax.jit(program), platforms=platforms)(*specs))
    if exported.nr_devices != 1:
        raise ValueError(
            f"fn is a program for {exported.nr_devices} devices, and a file is for one: call save "
            "outside jax.set_mesh."
        )
    if (size := len(exported.mlir_module_serialized)) >= _LIMIT:
        raise ValueError(
            f"the program takes {size} bytes with the arrays that fn closes over, and a file holds "
            f"less than {_LIMIT}: hand the weights to fn as one of args, with batch_axis=None."
        )
    try:
        content = exported.serialize()
    except ValueError as error:
        if "PyTreeDef" not in str(error):
            raise
        raise TypeError(
            "fn must take and return arrays in tuples, lists and dicts, so that the file can be "
            f"read without other code, but it takes {exported.in_tree} and returns "
            f"{exported.out_tree}."
        ) from error
    content += _SEAL + hashlib.sha256(content).digest()
    _files.write_whole(path, content)


def load(path: Path) -> Callable[..., Any]:
    """Reads a file of `save`, or any other of `jax.export`.

    Needs neither Flax nor the code of the model. The file must be trusted: its program may call
    any function that XLA knows.

    Args:
        path: of the file.

    Returns:
        The function, under `jax.jit`. Its `__doc__` tells what it takes and returns, as
        `float32[batch,28,28,1] -> float32[batch,10]`, and the platforms. Called with other shapes
        or dtypes, or on another platform, it raises a ValueError.

    Raises:
        ImportError: if flatbuffers is not installed.
        ValueError: if the file is cut off, not one of `jax.export`, or written by a later jax, or
            if the program in a file of `save` is damaged.

    Example:
        >>> import jax.numpy as jnp, jbn.export, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "double.jax")
        >>> jbn.export.save(path, lambda x: {"y": 2 * x}, jnp.ones((1, 3)), platforms=["cpu"])
        >>> print(jbn.export.load(path).__doc__)
        float32[batch,3] -> {y: float32[batch,3]}, for cpu.
    """
    _files.require("flatbuffers", "export")
    with open(path, "rb") as file:
        content = bytearray(file.read())
    end = content.rfind(_SEAL)
    if end >= 0:
        digest = content[end + len(_SEAL) :]
        del content[end:]
        if digest != hashlib.sha256(content).digest():
            raise ValueError(
                f"{os.fspath(path)!r} is damaged, as its checksum shows: copy it again as binary, "
                "or write it again with jbn.export.save."
            )
    # flatbuffers checks nothing: what is wrong shows as whichever error comes first.
    try:
        exported = jax.export.deserialize(content)
    except Exception as error:
        raise ValueError(
            f"{os.fspath(path)!r}, {len(content)} bytes, is not a file of jax.export, or is cut "
            "off: write it again with jbn.export.save, or copy it again as binary."
        ) from error
    try:
        with ir.Context():
            exported.mlir_module(serialized=False)
    except Exception as error:
        raise ValueError(
            f"jax {jax.__version__} cannot read the program in {os.fspath(path)!r}: it is damaged, "
            "or a later jax wrote it. Install that jax, or write the file with this one."
        ) from error

    def program(*args: Any, **kwargs: Any) -> Any:
        return exported.call(*args, **kwargs)

    program.__name__ = program.__qualname__ = exported.fun_name
    program.__doc__ = _describe(exported)
    return jax.jit(program)


def save_tensorflow(
    path: Path, fn: Callable[..., Any], *args: Any, batch_axis: int | None = 0
) -> None:
    """Writes a function of arrays as a TensorFlow SavedModel, by `jax.experimental.jax2tf`.

    TensorFlow serves it without jax: `tf.saved_model.load(path)(x)`, or TensorFlow Serving by the
    signature `serving_default`. It runs on cpu, cuda and tpu, and holds no derivatives. What `fn`
    closes over goes into the graph, which holds at most 2 GB.

    Before it is written, TensorFlow runs the function once, on ones, with 1 for each symbolic size,
    or only reads it where sizes of 1 do not fit each other, as with b and 2 b.

    Args:
        path: of the folder, which must not exist yet. It is written whole or not at all.
        fn: as for `save`; returns an array, or arrays in one tuple, list or dict, not nested.
        *args: as for `save`.
        batch_axis: as for `save`.

    Raises:
        ImportError: if TensorFlow is not installed.
        FileExistsError: if `path` exists.
        FileNotFoundError: if the folder of `path` does not exist.
        RuntimeError: if this TensorFlow cannot read the programs of this jax.
        TypeError, ValueError: as for `save`.

    Example:
        >>> import jbn.export, tensorflow as tf  # doctest: +SKIP
        >>> jbn.export.save_tensorflow("saved", lambda x: 2 * x, x)  # doctest: +SKIP
        >>> tf.saved_model.load("saved")(x)  # doctest: +SKIP
    """
    path = _files.check_parent(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists: delete it first, or give another path.")
    tf = _files.require("tensorflow", "tensorflow")
    program = _check_function(fn)
    specs = _symbolic(args, batch_axis)
    served = _trace(lambda: _tensorflow_function(tf, program, specs))
    outputs = jax.tree.leaves_with_path(served.get_concrete_function().structured_outputs)
    if any(len(keys) > 1 for keys, _ in outputs):
        raise ValueError(
            "for TensorFlow fn must return an array, or arrays in one tuple, list or dict, got "
            f"nested ones: {', '.join(jax.tree_util.keystr(keys) for keys, _ in outputs)}."
        )
    ones = jax.tree.map(
        lambda s: tf.ones([n if isinstance(n, int) else 1 for n in s.shape], s.dtype.name), specs
    )
    try:
        served(*ones)
    except tf.errors.InvalidArgumentError as error:
        if "deserialize" in str(error):
            raise RuntimeError(
                f"TensorFlow {tf.__version__} cannot read the programs of jax {jax.__version__}, "
                "whose StableHLO is later. Known to work are jax 0.10.0 to 0.11.1 with TensorFlow "
                "2.20 and 2.21: pip install 'jbn[tensorflow]' takes such a pair."
            ) from error
        if "do not match the polymorphic shapes" not in str(error):
            raise
    module = tf.Module()
    module.__call__ = served
    _files.make_whole(path, lambda partial: tf.saved_model.save(module, str(partial)))


def _tensorflow_function(tf: Any, program: Callable[..., Any], specs: tuple[Any, ...]) -> Any:
    """`program` as a `tf.function`, traced."""
    jax2tf = importlib.import_module("jax.experimental.jax2tf")
    converted = jax2tf.convert(
        program,
        polymorphic_shapes=jax.tree.map(lambda s: f"({', '.join(map(str, s.shape))})", specs),
        with_gradient=False,
        native_serialization_platforms=_ALL,
    )
    signature = jax.tree.map(
        lambda s: tf.TensorSpec([n if isinstance(n, int) else None for n in s.shape], s.dtype.name),
        specs,
    )
    served = tf.function(converted, autograph=False, input_signature=signature)
    served.get_concrete_function()
    return served


def _check_platforms(platforms: Any) -> tuple[str, ...]:
    given = (platforms,) if isinstance(platforms, str) else platforms
    is_known = isinstance(given, Collection) and all(p in _PLATFORMS for p in given)
    if not is_known or not given:
        raise ValueError(f"platforms must be some of {', '.join(_PLATFORMS)}, got {platforms!r}.")
    return tuple(given)


def _check_function(fn: Any) -> Callable[..., Any]:
    """`fn` as a plain function, which `jax.jit` takes, of the same name."""
    if not callable(fn):
        raise TypeError(f"fn must be a function of arrays, got {_axes.describe(fn)}.")

    def program(*args: Any) -> Any:
        return fn(*args)

    program.__name__ = program.__qualname__ = getattr(fn, "__name__", type(fn).__name__)
    return program


def _symbolic(args: tuple[Any, ...], batch_axis: int | None) -> tuple[Any, ...]:
    """Shapes and dtypes of `args`, with a symbolic batch size unless sizes are symbolic already."""
    leaves = jax.tree.leaves_with_path(args)
    if not leaves:
        raise ValueError("args must hold the arguments of fn, as arrays or jax.ShapeDtypeStruct.")
    for keys, leaf in leaves:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"args{jax.tree_util.keystr(keys)} must be an array or a jax.ShapeDtypeStruct, got "
                f"{_axes.describe(leaf)}. Bind it to fn: lambda x: fn(x, ...)."
            )
    sizes: dict[int, Any] = {}
    if batch_axis is not None and not any(
        jax.export.is_symbolic_dim(n) for _, leaf in leaves for n in leaf.shape
    ):
        _check_batch(leaves, batch_axis)
        sizes[batch_axis] = jax.export.symbolic_shape("batch")[0]

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = list(leaf.shape)
        for axis, size in sizes.items():
            shape[axis] = size
        # NumPy's float64 as jax.jit takes it: float32, unless jax_enable_x64 is set.
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
        return jax.ShapeDtypeStruct(tuple(shape), dtype)

    return jax.tree.map(spec, args)


def _check_batch(leaves: list[tuple[Any, Any]], batch_axis: Any) -> None:
    """Checks that all of the arrays have a batch axis, and as many elements along it."""
    instead = (
        "With batch_axis=None give the sizes that may vary yourself, as in "
        'jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 28, 28, 1"), jnp.float32).'
    )
    if not isinstance(batch_axis, int) or isinstance(batch_axis, bool):
        raise TypeError(f"batch_axis must be an int or None, got {_axes.describe(batch_axis)}.")
    for keys, leaf in leaves:
        name = f"args{jax.tree_util.keystr(keys)}"
        if not -len(leaf.shape) <= batch_axis < len(leaf.shape):
            raise ValueError(
                f"batch_axis {batch_axis} is out of range for {name} = {_axes.describe(leaf)}. "
                + instead
            )
    sizes = {leaf.shape[batch_axis] for _, leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(
            f"all args must have one size along batch_axis {batch_axis}, got "
            f"{', '.join(_axes.describe(leaf) for _, leaf in leaves)}. {instead}"
        )


def _trace(trace: Callable[[], Any]) -> Any:
    """Calls it; where it fails, a note tells what may be wrong with `fn`."""
    try:
        return trace()
    except Exception as error:
        error.add_note(
            "jbn.export: fn is traced once for every batch size. Where it needs to know the size, "
            "export it for one: batch_axis=None. It may not change state: call an NNX model's "
            "eval() first. Weights that lie on a mesh of several devices come to one by "
            "variables = jax.device_get(variables)."
        )
        raise


def _describe(exported: jax.export.Exported) -> str:
    """What a program takes and returns, and where it runs."""

    def show(tree: Any, avals: Sequence[Any]) -> Any:
        return jax.tree.unflatten(tree, [_axes.describe(a) for a in avals])

    args, kwargs = show(exported.in_tree, exported.in_avals)
    takes = ", ".join(map(str, (*args, *([kwargs] if kwargs else []))))
    returns = show(exported.out_tree, exported.out_avals)
    return f"{takes} -> {returns}, for {', '.join(exported.platforms)}.".replace("'", "")
