"""Split an image into two with independent noise, the same for every block that holds a voxel.

If a voxel counts n Poisson photons, a fair coin per photon gives two counts that are independent and Poisson,
with half the mean each (binomial thinning). The coins are a hash of the voxel's position in the volume, so
overlapping blocks throw the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore import backend
from chunkrestore.hashing import GAMMA, mixed

_BITS_PER_AXIS = 21
# Three axes in 63 bits; a position beyond two million voxels throws the coins of another one again.
_MOST_COINS = 256
# Above, the normal approximation of the binomial: its distribution differs by less than 1e-3 there.
_ALL = np.uint64(2**64 - 1)


def split_photons(
    image: np.ndarray,
    origin: Sequence[int],
    *,
    background: float = 0.0,
    gain: float = 1.0,
    seed: int = 0,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return two images that sum to `image`, each with half its expectation and independent photon noise.

    Photons are the whole multiples of `gain` by which a voxel exceeds `background`; what is not photons
    (offset, rounding, negative noise) is halved.

    Parameters
    ----------
    image
        On the host, real numbers, any number of axes up to 3.
    origin
        Position in the volume of its first voxel.
    background
        Intensity of a voxel without light.
    gain
        Intensity per detected photon, above 0.
    seed
        Whole number; another one throws other coins.

    Returns
    -------
    first, second : ndarray
        float32, shape of `image`; ``first + second == image`` to rounding.

    Examples
    --------
    >>> a, b = split_photons(np.full((4, 4), 100, np.uint16), (0, 0))
    >>> bool((a + b == 100).all())
    True
    """
    first, second = np.empty(image.shape, np.float32), np.empty(image.shape, np.float32)

    def run(slab: tuple[Any, ...]) -> None:
        part = image[slab].astype(np.float32)
        photons = np.maximum(np.rint((part - background) / gain), 0.0)
        heads = _heads(photons, _keys(part.shape, (origin[0] + slab[0].start, *origin[1:]), seed))
        rest = part - photons * np.float32(gain)
        first[slab] = heads * np.float32(gain) + rest / 2
        second[slab] = (photons - heads) * np.float32(gain) + rest / 2

    each = backend.namespace(image)
    backend.each_slab(each, image.shape, run)
    return first, second


def _keys(shape: Sequence[int], origin: Sequence[int], seed: int) -> npt.NDArray[np.uint64]:
    """Return a 64-bit key per voxel, from its position in the volume."""
    key = np.zeros((1,) * len(shape), np.uint64)
    for axis, (n, first) in enumerate(zip(shape, origin, strict=True)):
        position = np.arange(first, first + n, dtype=np.uint64) & np.uint64(2**_BITS_PER_AXIS - 1)
        position = position.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        key = key << np.uint64(_BITS_PER_AXIS) | position
    return key ^ _mixed(np.array(seed, np.uint64))


def _mixed(key: Any) -> Any:
    """Return the key one step of SplitMix64 further, with its bits mixed."""
    with np.errstate(over="ignore"):
        return mixed(key + np.uint64(GAMMA))


def _heads(photons: npt.NDArray[np.float32], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Return for every voxel how many of its photons fall to the first image."""
    most = float(photons.max(initial=0.0))
    left = np.minimum(photons, _MOST_COINS).astype(np.int64)
    heads = np.zeros(photons.shape, np.int64)
    for word in range(-(-int(min(most, _MOST_COINS)) // 64)):
        coins = _mixed(keys + np.uint64(word * 0xD1B54A32D192ED03 % 2**64))
        n = np.clip(left - 64 * word, 0, 64).astype(np.uint64)
        wanted = np.where(n == 64, _ALL, (np.uint64(1) << (n & np.uint64(63))) - np.uint64(1))
        heads += np.bitwise_count(coins & wanted)
    result = heads.astype(np.float32)
    if most > _MOST_COINS:
        many = photons > _MOST_COINS
        result[many] = _normal_heads(photons[many], np.broadcast_to(keys, photons.shape)[many])
    return result


def _normal_heads(photons: npt.NDArray[np.float32], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    first, second = (_mixed(keys ^ np.uint64(salt)) >> np.uint64(11) for salt in (0x5851F42D, 0x14057B7E))
    radius = np.sqrt(-2 * np.log((first.astype(np.float64) + 0.5) / 2**53))
    normal = radius * np.cos(2 * np.pi * second.astype(np.float64) / 2**53)
    heads = np.rint(photons / 2 + np.sqrt(photons) / 2 * normal)
    return np.clip(heads, 0, photons).astype(np.float32)
