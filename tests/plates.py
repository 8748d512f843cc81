"""Plates and bioformats2raw layouts as ome-zarr-py writes them, and what yaozarrs and ome-zarr-models say of ours."""

import json
import warnings
from pathlib import Path

import numpy as np
import zarr

SHAPE = (2, 4, 24, 40)

XML = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
  <Instrument ID="Instrument:0"/>
{images}
</OME>
"""


def voxels(member, shape=SHAPE):
    """Return the voxels of a field: noise with a bright cuboid, another one for every field."""
    rng = np.random.default_rng(sum(map(ord, member)))
    data = rng.integers(90, 110, shape).astype(np.uint16)
    z, y, x = (int(rng.integers(0, n // 2)) for n in shape[1:])
    data[:, z : z + 2, y : y + 6, x : x + 9] += 400
    return data


def write_plate(path, version="0.5", wells=("A/01", "A/02", "B/02"), n_fields=2, **metadata):
    """Write a plate with rows A to C and columns 01 to 03; wells may be a mapping to numbers of fields."""
    counts = wells if isinstance(wells, dict) else dict.fromkeys(wells, n_fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ome_zarr import writer

        root = _root(path, version)
        writer.write_plate_metadata(
            root, ["A", "B", "C"], ["01", "02", "03"], list(counts), name="screen", **metadata
        )
        for well, n in counts.items():
            group = root.require_group(well)
            images = [
                {"path": str(i)} | ({"acquisition": 0} if metadata.get("acquisitions") else {})
                for i in range(n)
            ]
            writer.write_well_metadata(group, images)
            for image in images:
                write_field(group.require_group(image["path"]), f"{well}/{image['path']}")
    return path


def write_series(path, version="0.5", n=3, *, listed=True, xml=True, named="{}"):
    """Write images in the layout of bioformats2raw."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = _root(path, version)
        members = [named.format(i) for i in range(n)]
        for member in members:
            write_field(root.require_group(member), member)
        own = {"bioformats2raw.layout": 3}
        root.attrs.update(own if version == "0.4" else {"ome": {"version": version, **own}})
        if listed:
            series = {"series": members}
            group = root.require_group("OME")
            group.attrs.update(series if version == "0.4" else {"ome": {"version": version, **series}})
    if xml:
        (Path(path) / "OME").mkdir(exist_ok=True)
        images = "\n".join(f'  <Image ID="Image:{i}" Name="position {i}"/>' for i in range(n))
        (Path(path) / "OME" / "METADATA.ome.xml").write_text(XML.format(images=images))
    return path


def write_field(group, member):
    """Write one image."""
    from ome_zarr import writer

    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.25, 0.25]}]
    axes = [{"name": "c", "type": "channel"}] + [
        {"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"
    ]
    writer.write_multiscale(
        [voxels(member)],
        group,
        axes=axes,
        coordinate_transformations=[scale],
        storage_options={"chunks": (1, 4, 24, 40)},
    )
    colors = ("00FF00", "FF00FF")
    channels = [
        {"label": f"dye {i}", "color": colors[i], "window": {"min": 0, "max": 65535, "start": 90, "end": 500}}
        for i in range(2)
    ]
    if "ome" in group.attrs:
        group.attrs["ome"] = {**group.attrs["ome"], "omero": {"channels": channels}}
    else:
        group.attrs["omero"] = {"channels": channels, "version": "0.4"}


def edit(path, change):
    """Change the OME attributes of the group at `path` on disk."""
    for name in ("zarr.json", ".zattrs"):
        file = Path(path) / name
        if file.is_file():
            document = json.loads(file.read_text())
            change(document["attributes"]["ome"] if name == "zarr.json" else document)
            file.write_text(json.dumps(document))


def attributes(path):
    """Return all attributes of a group."""
    return dict(zarr.open_group(path, mode="r").attrs)


def validate(path, version, kind="plate"):
    """Raise unless yaozarrs and ome-zarr-models accept a collection with everything in it."""
    import importlib

    from yaozarrs import validate_zarr_store

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        validate_zarr_store(str(path))
        models = f"ome_zarr_models.v{version.replace('.', '')}"
        module, name = {
            "plate": ("hcs", "HCS"),
            "well": ("well", "Well"),
            "series": ("bioformats2raw", "BioFormats2Raw"),
        }[kind]
        getattr(importlib.import_module(f"{models}.{module}"), name).from_zarr(
            zarr.open_group(path, mode="r")
        )


def _root(path, version):
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.io import parse_url

    location = parse_url(str(path), mode="w", fmt=FormatV04() if version == "0.4" else FormatV05())
    return zarr.group(store=location.store, zarr_format=2 if version == "0.4" else 3)
