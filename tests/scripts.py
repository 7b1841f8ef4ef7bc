"""How scripts end and what they print, for the tests of examples and benchmarks."""

import contextlib
from unittest import mock

import matplotlib.figure
import pytest


@contextlib.contextmanager
def exits(code):
    """The script ends there: with 0 after --help, with 2 where argparse tells of an error."""
    with pytest.raises(SystemExit) as exit_info:
        yield
    assert exit_info.value.code == code


def unwrapped(text):
    return " ".join(text.split())


def table_rows(text):
    """The cells of each line of rich's tables."""
    lines = (line for line in text.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def drawn(figure, results):
    """The figure that an example draws of its results, before it becomes a PNG."""
    with mock.patch.object(matplotlib.figure.Figure, "savefig", autospec=True) as savefig:
        figure(results)
    return savefig.call_args.args[0]


def lines(axes):
    """Points of the lines with a label, by the label."""
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}
