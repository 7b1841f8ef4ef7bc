"""Arithmetic in which some arrays are real and some complex.

JAX's strict dtype promotion has no product of the two, and a full complex product would turn an
infinite part into NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def abs2(x: jax.Array) -> jax.Array:
    """|x|^2, real."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)


def times(x: jax.Array, y: jax.Array) -> jax.Array:
    """x * y, where either may be real."""
    if jnp.iscomplexobj(x) == jnp.iscomplexobj(y):
        return x * y
    real, other = (y, x) if jnp.iscomplexobj(x) else (x, y)
    return lax.complex(real * other.real, real * other.imag)


def cast(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """x in `dtype`; its real part if that is real: so a real argument takes a cotangent."""
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)
