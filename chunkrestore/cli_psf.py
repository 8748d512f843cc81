"""The verbs on point spread functions: ``chunkrestore psf ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from chunkrestore.cli_options import Numbers
from chunkrestore.cli_text import say


@click.group()
def psf() -> None:
    """Make and check point spread functions."""


def _lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Return micrometres per axis."""
    return None if value is None else Numbers(float).convert(value, param, ctx)


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return voxels per axis."""
    return None if value is None else Numbers(int).convert(value, param, ctx)


def _index_of(_ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Return the refractive index of a medium by name, or a number."""
    from chunkrestore.psf.metadata import IMMERSION_INDEX

    if value is None or value.lower() in IMMERSION_INDEX:
        return None if value is None else IMMERSION_INDEX[value.lower()]
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no refractive index and none of {', '.join(IMMERSION_INDEX)}", param=param
        ) from None


@psf.command("check")
@click.argument("source", metavar="PSF")
@click.argument("image", metavar="[IMAGE]", required=False)
@click.option(
    "--voxel-size",
    callback=_lengths,
    metavar="Z,Y,X",
    help="Of the PSF in micrometres; default from its file.",
)
def check(source: str, image: str | None, voxel_size: tuple[float, ...] | None) -> int:
    """Say what is wrong with a PSF, by itself and for the image that it is meant for.

    Exit status 2 if there is an error, 0 with warnings or notes only.
    """
    from chunkrestore.psf.check import describe, diagnose
    from chunkrestore.psf.files import read_psf_voxel_size, read_raw_psf

    array, size = read_raw_psf(source), voxel_size or read_psf_voxel_size(source)
    facts = _image_facts(image) if image else {}
    findings = diagnose(array, psf_voxel_size=size, **facts)
    say(f"psf        {source}")
    if image:
        shape, lengths = facts["image_shape"], facts["image_voxel_size"]
        unit = f"{', '.join(f'{v:.3g}' for v in lengths)} um" if lengths else "unknown"
        say(f"image      {image}: {' x '.join(map(str, shape))}, voxel size {unit}")
    unusable = {"type", "dimensions", "NaN", "light"} & {f.subject for f in findings}
    if not unusable:
        say(describe(array, size))
    for finding in findings:
        say(f"{finding.severity:<11}{finding}")
    if not findings:
        say("ok         nothing is wrong")
    return 2 if any(finding.severity == "error" for finding in findings) else 0


@psf.command("prepare")
@click.argument("source", metavar="PSF")
@click.argument("output", metavar="OUT")
@click.argument("image", metavar="[IMAGE]", required=False)
@click.option(
    "--voxel-size",
    callback=_lengths,
    metavar="Z,Y,X",
    help="Of the PSF in micrometres; default from its file.",
)
@click.option(
    "--image-voxel-size", callback=_lengths, metavar="Z,Y,X", help="To resample to; default that of IMAGE."
)
@click.option(
    "--background",
    default="edge",
    show_default=True,
    help="Intensity to subtract; edge for the median of the faces, none for a computed PSF.",
)
@click.option(
    "--component", type=float, help="Keep the largest region above this share of the peak; default all."
)
@click.option(
    "--centre",
    "centre_by",
    type=click.Choice(["peak", "centroid", "none"]),
    default="peak",
    show_default=True,
)
@click.option("--energy", type=float, default=0.999, show_default=True, help="Light to keep per axis.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def prepare(
    source: str,
    output: str,
    image: str | None,
    voxel_size: tuple[float, ...] | None,
    image_voxel_size: tuple[float, ...] | None,
    background: str,
    centre_by: Any,
    overwrite: bool,
    **options: Any,
) -> None:
    """Subtract background, centre, resample to the image's voxel size, crop and scale a PSF to sum 1."""
    from chunkrestore.psf import prepare_psf, read_psf_voxel_size, write_psf
    from chunkrestore.psf.check import describe
    from chunkrestore.psf.files import read_raw_psf

    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"{output} exists; give another name, or --overwrite")
    size = voxel_size or read_psf_voxel_size(source)
    target = image_voxel_size or (_image_facts(image)["image_voxel_size"] if image else None)
    if target is not None and size is None:
        raise ValueError(f"the voxel size of {source} is unknown; give it by --voxel-size")
    array, steps = prepare_psf(
        read_raw_psf(source),
        background=_level(background),
        centre_by=None if centre_by == "none" else centre_by,
        voxel_size=size if target else None,
        image_voxel_size=target,
        **options,
    )
    size = target or size
    write_psf(output, array, None if output.lower().endswith(".npy") else size)
    for line in (*steps, *describe(array, size).splitlines(), f"wrote      {output}"):
        say(line)


