"""Whatever the axes, shapes, chunks, shards, dtypes, versions and codecs: what is written is what is read."""

import itertools

import numpy as np
import pytest
import yaozarrs
import zarr
from conforming import assert_valid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ome_zarr_models import open_ome_zarr

from chunkrestore.ome_zarr import open_image, write_image, write_labels

AXES = ["yx", "zyx", "cyx", "tyx", "tcyx", "czyx", "tzyx", "tczyx"]
IMAGE_DTYPES = ["uint8", "uint16", "int16", "float32"]
LABEL_DTYPES = ["uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64"]

PROPERTY = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def stores(draw, dtypes=IMAGE_DTYPES):
    """Return an array, its axes, and options to write it with."""
    axes = draw(st.sampled_from(AXES))
    n_space = sum(a in "zyx" for a in axes)
    longest = 23 if n_space == 2 else 13
    shape = tuple(draw(st.integers(1, longest if a in "zyx" else 2)) for a in axes)
    version = draw(st.sampled_from(["0.4", "0.5"]))
    options = {
        "axes": axes,
        "version": version,
        "compression": draw(st.sampled_from(["zstd", "lz4:1", "gzip", "none"])),
        "voxel_size": tuple(draw(st.sampled_from([0.25, 0.5, 1.0, 3.0])) for _ in range(n_space)),
    }
    chunks = tuple(draw(st.integers(2, 8)) for _ in range(n_space))
    if draw(st.booleans()):
        options["chunks"] = chunks
        if version == "0.5" and draw(st.booleans()):
            options["shards"] = tuple(c * draw(st.integers(1, 3)) for c in chunks)
    if version == "0.5":
        options["checksums"] = draw(st.booleans())
    if "t" in axes and draw(st.booleans()):
        options["time_step"] = 0.5
    data = array(shape, np.dtype(draw(st.sampled_from(dtypes))), draw(st.integers(0, 99)))
    return data, options


def array(shape, dtype, seed):
    """Return numbers over the whole range of `dtype`, some of them 0."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "f":
        return rng.normal(0, 1000, shape).astype(dtype) * rng.integers(0, 2, shape).astype(dtype)
    limits = np.iinfo(dtype)
    numbers = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.3, dtype.type(0), numbers)


def factors_of(image, level):
    """Return how many voxels of the level below a voxel covers, per axis, by what the metadata says."""
    below, here = image.levels[level - 1], image.levels[level]
    ratios = np.round(np.divide(here.voxel_size, below.voxel_size)).astype(int)
    return (1,) * (len(image.axes) - len(ratios)) + tuple(int(r) for r in ratios)


def windows(block, factors):
    """Yield the index of every voxel of the next level with what it covers."""
    shape = tuple(-(-n // f) for n, f in zip(block.shape, factors, strict=True))
    for index in itertools.product(*map(range, shape)):
        covered = tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))
        yield index, block[covered]


def check_validators(path):
    yaozarrs.validate_zarr_store(path)
    open_ome_zarr(zarr.open_group(path, mode="r"))
    assert_valid(path)


@PROPERTY
@given(stored=stores(), n_levels=st.integers(1, 3), data=st.data())
def test_images(tmp_path_factory, stored, n_levels, data):
    array, options = stored
    path = tmp_path_factory.mktemp("any") / "a.ome.zarr"
    image = write_image(array, path, levels=n_levels, **options)
    levels = [image.level(k).compute() for k in range(n_levels)]
    np.testing.assert_array_equal(levels[0], array)
    assert [level.dtype for level in levels] == [array.dtype] * n_levels
    assert (image.axes, image.voxel_size) == (options["axes"], options["voxel_size"])
    for k in range(1, n_levels):
        for index, covered in windows(levels[k - 1], factors_of(image, k)):
            mean = covered.astype(np.float64).mean()
            expected = np.floor(mean + 0.5) if array.dtype.kind in "iu" else mean
            assert levels[k][index] == pytest.approx(expected, rel=1e-5, abs=1e-3)
    check_regions(image, levels, data)
    check_validators(path)


def check_regions(image, levels, data):
    """Any part of any level is what slicing the level gives."""
    k = data.draw(st.integers(0, len(levels) - 1), label="level")
    reader = image.source(k)
    lead = {
        a: data.draw(st.integers(0, n - 1), label=a)
        for a, n in zip(image.axes, image.shape, strict=True)
        if a in "tc"
    }
    region = []
    for n in reader.spatial_shape:
        start = data.draw(st.integers(0, n - 1), label="start")
        region.append(slice(start, data.draw(st.integers(start + 1, n), label="stop")))
    part = reader.read(lead.get("t", 0), lead.get("c", 0), tuple(region))
    np.testing.assert_array_equal(part, levels[k][(*lead.values(), *region)])


@PROPERTY
@given(
    stored=stores(LABEL_DTYPES),
    n_levels=st.integers(1, 3),
    method=st.sampled_from(["nearest", "mode"]),
    colors=st.sampled_from([None, "auto"]),
)
def test_labels(tmp_path_factory, stored, n_levels, method, colors):
    labels, options = stored
    # Few objects, so that windows hold several voxels of one; the official schema compares each colour with each.
    ids = np.resize(labels, 7)
    labels = ids[np.abs(labels.astype(np.int64)) % 7].astype(labels.dtype)
    path = tmp_path_factory.mktemp("any") / "a.ome.zarr"
    geometry = {k: options.pop(k) for k in ("axes", "voxel_size")}
    step = {k: options.pop(k) for k in ("time_step",) if k in options}
    image = write_image(labels.astype("uint8"), path, levels=n_levels, **geometry, **step, **options)
    written = write_labels(labels, path, "any", method=method, colors=colors, **options)
    levels = [written.level(k).compute() for k in range(len(written.levels))]
    assert [level.shape for level in levels] == [level.shape for level in image.levels]
    np.testing.assert_array_equal(levels[0], labels)
    assert {level.dtype for level in levels} == {labels.dtype}
    ids = [int(i) for i in np.unique(labels) if i]
    entries = written.ome["image-label"].get("colors", [])
    assert [e["label-value"] for e in entries] == (ids if colors else [])
    for k in range(1, n_levels):
        for index, covered in windows(levels[k - 1], factors_of(written, k)):
            assert levels[k][index] in covered
            if method == "nearest":
                centre = tuple(
                    min((f - 1) // 2, n - 1)
                    for f, n in zip(factors_of(written, k), covered.shape, strict=True)
                )
                assert levels[k][index] == covered[centre]
            else:
                found, counts = np.unique(covered, return_counts=True)
                is_whole = covered.size == np.prod(factors_of(written, k))
                assert not is_whole or counts[found == levels[k][index]] == counts.max()
    check_validators(path)
    assert open_image(path).labels == ("any",)
