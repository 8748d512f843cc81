"""The methods that are compared: what makes an image of the raw one, and what makes labels of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from chunkrestore.operators.base import ImageOperator, Operator

KINDS = ("raw", "wiener", "richardson-lucy", "richardson-lucy-tv", "care", "richardson-lucy+care")
"""What can be asked for; the last one only if it is."""
_TOTAL_VARIATION = {"iterations": 40, "total_variation": 0.01}
"""What is best, or nearly, for dim nuclei (docs/deconvolution.md): smoothed as it is, it wants no early stop."""


@dataclass(frozen=True)
class Restoration:
    """One way to an image."""

    key: str
    """Name in tables and of the store."""
    title: str
    """Name for people."""
    operators: tuple[ImageOperator, ...]
    """What is applied; nothing for the raw image."""
    above_background: bool
    """Whether its intensities are above the background, rather than with it as those of the raw image."""
    source: str = "raw"
    """Key of what it is applied to."""


@dataclass(frozen=True)
class Segmentation:
    """One way from an image to labels."""

    key: str
    """Name in tables and of the labels."""
    operators: tuple[Operator, ...]
    """What is applied; the last one makes labels."""

    @property
    def makes_image(self) -> bool:
        """Whether there is an image before the labels, which are then stored with it."""
        return len(self.operators) > 1


def restorations(
    psf: Any,
    *,
    background: float,
    voxel_size: Sequence[float] | None,
    iterations: Sequence[int],
    care: Any,
    methods: Sequence[str] | None,
) -> list[Restoration]:
    """Return the methods that can be compared, in the order of the table.

    Parameters
    ----------
    psf
        Point spread function for the deconvolutions; None: without them.
    background
        Of the raw image.
    voxel_size
        Micrometres per axis: total variation is one of length.
    iterations
        Of Richardson-Lucy, one method each; with total variation it does 40.
    care
        Model; None: without it.
    methods
        Those of `KINDS` that are wanted; by default all but the last that psf and model allow.

    Raises
    ------
    ValueError
        If a method is unknown, or lacks its psf or model; or iterations are not positive or repeat.
    """
    able = {"raw"}
    able |= {"wiener", "richardson-lucy", "richardson-lucy-tv"} if psf is not None else set()
    able |= {"care"} if care is not None else set()
    able |= {"richardson-lucy+care"} if psf is not None and care is not None else set()
    wanted = [kind for kind in KINDS[:-1] if kind in able] if methods is None else list(methods)
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(f"`methods` holds {kind!r}; known are {', '.join(KINDS)}")
        if kind not in able:
            lacking = "a CARE model (`care`)" if psf is not None or kind == "care" else "a `psf`"
            raise ValueError(f"`methods` holds {kind!r}, which needs {lacking}")
    counts = sorted(int(n) for n in iterations)
    if not counts or counts[0] < 1 or len(set(counts)) < len(counts):
        raise ValueError(f"`iterations` must be different numbers of at least 1, got {tuple(iterations)}")
    made = [
        one
        for kind in KINDS
        if kind in wanted or (kind == "richardson-lucy" and "richardson-lucy+care" in wanted)
        for one in _made(kind, psf, background, voxel_size, counts, care)
    ]
    # The raw image is what all others are seen against.
    return made if "raw" in wanted else [*_made("raw", psf, background, voxel_size, counts, care), *made]


def segmentations(
    *,
    stardist: Any,
    min_distance: float | None,
    smoothing: float | None,
    voxel_size: Sequence[float] | None,
) -> list[Segmentation]:
    """Return how images are segmented: a threshold, a watershed if a length is given, StarDist if a model is.

    Lengths are in micrometres (voxels without a voxel size). `smoothing` is the standard deviation of a Gaussian before
    threshold and watershed.
    """
    from chunkrestore.operators.smoothing import Gaussian
    from chunkrestore.operators.threshold import Threshold

    size = None if voxel_size is None else tuple(voxel_size)
    before = () if smoothing is None else (Gaussian(smoothing, voxel_size=size),)
    found = [Segmentation("threshold", (*before, Threshold()))]
    if min_distance is not None:
        from chunkrestore.operators.watershed import Watershed

        watershed = Watershed(min_distance=min_distance, voxel_size=size)
        found.append(Segmentation("watershed", (*before, watershed)))
    if stardist is not None:
        from chunkrestore.operators.stardist import StarDist

        found.append(Segmentation("stardist", (StarDist(stardist),)))
    return found


def _made(
    kind: str,
    psf: Any,
    background: float,
    voxel_size: Sequence[float] | None,
    iterations: Sequence[int],
    care: Any,
) -> list[Restoration]:
    if kind == "raw":
        return [Restoration("raw", "raw", (), above_background=False)]
    if kind == "care":
        from chunkrestore.operators.care import Care

        return [Restoration("care", "CARE", (Care(care),), above_background=False)]
    if kind == "richardson-lucy+care":
        from chunkrestore.operators.care import Care

        n = iterations[0]
        title = f"Richardson-Lucy {n}, then CARE"
        source = f"richardson-lucy-{n}"
        return [Restoration(kind, title, (Care(care),), above_background=True, source=source)]
    from chunkrestore.operators.methods import deconvolution

    if kind == "wiener":
        operator = deconvolution("wiener", psf, background=background)
        return [Restoration(kind, "Wiener", (operator,), above_background=True)]
    if kind == "richardson-lucy-tv":
        more = {} if voxel_size is None else {"voxel_size": tuple(voxel_size)}
        operator = deconvolution("richardson-lucy", psf, background=background, **_TOTAL_VARIATION, **more)
        title = f"Richardson-Lucy {_TOTAL_VARIATION['iterations']}, total variation"
        return [Restoration(kind, title, (operator,), above_background=True)]
    return [
        Restoration(
            f"richardson-lucy-{n}",
            f"Richardson-Lucy {n}",
            (deconvolution("richardson-lucy", psf, iterations=n, background=background),),
            above_background=True,
        )
        for n in iterations
    ]
