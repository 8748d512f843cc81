"""Compare methods on one image: what is wanted and whether it fits, then the steps, then the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.comparison.methods import restorations, segmentations
from chunkrestore.comparison.page import write_page
from chunkrestore.comparison.pictures import draw
from chunkrestore.comparison.result import Comparison
from chunkrestore.comparison.steps import Steps
from chunkrestore.comparison.work import Work
from chunkrestore.jobs.prepare import Region, Store, select
from chunkrestore.ome_zarr import OmeZarrImage

TRUE_LABELS = "truth"
"""Name of true labels where none is given."""


def compare(
    image: Store | OmeZarrImage,
    output: Store,
    *,
    truth: Store | OmeZarrImage | None = None,
    labels: str | None = None,
    psf: Any = None,
    background: float = 0.0,
    truth_background: float | None = None,
    iterations: Sequence[int] = (20, 50),
    care: Any = None,
    stardist: Any = None,
    min_distance: float | None = None,
    smoothing: float | None = None,
    methods: Sequence[str] | None = None,
    level: int = 0,
    timepoint: int | None = None,
    channel: str | int | None = None,
    region: Region | None = None,
    block_shape: Sequence[int] | None = None,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Comparison:
    """Restore and segment one image by several methods, and score each against the truth.

    Called again with the same arguments it goes on where it stopped; with more methods it does what is new. Every image
    and every label image is kept, as OME-Zarr, in `output`.

    Parameters
    ----------
    image
        OME-Zarr: what was recorded.
    output
        Folder for stores, tables and pictures.
    truth
        The sharp image free of noise, of the same shape; None: images are not scored.
    labels
        Name of the true labels in `image`, or in `truth`. None: ``"truth"`` if there are any.
    psf
        Point spread function, as an array or a file; None: without deconvolution.
    background, truth_background
        Known intensities without light, of the image and of the truth (by default the same). Deconvolved intensities
        are above the background, those of the raw image and of CARE are not; before images are compared the known
        background is subtracted where it still is. Nothing is fitted.
    iterations
        Of Richardson-Lucy, one method each. With total variation (of 0.01) it does 40.
    care, stardist
        Models: folder, shipped name, or None for without.
    min_distance
        Segment by a watershed as well, with this length in micrometres (`chunkrestore.operators.watershed`).
    smoothing
        Standard deviation in micrometres of a Gaussian before threshold and watershed; None: images as they are.
    methods
        Of ``raw``, ``wiener``, ``richardson-lucy``, ``richardson-lucy-tv``, ``care``, ``richardson-lucy+care``; by
        default all but the last one.
    level, timepoint, channel, region
        Part of the image, as for `chunkrestore.run`: one volume. The same part of the truth is compared.
    block_shape
        Core of a block, voxels per axis, of all jobs; derived from each method's memory by default.
    cluster, n_workers, profile, quiet
        As for `chunkrestore.run`.
    overwrite
        Do everything anew.

    Returns
    -------
    Comparison
        All numbers. ``comparison.csv``, ``.json``, ``.md``, ``.html`` and ``.png`` are in `output`, with ``f1.png`` and
        ``fsc.png`` where there are true labels and a truth.

    Raises
    ------
    ValueError
        If there is no truth at all, images do not fit together, or a step was made with something else before; nothing
        is computed then.
    ImportError
        If matplotlib, or what a method needs, is missing.
    """
    _check_packages()
    raw = _one_volume(select(image, level, timepoint, channel, region), "image")
    true = None if truth is None else _one_volume(select(truth, level, timepoint, None, region), "truth")
    true_labels = _true_labels(image, truth, labels, (level, timepoint, region))
    if true is None and true_labels is None:
        raise ValueError("there is no truth to compare with: give `truth`, or the name of true `labels`")
    _check_shapes(raw, truth=true, labels=true_labels)
    size = raw.voxel_size if raw.calibrated else None
    ways = restorations(
        _psf(psf, size),
        background=background,
        voxel_size=size,
        iterations=iterations,
        care=care,
        methods=methods,
    )
    cuts = (
        segmentations(stardist=stardist, min_distance=min_distance, smoothing=smoothing, voxel_size=size)
        if true_labels
        else []
    )
    for operators in [one.operators for one in ways] + [cut.operators for cut in cuts]:
        for operator in operators:
            operator.check(raw.spatial_shape, raw.dtype)
    folder = Path(output)
    backgrounds = float(background), float(background if truth_background is None else truth_background)
    steps = Steps(folder / "records", overwrite)
    where: dict[str, Any] = {"block_shape": block_shape, "quiet": quiet}
    work = Work(folder, steps, raw, true, true_labels, backgrounds, ways, cuts, where)
    work.check()
    with connect(cluster, n_workers=n_workers, profile=profile) as client:
        where["cluster"] = "serial" if client is None else client
        results = [work.method(way) for way in ways]
    comparison = Comparison(folder, tuple(results), work.described())
    comparison.write()
    draw(comparison, work.pictured(results))
    write_page(comparison)
    return comparison


def _psf(psf: Any, voxel_size: Sequence[float] | None) -> Any:
    if not isinstance(psf, str | os.PathLike):
        return psf
    from chunkrestore.psf.fields import read_psf_or_field

    return read_psf_or_field(psf, voxel_size)


def _one_volume(image: OmeZarrImage, name: str) -> OmeZarrImage:
    if image.n_t != 1 or image.n_c != 1:
        raise ValueError(
            f"`{name}` {image.path} has {image.n_t} time points and {image.n_c} channels; one volume is compared: "
            "choose by `timepoint` and `channel`"
        )
    return image


def _true_labels(
    image: Store | OmeZarrImage,
    truth: Store | OmeZarrImage | None,
    name: str | None,
    part: tuple[Any, Any, Any],
) -> OmeZarrImage | None:
    """Return the part of the true labels that is compared, from the image or else from the truth."""
    wanted = name or TRUE_LABELS
    for store in (image, truth):
        if store is None:
            continue
        whole = select(store, 0, None, None, None)
        if wanted in whole.labels:
            level, timepoint, region = part
            found = select(whole.label(wanted), level, timepoint, None, region)
            return _one_volume(found, "labels")
    if name is not None:
        raise ValueError(f"`labels` {name!r} are neither in {image} nor in the truth")
    return None


def _check_shapes(raw: OmeZarrImage, **others: OmeZarrImage | None) -> None:
    for name, other in others.items():
        if other is not None and other.spatial_shape != raw.spatial_shape:
            raise ValueError(
                f"`{name}` {other.path} has {other.spatial_shape} voxels, the image has {raw.spatial_shape}; "
                "they must be the same"
            )


def _check_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("matplotlib", "numba") if find_spec(name) is None]
    if missing:
        raise ImportError(f'a comparison needs {", ".join(missing)}: pip install "chunkrestore[demo,tables]"')
