"""The comparison: what each method makes of one image whose truth is known, in numbers and pictures."""

from chunkrestore.comparison.result import Comparison, MethodResult, SegmentationResult
from chunkrestore.comparison.run import compare

__all__ = ["Comparison", "MethodResult", "SegmentationResult", "compare"]
