"""Options and kinds of values that several verbs take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from chunkrestore.cli_jobs import CLUSTER_OPTIONS


class Numbers(click.ParamType):
    """Numbers for the spatial axes, ``z,y,x`` or ``y,x``."""

    name = "z,y,x"

    def __init__(self, kind: type[int] | type[float] = int) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            what = "whole numbers such as 64,128,128" if self.kind is int else "numbers such as 2,0.5,0.5"
            self.fail(f"{value!r} is not a list of {what}", param, ctx)
        if len(numbers) not in (2, 3) or min(numbers) < 0:
            self.fail(f"{value!r} must have one number for each of z,y,x (or y,x), none negative", param, ctx)
        return numbers


class Depth(Numbers):
    """One whole number for all axes, or one per axis."""

    name = "n or z,y,x"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return an integer or a tuple of integers."""
        return (
            int(value) if isinstance(value, str) and value.isdecimal() else super().convert(value, param, ctx)
        )


class Region(click.ParamType):
    """Ranges for the spatial axes, ``z0:z1,y0:y1,x0:x1``."""

    name = "z0:z1,y0:y1,x0:x1"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return one (start, stop) per axis."""
        if isinstance(value, tuple):
            return value
        try:
            ranges = tuple((int(a), int(b)) for a, b in (part.split(":") for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of ranges such as 0:64,100:228,100:228", param, ctx)
        if any(not 0 <= start < stop for start, stop in ranges):
            self.fail(f"{value!r} has a range that is empty or begins below 0", param, ctx)
        return ranges


def index(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | str | None:
    """Take a channel by number if it is one, otherwise by name."""
    return int(value) if value is not None and value.isdecimal() else value


RUN_OPTIONS = (
    *CLUSTER_OPTIONS,
    click.option("--work-folder", help="Where the journal is kept; default OUT.chunkrestore."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    click.option("--dry-run", is_flag=True, help="Print the plan and stop."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Print the traceback of errors."),
)

OPENING_OPTIONS = (
    click.option(
        "--axes", help="One letter of tczyx per axis of a plain array or TIFF; default its metadata."
    ),
    click.option("--voxel-size", type=Numbers(float), help="Micrometres; default the metadata."),
    click.option("--series", type=click.IntRange(0), help="Of a TIFF that holds several; default the first."),
)
"""What is said of an input by hand."""

SELECTION_OPTIONS = (
    click.option("--channel", callback=index, help="Channel name or number; default all."),
    click.option("--timepoint", type=click.IntRange(0), help="Time point; default all."),
    click.option(
        "--level", type=click.IntRange(0), default=0, help="Resolution level; default 0, the finest."
    ),
    click.option("--region", type=Region(), help="Part of the volume; default all."),
)
"""Which part of an image."""

FIELD_OPTIONS = (
    click.option("--well", "wells", multiple=True, help="Of a plate, such as B/03; default all. Repeatable."),
    click.option(
        "--field",
        "fields",
        multiple=True,
        help="Number or name in a well or series; default all. Repeatable.",
    ),
)
"""Which images of a collection."""

STORAGE_OPTIONS = (
    click.option(
        "--ome-version",
        "version",
        type=click.Choice(["0.4", "0.5"]),
        default="0.5",
        show_default=True,
        help="Of a new store.",
    ),
    click.option(
        "--shards",
        type=Numbers(),
        help="Voxels stored as one file; default a chunk, or several if there are many.",
    ),
    click.option(
        "--compression",
        default="zstd",
        show_default=True,
        help="zstd, lz4, gzip or none; zstd:9 with a level.",
    ),
    click.option("--checksums", is_flag=True, help="Store a CRC-32C with every chunk."),
)
"""How an output is stored."""

DTYPE_OPTIONS = (
    click.option(
        "--dtype", type=click.Choice(["uint8", "uint16", "int16", "float32"]), help="Of the output."
    ),
    click.option(
        "--intensity-range", nargs=2, type=float, help="Intensities stored as least and largest integer."
    ),
)
"""In which numbers an image is stored."""

JOB_OPTIONS = (
    click.option(
        "--block", "block_shape", type=Numbers(), help="Core of a block in voxels; default by memory."
    ),
    click.option("--depth", type=Depth(), help="Halo in voxels; default derived from the operator."),
    click.option("--memory", help="Peak of a block, such as 8GB, or free; default 2 GiB."),
    *STORAGE_OPTIONS,
    *SELECTION_OPTIONS,
    *OPENING_OPTIONS,
    *FIELD_OPTIONS,
    *RUN_OPTIONS,
)


def with_options(options: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    """Return a decorator that adds options to a command."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
