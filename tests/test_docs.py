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

pytestmark = [pytest.mark.standard_jax, pytest.mark.quick_compile]

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("distributed", "gradient_accumulation", "serving")),
)
FILES = [path for path in sorted((ROOT / "jbn").rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstring_examples(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted >= 2
    assert failed == 0


def test_public_functions_have_examples():
    for name in jbn.__all__:
        if name not in ("Moments", "RunningStats"):
            assert ">>>" in getattr(jbn, name).__doc__, name


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page(page):
    """The blocks are one session, from top to bottom."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    session = {}
    for block in blocks:
        exec(compile(block, page, "exec"), session)


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


RESULTS = ROOT / "benchmarks/results"
PEERS = (
    "jbn",
    "linen-two-pass",
    "nnx",
    "haiku",
    "equinox",
    "keras",
    "torch",
    "torch-channels-last",
)


def test_readme_figures_of_the_traffic():
    """Each row of the table is in the committed output of `benchmarks.traffic`."""
    rows = {
        platform: {
            tuple(cells[:3]): cells[3:]
            for cells in _cells((RESULTS / f"traffic-{platform}.txt").read_text(), "│")
        }
        for platform in ("cuda", "cpu")
    }
    section = README.split("### Memory traffic")[1].split("\n### ")[0]
    shown = [cells for cells in _cells(section, "|") if "float" in cells[0] and len(cells) == 7]
    assert len(shown) == 8
    for name, *figures in shown:
        dtype, _, then = name.partition(", ")
        flax, ours = (rows["cuda"][dtype, then.replace(" and", ""), k] for k in ("flax", "jbn"))
        both = [(flax[i], ours[i]) for i in (0, 2, 3)]  # without the temporaries
        assert figures == [figure for pair in both for figure in pair], name
    ours, flax = (rows["cpu"]["bfloat16", "", k] for k in ("jbn", "flax"))
    assert f"jbn moves {ours[0]} forward and {ours[3]} backward" in section
    assert f"Flax {flax[0]} and {flax[3]}" in section


def test_readme_figures_of_the_networks():
    """They are those of the committed tables."""
    step = {
        (platform, cells[0], cells[1]): cells[2:]
        for platform in ("cuda", "tpu", "cpu", "cpu-jax-0.12")
        for cells in _cells((RESULTS / f"networks-{platform}.txt").read_text(), "│")
    }
    rows = {name: cells for name, *cells in _cells(README, "|") if len(cells) == 3}
    scanned = [step[p, "scan bfloat16", "jbn"][1] for p in ("cuda", "tpu", "cpu")]
    assert rows["16 scanned layers of convolution, batch norm and relu"] == scanned
    newer, name = step["cpu-jax-0.12", "scan bfloat16", "jbn"][1], "networks-cpu-jax-0.12.txt"
    assert f"[{newer}](benchmarks/results/{name})" in README
    resnets = [step["cuda", "ResNet-50", k] for k in ("flax", "jbn", "jbn, policy")]
    assert rows["ResNet-50, 64 images"][0] == resnets[1][1]
    assert rows["ResNet-50, 64 images, `jbn.save_batch_norm_inputs`"][0] == resnets[2][1]
    flax, ours, policy = (cells[2] for cells in resnets)
    assert f"{flax} GB with Flax's layer, {ours} GB with jbn's and {policy} GB" in README
    assert len({tuple(cells[3:4]) for cells in resnets}) == 1  # convolutions, and with the policy
    assert resnets[1][4] == resnets[2][4]  # as many sums


def test_figures_of_the_communication():
    """The megabytes are those of the committed table, and so is what stays below 1 %."""
    page = (ROOT / "docs/distributed.md").read_text()
    output = (RESULTS / "communication-cuda.txt").read_text()
    cells = _cells(output.split("Communication of a ResNet-50")[1], "│")
    sent = {(layer, devices): megabytes for devices, layer, megabytes, *_ in cells}
    (_, *header), _, *rows = [c for c in _cells(page, "|") if len(c) == 5]
    assert len(rows) == 2
    for name, *figures in rows:
        layer = name.partition(",")[0].lower()
        assert figures == [sent[layer, devices] for devices in header], name
    limits = {
        (platform, images): re.search(f"jbn, {images} images: .* up to (\\d+) devices", text)[1]
        for platform in ("cuda", "tpu")
        for text in [(RESULTS / f"communication-{platform}.txt").read_text()]
        for images in (64, 256)
    }
    order = [(platform, images) for images in (64, 256) for platform in ("cuda", "tpu")]
    told = (
        "up to {0} H100s, which is one node, and up to {1} chips of a TPU v5e; "
        "with 256 images, up to {2} and {3}."
    )
    assert told.format(*(limits[key] for key in order)) in " ".join(page.split())


def test_readme_figures_of_the_stages():
    """They are those of the committed output."""
    rows = _cells((ROOT / "examples/results/serve.txt").read_text(), "│")
    expected = [
        [name, f"{right} %", f"{one} us", f"{many} ms"] for name, right, _, one, many, _ in rows
    ]
    section = README.split("## From trained to served")[1].split("\n## ")[0]
    _, _, *shown = _cells(section, "|")
    assert len(shown) == 6
    assert shown == expected


def test_figures_of_the_folding():
    """They are those of the committed tables."""
    rows = {
        platform: {name: cells for name, *cells in _cells(text, "│")}
        for platform in ("cuda", "tpu", "cpu")
        for text in [(RESULTS / f"folding-{platform}.txt").read_text()]
    }
    page = (ROOT / "docs/serving.md").read_text()
    shown = {name: cells for name, *cells in _cells(page, "|") if len(cells) == 3}
    names = {"batch norm, Flax's layer": "flax", "batch norm, jbn's layer": "jbn"}
    for title, layer in (names | {"folded": "jbn, folded"}).items():
        cuda, tpu = (rows[platform][layer] for platform in ("cuda", "tpu"))
        assert shown[title] == [cuda[1], cuda[3], tpu[1]], title
    assert rows["cuda"]["jbn, folded"][:5] == rows["cuda"]["flax, folded"][:5]
    before, after = (rows["cpu"][name][-1].split()[0] for name in ("jbn", "jbn, folded"))
    assert f"took {after} ms instead of {before}" in " ".join(page.split())


def test_readme_figures_of_the_speed():
    """Ratios and errors are those of the committed measurement."""
    measured = json.loads((RESULTS / "cpu.json").read_text())
    ratios = {}
    for r in measured["speed"]:
        after = "" if r["after"] == "none" else f", {r['after']}"
        key = f"{r['dtype']}, {r['mode']}{after}"
        ratios.setdefault(key, {}).setdefault(r["peer"], []).append(r["ratio_to_linen"])
    section = README.split("### Speed on a CPU")[1].split("\n## ")[0]
    rows = {name: cells for name, *cells in _cells(section, "|") if "float" in name}
    assert rows.keys() == ratios.keys()
    for name, peers in ratios.items():
        means = [f"{np.exp(np.log(peers[peer]).mean()):.2f}" for peer in PEERS]
        means[0] += f" ({min(peers['jbn']):.2f} to {max(peers['jbn']):.2f})"
        assert rows[name] == means, name
    overhead = {
        cells[0].removesuffix(", 100 layers"): cells[3]
        for cells in _cells((RESULTS / "overhead-cpu.txt").read_text(), "│")
    }
    text = " ".join(section.split())
    assert f"takes {overhead['all']} times as long as with Linen" in text
    assert f"(tracing {overhead['trace']}, compiling {overhead['compile']};" in text
    both, forward = overhead["call, forward and backward"], overhead["call, forward"]
    assert f"256x128, {forward} times forward and {both} times forward and back" in text
    lines = _cells((RESULTS / "speed-cpu-amd.txt").read_text(), "│")
    table = {name: row for name, *row in lines if name}
    plain, narrow, relu, narrow_relu = table["jbn"]
    torch = table["torch-channels-last"]
    assert f"ahead without relu, at {torch[0]} and {torch[1]}" in text
    assert f"to {plain} in float32 and {relu} with relu" in text
    assert f"in bfloat16 to {narrow} and {narrow_relu}" in text

    errors = {(r["peer"], r["mean"], r["std"]): r["y_error"] for r in measured["accuracy"]}
    section = README.split("### Accuracy")[1].split("\n### ")[0]
    (_, *header), _, *rows = _cells(section, "|")
    assert len(rows) == len(PEERS) + 1
    for peer, *cells in rows:
        for cell, distribution in zip(cells, header, strict=True):
            error = errors[peer, *map(float, distribution.split(", "))]
            assert cell == ("NaN" if error is None else f"{error:.0e}")


def _cells(text, bar):
    """The cells of each row of a table in text."""
    lines = (line for line in text.splitlines() if line.startswith(bar))
    return [[cell.strip() for cell in line.strip(bar).split(bar)] for line in lines]


@pytest.mark.parametrize("page", [*PAGES, "docs/migrating.md"])
def test_links(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


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
