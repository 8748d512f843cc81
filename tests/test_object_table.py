"""The table of objects: equal to scikit-image, whole or absent, bounded in memory, readable by others."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import servers
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label, regionprops

from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.object_table import (
    TABLE_NAME,
    check_available,
    read_description,
    read_shapes,
    table_path,
    write_objects,
)
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.kernels.star_painting import paint
from chunkrestore.ome_zarr import open_image, write_image, write_labels

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the tables extra")

PROVENANCE = {"operators": [{"operator": "stardist", "model_digest": "0123abcd"}]}


def blobs(seed, shape):
    """Labels of all sizes, without gaps, some on the border."""
    rng = np.random.default_rng(seed)
    return label(rng.random(shape) < 0.35, connectivity=1)


def measured(labels):
    """What a job knows of the objects of `labels`, by sums over voxels."""
    where = np.nonzero(labels)
    ids, rows = np.unique(labels[where], return_inverse=True)
    places = np.stack(where, axis=-1)
    part = {"ids": ids.astype(np.int64), "volume": np.bincount(rows, minlength=len(ids))}
    for name, function, start in (("sum", np.add, 0), ("first", np.minimum, 2**40), ("last", np.maximum, 0)):
        part[name] = np.full((len(ids), labels.ndim), start, np.int64)
        function.at(part[name], rows, places)
    return part


def rows_of(part, rows):
    return {name: array[rows] for name, array in part.items()}


def written(path, parts, columns):
    """Write a table and return what Parquet's own reader gives: arrays by name."""
    n_objects = write_objects(path, parts, columns, provenance=PROVENANCE)
    table = parquet.read_table(path)
    assert len(table) == n_objects
    return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}


def numbered(n, *, first=1, ndim=3, seed=0):
    """Objects of made-up measurements."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 30, (n, ndim))
    volume = rng.integers(1, 99, n)
    ids = np.arange(first, first + n)
    return {
        "ids": ids,
        "volume": volume,
        "sum": corner * volume[:, np.newaxis],
        "first": corner,
        "last": corner + 3,
    }


def rays_of(n_dim, n_rays):
    if n_dim == 3:
        pytest.importorskip("stardist", reason="needs the deep-learning extra")
    json = {"name": "Rays_GoldenSpiral", "kwargs": {"n": n_rays, "anisotropy": (2.0, 1.0, 1.0)}}
    return Rays.of(SimpleNamespace(n_dim=n_dim, n_rays=n_rays, rays_json=json))


def scene(shape, rays, n_objects, seed=4):
    """Overlapping shapes, some of them hidden by others, numbered by position."""
    rng = np.random.default_rng(seed)
    points = np.unique(rng.integers(0, shape, (n_objects, len(shape))), axis=0)
    size = rng.uniform(2, 6, (len(points), 1))
    return {
        "prob": np.round(rng.uniform(0.4, 1, len(points)) * 32).astype(np.float32) / 32,  # many are equal
        "dist": (size * rng.uniform(0.8, 1.2, (len(points), len(rays)))).astype(np.float32),
        "points": points,
    }


def painted(shape, rows, rays, lattice=None):
    return paint(tuple(slice(0, n) for n in shape), rows, rays, lattice)


# What it tells


@pytest.mark.parametrize(("shape", "voxel_size"), [((9, 20, 17), (2.0, 0.5, 0.25)), ((40, 33), (0.5, 0.25))])
def test_table_equals_regionprops_of_the_labels(tmp_path, shape, voxel_size):
    labels = blobs(1, shape)
    translation = (1000.0, -7.5, 0.125)[: len(shape)]
    columns = ObjectColumns(shape, voxel_size, translation)
    table = written(tmp_path / TABLE_NAME, [((0, 0), measured(labels))], columns)

    in_voxels = regionprops(labels)
    in_micrometres = regionprops(labels, spacing=voxel_size, offset=translation)
    assert len(in_voxels) > 100
    axes = columns.axes
    np.testing.assert_array_equal(table["label"], [r.label for r in in_voxels])
    np.testing.assert_array_equal(table["n_voxels"], [r.num_pixels for r in in_voxels])
    name = "volume_um3" if len(shape) == 3 else "area_um2"
    np.testing.assert_allclose(table[name], [r.area for r in in_micrometres], rtol=1e-12)
    for k, axis in enumerate(axes):
        np.testing.assert_allclose(
            table[f"centroid_{axis}"], [r.centroid[k] for r in in_voxels], rtol=1e-12, atol=1e-12
        )
        np.testing.assert_allclose(
            table[f"centroid_{axis}_um"], [r.centroid[k] for r in in_micrometres], rtol=1e-12
        )
        np.testing.assert_array_equal(table[f"bbox_{axis}_start"], [r.bbox[k] for r in in_voxels])
        np.testing.assert_array_equal(table[f"bbox_{axis}_stop"], [r.bbox[k + len(shape)] for r in in_voxels])

    inner = np.zeros(shape, bool)
    inner[(slice(1, -1),) * len(shape)] = True
    on_border = np.isin(table["label"], labels[~inner])
    assert 0 < on_border.sum() < len(on_border)
    np.testing.assert_array_equal(table["touches_border"], on_border)


def test_an_image_without_a_voxel_size_has_no_columns_in_micrometres(tmp_path):
    table = written(tmp_path / TABLE_NAME, [((0, 0), numbered(3))], ObjectColumns((40, 40, 40)))
    assert not [name for name in table if "um" in name.split("_")[-1]]
    assert "unit" not in read_description(tmp_path / TABLE_NAME)


def test_time_points_and_channels_are_rows_of_one_table_with_ids_of_their_own(tmp_path):
    parts = [((t, c), numbered(2 + t + c, ndim=2)) for t in range(2) for c in range(2)]
    table = written(tmp_path / TABLE_NAME, parts, ObjectColumns((40, 40)))
    assert list(zip(table["t"], table["c"], table["label"], strict=True)) == [
        (t, c, i + 1) for t in range(2) for c in range(2) for i in range(2 + t + c)
    ]


def test_the_most_probable_class_counts_and_0_is_background(tmp_path):
    chances = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], np.float32)
    predicted = {"prob": np.float32([1, 0.5, 0.75]), "points": np.ones((3, 2), int), "class_prob": chances}
    columns = ObjectColumns((40, 40), predicted=True, n_classes=2)
    table = written(tmp_path / TABLE_NAME, [((0, 0), numbered(3, ndim=2) | predicted)], columns)
    assert table["class_id"].tolist() == [1, 0, 2]
    stored = np.stack([table[f"class_probability_{k}"] for k in range(3)], axis=-1)
    np.testing.assert_array_equal(stored.astype(np.float32), chances)


def test_points_of_a_scaled_lattice_are_given_in_voxels_of_the_labels(tmp_path):
    predicted = {"prob": np.ones(2, np.float32), "points": np.array([[3, 4], [5, 6]])}
    columns = ObjectColumns((40, 40), predicted=True, lattice=(0.5, 1.25))
    table = written(tmp_path / TABLE_NAME, [((0, 0), numbered(2, ndim=2) | predicted)], columns)
    assert table["point_y"].tolist() == [1.5, 2.5]
    assert table["point_x"].tolist() == [5.0, 7.5]


def test_ids_beyond_32_bits_are_kept(tmp_path):
    parts = [((0, 0), numbered(5, first=2**40))]
    table = written(tmp_path / TABLE_NAME, parts, ObjectColumns((40, 40, 40)))
    assert table["label"].tolist() == list(range(2**40, 2**40 + 5))


def test_zero_objects_are_a_table_with_the_same_columns(tmp_path):
    rays = Rays(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]], np.int32))
    columns = ObjectColumns((9, 9, 9), (1.0, 1.0, 1.0), predicted=True, n_classes=1, rays=rays)
    some = numbered(2) | {
        "prob": np.ones(2, np.float32),
        "points": np.ones((2, 3), int),
        "class_prob": np.ones((2, 2), np.float32),
        "dist": np.ones((2, 3), np.float32),
    }
    assert write_objects(tmp_path / "some", [((0, 0), some)], columns, provenance={}) == 2
    for name, parts in (("none", []), ("nothing", [((0, 0), columns.empty())])):
        assert write_objects(tmp_path / name, parts, columns, provenance={}) == 0
        assert parquet.read_schema(tmp_path / name).equals(
            parquet.read_schema(tmp_path / "some"), check_metadata=True
        )
        shapes = read_shapes(tmp_path / name)
        assert len(shapes.rows["ids"]) == 0
        assert shapes.vertices.shape == (0, 3, 3)


def test_description_says_what_the_numbers_mean_and_where_they_come_from(tmp_path):
    columns = ObjectColumns((5, 60, 70), (2, np.float64(0.5), 0.25), (0, 1, 2))
    write_objects(tmp_path / TABLE_NAME, [], columns, provenance=PROVENANCE)
    expected = {
        "format": 1,
        "axes": "zyx",
        "shape": [5, 60, 70],
        "voxel_size": [2.0, 0.5, 0.25],
        "translation": [0.0, 1.0, 2.0],
        "unit": "micrometer",
        "provenance": PROVENANCE,
    }
    assert read_description(tmp_path / TABLE_NAME) == expected
    # As any reader of Parquet files finds it.
    assert json.loads(parquet.read_metadata(tmp_path / TABLE_NAME).metadata[b"chunkrestore"]) == expected


def test_other_files_are_no_tables(tmp_path):
    import pyarrow

    parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no table of objects"):
        read_description(tmp_path / "other.parquet")
    write_objects(tmp_path / TABLE_NAME, [], ObjectColumns((9, 9)), provenance={})
    with pytest.raises(ValueError, match="holds no shapes"):
        read_shapes(tmp_path / TABLE_NAME)


# Shapes


@pytest.mark.parametrize(
    ("shape", "n_rays", "lattice"),
    [
        ((14, 30, 26), 33, None),
        ((14, 30, 26), 33, (1.0, 1 / 0.7, 1 / 1.3)),
        ((60, 50), 32, None),
        ((60, 50), 32, (1 / 0.7, 1 / 1.3)),
    ],
)
def test_shapes_of_the_table_paint_the_same_labels_without_the_model(tmp_path, shape, n_rays, lattice):
    rays = rays_of(len(shape), n_rays)
    seen = np.array(shape) // (lattice or 1)
    rows = scene(seen.astype(int), rays, 60)
    everything = rows | {"ids": np.arange(1, len(rows["prob"]) + 1)}
    shown = np.unique(painted(shape, everything, rays, lattice))[1:] - 1
    assert 20 < len(shown) < len(rows["prob"])
    visible = rows_of(rows, shown) | {"ids": np.arange(1, len(shown) + 1)}
    labels = painted(shape, visible, rays, lattice)

    columns = ObjectColumns(shape, predicted=True, rays=rays, lattice=lattice)
    part = visible | measured(labels)
    cuts = (slice(0, 7), slice(7, 8), slice(8, None))
    write_objects(tmp_path / "o", [((0, 1), rows_of(part, cut)) for cut in cuts], columns, provenance={})
    shapes = read_shapes(tmp_path / "o", c=1)

    np.testing.assert_array_equal(shapes.rays.vertices, rays.vertices)
    assert shapes.rays.vertices.dtype == rays.vertices.dtype
    np.testing.assert_array_equal(shapes.rays.faces, rays.faces)
    assert {name: array.dtype for name, array in shapes.rows.items()} == {
        name: visible[name].dtype for name in shapes.rows
    }
    np.testing.assert_array_equal(painted(shape, shapes.rows, shapes.rays, shapes.lattice), labels)
    if lattice is None:
        np.testing.assert_array_equal(shapes.vertices, rays.outlines(visible["dist"], visible["points"]))
    else:
        expected = (
            visible["points"][:, np.newaxis] + visible["dist"][..., np.newaxis] * rays.vertices
        ) * lattice
        np.testing.assert_allclose(shapes.vertices, expected, rtol=1e-6, atol=1e-5)
        assert shapes.vertices.dtype == np.float32


def test_shapes_of_some_labels_of_one_plane_are_read_alone(tmp_path):
    rays = rays_of(2, 8)
    columns = ObjectColumns((40, 40), predicted=True, rays=rays)
    parts = []
    for t in range(3):
        made = {"prob": np.full(6, 0.5, np.float32), "points": np.full((6, 2), t)}
        made["dist"] = np.arange(48, dtype=np.float32).reshape(6, 8) + 100 * t
        parts.append(((t, 0), numbered(6, ndim=2) | made))
    # Folders that look like the partitions of a data set change nothing.
    folder = tmp_path / "t=7"
    folder.mkdir()
    write_objects(folder / TABLE_NAME, parts, columns, provenance={})
    shapes = read_shapes(folder / TABLE_NAME, t=1, labels=range(3, 5))
    assert shapes.rows["ids"].tolist() == [3, 4]
    np.testing.assert_array_equal(shapes.rows["dist"], parts[1][1]["dist"][2:4])
    np.testing.assert_array_equal(shapes.rows["points"], [[1, 1], [1, 1]])
    assert len(read_shapes(folder / TABLE_NAME, t=5).rows["ids"]) == 0


# How it is written


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 50), max_size=6))
def test_a_table_is_the_same_file_whatever_the_parts(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("parts")
    whole = numbered(50)
    edges = [0, *sorted(cuts), 50]
    parts = [((0, 0), rows_of(whole, slice(a, b))) for a, b in itertools.pairwise(edges)]
    columns = ObjectColumns((40, 40, 40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chunkrestore.jobs.object_table._ROWS", 16)
        write_objects(folder / "parts", parts, columns, provenance={})
        write_objects(folder / "whole", [((0, 0), whole)], columns, provenance={})
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()
    metadata = parquet.read_metadata(folder / "parts")
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [16, 16, 16, 2]
    assert {groups[0].column(k).compression for k in range(metadata.num_columns)} == {"ZSTD"}


def test_memory_does_not_grow_with_a_million_objects_and_pandas_is_not_needed(tmp_path):
    script = """
import sys
from pathlib import Path

class NoPandas:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pandas":
            raise ModuleNotFoundError("pandas is not to be imported", name=name)

sys.meta_path.insert(0, NoPandas())
import numpy as np
from chunkrestore.jobs.object_columns import ObjectColumns
from chunkrestore.jobs.object_table import write_objects

def peak_mib():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

def parts(n, step=10_000):
    for start in range(0, n, step):
        numbers = np.arange(start, start + step)
        corner = np.stack([numbers] * 3, axis=-1)
        yield (0, 0), {"ids": numbers + 1, "volume": np.full(step, 7), "sum": 7 * corner + 3, "first": corner,
                       "last": corner + 2, "prob": numbers.astype(np.float32), "points": corner + 1}

columns = ObjectColumns((2**20,) * 3, (2.0, 0.5, 0.5), predicted=True)
write_objects(sys.argv[1], parts(2 * 10**5), columns, provenance={})
before = peak_mib()
assert write_objects(sys.argv[1], parts(10**6), columns, provenance={}) == 10**6
print(peak_mib() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / TABLE_NAME)], capture_output=True, text=True, check=True
    )
    metadata = parquet.read_metadata(tmp_path / TABLE_NAME)
    assert metadata.num_rows == 10**6
    # 800 000 rows more, of 20 columns and 150 bytes, would be 114 MiB.
    assert float(done.stdout) < 20


