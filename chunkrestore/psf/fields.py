"""Files of point spread functions that change with position."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkrestore.psf.files import VOXEL_SIZE_TOLERANCE, read_psf, read_psf_voxel_size, write_psf
from chunkrestore.psf.varying import PsfField


def read_psf_or_field(
    path: str | os.PathLike[str], voxel_size: Sequence[float] | None = None
) -> npt.NDArray[np.float32] | PsfField:
    """Read one point spread function, or a YAML file that lists several with their positions.

    The YAML file is a list of ``{psf: FILE, position: [z, y, x]}`` with positions in voxels of the volume
    that is deconvolved; files are relative to its folder.

    Parameters
    ----------
    path
        File.
    voxel_size
        Micrometres per axis of the image, against which those that a file states are held; None: not.

    Raises
    ------
    FileNotFoundError
        If a file does not exist.
    ValueError
        If a file is not what it should be, or is sampled otherwise than the image.
    """
    file = Path(path)
    if file.suffix.lower() not in (".yaml", ".yml"):
        _check_sampling(file, voxel_size)
        return read_psf(file)
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f'`psf` file "{file}" does not exist')
    try:
        entries = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'`psf` file "{file}" is not YAML: {" ".join(str(error).split())}') from None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ValueError(
            f'`psf` file "{file}" must be a list of {{psf: FILE, position: [z, y, x]}}, one per point spread '
            "function"
        )
    for entry in entries:
        _check_sampling(file.parent / str(entry["psf"]), voxel_size)
    try:
        return PsfField(
            [read_psf(file.parent / str(entry["psf"])) for entry in entries],
            [tuple(entry["position"]) for entry in entries],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f'`psf` file "{file}": {error}') from error


def write_psf_field(
    path: str | os.PathLike[str],
    field: PsfField,
    voxel_size: tuple[float, ...],
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write a field as a YAML file and one TIFF per point spread function beside it.

    Returns
    -------
    list of Path
        All files, the YAML file first.

    Raises
    ------
    FileExistsError
        If one of them exists and `overwrite` is not set; nothing is written then.
    """
    import yaml

    file = Path(path)
    files = [file.with_name(f"{file.stem}-{k}.tif") for k in range(len(field.psfs))]
    for one in (file, *files):
        if one.exists() and not overwrite:
            raise FileExistsError(f"{one} exists; give another name, or overwrite it")
    entries = []
    for one, psf, position in zip(files, field.psfs, field.positions, strict=True):
        write_psf(one, psf, voxel_size)
        entries.append({"psf": one.name, "position": list(position)})
    file.write_text(yaml.safe_dump(entries, sort_keys=False))
    return [file, *files]


def _check_sampling(file: Path, voxel_size: Sequence[float] | None) -> None:
    own = None if voxel_size is None or file.suffix.lower() == ".npy" else read_psf_voxel_size(file)
    if own is None or voxel_size is None or len(own) != len(voxel_size):
        return
    if any(abs(a - b) > VOXEL_SIZE_TOLERANCE * b for a, b in zip(own, voxel_size, strict=True)):
        wanted, given = (" x ".join(f"{x:.4g}" for x in sizes) for sizes in (voxel_size, own))
        raise ValueError(
            f'`psf` file "{file}" has voxels of {given} um but the image has {wanted} um; resample it by '
            "`chunkrestore psf prepare PSF OUT IMAGE`"
        )


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and set(entry) == {"psf", "position"}
        and isinstance(entry["position"], list)
        and all(isinstance(x, int | float) for x in entry["position"])
    )
