"""Point spread functions in TIFF and NumPy files, with their voxel size."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.prepare import check_numbers, prepare

if TYPE_CHECKING:
    import tifffile

VOXEL_SIZE_TOLERANCE = 0.05
"""Relative difference of voxel sizes that is let pass: as much as a width is known; rounding in metadata stays
well below."""

_TIFF = (".tif", ".tiff")


def read_psf(path: str | os.PathLike[str], ndim: int | None = None) -> npt.NDArray[np.float32]:
    """Read a point spread function from a TIFF (``.tif``, ``.tiff``) or NumPy (``.npy``) file.

    Parameters
    ----------
    path
        File with one two- or three-dimensional array, axes ``yx`` or ``zyx``.
    ndim
        Number of dimensions that the array must have; any of 2 and 3 by default.

    Returns
    -------
    ndarray
        As `prepare` returns it: float32, sum 1.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind, cannot be read, or holds no valid point spread function.
    """
    array = read_raw_psf(path)
    try:
        return prepare(array, ndim)
    except (TypeError, ValueError) as error:
        raise ValueError(f'`psf` file "{Path(path)}": {error}') from error


def read_raw_psf(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the array of a file as it is, unchecked: what `diagnose` and `prepare_psf` take.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind or cannot be read.
    """
    file = Path(path)
    readers: dict[str, Callable[[Path], np.ndarray]] = {
        ".npy": lambda f: np.load(f, allow_pickle=False),
        **dict.fromkeys(_TIFF, lambda f: np.asarray(_tifffile().imread(f))),
    }
    reader = readers[_kind(file)]
    if not file.is_file():
        raise FileNotFoundError(f'`psf` file "{file}" does not exist')
    try:
        return reader(file)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f'`psf` file "{file}" cannot be read: {error}') from error


def read_psf_voxel_size(path: str | os.PathLike[str]) -> tuple[float, ...] | None:
    """Return the micrometres per axis (z, y, x or y, x) that a TIFF states for its array, or None.

    From OME or ImageJ metadata; for a single plane also from the resolution tags of any TIFF. None where a
    length or its unit is missing, and for ``.npy`` files, which have no place for it.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind or cannot be read.
    """
    file = Path(path)
    if _kind(file) == ".npy":
        return None
    from chunkrestore.ome_zarr.tiff.metadata import facts_of

    with _open_tiff(file) as tiff:
        axes = "zyx"[-len(tiff.series[0].shape) :]
        lengths = facts_of(tiff).lengths
    return tuple(lengths[axis] for axis in axes) if {*axes} <= {*lengths} else None


def write_psf(
    path: str | os.PathLike[str], psf: npt.ArrayLike, voxel_size: Sequence[float] | None = None
) -> None:
    """Write a point spread function so that `read_psf` and `read_psf_voxel_size` give it back.

    Values are stored as float32 and not scaled. A TIFF is one that ImageJ opens with its voxel size. Readers
    take a TIFF with a single plane for two-dimensional.

    Parameters
    ----------
    path
        New file, ``.tif``, ``.tiff`` or ``.npy``; an existing file is replaced.
    psf
        Axes ``yx`` or ``zyx``.
    voxel_size
        Micrometres per axis of `psf`; not stored by default.

    Raises
    ------
    ValueError
        If the file is of another kind, there is no such folder, `psf` does not have 2 or 3 dimensions of
        finite numbers, or `voxel_size` does not fit it or cannot be stored (``.npy``).
    """
    file, array = Path(path), np.ascontiguousarray(check_numbers(psf), dtype=np.float32)
    kind = _kind(file)
    size = None if voxel_size is None else check_voxel_size("voxel_size", voxel_size, array.ndim)
    if not file.parent.is_dir():
        raise ValueError(f'folder "{file.parent}" of the `psf` file does not exist; create it first')
    if kind == ".npy":
        if size is not None:
            raise ValueError(f'"{file}" cannot hold `voxel_size` {size}; write a .tif, or pass None')
        np.save(file, array)
        return
    facts: dict[str, Any] = {"axes": "ZYX"[-array.ndim :]}
    options: dict[str, Any] = {}
    if size is not None:
        facts |= {"unit": "um"} | ({"spacing": size[0]} if array.ndim == 3 else {})
        options["resolution"] = (1 / size[-1], 1 / size[-2])
    _tifffile().imwrite(file, array, imagej=True, metadata=facts, **options)


def check_voxel_size(name: str, values: Sequence[float], ndim: int) -> tuple[float, ...]:
    """Return `values` as a tuple of `ndim` positive lengths in micrometres, or raise a ValueError."""
    size = tuple(float(value) for value in values)
    if len(size) != ndim or not all(math.isfinite(value) and value > 0 for value in size):
        raise ValueError(
            f"`{name}` must have one positive length in micrometres for each of the {ndim} axes "
            f"({'z, y, x'[-(3 * ndim - 2) :]}), got {size}"
        )
    return size


def _kind(file: Path) -> str:
    kind = file.suffix.lower()
    if kind not in (".npy", *_TIFF):
        raise ValueError(f'`psf` file "{file}" is not of a supported kind; use one of .npy, .tif, .tiff')
    return kind


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError('TIFF files need tifffile; run: pip install "chunkrestore"') from error
    return tifffile


def _open_tiff(file: Path) -> AbstractContextManager[tifffile.TiffFile]:
    if not file.is_file():
        raise FileNotFoundError(f'`psf` file "{file}" does not exist')
    try:
        return _tifffile().TiffFile(file)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f'`psf` file "{file}" cannot be read: {error}') from error
