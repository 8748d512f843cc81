"""How good a result is: against a truth, against an independent repeat, against the untiled result.

Images are compared as they are: nothing is rescaled unless a function is told to. All sums are float64.
"""

from chunkrestore.metrics.images import SeamError, ShellCorrelation, fsc, psnr, seam_error, ssim
from chunkrestore.metrics.instances import (
    InstanceDifference,
    InstanceScore,
    match_instances,
    same_instances,
)

__all__ = [
    "InstanceDifference",
    "InstanceScore",
    "SeamError",
    "ShellCorrelation",
    "fsc",
    "match_instances",
    "psnr",
    "same_instances",
    "seam_error",
    "ssim",
]
