"""Settings of the whole suite."""

import contextlib

import hypothesis
import jax
import pytest

# Devices for the tests of named axes; read when JAX first starts its CPU backend.
jax.config.update("jax_num_cpu_devices", 4)

hypothesis.settings.register_profile("jbn", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("jbn")


@pytest.fixture(autouse=True, scope="module")
def jax_settings(request):
    """Strict promotion and 64 bits; a module marked `standard_jax` keeps JAX's defaults.

    optax's optimizers and Flax's own layers raise under strict promotion.
    """
    with contextlib.ExitStack() as stack:
        if not any(mark.name == "standard_jax" for mark in request.node.iter_markers()):
            stack.enter_context(jax.enable_x64(True))
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield
