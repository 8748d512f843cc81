"""The verb that simulates images of phantoms and of labels."""

from __future__ import annotations

from typing import Any

import click

from chunkrestore.cli_options import RUN_OPTIONS, STORAGE_OPTIONS, Numbers, with_options
from chunkrestore.cli_text import say

_DEFAULT_SHAPE = (96, 192, 192)


class Pair(Numbers):
    """Two numbers, ``low,high``."""

    name = "low,high"

    def __init__(self) -> None:
        super().__init__(float)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return two numbers."""
        numbers = super().convert(value, param, ctx)
        if len(numbers) != 2:
            self.fail(f"{value!r} must be two numbers such as 4,14", param, ctx)
        return numbers


_WHAT_OPTIONS = (
    click.option(
        "--phantom",
        type=click.Choice(["embryo", "tissue", "spheres", "beads", "filaments"]),
        help="What is there; default embryo.",
    ),
    click.option("--labels", help="Image these objects instead: OME-Zarr, label group or TIFF."),
    click.option("--labels-name", help="Of the labels in an OME-Zarr image."),
    click.option("--axes", help="One letter of tczyx per axis of --labels; default their metadata."),
    click.option("--shape", type=Numbers(), help="Voxels of a phantom; default 96,192,192."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--photons", type=Pair(), help="Range of brightness; default the phantom's."),
    click.option("--radius", type=Pair(), help="Range of sizes in voxels; default the phantom's."),
    click.option(
        "--voxel-size", type=Numbers(float), help="Micrometres; default 0.4, or that of the labels."
    ),
)
_MICROSCOPE_OPTIONS = (
    click.option("--psf", help="Point spread function, .tif or .npy; .yaml for one that varies."),
    click.option("--background", type=float, help="Photons per voxel of stray light; default 2."),
    click.option("--gain", type=float, help="Counts per photon; default 4."),
    click.option("--offset", type=float, help="Counts without light; default 100."),
    click.option("--read-noise", type=float, help="Standard deviation in counts; default 4."),
    click.option(
        "--attenuation",
        type=Pair(),
        metavar="SHEET,EMISSION",
        help="Micrometres to 1/e of the light of the sheet, and of the emission; inf for none.",
    ),
    click.option(
        "--sides",
        type=click.Choice(["low", "high", "both"]),
        help="Of x, where sheets come from; default low.",
    ),
)


@click.command()
@click.argument("output", metavar="OUT")
@with_options(_WHAT_OPTIONS)
@with_options(_MICROSCOPE_OPTIONS)
@click.option("--truth", help="Store for the image without blur and noise, in counts.")
@click.option("--block", "block_shape", type=Numbers(), help="Voxels per task; default 256 per axis.")
@click.option("--levels", type=click.IntRange(1), help="Of the pyramid; default until one is small.")
@with_options(STORAGE_OPTIONS)
@with_options(RUN_OPTIONS)
def simulate(output: str, dry_run: bool, verbose: bool, **options: Any) -> None:
    """Simulate a light-sheet image of a phantom or of labels, with its labels and PSF."""
    from chunkrestore.jobs.simulating import simulate as run
    from chunkrestore.jobs.simulation_plan import plan_simulation

    source, voxel_size = _phantom(options)
    options["microscope"] = _microscope(source, voxel_size, options)
    options |= {"voxel_size": voxel_size, "psf_file": _psf_file(output, options.pop("psf"))}
    running = {name: options.pop(name) for name in _RUNNING}
    if dry_run:
        say(plan_simulation(source, output, **options))
        return
    report = run(source, output, **options, **running)
    if not running["quiet"]:
        say(report)


_RUNNING = ("cluster", "profile", "n_workers", "work_folder", "overwrite", "quiet")


def _phantom(options: dict[str, Any]) -> tuple[Any, tuple[float, ...]]:
    """Take what is there out of `options`; return it with its voxel size."""
    from chunkrestore.simulate.phantoms import VOXEL_SIZE

    names = ("phantom", "labels", "labels_name", "axes", "shape", "photons", "radius", "voxel_size")
    kind, labels, labels_name, axes, shape, photons, radius, voxel_size = map(options.pop, names)
    look = {"photons": photons} if photons is not None else {}
    if labels is None:
        if labels_name is not None or axes is not None:
            raise ValueError("`--labels-name` and `--axes` say more of `--labels`; give these as well")
        made = _made(kind or "embryo", shape or _DEFAULT_SHAPE, options["seed"], look, radius)
        return made, voxel_size or VOXEL_SIZE
    for name, value in (("phantom", kind), ("shape", shape), ("radius", radius)):
        if value is not None:
            raise ValueError(
                f"`--{name}` describes a phantom, and `--labels` are what is imaged; leave it out"
            )
    from chunkrestore.ome_zarr import open_image, open_source
    from chunkrestore.simulate.from_labels import LabelledPhantom

    if labels_name is None:
        image = open_source(labels, axes=axes, as_labels=True)
    else:
        image = open_image(labels).label(labels_name)
    own = image.voxel_size if image.calibrated else VOXEL_SIZE[-len(image.spatial_shape) :]
    return LabelledPhantom(image, options["seed"], **look), voxel_size or own


def _made(kind: str, shape: tuple[int, ...], seed: int, look: dict[str, Any], radius: Any) -> Any:
    """Return a phantom."""
    from chunkrestore.simulate.nuclei import Nuclei
    from chunkrestore.simulate.phantoms import KINDS

    if radius is not None and kind == "beads":
        if radius[0] != radius[1]:
            raise ValueError(
                f"`--radius` of beads is one number, got {radius[0]:g} and {radius[1]:g}; repeat it"
            )
        look["radius"] = radius[0]
    elif radius is not None:
        look["radius"] = radius
    if kind in ("embryo", "tissue"):
        look = {"nuclei": Nuclei(**look)}
    return KINDS[kind.capitalize()](shape, seed, **look)


def _microscope(source: Any, voxel_size: tuple[float, ...], options: dict[str, Any]) -> Any:
    """Take what records the image out of `options`, but for the file of the point spread function."""
    from chunkrestore.simulate.attenuation import Attenuation, Ellipsoid
    from chunkrestore.simulate.bodies import Embryo
    from chunkrestore.simulate.microscope import Camera, Microscope, light_sheet_psf

    names = ("background", "gain", "offset", "read_noise")
    given = {name: options.pop(name) for name in names}
    camera = Camera(**{name: value for name, value in given.items() if value is not None})
    lengths, sides = options.pop("attenuation"), options.pop("sides")
    if sides is not None and lengths is None:
        raise ValueError("`--sides` needs `--attenuation`; without it light comes from everywhere alike")
    attenuation = None
    if lengths is not None:
        body = Ellipsoid.filling(source.shape) if isinstance(source, Embryo) else None
        sheet, emission = lengths
        attenuation = Attenuation.in_micrometres(
            sheet, emission, voxel_size=voxel_size, sides=sides or "low", body=body
        )
    if options["psf"] is not None:
        from chunkrestore.psf.fields import read_psf_or_field

        return Microscope(read_psf_or_field(options["psf"], voxel_size), camera, attenuation)
    psf = light_sheet_psf()
    return Microscope(psf if len(source.shape) == 3 else psf.sum(0), camera, attenuation)


def _psf_file(output: str, given: str | None) -> Any:
    """Return the file beside the output for the point spread function, unless there is one, or no place for it."""
    from chunkrestore.demo import psf_path
    from chunkrestore.ome_zarr.store import is_url

    return None if given is not None or is_url(output) else psf_path(output)


COMMANDS = (simulate,)
