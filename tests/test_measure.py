"""Measured labels: equal to scikit-image on the whole array, bit by bit the same in any blocks, resumable."""

from __future__ import annotations

import itertools
import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import servers
from dying import Disk, Killed, bury
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import tree
from skimage.measure import label, regionprops

import chunkrestore as cr
from chunkrestore.jobs import measuring, table_formats
from chunkrestore.jobs.intensities import column_name
from chunkrestore.jobs.measure import default_block, measure
from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.object_table import read_description, read_shapes, write_objects
from chunkrestore.jobs.runner import BlockError
from chunkrestore.kernels.object_measures import merge_intensities, merge_objects, principal_axes, trimmed
from chunkrestore.kernels.star_convex import Rays

pyarrow = pytest.importorskip("pyarrow", reason="needs the tables extra")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the tables extra")
pytest.importorskip("numba", reason="needs the tables extra")

SERIAL = {"cluster": "serial", "quiet": True}
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32")


def blobs(shape, seed, gap=1):
    """Labels of all sizes that touch each other, some on the border, with gaps between ids."""
    rng = np.random.default_rng(seed)
    return label(rng.random(shape) < 0.4, connectivity=1).astype(np.int64) * gap


def intensities(shape, dtype, seed):
    """Values over the whole range of an integer type; of floats, over more exponents than float64 can add up."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        values = rng.standard_normal(shape) * 10.0 ** rng.integers(-44, 37, shape)
        return np.where(rng.random(shape) < 0.1, 0, values).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def stored(folder, labels, image=None, axes="zyx", channels=None, voxel_size=None, name="nuclei"):
    """Write labels of some chunks, with their image if there is one, and return the store."""
    path = Path(folder) / "in.zarr"
    spatial = axes[-min(len(axes.replace("c", "").replace("t", "")), 3) :]
    chunks = (4,) * len(spatial)
    if image is not None:
        image_axes = (
            axes if image.ndim == labels.ndim else axes.replace("zyx"[-len(spatial) :], "") + "c" + spatial
        )
        cr.write_image(image, path, axes=image_axes, voxel_size=voxel_size, channels=channels, chunks=chunks)
    cr.write_labels(labels, path, name, axes=axes, voxel_size=voxel_size, chunks=chunks)
    return path


def table_of(path, name="nuclei"):
    table = parquet.read_table(path / "labels" / name / "objects.parquet")
    return {column: np.asarray(table[column].to_pylist()) for column in table.column_names}


def in_blocks(labels, images, block_shape):
    """Sums of every block with its corner, of labels and of every image."""
    from chunkrestore.kernels.object_sums import intensity_sums, object_sums

    parts, channels = [], [[] for _ in images]
    corners = itertools.product(*(range(0, n, b) for n, b in zip(labels.shape, block_shape, strict=True)))
    for corner in corners:
        region = tuple(slice(a, a + b) for a, b in zip(corner, block_shape, strict=True))
        table, pieces = object_sums(labels[region], corner)
        if not len(table["ids"]):
            continue
        parts.append((table, corner))
        for channel, image in zip(channels, images, strict=True):
            sums = intensity_sums(image[region], pieces, len(table["ids"]))
            limbs = {name: trimmed(sums[name]) for name in ("total", "square", "weighted")}
            channel.append((limbs, sums["least"], sums["most"]))
    return parts, channels


shapes = st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple)


# Exactness


@settings(max_examples=50, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6), data=st.data())
def test_measures_are_exact_and_rounded_once_in_any_blocks(shape, dtype, seed, data):
    block_shape = tuple(data.draw(st.integers(1, n)) for n in shape)
    labels = np.random.default_rng(seed).integers(-2, 5, shape) * 10**15
    image = intensities(shape, dtype, seed)
    if not labels.any():
        return
    parts, (channel,) = in_blocks(labels, [image], block_shape)
    objects, grouping = merge_objects(parts)
    merged = merge_intensities(channel, grouping)
    np.testing.assert_array_equal(objects["ids"], np.unique(labels[labels != 0]))
    for row, ident in enumerate(objects["ids"]):
        places = np.argwhere(labels == ident)
        values = [Fraction(float(v)) for v in image[labels == ident]]
        n, total = len(values), sum(values)
        assert objects["volume"][row] == n
        np.testing.assert_array_equal(objects["sum"][row], places.sum(axis=0))
        np.testing.assert_array_equal(objects["first"][row], places.min(axis=0))
        np.testing.assert_array_equal(objects["last"][row], places.max(axis=0))
        pairs = [(i, j) for i in range(len(shape)) for j in range(i, len(shape))]
        for k, (i, j) in enumerate(pairs):
            a, b = places[:, i].tolist(), places[:, j].tolist()
            exact = Fraction(sum(x * y for x, y in zip(a, b, strict=True)), n) - Fraction(
                sum(a) * sum(b), n * n
            )
            assert objects["covariance"][row, k] == float(exact)
        variance = sum(v * v for v in values) / n - (total / n) ** 2
        assert merged["mean"][row] == float(total / n)
        assert merged["std"][row] == np.sqrt(float(variance))
        assert merged["sum"][row] == (float(total) if dtype == "float32" else int(total))
        assert merged["min"][row] == min(image[labels == ident])
        assert merged["max"][row] == max(image[labels == ident])
        assert merged["min"].dtype == merged["max"].dtype == image.dtype
        for axis in range(len(shape)):
            weighted = sum(v * int(place) for v, place in zip(values, places[:, axis], strict=True))
            expected = float(weighted / total) if total else np.nan
            np.testing.assert_equal(merged["weighted_centroid"][row, axis], expected)


def test_coordinates_beyond_what_products_in_64_bits_hold_are_exact():
    from chunkrestore.kernels.object_sums import object_sums

    far = (2**40, 2**41 + 3, 2**39)
    labels = np.ones((2, 3, 5), np.int32)
    here = [(object_sums(labels, (0, 0, 0))[0], (0, 0, 0)), (object_sums(labels, (0, 0, 5))[0], (0, 0, 5))]
    there = [(object_sums(labels, far)[0], far)]
    there.append((object_sums(labels, (*far[:2], far[2] + 5))[0], (*far[:2], far[2] + 5)))
    near, moved = merge_objects(here)[0], merge_objects(there)[0]
    np.testing.assert_array_equal(moved["covariance"], near["covariance"])
    np.testing.assert_array_equal(moved["sum"], near["sum"] + 60 * np.array(far))
    # One object that spans a trillion voxels: its products take 80 bits and more.
    apart = [(object_sums(labels, (0, 0, 0))[0], (0, 0, 0)), (object_sums(labels, far)[0], far)]
    z = [*np.repeat([0, 1], 15), *(np.repeat([0, 1], 15) + 2**40)]
    exact = Fraction(sum(int(i) ** 2 for i in z), 60) - Fraction(sum(map(int, z)), 60) ** 2
    assert merge_objects(apart)[0]["covariance"][0, 0] == float(exact)


def test_a_long_row_of_the_largest_values_is_exact():
    from chunkrestore.kernels.object_sums import intensity_sums, object_sums

    for dtype in ("uint32", "float32"):
        largest = (np.finfo if dtype == "float32" else np.iinfo)(dtype).max
        image, labels = np.full((1, 5000), largest, dtype), np.ones((1, 5000), np.uint8)
        table, pieces = object_sums(labels, (0, 0))
        sums = intensity_sums(image, pieces, 1)
        limbs = {name: trimmed(sums[name]) for name in ("total", "square", "weighted")}
        _, grouping = merge_objects([(table, (0, 0))])
        merged = merge_intensities([(limbs, sums["least"], sums["most"])], grouping)
        assert merged["mean"][0] == largest
        assert merged["std"][0] == 0
        assert merged["sum"][0] == 5000 * (float(largest) if dtype == "float32" else int(largest))
        np.testing.assert_array_equal(merged["weighted_centroid"], [[0, 2499.5]])


def test_blocks_that_are_too_large_for_64_bits_are_refused():
    from chunkrestore.kernels.object_sums import object_sums

    huge = np.broadcast_to(np.uint8(0), (2**12, 2**13, 2**19))
    with pytest.raises(ValueError, match="too large for sums in 64 bits; use a smaller `block_shape`"):
        object_sums(huge, (0, 0, 0))


# What a table tells


def assert_equals_regionprops(table, labels, image, spacing, axes, channel="channel_0"):
    image = image if image.dtype.kind in "iu" else image.astype(np.float64)  # it would add up in float32
    plain = regionprops(labels, image, spacing=None)
    scaled = regionprops(labels, image, spacing=spacing)
    ndim, rows = labels.ndim, len(plain)
    for name, expected in {
        "label": [r.label for r in plain],
        "n_voxels": [r.num_pixels for r in plain],
        **{f"bbox_{a}_start": [r.bbox[k] for r in plain] for k, a in enumerate(axes)},
        **{f"bbox_{a}_stop": [r.bbox[ndim + k] for r in plain] for k, a in enumerate(axes)},
        f"{channel}_min": [r.intensity_min for r in plain],
        f"{channel}_max": [r.intensity_max for r in plain],
        f"{channel}_sum": [int(r.image_intensity.astype(object).sum()) for r in plain],
    }.items():
        np.testing.assert_array_equal(table[name], expected, err_msg=name)
    moments = [np.sort(r.inertia_tensor_eigvals)[::-1] for r in scaled]
    if ndim == 3:
        spread = [np.sort(np.maximum(m.sum() / 2 - m, 0))[::-1] for m in moments]
        lengths = np.sqrt(20 * np.array(spread).reshape(rows, 3))
    else:
        lengths = 4 * np.sqrt(np.maximum(np.array(moments).reshape(rows, 2), 0))
    longest = lengths[:, :1].max(initial=0)
    for k in range(ndim):
        found = table[f"axis_length_{k + 1}_um"]
        # scikit-image rounds second moments about the origin: a flat object gets 1e-8 of its length for 0.
        np.testing.assert_allclose(found, lengths[:, k], rtol=1e-9, atol=1e-6 * longest)
        np.testing.assert_allclose(found**2, lengths[:, k] ** 2, rtol=1e-9, atol=1e-11 * longest**2)
    content = "volume_um3" if ndim == 3 else "area_um2"
    weightless = np.array([r.image_intensity.astype(object).sum() == 0 for r in plain], bool)
    for name, expected in {
        content: [r.area for r in scaled],
        **{f"centroid_{a}": [r.centroid[k] for r in plain] for k, a in enumerate(axes)},
        **{f"centroid_{a}_um": [r.centroid[k] for r in scaled] for k, a in enumerate(axes)},
        "equivalent_diameter_um": [r.equivalent_diameter_area for r in scaled],
        f"{channel}_mean": [r.intensity_mean for r in plain],
    }.items():
        np.testing.assert_allclose(table[name], expected, rtol=1e-9, atol=1e-9, err_msg=name)
    spread_of_values = [np.std(r.image_intensity[r.image].astype(np.longdouble)) for r in plain]
    np.testing.assert_allclose(
        table[f"{channel}_std"], np.array(spread_of_values, float), rtol=1e-9, atol=1e-9
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        weighted = np.array([r.centroid_weighted for r in plain]).reshape(rows, ndim)
    for k, a in enumerate(axes):
        found = table[f"{channel}_weighted_centroid_{a}"]
        np.testing.assert_allclose(found[~weightless], weighted[~weightless, k], rtol=1e-9, atol=1e-9)
        assert np.isnan(found[weightless]).all()
    if ndim == 2:
        expected = [r.eccentricity for r in scaled]
        np.testing.assert_allclose(table["eccentricity"], expected, rtol=1e-7, atol=1e-7)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.lists(st.integers(2, 11), min_size=2, max_size=3).map(tuple),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    gap=st.sampled_from([1, 7, 10**15]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_table_equals_regionprops_of_the_whole_array(tmp_path_factory, shape, dtype, gap, seed, data):
    folder = tmp_path_factory.mktemp("measured")
    block_shape = tuple(data.draw(st.integers(1, n)) for n in shape)
    labels, rng = blobs(shape, seed), np.random.default_rng(seed)
    image = np.round(rng.uniform(1, 200, shape)).astype(dtype)
    axes, spacing = "zyx"[-len(shape) :], (2.0, 0.5, 0.25)[-len(shape) :]
    path = stored(folder, labels * gap, image, axes, voxel_size=spacing)
    report = measure(path, "nuclei", block_shape=block_shape, **SERIAL)
    table = table_of(path)
    assert report.n_objects == len(table["label"]) == labels.max()
    np.testing.assert_array_equal(table["label"], gap * np.arange(1, labels.max() + 1))
    if labels.any():
        assert_equals_regionprops(table | {"label": table["label"] // gap}, labels, image, spacing, axes)


def test_axes_are_those_of_an_ellipsoid_that_was_drawn(tmp_path):
    grid = np.indices((40, 60, 80)) - np.array([20, 30, 40]).reshape(3, 1, 1, 1)
    size = np.array([0.75, 0.5, 0.4])
    along = np.array([[0.0, 0.6, 0.8], [0.0, -0.8, 0.6], [1.0, 0.0, 0.0]])
    semi = np.array([14.0, 9.0, 6.0])  # micrometres
    placed = np.einsum("ij,jzyx->izyx", along, grid * size.reshape(3, 1, 1, 1))
    labels = ((placed / semi.reshape(3, 1, 1, 1)) ** 2).sum(axis=0) <= 1
    path = stored(tmp_path, labels.astype(np.uint8), voxel_size=tuple(size))
    measure(path, "nuclei", **SERIAL)
    table = table_of(path)
    lengths = [table[f"axis_length_{k}_um"][0] for k in (1, 2, 3)]
    np.testing.assert_allclose(lengths, 2 * semi, rtol=0.02)
    for k in range(3):
        found = [table[f"axis_{k + 1}_{axis}"][0] for axis in "zyx"]
        assert abs(np.dot(found, along[k])) > 0.999
        assert found[int(np.argmax(np.abs(found)))] > 0
    assert table["elongation"][0] == lengths[0] / lengths[1]
    assert table["flatness"][0] == lengths[1] / lengths[2]


def test_directions_are_eigenvectors_of_the_coordinates_covariance():
    places = np.random.default_rng(3).integers(0, 40, (500, 3))
    covariance = np.cov(places.T, ddof=0)
    lengths, directions = principal_axes(covariance[np.triu_indices(3)][np.newaxis], (1.0, 1.0, 1.0))
    for length, direction in zip(lengths[0], directions[0], strict=True):
        np.testing.assert_allclose(covariance @ direction, length**2 / 20 * direction, atol=1e-10)
    assert (np.diff(lengths[0]) <= 0).all()


def test_a_voxel_a_line_and_a_plane_have_the_axes_that_they_have(tmp_path):
    labels = np.zeros((6, 9, 9), np.uint16)
    labels[0, 0, 0], labels[2, 3, 1:8], labels[4, 1:6, 2:7] = 1, 2, 3
    path = stored(tmp_path, labels)
    measure(path, "nuclei", **SERIAL)
    table = table_of(path)
    lengths = np.stack([table[f"axis_length_{k}"] for k in (1, 2, 3)], axis=-1)
    np.testing.assert_array_equal(lengths[0], [0, 0, 0])
    np.testing.assert_allclose(lengths[1], [np.sqrt(20 * 4), 0, 0])
    np.testing.assert_allclose(lengths[2], [np.sqrt(20 * 2), np.sqrt(20 * 2), 0])
    assert lengths[2, 2] == lengths[1, 1] == 0  # exactly
    np.testing.assert_array_equal(table["elongation"], [np.nan, np.inf, lengths[2, 0] / lengths[2, 1]])
    np.testing.assert_array_equal(table["flatness"], [np.nan, np.nan, np.inf])
    np.testing.assert_array_equal(table["touches_border"], [True, False, False])
    assert not any(name.endswith("_um") or "_um" in name for name in table)


# Grids, interruptions, clusters


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Objects that span many blocks, with intensities that no float adds up exactly."""
    folder = tmp_path_factory.mktemp("scene")
    shape = (12, 16, 20)
    labels = blobs(shape, 5, gap=3)
    labels[4:8] = np.where(np.indices((4, 16, 20)).sum(axis=0) % 9 < 4, 10**12, labels[4:8])
    image = np.stack([intensities(shape, "float32", seed) for seed in (6, 7)])
    return stored(folder, labels, image, channels=["a", "b"], voxel_size=(1, 0.5, 0.5))


