"""Settings of the whole suite."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

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

    optax's optimizers and Flax's own layers raise under strict promotion.
    """
    with contextlib.ExitStack() as stack:
        if mark := request.node.get_closest_marker("quick_compile"):
            stack.enter_context(quick_compile(*mark.args, **mark.kwargs))
        for mark in request.node.iter_markers("standard_jax"):
            stack.enter_context(jax.enable_x64(mark.kwargs.get("x64", False)))
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield


@contextlib.contextmanager
def quick_compile(same_hlo: bool = False) -> Iterator[None]:
    """Inside, programs compile without the optimizations of LLVM; those of XLA stay.

    And by XLA's older code generator for CPUs, where it still has it: together a small program
    takes a fifth of the time. That one fuses a little differently, so tests of the HLO are marked
    `same_hlo` and do without. `test_moments.py`, on accuracy, and `test_properties.py`, on random
    arguments, are not marked: they compile what users do.
    """
    has_older = jax.__version_info__ < (0, 11) and not same_hlo
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with older_generator() if has_older else contextlib.nullcontext():
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def older_generator() -> Iterator[None]:
    from jax._src import compiler  # there is no public default of the compiler's options

    original = compiler.get_compile_options
    older = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

    def get_compile_options(*args: Any, env_options_overrides: Any = None, **kwargs: Any) -> Any:
        overrides = {**older, **(env_options_overrides or {})}
        return original(*args, env_options_overrides=overrides, **kwargs)

    with mock.patch.object(compiler, "get_compile_options", get_compile_options):
        yield
