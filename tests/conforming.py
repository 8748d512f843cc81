"""Whether a store conforms: the official schemas, and what neither they nor the validators look at."""

import itertools
import json

import numpy as np
import zarr


def attributes_of(path):
    """Return the OME attributes as on disk, and the version."""
    if (path / "zarr.json").exists():
        found = json.loads((path / "zarr.json").read_text())["attributes"]
        return found, found["ome"], "0.5"
    found = json.loads((path / ".zattrs").read_text())
    return found, found, "0.4"


def assert_valid(path):
    """Check the official schemas, and what neither they nor the validators look at."""
    from ngff_zarr.validate import validate

    attributes, ome, version = attributes_of(path)
    is_label = "image-label" in ome
    for model in ("image", "label") if is_label else ("image",):
        validate(attributes, version, model)
        if model == "image" or "colors" in ome["image-label"]:  # which should be there, and may not
            validate(attributes, version, model, strict=True)
    arrays = assert_levels(path, ome["multiscales"][0])
    if "omero" in ome:
        names = [a["name"] for a in ome["multiscales"][0]["axes"]]
        n_c = arrays[0].shape[names.index("c")] if "c" in names else 1
        assert len(ome["omero"]["channels"]) == n_c
        for channel in ome["omero"]["channels"]:
            window = channel["window"]
            assert window["min"] <= window["start"] < window["end"] <= window["max"]
            assert len(channel["color"]) == 6
    if is_label:
        assert arrays[0].dtype.kind in "iu"
        ids = [c["label-value"] for c in ome["image-label"].get("colors", [])]
        assert len(set(ids)) == len(ids)
        source = ome["image-label"]["source"]["image"]
        found = (path / source).resolve()
        if found.exists():  # labels may stand alone
            assert len(attributes_of(found)[1]["multiscales"][0]["datasets"]) == len(arrays)
        return
    listed = [p.name for p in (path / "labels").glob("*") if p.is_dir()] if (path / "labels").exists() else []
    if listed:
        assert sorted(attributes_of(path / "labels")[1]["labels"]) == sorted(listed)
    for name in listed:
        assert_valid(path / "labels" / name)


def assert_levels(path, multiscale):
    """Check levels, finest first, of one dtype, with scales and places that fit their shapes; return the arrays."""
    arrays = [zarr.open_array(path / d["path"], mode="r") for d in multiscale["datasets"]]
    names = [a["name"] for a in multiscale["axes"]]
    assert len({a.dtype for a in arrays}) == 1
    for finer, coarser in itertools.pairwise(arrays):
        assert all(m <= n for n, m in zip(finer.shape, coarser.shape, strict=True))
        in_space = [
            n for n, axis in zip(finer.shape, multiscale["axes"], strict=True) if axis["type"] == "space"
        ]
        assert np.prod(coarser.shape) < np.prod(finer.shape) or np.prod(in_space) == 1
    first = multiscale["datasets"][0]["coordinateTransformations"]
    origin = first[1]["translation"] if len(first) > 1 else [0.0] * len(names)
    for dataset, array in zip(multiscale["datasets"], arrays, strict=True):
        steps = dataset["coordinateTransformations"]
        assert [s["type"] for s in steps] in (["scale"], ["scale", "translation"])
        factors = np.divide(steps[0]["scale"], first[0]["scale"])
        assert array.shape == tuple(int(n) for n in np.ceil(np.divide(arrays[0].shape, factors)))
        # The centre of the first voxel is the centre of what it covers.
        expected = np.add(origin, (factors - 1) / 2 * np.asarray(first[0]["scale"]))
        found = steps[1]["translation"] if len(steps) > 1 else np.zeros(len(names))
        np.testing.assert_allclose(found, expected, atol=1e-9)
        if array.metadata.zarr_format == 3:
            assert list(array.metadata.dimension_names) == names
    return arrays
