"""Batch normalization for JAX (Ioffe and Szegedy 2015, arXiv:1502.03167).

Pure functions with a hand-written backward pass. The Flax layers are in `jbn.linen`, which is
imported apart: `import jbn` needs JAX alone.
"""

from importlib.metadata import version as _version

from jbn._batch_norm import batch_norm, batch_norm_inference
from jbn._fold import fold_batch_norm
from jbn._moments import Moments, merge_moments, moments
from jbn._remat import save_batch_norm_inputs
from jbn._running import RunningStats, update_running_stats

__version__ = _version("jbn")

__all__ = [
    "Moments",
    "RunningStats",
    "batch_norm",
    "batch_norm_inference",
    "fold_batch_norm",
    "merge_moments",
    "moments",
    "save_batch_norm_inputs",
    "update_running_stats",
]