def test_no_grid_and_no_order_changes_a_byte(scene, tmp_path, monkeypatch):
    written = []
    for k, block_shape in enumerate([(12, 16, 20), (5, 4, 9), (1, 16, 3), None]):
        if k == 1:  # several ranges of labels, and several steps in each of them
            monkeypatch.setattr(measuring, "_ROWS_PER_RANGE", 40)
            monkeypatch.setattr(measuring, "_ROWS_AT_ONCE", 7)
        output = tmp_path / f"{k}.parquet"
        measure(scene, "nuclei", block_shape=block_shape, output=output, work_folder=tmp_path / "w", **SERIAL)
        written.append(output.read_bytes())
    assert len(set(written)) == 1


@pytest.mark.slow
def test_a_cluster_changes_no_byte(scene, tmp_path):
    options = {"block_shape": (5, 4, 9), "work_folder": tmp_path / "w", "quiet": True}
    measure(scene, "nuclei", output=tmp_path / "serial", cluster="serial", **options)
    measure(scene, "nuclei", output=tmp_path / "local", cluster="local", n_workers=2, **options)
    assert (tmp_path / "serial").read_bytes() == (tmp_path / "local").read_bytes()


@pytest.fixture(scope="module")
def disk():
    return Disk()


@pytest.mark.parametrize(
    ("kind", "n_deaths"), [("parquet", 12), ("csv", 6), pytest.param("anndata", 25, marks=pytest.mark.slow)]
)
def test_a_job_killed_at_any_moment_goes_on_to_the_same_table(tmp_path, disk, kind, n_deaths):
    if kind == "anndata":
        pytest.importorskip("anndata", reason="needs the tables extra")
    labels = blobs((8, 8), 9)
    fresh = stored(tmp_path / "fresh", labels, labels.astype(np.float32), "yx")
    path = tmp_path / "here" / "in.zarr"
    work = Path(f"{path}.chunkrestore")
    options = {"block_shape": (8, 4), "format": kind, **SERIAL}

    def dies(n_changes):
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(fresh, path)
        with disk.dies_after(n_changes, path.parent):
            measure(path, "nuclei", **options)

    dies(10**6)
    expected, n_changes = tree(path), len(disk.changes)
    moments = {*range(0, n_changes, max(n_changes // n_deaths, 1)), *range(n_changes - 5, n_changes)}
    for moment in sorted(moments):
        with pytest.raises(Killed):
            dies(moment)
        bury(path)
        if not (work / "measure-nuclei" / "report.json").exists():
            assert measure(path, "nuclei", **options).n_objects == labels.max()
        assert tree(path) == expected


def test_an_unfinished_job_with_other_arguments_is_refused(scene, tmp_path, monkeypatch):
    options = {"output": tmp_path / "o", "work_folder": tmp_path / "w", **SERIAL}

    def breaks(*_, **__):
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "write_objects_to", breaks)
        with pytest.raises(BlockError, match="broken"):
            measure(scene, "nuclei", **options)
    with pytest.raises(ValueError, match="block_shape"):
        measure(scene, "nuclei", block_shape=(4, 4, 4), **options)
    assert measure(scene, "nuclei", **options).n_resumed
    assert (tmp_path / "o").exists()


@pytest.mark.parametrize("how", ["own", "paths", "named", "selected"])
def test_an_unfinished_job_is_resumed_without_its_script(scene, tmp_path, monkeypatch, how):
    cut = cr.open_image(scene).select(c="b")
    images = {"own": None, "paths": [str(scene)], "named": {"x": scene}, "selected": {"y": cut}}[how]
    options = {"images": images, "work_folder": tmp_path / "w", **SERIAL}
    measure(scene, "nuclei", output=tmp_path / "whole.csv", format="csv", **options)
    options |= {"output": tmp_path / "again.csv", "format": "csv"}

    def breaks(*_, **__):
        raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "write_objects_to", breaks)
        with pytest.raises(BlockError, match="broken"):
            measure(scene, "nuclei", **options)
    assert cr.resume(scene, work_folder=tmp_path / "w", **SERIAL).n_resumed
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40, unique=True), min_size=1
    ),
    most=st.integers(1, 60),
)
def test_ranges_of_labels_hold_every_label_once(blocks, most):
    told = []
    for ids in map(sorted, blocks):
        rows = np.linspace(0, len(ids) - 1, min(len(ids), 17)).round().astype(int)
        told.append({"n_rows": len(ids), "knots": [ids[row] for row in rows]})
    ranges = measuring.label_ranges(told, most)
    assert ranges[0][0] == min(map(min, blocks))
    assert ranges[-1][1] == max(map(max, blocks))
    for (_, last), (first, _) in itertools.pairwise(ranges):
        assert first == last + 1
    for first, last in ranges[:-1]:
        assert first <= last
        rows = sum(first <= i <= last for ids in blocks for i in ids)
        assert rows <= most + 40 * len(blocks)


def test_ranges_are_balanced_whatever_the_labels(tmp_path):
    # Every block has its labels close together, but for one that is far away.
    told = [{"n_rows": 1601, "knots": [*range(100 * k, 100 * k + 1600, 100), 2**62]} for k in range(50)]
    ranges = measuring.label_ranges(told, 8000)
    assert 9 <= len(ranges) <= 12


# Axes, images, names


def test_time_points_are_measured_each_with_its_own_image(tmp_path):
    labels = np.stack([blobs((9, 10), seed) for seed in (1, 2, 3)])
    image = np.random.default_rng(4).integers(0, 99, (3, 2, 9, 10)).astype(np.uint8)
    path = stored(tmp_path, labels, image, "tyx", channels=["DAPI (405 nm)", "0"])
    measure(path, "nuclei", block_shape=(4, 4), **SERIAL)
    table = table_of(path)
    for t in range(3):
        found = regionprops(labels[t], image[t, 1])
        rows = table["t"] == t
        np.testing.assert_array_equal(table["label"][rows], [r.label for r in found])
        np.testing.assert_array_equal(table["channel_0_max"][rows], [r.intensity_max for r in found])
        expected = [r.image_intensity.sum() for r in regionprops(labels[t], image[t, 0])]
        np.testing.assert_array_equal(table["DAPI_405_nm_sum"][rows], expected)
    assert (np.diff(table["t"]) >= 0).all()


