"""Settings of the whole suite."""

import contextlib
import os

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for the tests of many devices
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("jbn", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("jbn")


@pytest.hookimpl(optionalhook=True)  # there may be no xdist
def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: the tests of many processes mostly wait."""
    on_linux = hasattr(os, "sched_getaffinity")
    return 1 + (len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one process, which makes its fixtures and compiles its programs once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="module")
def jax_settings(request):
    """Gives a module marked `standard_jax` JAX's own defaults, with `x64=True` all but one.

    optax's optimizers and Flax's own layers raise under strict promotion. One marked
    `quick_compile` compiles without the optimizations of LLVM; those of XLA stay.
    """
    with contextlib.ExitStack() as stack:
        if request.node.get_closest_marker("quick_compile"):
            jax.config.update("jax_disable_most_optimizations", True)
            stack.callback(jax.config.update, "jax_disable_most_optimizations", False)
        for mark in request.node.iter_markers("standard_jax"):
            stack.enter_context(jax.enable_x64(mark.kwargs.get("x64", False)))
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield
