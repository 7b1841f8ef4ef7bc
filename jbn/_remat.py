"""A rematerialisation policy for deep networks: what of batch norm is worth its memory."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "batch_norm_inputs"
_policy = jax.checkpoint_policies.save_only_these_names(_NAME)


def tag(value: Any) -> Any:
    """Marks arrays that `save_batch_norm_inputs` keeps."""
    return jax.tree.map(lambda v: checkpoint_name(v, _NAME), value)


def save_batch_norm_inputs(prim: Any, *args: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: keep what goes into batch norm, recompute what comes out.

    Of a rematerialised function it keeps the inputs `x` of every batch norm and their moments.
    The backward pass computes outputs and activations again from them, elementwise, and no
    convolution, matrix product or sum a second time; without a policy, `jax.checkpoint` computes
    everything again. Combine it with others by `jax.checkpoint_policies.save_from_both_policies`.

    Example:
        >>> import jax, jax.numpy as jnp, jbn
        >>> def block(x, kernel):
        ...     y, _ = jbn.batch_norm(x @ kernel, activation=jax.nn.relu)
        ...     return y
        >>> block = jax.checkpoint(block, policy=jbn.save_batch_norm_inputs)
        >>> jax.grad(lambda k: block(jnp.eye(2), k).sum())(jnp.eye(2)).shape
        (2, 2)
    """
    return _policy(prim, *args, **params)