def test_raw_and_restored_images_are_told_apart(tmp_path):
    labels = blobs((8, 8, 8), 1)
    path = stored(tmp_path, labels, labels.astype(np.uint16))
    restored = cr.write_image(labels.astype(np.float32) / 2, tmp_path / "b.ome.zarr", axes="zyx")
    measure(path, "nuclei", images=[path, restored.path], **SERIAL)
    table = table_of(path)
    np.testing.assert_array_equal(table["in_0_mean"], table["label"])
    np.testing.assert_array_equal(table["b_0_mean"], table["label"] / 2)
    measure(path, "nuclei", images={"raw": path, "new": restored.path}, **SERIAL)
    assert {"raw_0_mean", "new_0_mean"} <= table_of(path).keys()
    measure(path, "nuclei", images=(), **SERIAL)
    assert not any(name.endswith("_mean") for name in table_of(path))


def test_labels_without_an_image_are_measured(tmp_path):
    path = stored(tmp_path, blobs((8, 8, 8), 2))
    measure(path, "nuclei", **SERIAL)
    assert "n_voxels" in table_of(path)


def test_a_channel_is_chosen_by_name(tmp_path):
    image = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8)
    path = stored(tmp_path, blobs((8, 8), 2), image, "yx", channels=["a", "b"])
    measure(path, "nuclei", channels="b", **SERIAL)
    table = table_of(path)
    assert "b_mean" in table
    assert "a_mean" not in table


def test_labels_without_unit_take_the_voxel_size_of_their_image(tmp_path):
    labels = blobs((8, 8), 2)
    cr.write_image(labels.astype(np.uint8), tmp_path / "in.zarr", axes="yx", voxel_size=(0.5, 0.25))
    path = tmp_path / "in.zarr"
    cr.write_labels(labels, path, "nuclei", axes="yx", voxel_size=(0.5, 0.25))
    document = json.loads((path / "labels/nuclei/zarr.json").read_text())
    for axis in document["attributes"]["ome"]["multiscales"][0]["axes"]:
        axis.pop("unit", None)
    (path / "labels/nuclei/zarr.json").write_text(json.dumps(document))
    measure(path, "nuclei", **SERIAL)
    table = table_of(path)
    np.testing.assert_array_equal(table["area_um2"], table["n_voxels"] / 8)


def test_another_level_is_measured_into_another_table(tmp_path):
    labels = np.kron(blobs((300, 300), 2), np.ones((2, 2), np.int64))
    path = tmp_path / "in.zarr"
    cr.write_image(labels.astype(np.float32), path, axes="yx", levels=2, voxel_size=(1, 1))
    cr.write_labels(labels, path, "nuclei", axes="yx", voxel_size=(1, 1))
    with pytest.raises(ValueError, match="`level` 1 needs an `output`"):
        measure(path, "nuclei", level=1, **SERIAL)
    measure(path, "nuclei", level=1, output=tmp_path / "low.parquet", **SERIAL)
    table = parquet.read_table(tmp_path / "low.parquet")
    np.testing.assert_array_equal(table["n_voxels"], np.bincount(labels[::2, ::2].ravel())[1:])
    np.testing.assert_array_equal(table["area_um2"], 4 * np.asarray(table["n_voxels"]))
    np.testing.assert_allclose(table["channel_0_mean"], np.asarray(table["label"]))


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("DAPI (405 nm)", "DAPI_405_nm"),
        ("0", "channel_0"),
        ("488", "channel_488"),
        ("---", "channel"),
        ("β-tubulin", "β_tubulin"),
        ("../x\n;drop", "x_drop"),
        ("x" * 500, "x" * 64),
    ],
)
def test_names_of_channels_become_names_of_columns(title, name):
    assert column_name(title) == name