@psf.command("beads")
@click.argument("source", metavar="IMAGE")
@click.argument("output", metavar="OUT")
@click.option(
    "--voxel-size", callback=_lengths, metavar="Z,Y,X", help="Micrometres; default from the image's file."
)
@click.option("--bead-diameter-um", type=float, help="To be taken out of the PSF; default not.")
@click.option(
    "--method",
    type=click.Choice(["average", "distill"]),
    default="distill",
    show_default=True,
    help="Mean of the aligned beads, or deconvolution of the image by the beads.",
)
@click.option("--shape", callback=_counts, metavar="Z,Y,X", help="Voxels, odd; default 4 times the width.")
@click.option("--saturation", type=float, help="Value of a saturated voxel; default found from the image.")
@click.option(
    "--min-snr", type=float, default=20.0, show_default=True, help="Least signal to noise of a bead."
)
@click.option("--report", metavar="PNG", help="Picture of the PSF and of the beads that were used.")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
def beads(
    source: str,
    output: str,
    voxel_size: tuple[float, ...] | None,
    report: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Measure a PSF from an image of beads."""
    from chunkrestore.psf.bead_report import measure

    for line in measure(source, output, voxel_size=voxel_size, report=report, overwrite=overwrite, **options):
        say(line)


@psf.command("theory")
@click.argument("output", metavar="OUT")
@click.option(
    "--model",
    type=click.Choice(["scalar", "vectorial", "confocal", "light-sheet"]),
    default="vectorial",
    show_default=True,
    help="Widefield by scalar or vectorial theory; confocal and light sheet are vectorial.",
)
@click.option("--na", "numerical_aperture", type=float, help="Numerical aperture of the detection.")
@click.option("--emission-um", type=float, help="Wavelength of the detected light.")
@click.option("--excitation-um", type=float, help="Wavelength of the excitation (confocal, light sheet).")
@click.option(
    "--immersion",
    "immersion_index",
    callback=_index_of,
    help="air, water, glycerol, oil or a refractive index.",
)
@click.option(
    "--sample", "sample_index", callback=_index_of, help="Medium of the sample; default the immersion."
)
@click.option("--depth-um", type=float, help="Of the object below the coverslip.")
@click.option("--coverslip-um", type=float, help="Thickness as used; default 170.")
@click.option("--coverslip-design-um", type=float, help="Thickness as designed; default as used.")
@click.option("--pinhole-airy", type=float, help="Diameter of the pinhole in Airy units.")
@click.option("--pinhole-um", type=float, help="Diameter of the pinhole; needs --magnification.")
@click.option("--magnification", type=float, help="From the sample to the pinhole.")
@click.option("--sheet-waist-um", type=float, help="1/e^2 half-width of the light sheet at its waist.")
@click.option("--sheet-na", type=float, help="Aperture of the illumination, instead of the waist.")
@click.option("--x-um", type=float, default=0.0, help="Distance from the waist of the light sheet.")
@click.option(
    "--volume-shape",
    callback=_counts,
    metavar="Z,Y,X",
    help="Of the image: write OUT.yaml with as many light-sheet PSFs along x as it needs.",
)
@click.option("--voxel-size", callback=_lengths, metavar="Z,Y,X", help="Micrometres; default that of IMAGE.")
@click.option(
    "--shape", callback=_counts, metavar="Z,Y,X", help="Voxels; default 99 % of each plane's light."
)
@click.option("--like", metavar="IMAGE", help="OME-TIFF, OME-XML or OME-Zarr to take unknown values from.")
@click.option("--channel", type=click.IntRange(0), default=0, help="Of IMAGE; default 0.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
def theory(
    output: str,
    model: str,
    voxel_size: tuple[float, ...] | None,
    shape: tuple[int, ...] | None,
    like: str | None,
    channel: int,
    overwrite: bool,
    sheet_waist_um: float | None,
    sheet_na: float | None,
    x_um: float,
    volume_shape: tuple[int, ...] | None,
    **given: Any,
) -> None:
    """Compute a PSF from the optics of a microscope.

    The depth axis grows as the focus moves deeper into the sample.
    """
    from chunkrestore.psf import (
        LightSheet,
        Optics,
        confocal,
        light_sheet,
        light_sheet_field,
        widefield,
        write_psf,
    )
    from chunkrestore.psf.check import describe

    if Path(output).exists() and not overwrite:
        raise FileExistsError(f"{output} exists; give another name, or --overwrite")
    known = _microscope(like, channel) if like else {}
    optics = Optics.from_known(known, **given)
    size = voxel_size or known.get("voxel_size")
    if size is None:
        raise ValueError("the voxel size is unknown; give it by --voxel-size z,y,x in micrometres")
    if model == "light-sheet":
        sheet = LightSheet(waist_um=sheet_waist_um, numerical_aperture=sheet_na)
        if volume_shape is not None:
            field = light_sheet_field(optics, size, volume_shape, sheet, shape=shape)
            _write_field(output, field, size, overwrite=overwrite)
            return
        array = light_sheet(optics, size, sheet, x_um=x_um, shape=shape)
    elif sheet_waist_um is not None or sheet_na is not None or x_um or volume_shape:
        raise ValueError(
            "--sheet-waist-um, --sheet-na, --x-um and --volume-shape need --model light-sheet, not " + model
        )
    elif model == "confocal":
        array = confocal(optics, size, shape)
    else:
        array = widefield(optics, size, shape, model="scalar" if model == "scalar" else "vectorial")
    write_psf(output, array, None if output.lower().endswith(".npy") else size)
    for line in (f"model      {model}", *str(optics).splitlines(), *describe(array, size).splitlines()):
        say(line)
    say(f"wrote      {output}")


def _write_field(output: str, field: Any, voxel_size: tuple[float, ...], *, overwrite: bool) -> None:
    """Write a field of point spread functions and say where each of them holds."""
    from chunkrestore.psf.fields import write_psf_field

    if Path(output).suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(
            f"{output} must end in .yaml: a field of PSFs is one list and one TIFF for each of them"
        )
    files = write_psf_field(output, field, voxel_size, overwrite=overwrite)
    for file, position in zip(files[1:], field.positions, strict=True):
        say(f"wrote      {file} for voxel {', '.join(f'{x:g}' for x in position)}")
    say(f"wrote      {files[0]}")


def _microscope(path: str, channel: int) -> dict[str, Any]:
    """Return what an OME-TIFF, an OME-XML file or an OME-Zarr says about its microscope."""
    from chunkrestore.ome_zarr import open_image
    from chunkrestore.psf.files import read_psf_voxel_size
    from chunkrestore.psf.metadata import acquisition

    place = Path(path)
    if place.suffix.lower() in (".tif", ".tiff"):
        return {"voxel_size": read_psf_voxel_size(place)} | acquisition(place, channel=channel)
    if place.is_file():
        return acquisition(place, channel=channel)
    image = open_image(path)
    found = acquisition(image.attributes, channel=channel)
    # bioformats2raw keeps the microscope's own metadata beside the images, which it numbers.
    for folder, number in ((place, "0"), (place.parent, place.name)):
        described = folder / "OME" / "METADATA.ome.xml"
        if number.isdecimal() and described.is_file():
            found = acquisition(described, channel=channel, image=int(number)) | found
    if image.calibrated and len(image.voxel_size) == 3:
        found["voxel_size"] = image.voxel_size
    return found


def _level(background: str) -> Any:
    """Return ``"edge"``, None or the intensity."""
    if background in ("edge", "none"):
        return "edge" if background == "edge" else None
    try:
        return float(background)
    except ValueError:
        raise ValueError(f"`--background` must be a number, edge or none, got {background!r}") from None


def _image_facts(path: str) -> dict[str, Any]:
    """Return what `diagnose` asks of an image: shape, voxel size, and voxels from its middle."""
    from chunkrestore.ome_zarr import open_image

    image = open_image(path)
    middle = tuple(
        slice(n // 2 - min(n, 64) // 2, n // 2 - min(n, 64) // 2 + min(n, 64)) for n in image.spatial_shape
    )
    return {
        "image_shape": image.spatial_shape,
        "image_voxel_size": image.voxel_size if image.calibrated else None,
        "image_sample": image.source(0).read(0, 0, middle),
    }
