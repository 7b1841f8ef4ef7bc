"""What differs by platform: how XLA is kept from moving `x` more often than it must.

The arithmetic is the same everywhere. Batch norm reads `x` once for its sums and once more to
apply them, and each compiler leaves that path at a different point:

- CPU: every sum is a kernel of its own, and what two of them share (a cast to float32, x - shift)
  is written to memory, unless `apart` hides that it is shared. Small arrays stay in the cache
  (`is_small`): for them the plain formulas are as fast, and take less time to compile.
- GPU: two sums of one operand become one kernel only where that operand is cheap to compute;
  `sum_both` makes them one sum. What the next kernel needs again is then computed again, not
  written, if `apart` hides that it is the same.
- TPU, and platforms unknown: the plain formulas are at the floor already.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

# Elements of x up to which a CPU runs the plain formulas.
_SMALL = 1 << 16


def by_platform(
    *args: Any,
    cpu: Callable[..., Any],
    gpu: Callable[..., Any],
    default: Callable[..., Any],
) -> Any:
    """Calls the function for the platform that the program is compiled for."""
    if cpu is gpu is default:
        return default(*args)
    return lax.platform_dependent(*args, cpu=cpu, cuda=gpu, rocm=gpu, default=default)


def is_small(x: jax.Array) -> bool:
    """Whether `x` is known to stay in the cache of a CPU."""
    return all(isinstance(n, int) for n in x.shape) and x.size <= _SMALL


def apart(*arrays: Any) -> Any:
    """The same arrays, but for XLA new ones: nothing computed from them is shared with before."""
    return lax.optimization_barrier(arrays)


def once(*features: Any) -> Any:
    """The same feature arrays, on CPU made before the loop over `x` and not in it, N times over."""
    return by_platform(*features, cpu=_stacked, gpu=_as_they_are, default=_as_they_are)


def _stacked(*features: jax.Array) -> tuple[jax.Array, ...]:
    shardings = {jax.typeof(f).sharding for f in features}
    if len({f.dtype for f in features}) > 1 or len(shardings) > 1:
        return features
    # Under vmap, JAX does not stack what is mapped along a split Explicit axis with what is not.
    if AxisType.Explicit in next(iter(shardings)).mesh.axis_types:
        return features
    (stack,) = apart(jnp.stack(features))  # which XLA writes to memory
    return tuple(stack)


def _as_they_are(*features: jax.Array) -> tuple[jax.Array, ...]:
    return features


def sum_both(a: jax.Array, b: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Sums of two arrays of one shape and dtype over the same axes, as one complex sum if real."""
    if jnp.iscomplexobj(a):
        return jnp.sum(a, axes), jnp.sum(b, axes)
    both = jnp.sum(lax.complex(a, b), axes)
    return both.real, both.imag


def widen(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """x in a wider dtype, on a GPU as it was rounded.

    XLA drops a rounding to bfloat16 that is cast back at once, and reads the unrounded array in
    its place. Where `x` is the output of the layer before, which the next convolution needs
    rounded, that array would be written as well, at twice the size.
    """
    if x.dtype != jnp.bfloat16 or dtype != jnp.float32:
        return x.astype(dtype)
    return by_platform(x, cpu=_cast, gpu=_cast_as_rounded, default=_cast)


def _cast(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _cast_as_rounded(x: jax.Array) -> jax.Array:
    """With a rounding between that changes nothing, but that XLA does not drop."""
    return _cast(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