def test_labels_of_any_integer_type_are_measured(tmp_path):
    for dtype in ("uint8", "int16", "uint32", "int64", "uint64"):
        labels = (blobs((7, 7), 3) % 100).astype(dtype)
        if dtype.startswith("i"):
            labels = -labels
        path = stored(tmp_path / dtype, labels, axes="yx")
        measure(path, "nuclei", **SERIAL)
        ids, counts = np.unique(labels[labels != 0], return_counts=True)
        table = table_of(path)
        np.testing.assert_array_equal(table["label"], ids.astype(np.int64))
        np.testing.assert_array_equal(table["n_voxels"], counts)


def test_empty_labels_make_an_empty_table_with_all_columns(tmp_path):
    path = stored(tmp_path, np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.float32), "yx")
    for kind in ("parquet", "csv"):
        assert measure(path, "nuclei", format=kind, **SERIAL).n_objects == 0
    schema = parquet.read_schema(path / "labels/nuclei/objects.parquet")
    assert schema.field("channel_0_min").type == "float"
    assert schema.field("label").type == "int64"
    assert (path / "labels/nuclei/objects.csv").read_text().count("\n") == 1


# Predictions


def predicted(labels, rays):
    """The table that a job of StarDist writes: with probabilities, classes and shapes."""
    found = regionprops(labels)
    n = len(found)
    rng = np.random.default_rng(1)
    return {
        "ids": np.array([r.label for r in found]),
        "volume": np.array([r.num_pixels for r in found]),
        "sum": np.array([r.coords.sum(axis=0) for r in found]),
        "first": np.array([r.bbox[:2] for r in found]),
        "last": np.array([r.bbox[2:] for r in found]) - 1,
        "prob": rng.random(n).astype(np.float32),
        "points": rng.integers(0, 9, (n, 2)),
        "class_prob": rng.random((n, 3)).astype(np.float32),
        "dist": rng.random((n, len(rays))).astype(np.float32),
    }


