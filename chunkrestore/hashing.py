"""Random bits by key: what is drawn for a place or an object depends on nothing else.

References
----------
.. [1] Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Bits: TypeAlias = Any
"""uint64 array of NumPy or CuPy."""

GAMMA = 0x9E3779B97F4A7C15
"""Steps of SplitMix64's counter: odd, and near 2**64 divided by the golden ratio."""


def mixed(bits: Bits) -> Bits:
    """Return a permutation of 64-bit numbers in which every bit depends on every one (SplitMix64's finaliser)."""
    with np.errstate(over="ignore"):  # NumPy warns of what is meant, for single numbers
        bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)
