"""Named shapes, axes and options: what every implementation is held to."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of batch norm.

    Attributes:
        shape: of x.
        axis: as given to the function.
        mask: shape of a random mask, or None.
        mask_dtype: its dtype.
        weights: whether it holds weights rather than 0 and 1.
        valid: share of elements that the mask keeps.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    scale: bool = True
    bias: bool = True
    mask: tuple[int, ...] | None = None
    mask_dtype: str = "bool"
    weights: bool = False
    valid: float = 0.6
    residual: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    epsilon: float = 1e-5

    @property
    def feature_axes(self) -> tuple[int, ...]:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(sorted(a % len(self.shape) for a in axes))

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i not in self.feature_axes)

    @property
    def features(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.feature_axes)

    @property
    def n(self) -> int:
        return math.prod(self.shape[i] for i in self.reduced_axes)


CASES = (
    Case("vector", (5,)),
    Case("matrix", (16, 5)),
    Case("first axis", (5, 16), axis=0),
    Case("sequence", (4, 7, 3), epsilon=1e-3),
    Case("nhwc", (4, 5, 3, 6)),
    Case("nchw", (4, 6, 5, 3), axis=1),
    Case("negative axis", (4, 6, 5, 3), axis=-3),
    Case("rank 5", (3, 2, 3, 2, 4)),
    Case("rank 6", (2, 3, 2, 1, 2, 3), axis=2),
    Case("two feature axes", (6, 3, 5, 2), axis=(1, -1)),
    Case("unsorted feature axes", (6, 3, 5, 2), axis=(-1, 1)),
    Case("all features", (3, 4), axis=(0, 1)),
    Case("no feature axis", (6, 5), axis=()),
    Case("batch of one", (1, 6)),
    Case("one channel", (9, 1)),
    Case("empty batch", (0, 4)),
    Case("no channels", (4, 0)),
    Case("sampled sparsely", (130, 9, 2)),
    Case("no scale", (16, 5), scale=False),
    Case("no bias", (16, 5), bias=False),
    Case("neither", (16, 5), scale=False, bias=False),
    Case("mask of rows", (16, 3, 5), mask=(16, 1, 1)),
    Case("mask of elements", (16, 5), mask=(16, 5)),
    Case("mask of lower rank", (16, 3, 5), mask=(3, 5)),
    Case("float mask", (16, 5), mask=(16, 1), mask_dtype="float32"),
    Case("integer mask", (5, 16), axis=0, mask=(16,), mask_dtype="int32"),
    Case("weights", (16, 3, 5), mask=(16, 1, 5), mask_dtype="float64", weights=True),
    Case("integer weights", (16, 5), mask=(16, 1), mask_dtype="int32", weights=True),
    Case("small weights", (8, 4), mask=(8, 4), mask_dtype="float32", weights=True, valid=1 / 8),
    Case("all masked", (8, 4), mask=(8, 1), valid=0.0),
    Case("one valid element", (8, 4), mask=(8, 1), valid=1 / 8),
    Case("residual", (16, 5), residual=True),
    Case("relu", (16, 5), activation=jax.nn.relu),
    Case("gelu, nchw", (4, 6, 5, 3), axis=1, activation=jax.nn.gelu),
    Case("add and relu", (4, 3, 3, 5), residual=True, activation=jax.nn.relu),
    Case(
        "everything",
        (4, 3, 6, 5),
        axis=(1, 3),
        mask=(4, 1, 6, 1),
        residual=True,
        activation=jnp.tanh,
        epsilon=0.1,
    ),
)


def draw(case: Case, dtype: Any = "float64", seed: int = 0) -> dict[str, np.ndarray | None]:
    """Random arguments and cotangents, all different, features with different mean and spread."""
    rng = np.random.default_rng([seed, *case.shape])
    is_complex = np.issubdtype(jnp.dtype(dtype), np.complexfloating)

    def normal(shape, is_complex=is_complex):
        v = rng.normal(size=shape)
        return v + 1j * rng.normal(size=shape) if is_complex else v

    per_feature = [n if i in case.feature_axes else 1 for i, n in enumerate(case.shape)]
    x = normal(case.shape) * rng.uniform(0.5, 2, per_feature) + 3 * normal(per_feature)
    mask = None
    if case.mask is not None:
        kept = round(case.valid * math.prod(case.mask))
        mask = rng.permutation(np.arange(math.prod(case.mask)) < kept).reshape(case.mask)
        if case.weights:
            mask = (
                mask * rng.uniform(0.1, 0.4, case.mask) * (10 if case.mask_dtype == "int32" else 1)
            )
        mask = mask.astype(case.mask_dtype)
    param_dtype = "float64" if jnp.dtype(dtype).itemsize >= 8 else "float32"
    if jnp.dtype(dtype) == np.complex64:
        param_dtype = "float32"
    real = jnp.finfo(dtype).dtype
    return {
        "x": x.astype(dtype),
        "scale": rng.uniform(0.5, 2, case.features).astype(param_dtype) if case.scale else None,
        "bias": rng.normal(size=case.features).astype(param_dtype) if case.bias else None,
        "mask": mask,
        "residual": normal(case.shape).astype(dtype) if case.residual else None,
        "dy": normal(case.shape).astype(dtype),
        "dmean": normal(case.features).astype(accumulated(dtype)),
        "dvar": rng.normal(size=case.features).astype(accumulated(real)),
    }


def differentiable(args: dict[str, Any]) -> list[str]:
    """The arguments that have a gradient: floating weights too."""
    arrays = {k: args[k] for k in ("x", "scale", "bias", "residual", "mask")}
    return [k for k, v in arrays.items() if v is not None and jnp.issubdtype(v.dtype, jnp.inexact)]


def accumulated(dtype: Any) -> Any:
    """The dtype of the moments of a batch of this dtype."""
    dtype = jnp.dtype(dtype)
    return np.dtype("float32") if dtype.itemsize < 4 else dtype