@pytest.fixture
def segmented(tmp_path):
    labels = blobs((16, 16), 8)
    path = stored(tmp_path, labels, labels.astype(np.uint8), "yx", voxel_size=(1, 1))
    angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    rays = Rays(
        np.stack([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32), np.empty((0, 3), np.int32)
    )
    columns = ObjectColumns((16, 16), (1, 1), None, predicted=True, n_classes=2, rays=rays)
    part = predicted(labels, rays)
    target = path / "labels/nuclei/objects.parquet"
    write_objects(target, [((0, 0), part)], columns, provenance={"operators": [{"operator": "stardist"}]})
    return path, labels, part


def test_predictions_of_an_earlier_table_are_kept(segmented, monkeypatch):
    path, _, part = segmented
    before, target = table_of(path), path / "labels/nuclei/objects.parquet"
    monkeypatch.setattr(measuring, "_ROWS_PER_RANGE", 9)
    for _ in range(2):  # what was measured once can be measured again
        measure(path, "nuclei", block_shape=(5, 7), **SERIAL)
        after = table_of(path)
        for name, column in before.items():
            np.testing.assert_array_equal(after[name], column, err_msg=name)
        assert "channel_0_mean" in after
        shapes = read_shapes(target)
        np.testing.assert_array_equal(shapes.rows["dist"], part["dist"])
        np.testing.assert_array_equal(shapes.rows["points"], part["points"])
        provenance = read_description(target)["provenance"]
        assert provenance["operators"] == [{"operator": "stardist"}]
        assert provenance["measured"]["images"][0]["name"] == "channel_0"


@pytest.mark.parametrize("change", ["size", "gone between", "gone last", "new"])
def test_predictions_of_other_objects_are_refused(segmented, change):
    path, labels, _ = segmented
    edited = labels.copy()
    if change == "size":
        edited[tuple(np.argwhere(labels == 5)[0])] = 0
    elif change == "gone between":
        edited[labels == 5] = 0
    elif change == "gone last":
        edited[labels == labels.max()] = 0
    else:
        edited[tuple(np.argwhere(labels == 0)[0])] = labels.max() + 1
    kept = (path / "labels/nuclei/objects.parquet").read_bytes()
    cr.write_labels(edited, path, "nuclei", axes="yx", voxel_size=(1, 1), chunks=(4, 4), overwrite=True)
    (path / "labels/nuclei/objects.parquet").write_bytes(kept)
    with pytest.raises(BlockError, match=r"other objects than the labels show.*Remove the table"):
        measure(path, "nuclei", block_shape=(8, 8), **SERIAL)
    assert (path / "labels/nuclei/objects.parquet").read_bytes() == kept
    (path / "labels/nuclei/objects.parquet").unlink()
    assert measure(path, "nuclei", block_shape=(8, 8), **SERIAL).n_objects == len(np.unique(edited)) - 1


# Formats


def test_csv_says_the_same_as_parquet(segmented):
    csv = pytest.importorskip(
        "pyarrow.csv", reason="needs the tables extra"
    )  # rounds decimals to the nearest float
    path, *_ = segmented
    measure(path, "nuclei", format="csv", **SERIAL)
    measure(path, "nuclei", **SERIAL)
    columns = csv.read_csv(path / "labels/nuclei/objects.csv").to_pydict()
    table = {name: np.array(column) for name, column in columns.items()}
    expected = table_of(path)
    distances = expected.pop("distances")
    for name, column in expected.items():
        kept = np.float32 if name.startswith(("probability", "class_probability")) else column.dtype
        np.testing.assert_array_equal(table[name].astype(kept), column, err_msg=name)
    for k in range(8):
        np.testing.assert_array_equal(table[f"distances_{k}"].astype(np.float32), distances[:, k])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_anndata_says_the_same_and_where_its_labels_are(tmp_path, version):
    anndata = pytest.importorskip("anndata", reason="needs the tables extra")
    labels = blobs((6, 8, 8), 3, gap=5)
    path = tmp_path / "in.zarr"
    cr.write_image(labels.astype(np.uint16), path, axes="zyx", voxel_size=(2, 1, 0.5), version=version)
    cr.write_labels(labels, path, "nuclei", axes="zyx", voxel_size=(2, 1, 0.5))
    measure(path, "nuclei", **SERIAL)
    measure(path, "nuclei", format="anndata", **SERIAL)
    table, expected = anndata.read_zarr(path / "tables/nuclei"), table_of(path)
    assert table.uns["spatialdata_attrs"] == {
        "region": "nuclei",
        "region_key": "region",
        "instance_key": "label",
    }
    assert set(table.obs["region"]) == {"nuclei"}
    assert list(table.obs_names) == [str(i) for i in expected["label"]]
    assert set(expected) == {*table.var_names, *table.obs.columns} - {"region"}
    for name, column in expected.items():
        found = table.obs[name] if name in table.obs else table[:, name].X[:, 0]
        np.testing.assert_array_equal(found, column, err_msg=name)
    xyz = np.stack([expected[f"centroid_{axis}_um"] for axis in "xyz"], axis=-1)
    np.testing.assert_array_equal(table.obsm["spatial"], xyz)

    file, key = ("zarr.json", "attributes") if version == "0.5" else (".zattrs", None)
    attributes, listed = (json.loads((path / p / file).read_text()) for p in ("tables/nuclei", "tables"))
    attributes, listed = (d[key] if key else d for d in (attributes, listed))
    assert listed["tables"] == ["nuclei"]
    assert attributes["region"] == {"path": "../labels/nuclei"}
    assert attributes["encoding-type"] == "anndata"
    assert attributes["type"] == "feature_table"
    assert attributes["spatialdata-encoding-type"] == "ngff:regions_table"
    assert cr.open_image(path).labels == ("nuclei",)


def test_another_table_stays_listed(tmp_path):
    pytest.importorskip("anndata", reason="needs the tables extra")
    labels = blobs((8, 8), 3)
    path = stored(tmp_path, labels, axes="yx")
    cr.write_labels(labels, path, "cells", axes="yx")
    for name in ("nuclei", "cells", "nuclei"):
        measure(path, name, format="anndata", overwrite=True, **SERIAL)
    listed = json.loads((path / "tables/zarr.json").read_text())["attributes"]["tables"]
    assert sorted(listed) == ["cells", "nuclei"]
    with pytest.raises(FileExistsError, match="overwrite"):
        measure(path, "nuclei", format="anndata", **SERIAL)


def test_more_objects_than_anndata_holds_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("anndata", reason="needs the tables extra")
    path = stored(tmp_path, blobs((8, 8), 3), axes="yx")
    monkeypatch.setattr("chunkrestore.jobs.measure.MOST_ANNDATA_OBJECTS", 2)
    with pytest.raises(ValueError, match=r"the limit is 2\. Measure with format='parquet'"):
        measure(path, "nuclei", format="anndata", **SERIAL)
    assert not (path / "tables").exists()
    assert measure(path, "nuclei", overwrite=True, **SERIAL).n_objects > 2


# Object storage


@pytest.fixture
def bucket(monkeypatch):
    boto3 = pytest.importorskip("boto3", reason="needs the test extra")
    pytest.importorskip("obstore", reason="needs the s3 extra")
    server = pytest.importorskip("moto.server", reason="needs the test extra").ThreadedMotoServer(
        "127.0.0.1", 0
    )
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ACCESS_KEY_ID": servers.KEY,
        "AWS_SECRET_ACCESS_KEY": servers.SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="tables")
    yield "s3://tables"
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore", "ignore::DeprecationWarning:moto")
def test_labels_in_a_bucket_keep_their_predictions(segmented, bucket, tmp_path):
    from chunkrestore.ome_zarr import remote

    path, *_ = segmented
    for name, content in tree(path).items():
        remote.write(f"{bucket}/in.zarr/{name}", content)
    measure(path, "nuclei", **SERIAL)
    measure(f"{bucket}/in.zarr", "nuclei", work_folder=tmp_path / "w", **SERIAL)
    sent = tmp_path / "labels/nuclei/objects.parquet"
    sent.parent.mkdir(parents=True)
    sent.write_bytes(remote.read(f"{bucket}/in.zarr/labels/nuclei/objects.parquet"))
    ours, theirs = table_of(tmp_path), table_of(path)
    assert {"probability", "channel_0_mean"} < ours.keys() == theirs.keys()
    for name, column in theirs.items():
        np.testing.assert_array_equal(ours[name], column)
    with pytest.raises(ValueError, match="AnnData can be written to a path only"):
        measure(f"{bucket}/in.zarr", "nuclei", format="anndata", work_folder=tmp_path / "w", **SERIAL)


# What is refused


