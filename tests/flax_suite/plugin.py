"""A pytest plugin: jbn's layers in the place of Flax's, for those tests that touch batch norm.

A run in which one of the two layers was never called fails. `python -m tests.flax_suite` runs
Flax's own tests with it.
"""

import ast
import collections
import functools
import inspect
import keyword
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen.normalization
import flax.nnx.nn.normalization
import pytest

import jbn.linen
import jbn.nnx

LAYERS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # and the modules that hold Flax's
    "jbn.linen.BatchNorm": (jbn.linen.BatchNorm, (flax.linen, flax.linen.normalization)),
    "jbn.nnx.BatchNorm": (jbn.nnx.BatchNorm, (flax.nnx, flax.nnx.nn.normalization)),
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WORD = re.compile(r"\w+")
IMPLICIT = re.compile(r"set_?up|pytest", re.IGNORECASE)  # what pytest uses without its being named

calls: collections.Counter[tuple[str, str]] = collections.Counter()  # by layer and test


def pytest_configure(config: pytest.Config) -> None:
    """Swaps the layers, before any test file is imported."""
    if Path(flax.__file__).parent == config.rootpath / "flax":
        raise pytest.UsageError(f"{flax.__file__} lies beside the tests: install Flax elsewhere")
    for name, (layer, modules) in LAYERS.items():
        count_calls(name, layer)
        for module in modules:
            module.BatchNorm = layer


def count_calls(name: str, layer: Any) -> None:
    """Makes a layer count the calls that tests make of it."""
    call = layer.__call__

    @functools.wraps(call)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if test := os.environ.get("PYTEST_CURRENT_TEST"):  # the test's id, then its phase
            calls[name, test.rpartition(" ")[0]] += 1
        return call(*args, **kwargs)

    layer.__call__ = counted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests that do not touch batch norm."""
    keep = {item: touches_batch_norm(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not keep[item]])
    items[:] = [item for item in items if keep[item]]


def touches_batch_norm(item: pytest.Item) -> bool:
    """Whether BatchNorm is named by a test or by what it leads to within its file.

    That is its parameters, fixtures and setup, and every top-level or class-level definition of a
    word in one of these. Comments and strings count too: rather a test too many than one too few.
    """
    if not isinstance(item, pytest.Function):
        return True
    try:
        function = inspect.unwrap(item.function)
        if inspect.getsourcefile(function) != str(item.path):  # inherited from another file
            return True
        pending = [inspect.getsource(function), item.name, *item.fixturenames]
    except (OSError, TypeError):  # no function with a source
        return True
    scopes = definitions(item.path)
    classes = {base.__name__ for base in item.cls.__mro__} if item.cls else ()
    return leads_to_batch_norm(pending, [scopes[name] for name in ("", *classes) if name in scopes])


def leads_to_batch_norm(
    pending: Iterable[str], scopes: Iterable[Mapping[str, Iterable[str]]]
) -> bool:
    """Follows the words of these sources, and what has no name, through their definitions."""
    pending, seen = ["", *pending], set[str]()
    while pending:
        text = pending.pop()
        if "BatchNorm" in text:
            return True
        words = {"", *WORD.findall(text)} - seen
        seen |= words
        pending += [source for w in words for scope in scopes for source in scope.get(w, ())]
    return False


@functools.cache
def definitions(path: Path) -> dict[str, dict[str, list[str]]]:
    """The sources that define each name at the top of a file, under "", and in each class.

    What takes effect without being named is under the name "".
    """
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    scopes: dict[str, dict[str, list[str]]] = {}
    for scope in ast.walk(ast.parse(text)):
        if not isinstance(scope, ast.Module | ast.ClassDef):
            continue
        in_class = isinstance(scope, ast.ClassDef)
        sources = scopes.setdefault(scope.name if in_class else "", {})
        for node in (*getattr(scope, "decorator_list", ()), *scope.body):
            first = min(n.lineno for n in (node, *getattr(node, "decorator_list", ())))
            source = "\n".join(lines[first - 1 : node.end_lineno])
            found = names(node, source)
            if any(map(IMPLICIT.match, found)) or (in_class and not isinstance(node, FUNCTIONS)):
                found.add("")
            for name in found:
                sources.setdefault(name, []).append(source)
    return scopes


def names(node: ast.AST, source: str) -> set[str]:
    """What a statement binds, and its first word, since `cases.append(...)` changes `cases`."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    found = {word for word in WORD.findall(source)[:1] if not keyword.iskeyword(word)}
    for inner in ast.walk(node):
        if isinstance(inner, (*FUNCTIONS, ast.ClassDef)):
            found.add(inner.name)
        elif isinstance(inner, ast.alias):
            found.add(inner.asname or inner.name)
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.add(inner.id)
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds up the calls of pytest-xdist's workers."""
    calls.update(getattr(node, "workeroutput", {}).get("jbn_calls", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands a worker's calls on, and fails a run without calls."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["jbn_calls"] = dict(calls)
    elif session.exitstatus == pytest.ExitCode.OK and not_called(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def not_called(config: pytest.Config) -> list[str]:
    """The layers that should have been called and were not."""
    if config.option.collectonly or config.option.keyword:  # these leave tests out
        return []
    return [name for name in LAYERS if not any(layer == name for layer, _ in calls)]


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Shows the calls."""
    for name in LAYERS:
        counts = [n for (layer, _), n in calls.items() if layer == name]
        terminalreporter.line(f"{len(counts)} tests called {name} {sum(counts)} times")
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        for name in not_called(config):
            terminalreporter.line(
                f"FAILED: no test called {name}, so it did not take the place of Flax's", red=True
            )
