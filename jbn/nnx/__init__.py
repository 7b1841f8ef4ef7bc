"""Flax NNX: the layer of batch norm, and what is done with a model of such layers."""

from jbn.nnx._batch_norm import BatchMoments, BatchNorm, batch_norm_mask
from jbn.nnx._calibrate import calibrate
from jbn.nnx._fold import fold
from jbn.nnx._report import report

__all__ = ["BatchMoments", "BatchNorm", "batch_norm_mask", "calibrate", "fold", "report"]
