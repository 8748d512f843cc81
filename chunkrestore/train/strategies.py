"""Where pairs of an input and what is learnt from it come from: the strategies of the literature.

========================  =====================================================  ==================================
strategy                  what the network is shown as the answer                what it needs
========================  =====================================================  ==================================
`simulated`               the phantom itself, or its objects                     a model of sample and microscope
`deconvolved`             the deconvolved image                                  the point spread function
`two_exposures`           the same sample with more light                        a second exposure, in place
`two_noisy`               the same sample with other noise (Noise2Noise)         a second exposure, in place
`noise_only`              the image itself, through blind spots (Noise2Void)     nothing; noise of independent voxels
========================  =====================================================  ==================================

Each returns a `Strategy`; ``strategy.draw(patch_shape, n_patches, seed=...)`` gives the patches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from chunkrestore.ome_zarr import OmeZarrImage, open_source
from chunkrestore.ome_zarr.metadata import OWN_KEY
from chunkrestore.train.drawing import draw_patches
from chunkrestore.train.pairs import Pair, Source, open_pair
from chunkrestore.train.patches import Patches
from chunkrestore.train.registration import shift_of

Sources: TypeAlias = Source | Sequence[Source]


@dataclass(frozen=True)
class Strategy:
    """Pairs to learn from, and what they are."""

    name: str
    """``"simulated"``, ``"deconvolved"``, ``"two-exposures"``, ``"noise2noise"`` or ``"noise-only"``."""
    pairs: tuple[Pair, ...]
    """What `chunkrestore.train.drawing.draw_patches` takes."""
    described: dict[str, Any] = field(default_factory=dict)
    """What the model card says, as JSON."""

    def draw(self, patch_shape: Sequence[int], n_patches: int, *, seed: int, **options: Any) -> Patches:
        """Draw patches; arguments as for `chunkrestore.train.drawing.draw_patches`."""
        described = {"strategy": self.name, **self.described}
        return draw_patches(self.pairs, patch_shape, n_patches, seed=seed, described=described, **options)


def simulated(
    images: Sources, truths: Sources | None = None, *, labels: str = "truth", **choice: Any
) -> Strategy:
    """Learn from simulated images, whose truth is known.

    Parameters
    ----------
    images
        Simulated images (``chunkrestore simulate``), one or several.
    truths
        For every image the sharp, noise-free one (``--truth``), to learn restoration; None: the objects called
        `labels` in the images, to learn segmentation.
    labels
        Name of the objects.
    choice
        ``channel``, ``timepoint``, ``level``, ``classes`` of `chunkrestore.train.pairs.Pair`.

    References
    ----------
    .. [1] M. Weigert et al., "Content-aware image restoration: pushing the limits of fluorescence microscopy", Nature
       Methods 15, 1090 (2018): networks trained on simulated pairs restore real images.
    """
    inputs = _listed(images)
    if truths is None:
        pairs = [Pair(image, labels=labels, **choice) for image in inputs]
    else:
        pairs = [Pair(image, truth, **choice) for image, truth in _paired(inputs, truths, "truths")]
    said = [open_source(image).others.get(OWN_KEY, {}).get("provenance", {}) for image in inputs]
    models = [provenance["simulated"] for provenance in said if "simulated" in provenance]
    return Strategy("simulated", tuple(pairs), {"simulations": models} if models else {})


def deconvolved(
    image: Source,
    output: str | os.PathLike[str],
    operator: Any = None,
    *,
    cleaned: Source | None = None,
    channel: str | int | None = None,
    timepoint: int | None = None,
    **options: Any,
) -> Strategy:
    """Learn to do at once what deconvolution takes many iterations for.

    Networks learnt from the results of deconvolution in [1]_; [2]_ shapes one after the iterations. The image, or
    a cleaner one of the same sample, is deconvolved block by block by `chunkrestore.run` into a store,
    which the network is then shown as the answer; input and answer are normalised each by its own percentiles.

    Parameters
    ----------
    image
        Input of the network.
    output
        Store for the deconvolved image.
    operator
        How to deconvolve, such as `chunkrestore.RichardsonLucy`; None if `output` has been made before.
    cleaned
        What is deconvolved instead of `image`: the same sample with less noise, in place. The network then
        learns to denoise as well; otherwise it learns what the deconvolution made of the noise, too.
    channel, timepoint
        Of the image and of `cleaned`; needed if there are more than one.
    options
        Of `chunkrestore.run`.

    Raises
    ------
    FileExistsError
        If `operator` is given and `output` exists; ``overwrite=True`` replaces it.

    References
    ----------
    .. [1] M. Guo et al., "Rapid image deconvolution and multiview fusion for optical microscopy", Nature
       Biotechnology 38, 1337 (2020).
    .. [2] Y. Li et al., "Incorporating the image formation process into deep learning improves network performance",
       Nature Methods 19, 1427 (2022).
    """
    opened = open_source(image)
    sharp = opened if cleaned is None else open_source(cleaned)
    open_pair(Pair(opened, sharp, channel=channel, timepoint=timepoint), 0)
    described: dict[str, Any] = {"deconvolved": sharp.path}
    if operator is not None:
        from chunkrestore.jobs.run import run

        selected = None if sharp.n_c == 1 else channel
        report = run(operator, sharp, output, channel=selected, timepoint=timepoint, **options)
        described["operators"] = report.operators
    # A deconvolved image has no camera offset, and other peaks: no common numbers would suit both.
    pair = Pair(opened, output, channel=channel, timepoint=timepoint, own_numbers=True)
    return Strategy("deconvolved", (pair,), described)


def two_exposures(
    low: Sources,
    high: Sources,
    *,
    own_numbers: bool = True,
    most_shift: float = 1.0,
    **choice: Any,
) -> Strategy:
    """Learn from the same sample imaged with little and with much light [1]_.

    Parameters
    ----------
    low, high
        Images with little and with much light, in place; one or several pairs.
    own_numbers
        Normalise each image by its own percentiles, so that exposures may differ by any factor and offset.
        A restored image then has the contrast that `high` has, scaled to the percentiles of what it is restored from.
        Otherwise both by those of `low`.
    most_shift
        Voxels per axis by which `high` may lie beside `low`, measured by phase correlation on up to three regions
        with most structure; `math.inf` leaves it unmeasured.
    choice
        ``channel``, ``timepoint``, ``level`` of `chunkrestore.train.pairs.Pair`.

    Raises
    ------
    ValueError
        If shapes differ, or images are further apart or have nothing in common: register them first.

    References
    ----------
    .. [1] M. Weigert et al., "Content-aware image restoration: pushing the limits of fluorescence microscopy", Nature
       Methods 15, 1090 (2018).
    """
    pairs = [
        Pair(first, second, own_numbers=own_numbers, **choice)
        for first, second in _paired(_listed(low), high, "high")
    ]
    return _in_place("two-exposures", pairs, most_shift)


def two_noisy(
    first: Sources, second: Sources, *, own_numbers: bool = False, most_shift: float = 1.0, **choice: Any
) -> Strategy:
    """Learn to denoise from two equally noisy images of the same sample [1]_.

    What noise cannot be foretold from the first image averages out over many patches, since the mean of the second
    image's noise is zero; the loss must be the mean squared error.

    Parameters
    ----------
    first, second
        Images of the same sample whose noise is independent, in place.
    own_numbers
        Normalise each image by its own percentiles, if one was bleached; otherwise both by those of `first`.
    most_shift, choice
        As for `two_exposures`.

    Raises
    ------
    ValueError
        As for `two_exposures`.

    References
    ----------
    .. [1] J. Lehtinen et al., "Noise2Noise: learning image restoration without clean data", ICML 2018.
    """
    pairs = [
        Pair(one, other, own_numbers=own_numbers, **choice)
        for one, other in _paired(_listed(first), second, "second")
    ]
    return _in_place("noise2noise", pairs, most_shift)


def noise_only(images: Sources, **choice: Any) -> Strategy:
    """Learn to denoise from noisy images alone, through blind spots [1]_ (`chunkrestore.train.blind_spots`).

    It removes noise that is independent between voxels, as photon and read noise are, and keeps all blur; noise in
    stripes or clusters of voxels, as of a camera's columns or of an interpolated image, stays.

    Parameters
    ----------
    images
        Noisy images, one or several.
    choice
        ``channel``, ``timepoint``, ``level`` of `chunkrestore.train.pairs.Pair`.

    References
    ----------
    .. [1] A. Krull, T.-O. Buchholz, F. Jug, "Noise2Void - learning denoising from single noisy images", CVPR 2019.
    """
    return Strategy("noise-only", tuple(Pair(image, **choice) for image in _listed(images)))


def _in_place(name: str, pairs: Sequence[Pair], most_shift: float) -> Strategy:
    """Return a strategy after having measured that the images of each pair lie on each other."""
    if not most_shift >= 0:
        raise ValueError(f"`most_shift` {most_shift} must be at least 0 voxels")
    shifts = []
    for i, pair in enumerate(pairs):
        opened = open_pair(pair, i)
        if math.isinf(most_shift):
            continue
        shift = shift_of(opened.image[0], opened.target)
        if shift is None:
            raise ValueError(
                f"pair {i}: {opened.image[0].name} and {opened.target.name} show nothing in common where they have "
                "most structure; check that they belong together, or pass `most_shift=math.inf`"
            )
        if max(map(abs, shift)) > most_shift:
            voxels = ", ".join(f"{d:+.1f}" for d in shift)
            raise ValueError(
                f"pair {i}: {opened.target.name} lies ({voxels}) voxels beside {opened.image[0].name}, more than "
                f"`most_shift` {most_shift:g}; register them first"
            )
        shifts.append([round(d, 2) for d in shift])
    return Strategy(name, tuple(pairs), {"shifts_voxels": shifts} if shifts else {})


def _listed(sources: Sources) -> list[Source]:
    return [sources] if isinstance(sources, str | os.PathLike | OmeZarrImage) else list(sources)


def _paired(firsts: list[Source], seconds: Sources, what: str) -> list[tuple[Source, Source]]:
    others = _listed(seconds)
    if len(firsts) != len(others):
        raise ValueError(f"there must be one of `{what}` for each image; got {len(others)} for {len(firsts)}")
    return list(zip(firsts, others, strict=True))
