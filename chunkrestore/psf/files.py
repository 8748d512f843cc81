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
_MICROMETRES = {
    "um": 1.0, "µm": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0,
    "nm": 1e-3, "nanometer": 1e-3, "nanometre": 1e-3, "mm": 1e3, "millimeter": 1e3, "millimetre": 1e3,
    "cm": 1e4, "centimeter": 1e4, "m": 1e6, "meter": 1e6, "metre": 1e6, "inch": 25400.0, "å": 1e-4,
}  # fmt: skip


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
    with _open_tiff(file) as tiff:
        ndim = len(tiff.series[0].shape)
        stated = (
            _from_ome(tiff) if tiff.is_ome else _from_imagej(tiff) if tiff.is_imagej else _from_tags(tiff)
        )
    lengths = stated[-2:] if ndim == 2 else stated
    valid = all(length is not None and math.isfinite(length) and length > 0 for length in lengths)
    return tuple(float(length) for length in lengths if length is not None) if valid else None


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


def _from_ome(tiff: tifffile.TiffFile) -> list[float | None]:
    images = _tifffile().xml2dict(tiff.ome_metadata or "<OME/>").get("OME", {}).get("Image", {})
    pixels = (images[0] if isinstance(images, list) else images).get("Pixels", {})
    names = [f"PhysicalSize{axis}" for axis in "ZYX"]
    return [_length(pixels.get(name), pixels.get(f"{name}Unit", "um")) for name in names]


def _from_imagej(tiff: tifffile.TiffFile) -> list[float | None]:
    facts = tiff.imagej_metadata or {}
    # ImageJ writes the micro sign as the six characters of its escape.
    unit = str(facts.get("unit", "")).replace("\\u00B5", "µ")
    y, x = _steps(tiff)
    return [_length(facts.get("spacing"), unit), _length(y, unit), _length(x, unit)]


def _from_tags(tiff: tifffile.TiffFile) -> list[float | None]:
    tags = tiff.pages.first.tags
    unit = {2: "inch", 3: "cm"}.get(int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 0, "")
    y, x = _steps(tiff)
    return [None, _length(y, unit), _length(x, unit)]


def _steps(tiff: tifffile.TiffFile) -> tuple[float | None, float | None]:
    """Return the units of length per pixel along y and x."""
    tags = tiff.pages.first.tags
    rationals = (tags[name].value if name in tags else (0, 1) for name in ("YResolution", "XResolution"))
    y, x = (units / pixels if pixels else None for pixels, units in rationals)
    return y, x


def _length(value: Any, unit: object) -> float | None:
    """Return micrometres, or None without a number or with a unit that is no length (``pixel``)."""
    factor = _MICROMETRES.get(str(unit).strip().lower())
    return None if value is None or factor is None else float(value) * factor
