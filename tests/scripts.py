"""How scripts end and what they print, for the tests of examples and benchmarks."""

import contextlib

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
