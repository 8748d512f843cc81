"""Random numbers by key: any object's are drawn without those of the others, many objects at once.

A generator of NumPy's for each object would take longer than the object. Here the numbers are a hash of the seed,
the purpose, the object's key and the number's place (`chunkrestore.hashing`).
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from chunkrestore.hashing import GAMMA, mixed

Floats: TypeAlias = npt.NDArray[np.float64]
Keys: TypeAlias = npt.NDArray[np.int64]


class Purpose(IntEnum):
    """What random numbers are for: each purpose has a stream of its own."""

    PLACES = 1
    SIZES = 2
    LOOKS = 3
    TEXTURE = 4
    CLUSTERS = 5
    SHAPES = 6
    CURVES = 7


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: Purpose) -> int:
    return int(np.random.SeedSequence([seed, int(purpose)]).generate_state(1, np.uint64)[0])


def uniform(seed: int, purpose: Purpose, keys: npt.NDArray[np.integer], draws: int) -> Floats:
    """Return `draws` numbers in [0, 1) for each key: float64, the shape of `keys` and one axis more.

    A number depends on the seed, the purpose, its key and its place alone, never on what else is asked.
    """
    counters = keys[..., None].astype(np.uint64) * np.uint64(draws) + np.arange(draws, dtype=np.uint64)
    bits = mixed(counters * np.uint64(GAMMA) + np.uint64(_stream(seed, purpose)))
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
