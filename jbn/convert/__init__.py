"""Weights of torch and Keras, in and out of Flax: neither of the two is needed.

A tour: `from_torch` and `from_keras` take a template of Flax variables and return it filled, with a
report of every entry; `to_torch` and `to_keras` go back. What differs between the layers of batch
norm themselves is in docs/migrating.md.
"""

from jbn.convert._keras import from_keras, to_keras
from jbn.convert._order import OrderError
from jbn.convert._report import Converted, Report, Row
from jbn.convert._torch import from_torch, to_torch

__all__ = [
    "Converted",
    "OrderError",
    "Report",
    "Row",
    "from_keras",
    "from_torch",
    "to_keras",
    "to_torch",
]