def wrong(**changes):
    return [((0, 0), numbered(4) | changes)]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (wrong(ids=np.array([1, 2, 4, 5])), r"ids 1 to 5 .* with gaps"),
        ([((0, 0), numbered(2)), ((0, 0), numbered(2, first=4))], r"ids 4 to 5 .* with gaps"),
        ([((0, 0), numbered(2)), ((0, 0), numbered(2))], "out of order"),
        ([((1, 0), numbered(2)), ((0, 3), numbered(2))], "out of order"),
        (wrong(volume=np.array([1, 0, 2, 2])), "object 2 without voxels"),
        (wrong(volume=np.ones(4)), r"'volume' of float64 \(4,\); needed is int64 \(4,\)"),
        (wrong(sum=np.ones((4, 2), int)), r"'sum' of int64 \(4, 2\); needed is int64 \(4, 3\)"),
        (wrong(first=np.ones((3, 3), int)), "'first'"),
        ([((0, 0), {"ids": np.arange(1, 3)})], "lack 'volume'"),
        ([((0, 0), {})], "lack 'ids'"),
    ],
)
def test_wrong_parts_are_refused_and_leave_nothing_behind(tmp_path, parts, message):
    target = tmp_path / TABLE_NAME
    columns = ObjectColumns((40, 40, 40))
    write_objects(target, [((0, 0), numbered(3))], columns, provenance={})
    before = target.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_objects(target, [*parts], columns, provenance={})
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [TABLE_NAME]


