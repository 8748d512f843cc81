"""The verb that compares methods."""

from __future__ import annotations

from typing import Any

import click

from chunkrestore.cli_jobs import CLUSTER_OPTIONS
from chunkrestore.cli_options import SELECTION_OPTIONS, Numbers, with_options
from chunkrestore.cli_text import say


def _counts(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    """Take whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 20,50") from None


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Take names separated by commas."""
    return None if value is None else tuple(part.strip() for part in value.split(","))


@click.command()
@click.argument("image")
@click.option("--out", "output", required=True, help="Folder for stores, tables and pictures.")
@click.option("--truth", help="OME-Zarr of the sharp image free of noise; default images are not scored.")
@click.option("--labels", help="Name of the true labels, in IMAGE or in the truth; default truth, if there.")
@click.option("--psf", help="Point spread function, .tif or .npy; default no deconvolution.")
@click.option("--background", type=float, default=0.0, help="Camera offset of IMAGE; default 0.")
@click.option("--truth-background", type=float, help="Offset of the truth; default that of IMAGE.")
@click.option(
    "--iterations", default="20,50", show_default=True, callback=_counts, help="Of Richardson-Lucy, each."
)
@click.option("--care", help="Folder of a CARE model, or care3d-demo.")
@click.option("--stardist", help="Folder of a StarDist model, or stardist3d-demo.")
@click.option("--min-distance", type=float, help="Segment by a watershed as well, with this length in um.")
@click.option("--smoothing", type=float, help="Gaussian before threshold and watershed, in um; default none.")
@click.option(
    "--methods",
    callback=_names,
    help="Of raw, wiener, richardson-lucy, richardson-lucy-tv, care, richardson-lucy+care; default all but the last.",
)
@click.option("--block", "block_shape", type=Numbers(), help="Core of a block in voxels; default by memory.")
@with_options((*SELECTION_OPTIONS, *CLUSTER_OPTIONS))
@click.option("--overwrite", is_flag=True, help="Do everything anew.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Print the traceback of errors.")
def compare(image: str, output: str, verbose: bool, **options: Any) -> None:
    """Restore and segment an image by several methods, and score each against the truth."""
    from chunkrestore.comparison import compare as compare_methods

    found = compare_methods(image, output, **options)
    if not options["quiet"]:
        say(found)
        say(f"\nwrote      {found.folder / 'comparison.html'}")


COMMANDS = (compare,)