def refused(tmp_path, match, labels=None, image=None, error=ValueError, **options):
    labels = blobs((8, 8), 3) if labels is None else labels
    path = stored(tmp_path, labels, image, "yx")
    before = tree(path)
    with pytest.raises(error, match=match):
        measure(path, options.pop("name", "nuclei"), **SERIAL, **options)
    assert tree(path) == before
    return path


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path):
    image = np.zeros((8, 8), np.uint8)
    other = cr.write_image(np.zeros((8, 9), np.uint8), tmp_path / "other.zarr", axes="yx").path
    double = tmp_path / "double.zarr"
    import zarr

    zarr.create_array(double, shape=(8, 8), chunks=(8, 8), dtype="float64")
    refused(tmp_path / "1", r"has no such labels; it has 'nuclei'", name="cells")
    refused(tmp_path / "2", "must be the same", images=other)
    refused(tmp_path / "3", "channel 'x' does not exist", image=image, channels="x")
    refused(tmp_path / "4", "use one of parquet, csv, anndata", format="xlsx")
    refused(tmp_path / "5", "must have one length per axis", block_shape=(4, 4, 4))
    refused(tmp_path / "6", "level 3 does not exist", level=3, output=tmp_path / "o")
    same = cr.write_image(np.zeros((8, 8), np.uint8), tmp_path / "same.zarr", axes="yx").path
    refused(tmp_path / "7", "would be called a_b_0, a_b_0", images={"a b": same, "a_b": same})
    refused(tmp_path / "7b", "would be called same, same; give a mapping", images=[same, same])
    opened = cr.open_image(double, axes="yx")
    refused(tmp_path / "8", "is of float64; intensities can be uint8", images=opened)
    refused(tmp_path / "9", "its folder does not exist", error=FileNotFoundError, output=tmp_path / "no/o")


def test_labels_that_are_no_integers_are_refused(tmp_path):
    path = stored(tmp_path, blobs((8, 8), 3), axes="yx")
    array = path / "labels/nuclei/0/zarr.json"
    if not array.exists():
        array = next((path / "labels/nuclei").glob("*/zarr.json"))
    document = json.loads(array.read_text())
    document["data_type"], document["fill_value"] = "float64", 0.0
    array.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"float64, but must be integers"):
        measure(path, "nuclei", **SERIAL)


def test_nan_within_an_object_fails_its_block_and_beside_it_does_not(tmp_path):
    labels = np.zeros((8, 8), np.int32)
    labels[2:6, 2:6] = 7
    image = np.ones((8, 8), np.float32)
    image[0, 0], image[0, 1] = np.nan, np.inf
    path = stored(tmp_path, labels, image, "yx")
    measure(path, "nuclei", block_shape=(4, 4), **SERIAL)
    assert table_of(path)["channel_0_sum"] == [16]
    image[5, 3] = np.nan
    path = stored(tmp_path / "nan", labels, image, "yx")
    with pytest.raises(BlockError, match=r"intensity at \(1, 3\) of the block, within an object, is nan"):
        measure(path, "nuclei", block_shape=(4, 4), **SERIAL)
    assert not (path / "labels/nuclei/objects.parquet").exists()


def test_labels_beyond_int64_fail(tmp_path):
    labels = np.array([[0, 2**63]], np.uint64)
    path = stored(tmp_path, labels, axes="yx")
    with pytest.raises(BlockError, match="exceeds int64"):
        measure(path, "nuclei", **SERIAL)


def test_what_is_there_is_replaced_only_if_asked(tmp_path):
    path = stored(tmp_path, blobs((8, 8), 3), axes="yx")
    target = tmp_path / "table.csv"
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        measure(path, "nuclei", format="csv", output=target, **SERIAL)
    assert target.read_text() == "mine"
    measure(path, "nuclei", format="csv", output=target, overwrite=True, **SERIAL)
    assert target.read_text().startswith('"t","c","label"')
    own = path / "labels/nuclei/objects.parquet"
    parquet.write_table(pyarrow.table({"x": [1]}), own)
    with pytest.raises(ValueError, match="no table of objects"):
        measure(path, "nuclei", **SERIAL)


def test_nothing_is_written_or_read_behind_a_link(tmp_path):
    path = stored(tmp_path, blobs((8, 8), 3), axes="yx")
    elsewhere = tmp_path / "elsewhere.parquet"
    elsewhere.write_text("mine")
    (path / "labels/nuclei/objects.parquet").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="behind a link"):
        measure(path, "nuclei", **SERIAL)
    with pytest.raises(BlockError, match="out of its group"):
        measure(path, "nuclei", output=tmp_path / "o", **SERIAL)
    assert elsewhere.read_text() == "mine"


# Blocks


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 10**6), min_size=2, max_size=3),
    unit=st.lists(st.integers(1, 2000), min_size=3, max_size=3),
)
def test_default_blocks_are_whole_chunks_of_bounded_size(shape, unit):
    unit = tuple(min(u, n) for u, n in zip(unit, shape, strict=False))
    block = default_block(shape, unit)
    for b, u, n in zip(block, unit, shape, strict=True):
        assert b == n or b % u == 0
    assert np.prod(block, dtype=float) <= max(2**24, np.prod(unit, dtype=float))


def test_anndata_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "anndata", None)
    with pytest.raises(ImportError, match=r"chunkrestore\[tables\]"):
        table_formats.check_format("anndata")
