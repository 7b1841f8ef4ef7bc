"""What the documentation shows is run: docstring examples, README code, the cost of importing."""

import doctest
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import jbn
import jbn._batch_norm
import jbn._moments
import jbn._remat
import jbn._running
import jbn.linen

pytestmark = pytest.mark.standard_jax

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
MODULES = (jbn._moments, jbn._batch_norm, jbn._remat, jbn._running, jbn.linen)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted >= 2
    assert failed == 0


def test_public_functions_have_examples():
    for name in jbn.__all__:
        if name not in ("Moments", "RunningStats"):
            assert ">>>" in getattr(jbn, name).__doc__, name


def test_readme_code():
    """The blocks are one session, from top to bottom."""
    assert len(BLOCKS) >= 4
    session = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), session)


def test_readme_figures_of_the_digits():
    """They are those of the committed run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        digits = importlib.import_module("digits")
    results = json.loads((ROOT / "examples/results/digits.json").read_text())
    curves = {name: np.array(values) for name, values in results["test_accuracy"].items()}
    sentences = digits.effects(results["learning_rates"], curves)
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    shown = [row for row in rows if "learning rate" in row[0]]
    assert len(shown) == 3
    for sentence, (_, without, with_batch_norm) in zip(sentences, shown, strict=True):
        numbers = re.search(
            r"plain (.*?)(?: %)?(?: at .*?)?, batch norm (.*?)(?: %)?(?: at .*)?\.$", sentence
        )
        assert numbers is not None
        assert numbers.groups() == (without, with_batch_norm)


def test_readme_figures_of_the_questions():
    """Every number of the answers is in the committed output."""
    section = README.split("## The lecture's questions")[1].split("\n## ")[0]
    answers = section.split("```")[2]
    output = (ROOT / "examples/results/questions.txt").read_text()
    numbers = re.findall(r"\d+\.\d+|\de-\d\d|\d{3}", answers)
    assert len(numbers) >= 10
    for number in numbers:
        assert number in output, number


def test_readme_figures_of_the_traffic():
    """Each row of the table is in the committed output of `benchmarks.traffic`."""
    results = {
        platform: (ROOT / f"benchmarks/results/traffic-{platform}.txt").read_text()
        for platform in ("cuda", "cpu")
    }
    rows = {
        platform: {tuple(cells[:3]): cells[3:] for cells in _cells(text, "│")}
        for platform, text in results.items()
    }
    section = README.split("## Memory traffic")[1].split("\n## ")[0]
    shown = [cells for cells in _cells(section, "|") if "float" in cells[0]]
    assert len(shown) == 6
    for name, *figures in shown:
        dtype, _, then = name.partition(", ")
        flax, ours = (rows["cuda"][dtype, then.replace(" and", ""), k] for k in ("flax", "jbn"))
        both = [(flax[i], ours[i]) for i in (0, 2, 3)]  # without the temporaries
        assert figures == [figure for pair in both for figure in pair], name
    forward, backward = (
        [rows["cpu"]["float32", "", k][i] for k in ("jbn", "flax")] for i in (0, 3)
    )
    assert f"({forward[0]} against {forward[1]} in float32)" in section
    assert f"({backward[0]} against {backward[1]})" in section


def _cells(text, bar):
    """The cells of each row of a table in text."""
    lines = (line for line in text.splitlines() if line.startswith(bar))
    return [[cell.strip() for cell in line.strip(bar).split(bar)] for line in lines]


def test_readme_links():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    ).stdout.strip()


def test_import_needs_jax_alone():
    code = """
import sys, jax
before = set(sys.modules)
import jbn
print(sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
"""
    loaded = set(eval(run(code))) - set(sys.stdlib_module_names)
    assert loaded <= {"jbn", "jax"}  # of jax, parts that it loads when asked for


def test_version():
    assert jbn.__version__ == importlib.metadata.version("jbn")
    assert f"[{jbn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names():
    assert jbn.__all__ == sorted(jbn.__all__)
    assert all(hasattr(jbn, name) for name in jbn.__all__)
    assert (ROOT / "jbn" / "py.typed").exists()