def test_a_table_appears_whole_or_not_at_all(tmp_path):
    seen = []

    def interrupted():
        yield (0, 0), numbered(3)
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_objects(tmp_path / TABLE_NAME, interrupted(), ObjectColumns((40, 40, 40)), provenance={})
    assert len(seen) == 1
    assert seen[0].endswith(".partial")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4,)}, "`shape`"),
        ({"shape": (4, 4), "voxel_size": (1.0,)}, "`voxel_size`"),
        ({"shape": (4, 4), "translation": (1.0, 1.0, 1.0)}, "`translation`"),
        ({"shape": (4, 4), "lattice": (1.0,), "predicted": True}, "`lattice`"),
        ({"shape": (4, 4), "n_classes": 2}, "set `predicted`"),
        ({"shape": (4, 4), "predicted": True, "rays": Rays(np.eye(3), np.empty((0, 3), int))}, "`rays`"),
    ],
)
def test_columns_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObjectColumns(**options)


def test_a_missing_pyarrow_is_told_with_the_line_that_installs_it(monkeypatch):
    check_available()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "chunkrestore\[tables\]"'):
        check_available()


# Where it lies


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_table_beside_labels_disturbs_no_reader_and_goes_with_them(tmp_path, version):
    import ome_zarr_models
    import yaozarrs
    import zarr

    store = tmp_path / "out.zarr"
    labels = blobs(2, (8, 12, 10)).astype(np.int32)
    write_image(np.zeros(labels.shape, np.uint16), store, axes="zyx", voxel_size=(1, 1, 1), version=version)
    group = write_labels(labels, store, "nuclei").path
    columns = ObjectColumns(labels.shape, (1.0, 1.0, 1.0))
    write_objects(table_path(group), [((0, 0), measured(labels))], columns, provenance={})

    np.testing.assert_array_equal(open_image(store).label("nuclei").data.compute(), labels)
    yaozarrs.validate_zarr_store(str(store))
    yaozarrs.validate_zarr_store(group)
    for path in ("", "labels", "labels/nuclei"):
        ome_zarr_models.open_ome_zarr(zarr.open_group(store, path=path, mode="r"))
    # zarr-python says so where somebody lists what is in the labels' group, and goes on.
    with pytest.warns(UserWarning, match=f"Object at {TABLE_NAME} is not recognized"):
        assert list(zarr.open_group(group, mode="r").array_keys()) == ["0"]

    write_labels(labels, store, "nuclei", overwrite=True)
    assert not (store / "labels" / "nuclei" / TABLE_NAME).exists()


@pytest.fixture
def bucket(monkeypatch):
    """A bucket of an S3 server on loopback, and a client of its own."""
    pytest.importorskip("obstore", reason="needs the s3 extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import boto3
        from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="tables")
    yield client
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore", "ignore::DeprecationWarning:moto")
def test_a_table_at_a_url_is_sent_whole_in_parts(tmp_path, bucket):
    rays = rays_of(2, 64)
    columns = ObjectColumns((40, 40), predicted=True, rays=rays)
    rng = np.random.default_rng(8)
    n = 30_000
    noise = rng.random((n, 64), np.float32)  # compresses badly: more than one part of 5 MiB
    made = {"prob": noise[:, 0], "points": np.ones((n, 2), int), "dist": noise}
    parts = [((0, 0), numbered(n, ndim=2) | made)]
    url = table_path("s3://tables/out.zarr/labels/nuclei")
    with pytest.raises(ValueError, match="`scratch` is needed"):
        write_objects(url, parts, columns, provenance={})
    assert write_objects(url, parts, columns, provenance={}, scratch=tmp_path) == n
    assert list(tmp_path.iterdir()) == []

    write_objects(tmp_path / "local", parts, columns, provenance={})
    found = bucket.get_object(Bucket="tables", Key=f"out.zarr/labels/nuclei/{TABLE_NAME}")
    assert found["Body"].read() == (tmp_path / "local").read_bytes()
    assert found["ETag"].strip('"').endswith(tuple(f"-{k}" for k in range(2, 9)))  # sent in parts
    with pytest.raises(ValueError, match="web servers are read only"):
        write_objects(f"https://x.org/{TABLE_NAME}", parts, columns, provenance={}, scratch=tmp_path)
