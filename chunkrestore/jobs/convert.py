"""Conversion of whatever holds an image to OME-Zarr, as a job: no operator, every voxel as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from chunkrestore.cluster import Cluster, connect
from chunkrestore.jobs.fields import run_fields
from chunkrestore.jobs.job import input_identity
from chunkrestore.jobs.ledger import Ledger, work_folder_of
from chunkrestore.jobs.prepare import Store, select
from chunkrestore.jobs.report import Report
from chunkrestore.jobs.run import run
from chunkrestore.ome_zarr import (
    Collection,
    OmeZarrImage,
    open_collection,
    open_image,
    open_source,
    select_channel,
)
from chunkrestore.ome_zarr import store as stores
from chunkrestore.ome_zarr.read import label_names
from chunkrestore.ome_zarr.store import location
from chunkrestore.operators.base import Operator
from chunkrestore.operators.storing import choice_of_dtype, completed

_OF_IMAGES = ("channel", "label_name", "objects", "depth", "calibrate", "device")
"""Arguments of `run` that say nothing about labels that are copied."""


def convert(
    source: Store | OmeZarrImage,
    output: Store,
    *,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    channels: Sequence[str] | None = None,
    series: int | None = None,
    as_labels: bool = False,
    dtype: str | None = None,
    intensity_range: tuple[float, float] | None = None,
    labels: bool = True,
    **options: Any,
) -> Report:
    """Store an image as OME-Zarr, whatever holds it: TIFF files, folders of planes, zarr arrays, other OME-Zarr.

    Preserves dtype (unless another is asked for), every voxel, and all metadata: what is not understood is kept under
    the ``chunkrestore`` attribute. Nothing is held but blocks, whatever the size of the image. Called again with the
    same arguments, a conversion that was interrupted goes on, as any job does.

    Parameters
    ----------
    source, axes, voxel_size, channels, series, as_labels
        As for `chunkrestore.ome_zarr.open_source`.
    output
        OME-Zarr to write. Labels (`as_labels`) are added to the image there, if there is one, as `label_name`.
    dtype, intensity_range
        As for `chunkrestore.operators.storing.AsType`; the image's own dtype by default.
    labels
        Store the labels of an OME-Zarr as well, each under its name.
    **options
        As for `chunkrestore.run`: `version`, `shards`, `compression`, `region`, `overwrite`, `cluster` and so on.

    Returns
    -------
    Report
        Of the image, its `outputs` with the labels.

    Raises
    ------
    FileNotFoundError, FileExistsError, ValueError
        As for `open_source` and `chunkrestore.run`; nothing was written then.
    """
    image = open_source(
        source, axes=axes, voxel_size=voxel_size, channels=channels, series=series, as_labels=as_labels
    )
    names = image.labels if labels and not image.is_labels else ()
    pending = [name for name in names if name not in label_names(location(output))]
    operators = completed(choice_of_dtype(dtype, intensity_range))
    report = None
    if pending and not options.get("overwrite"):
        report = _stored(image, operators, output, options)
    if report is None:
        report = run(operators, image, output, **options)
    for name in names if options.get("overwrite") else pending:
        of_labels = run(
            [], image.label(name), output, label_name=name, **_label_options(image, name, options)
        )
        report.outputs += of_labels.outputs
    return report


def convert_fields(
    collection: Store | Collection,
    output: Store,
    *,
    wells: Sequence[str] | None = None,
    fields: Sequence[int | str] | None = None,
    dtype: str | None = None,
    intensity_range: tuple[float, float] | None = None,
    labels: bool = True,
    cluster: Cluster = "auto",
    n_workers: int | None = None,
    profile: Store | None = None,
    **options: Any,
) -> list[Report]:
    """Store the fields of a plate or another collection anew, as `convert` does, each as a job of its own.

    Parameters
    ----------
    collection, output, wells, fields
        As for `chunkrestore.run_fields`.
    dtype, intensity_range, labels
        As for `convert`.
    cluster, n_workers, profile, **options
        As for `chunkrestore.run`.

    Raises
    ------
    chunkrestore.jobs.fields.FieldsError, FileExistsError, ValueError
        As for `chunkrestore.run_fields`.
    """
    chosen = open_collection(collection).select(wells, fields)
    work = work_folder_of(location(output), options.get("work_folder"))
    with connect(cluster, n_workers=n_workers, profile=profile) as client:
        place = {"cluster": "serial" if client is None else client}
        reports = run_fields(choice_of_dtype(dtype, intensity_range), chosen, output, **options | place)
        for field, report in zip(chosen.fields if labels else (), reports, strict=labels):
            image, path = open_image(field.path), stores.join(location(output), field.member)
            for name in image.labels:
                if name in label_names(path) and not options.get("overwrite"):
                    continue
                kept = _label_options(image, name, options) | place | {"work_folder": work / field.member}
                report.outputs += run([], image.label(name), path, label_name=name, **kept).outputs
    return reports


def _stored(
    image: OmeZarrImage, operators: Sequence[Operator], output: Store, options: dict[str, Any]
) -> Report | None:
    """Return the report of the image if an earlier call has stored it, and was interrupted among its labels."""
    ledger = Ledger(work_folder_of(location(output), options.get("work_folder")) / "image")
    if not ledger.complete:
        return None
    parts = (options.get(key) for key in ("timepoint", "channel", "region"))
    selected = select(image, options.get("level", 0), *parts)
    manifest = ledger.manifest()
    done = [operator for work in manifest["passes"] for operator in work["operators"]]
    if manifest["input"] != input_identity(selected) or done != [
        dict(operator.describe()) for operator in operators
    ]:
        return None
    content = json.loads((ledger.folder / "report.json").read_text())
    return Report(**{key: content[key] for key in ("operators", "plan", "outputs", "versions")})


def _label_options(image: OmeZarrImage, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `run` for labels of an image: the same part of them."""
    kept = {key: value for key, value in options.items() if key not in _OF_IMAGES}
    axes = image.label(name).axes
    if "t" not in axes:
        kept.pop("timepoint", None)
    if "c" in axes and (channel := options.get("channel")) is not None:
        several = [channel] if isinstance(channel, str | int) else channel
        kept["channel"] = [select_channel(image, c) for c in several]
    return kept
