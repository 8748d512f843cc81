"""Options of the classical methods: smoothing, thresholds, the watershed."""

from __future__ import annotations

from typing import Any

import click

from chunkrestore.cli_running import first_image

_LOCAL = ("window", "factor", "offset", "k")
_WATERSHED = ("min_distance", "max_distance", "landscape", "smoothing")

CLASSICAL_OPTIONS = (
    click.option(
        "--value", type=float, help="Threshold, for --method threshold or watershed; default Otsu's."
    ),
    click.option("--percentile", type=float, help="Of the volume: its intensity is the threshold."),
    click.option(
        "--local-threshold",
        "local",
        type=click.Choice(["gaussian", "mean", "niblack", "sauvola"]),
        help="A threshold of each voxel's surroundings; with --value or --percentile, foreground is above both.",
    ),
    click.option("--window", type=int, help="Voxels of the surroundings, odd; default 31."),
    click.option("--factor", type=float, help="Multiplies the local threshold; default 1."),
    click.option(
        "--offset", type=float, help="Added to the local threshold, in input intensities; default 0."
    ),
    click.option("--k", type=float, help="Weight of the local standard deviation; default 0.2."),
    click.option(
        "--min-distance",
        type=float,
        help="Summits nearer than this are one object, for watershed; default 4.",
    ),
    click.option(
        "--max-distance",
        type=float,
        help="Radius of the largest objects, for watershed; default 3 times that.",
    ),
    click.option(
        "--landscape",
        type=click.Choice(["distance", "intensity"]),
        help="Split at necks of the form (default), or at dark seams.",
    ),
    click.option(
        "--smoothing", type=float, help="Of the watershed's landscape; default a third of --min-distance."
    ),
    click.option(
        "--smooth", type=float, help="Standard deviation of a Gaussian that comes first; default none."
    ),
    click.option(
        "--micrometres", is_flag=True, help="Lengths are in micrometres; default voxels, taken as cubes."
    ),
)
"""Of ``segment``."""


def take_classical(options: dict[str, Any]) -> dict[str, Any]:
    """Take what was given of `CLASSICAL_OPTIONS` out of `options`."""
    names = ("value", "percentile", "local", *_LOCAL, *_WATERSHED, "smooth", "micrometres")
    found = {name: options.pop(name) for name in names}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def smoothing_of(classical: dict[str, Any], source: str, options: dict[str, Any]) -> list[Any]:
    """Take ``--smooth`` and ``--micrometres`` out of `classical`; return the operator that they stand for, if any.

    A voxel size that lengths are to be measured in is left in `classical`.
    """
    if classical.pop("micrometres", False):
        from chunkrestore.pipeline import voxel_size_of

        found = options["voxel_size"] or voxel_size_of(first_image(source), options["level"])
        if found is None:
            raise ValueError(f"`--micrometres`: {source} tells no voxel size; give `--voxel-size`")
        classical["voxel_size"] = found
    if "smooth" not in classical:
        return []
    from chunkrestore.operators.smoothing import Gaussian

    return [Gaussian(classical.pop("smooth"), classical.get("voxel_size"))]


def segmenter_of(method: str, classical: dict[str, Any]) -> Any:
    """Return the operator of ``--method threshold`` or ``watershed``.

    Raises
    ------
    ValueError
        If an option was given that the method does not have.
    """
    from chunkrestore.operators.threshold import LocalThreshold, Threshold
    from chunkrestore.operators.watershed import Watershed

    given = dict(classical)
    surroundings = {name: given.pop(name) for name in _LOCAL if name in given}
    if "local" in given:
        given["local"] = LocalThreshold(given["local"], **surroundings)
    elif surroundings:
        raise ValueError(f"{_named(surroundings)} belongs to a local threshold; give `--local-threshold`")
    if method == "watershed":
        return Watershed(**given)
    given.pop("voxel_size", None)
    refuse_classical(method, [name for name in given if name in _WATERSHED])
    return Threshold(**given)


def refuse_classical(method: str, names: Any) -> None:
    """Raise `ValueError` if there are any `names` of options that a method does not have."""
    if wrong := [name for name in names if name != "voxel_size"]:
        raise ValueError(f"{_named(wrong)} means nothing to --method {method}; leave it out")


def _named(names: Any) -> str:
    options = ("local-threshold" if name == "local" else name.replace("_", "-") for name in names)
    return ", ".join(f"`--{name}`" for name in options)
