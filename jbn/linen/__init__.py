"""Flax Linen: the layer of batch norm, and what is done with a model of such layers."""

from jbn.linen._batch_norm import BatchNorm, batch_norm_mask
from jbn.linen._calibrate import calibrate
from jbn.linen._fold import fold
from jbn.linen._report import report

__all__ = ["BatchNorm", "batch_norm_mask", "calibrate", "fold", "report"]
