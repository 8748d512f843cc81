"""The verbs for stores: what is in them, from and to other formats, pyramids, tables of objects, and a look at them."""

from __future__ import annotations

import json
from typing import Any

import click

from chunkrestore.cli_jobs import CLUSTER_OPTIONS
from chunkrestore.cli_options import (
    DTYPE_OPTIONS,
    FIELD_OPTIONS,
    OPENING_OPTIONS,
    RUN_OPTIONS,
    SELECTION_OPTIONS,
    STORAGE_OPTIONS,
    Numbers,
    with_options,
)
from chunkrestore.cli_running import chosen_dtype, collection_at, opened, run_job, single_images_only
from chunkrestore.cli_text import say

_WORK_OPTIONS = (
    *CLUSTER_OPTIONS,
    click.option("--work-folder", help="Where the journal is kept; default STORE.chunkrestore."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Print the traceback of errors."),
)


@click.command()
@click.argument("store")
@with_options(OPENING_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(store: str, as_json: bool, **options: Any) -> None:
    """Describe an image, labels, a plate or another collection of images."""
    from chunkrestore.ome_zarr import describe, facts_of

    found = opened(store, options)
    say(json.dumps(facts_of(found), indent=1) if as_json else describe(found))


@click.command()
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option("--block", "block_shape", type=Numbers(), help="Core of a block in voxels; default by memory.")
@click.option("--memory", help="Peak of a block, such as 8GB, or free; default 2 GiB.")
@click.option("--as-labels", is_flag=True, help="IN holds ids of objects: store it as labels of OUT.")
@click.option("--name", "label_name", default="labels", show_default=True, help="For --as-labels.")
@click.option("--no-labels", is_flag=True, help="Leave the labels of an OME-Zarr behind.")
@with_options(DTYPE_OPTIONS)
@with_options(STORAGE_OPTIONS)
@with_options(SELECTION_OPTIONS)
@with_options(OPENING_OPTIONS)
@with_options(FIELD_OPTIONS)
@with_options(RUN_OPTIONS)
def convert(source: str, output: str, no_labels: bool, **options: Any) -> None:
    """Convert a TIFF, a folder of planes, or an OME-Zarr or zarr array to OME-Zarr."""
    collection = collection_at(source)
    if options["dry_run"] or (collection is None and (options["wells"] or options["fields"])):
        run_job(chosen_dtype(options), source, output, options)
        return
    from chunkrestore.jobs.convert import convert as convert_store
    from chunkrestore.jobs.convert import convert_fields

    del options["dry_run"], options["verbose"]
    chosen: dict[str, Any] = {key: list(options.pop(key)) or None for key in ("wells", "fields")}
    options |= {"labels": not no_labels, "page": True}
    if collection is None:
        told = str(convert_store(source, output, **options))
    else:
        from chunkrestore.jobs.fields import summary

        del options["label_name"]
        if options.pop("as_labels"):
            raise ValueError(f"`--as-labels` is for single images, and {source} is a collection")
        told = summary(convert_fields(collection, output, **chosen, **single_images_only(options, source)))
    if not options["quiet"]:
        say(told)


@click.command()
@click.argument("store")
@click.argument("tiff")
@with_options(SELECTION_OPTIONS)
@with_options(OPENING_OPTIONS)
@click.option("--compression", default="zlib", show_default=True, help="zlib, none, lzw or zstd.")
@click.option("--tile", type=Numbers(), help="y,x of tiles; default whole rows.")
@click.option("--pyramid", is_flag=True, help="Write the lower resolutions as well.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def export(store: str, tiff: str, **options: Any) -> None:
    """Write an image or a part of it as OME-TIFF."""
    from chunkrestore.jobs.prepare import select
    from chunkrestore.ome_zarr.tiff.export import export_tiff

    parts = [options.pop(key) for key in ("level", "timepoint", "channel", "region")]
    export_tiff(select(opened(store, options), *parts), tiff, **options)
    say(f"wrote      {tiff}")


@click.command()
@click.argument("store")
@click.option("--levels", type=click.IntRange(1), help="Number of levels; default until one is small.")
@click.option(
    "--method", type=click.Choice(["nearest", "mode"]), help="How labels are reduced; default nearest."
)
@click.option("--overwrite", is_flag=True, help="Make levels anew that exist.")
@with_options(_WORK_OPTIONS)
def pyramid(store: str, verbose: bool, **options: Any) -> None:
    """Add the lower resolutions of an image and its labels, in place."""
    from chunkrestore.jobs.pyramids import build_pyramid

    report = build_pyramid(store, **options)
    if not options["quiet"]:
        say(report)


@click.command()
@click.argument("store")
@click.argument("name")
@click.option(
    "--image",
    "images",
    multiple=True,
    help="STORE or NAME=STORE to measure; default that of STORE. Repeatable.",
)
@click.option("--channel", "channels", multiple=True, help="To measure; default all. Repeatable.")
@click.option(
    "--level", type=click.IntRange(0), default=0, help="Resolution to measure at; default the finest."
)
@click.option("--output", help="File to write; default beside the labels.")
@click.option(
    "--format", type=click.Choice(["parquet", "csv", "anndata"]), default="parquet", show_default=True
)
@click.option("--overwrite", is_flag=True, help="Replace an existing table.")
@with_options(_WORK_OPTIONS)
def measure(
    store: str, name: str, verbose: bool, images: tuple[str, ...], channels: tuple[str, ...], **options: Any
) -> None:
    """Measure the objects of the labels NAME: volumes, places, intensities, axes."""
    from chunkrestore.jobs.measure import measure as measure_objects

    named = [image.partition("=") for image in images]
    if any(separator for _, separator, _ in named):
        if not all(separator for _, separator, _ in named):
            raise ValueError("`--image` must be NAME=STORE for all images or for none")
        chosen: Any = {key: place for key, _, place in named}
    else:
        chosen = list(images) or None
    report = measure_objects(store, name, images=chosen, channels=list(channels) or None, **options)
    if not options["quiet"]:
        say(report)


@click.command()
@click.argument("store")
@click.option("--labels", multiple=True, help="Labels to show; default all. Repeatable.")
@click.option("--before", help="Another image to compare with; default the input that the store names.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default any that is free.")
@click.option("--no-browser", is_flag=True, help="Print the address and open nothing.")
@click.option("--viewer", type=click.Choice(["auto", "napari", "web"]), default="auto", show_default=True)
def view(
    store: str, labels: tuple[str, ...], before: str | None, port: int, no_browser: bool, viewer: str
) -> None:
    """Look at an image and its labels, in napari or a browser."""
    from chunkrestore.viewer import view as show

    show(store, before=before, labels=list(labels) or None, port=port, browser=not no_browser, viewer=viewer)


COMMANDS = (info, convert, export, pyramid, measure, view)
