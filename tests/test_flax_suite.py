"""The runner of Flax's own tests: which tests it selects, what it counts and how it fails."""

import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import flax
import pytest

from tests.flax_suite import __main__ as runner
from tests.flax_suite import plugin

ROOT = Path(__file__).parents[1]

NAMING = """
import functools
import unittest

import pytest
from absl.testing import parameterized
from flax import nnx
from flax.nnx import BatchNorm as Norm

CASES = []
CASES.append(nnx.BatchNorm)
if True:
    LAYER = nnx.BatchNorm


class Block:
    norm = nnx.BatchNorm


def near():
    return far()


def far():
    return Block


@pytest.fixture
def block():
    return Block


def decorated(f):
    Block
    return functools.wraps(f)(lambda *args: f(*args))


def test_kept_by_name():
    nnx.BatchNorm


def test_kept_by_import():
    Norm


def test_kept_by_helper_of_helper():
    near()


def test_kept_by_list():
    CASES


def test_kept_by_block():
    LAYER


@pytest.mark.parametrize("layer", [nnx.Dropout, nnx.BatchNorm])
def test_kept_by_parameter(layer):
    pass


def test_kept_by_fixture(block):
    pass


@decorated
def test_kept_by_decorator():
    pass


def test_left_alone():
    nnx.LayerNorm


class Base:
    def test_kept_by_subclass(self):
        self.layer()


class TestSubclass(Base):
    def layer(self):
        return Block


class TestSetUp(unittest.TestCase):
    def setUp(self):
        near()

    def test_kept_by_setup(self):
        pass


class TestAttribute:
    layers = (Block,)

    def test_kept_by_attribute(self):
        pass


class TestParameters(parameterized.TestCase):
    def helper(self):
        return Block

    @parameterized.parameters(1, 2)
    def test_kept_by_method(self, _):
        self.helper()

    @parameterized.parameters((Block,))
    def test_kept_by_absl_parameter(self, _):
        pass

    @parameterized.parameters(1, 2)
    def test_left_beside_a_helper(self, _):
        pass
"""

CALLING = """
import jax
from flax import linen as nn
from flax import nnx

X = jax.numpy.ones((4, 3))


def test_linen():
    layer = nn.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    layer.apply(variables, X, mutable=["batch_stats"])


def test_nnx():
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for _ in range(3):
        layer(X)


def test_both():
    nn.normalization.BatchNorm(True).init(jax.random.key(0), X)
    nnx.nn.normalization.BatchNorm(3, rngs=nnx.Rngs(0))(X)


def test_neither():
    raise AssertionError("deselected")
"""

BACKEND = """
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    import pathlib
    info = pathlib.Path(folder, "flax-{version}.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\\nName: flax\\nVersion: {version}\\n"
    )
    return info.name
"""

SETTINGS = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[tool.pytest.ini_options]
filterwarnings = ["error"]
"""


def run(*command, **env):
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


def run_offline(folder, *arguments):
    """The command, for which pip finds what lies in the folder and nothing else."""
    pytest.importorskip("pip")
    return run("tests.flax_suite", *arguments, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))


@pytest.fixture(scope="module")
def naming(tmp_path_factory):
    """What pytest prints, and its status, for tests that name the layer and do not call it."""
    folder = tmp_path_factory.mktemp("naming")
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    (folder / "naming_test.py").write_text(NAMING)
    return run("pytest", "-v", "-c", settings, "-p", "tests.flax_suite.plugin", folder)


def test_selection(naming):
    """The name of each test says what is expected."""
    ran = re.findall(r"::(test_\w+?)\d*(?:\[.*\])? PASSED", naming.stdout)
    assert set(ran) == set(re.findall(r"def (test_kept\w+)", NAMING))
    assert len(set(ran)) == 13
    assert "15 passed, 3 deselected" in naming.stdout


def test_fails_without_calls(naming):
    for name in ("jbn.linen.BatchNorm", "jbn.nnx.BatchNorm"):
        assert f"0 tests called {name} 0 times" in naming.stdout
        assert f"FAILED: no test called {name}, so it did not take the place" in naming.stdout
    assert naming.returncode == pytest.ExitCode.TESTS_FAILED


def test_refuses_the_flax_beside_the_tests(monkeypatch, pytestconfig):
    monkeypatch.setattr(flax, "__file__", str(pytestconfig.rootpath / "flax/__init__.py"))
    with pytest.raises(pytest.UsageError, match="lies beside the tests"):
        plugin.pytest_configure(pytestconfig)


def test_runner(tmp_path):
    """From the archive to the calls, which are added up over two workers."""
    version = importlib.metadata.version("flax")
    files = {
        "pyproject.toml": SETTINGS,
        "backend.py": BACKEND.format(version=version),
        "flax/__init__.py": "raise AssertionError('not the Flax that is installed')",
        "tests/other_test.py": "raise AssertionError('does not name the layer')",
        "tests/nnx/calling_test.py": CALLING,
    }
    with tarfile.open(tmp_path / f"flax-{version}.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"flax-{version}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    done = run_offline(tmp_path, "-n", "2")
    assert done.returncode == 0, done.stdout
    assert "2 tests called jbn.linen.BatchNorm 3 times" in done.stdout
    assert "2 tests called jbn.nnx.BatchNorm 4 times" in done.stdout
    assert "3 passed" in done.stdout


def test_runner_without_network(tmp_path):
    done = run_offline(tmp_path)
    assert done.returncode == 1
    assert "pip could not download the source distribution of flax" in done.stdout
    assert "No matching distribution" in done.stdout  # what pip says


def test_runner_without_tests(monkeypatch):
    monkeypatch.setattr(runner, "fetch", lambda version, folder: folder)
    with pytest.raises(SystemExit, match=r"no test file of flax .* names BatchNorm"):
        runner.main([])
