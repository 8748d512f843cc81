"""Store-to-store jobs: the numbers of eager and lazy calls, with the metadata of the input."""

import json
import shutil
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from observing import tree
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.jobs.ledger import read_journal
from chunkrestore.jobs.runner import BlockError
from chunkrestore.lazy import apply_image, apply_labels
from chunkrestore.psf import gaussian
from chunkrestore.statistics import as_percentiles, of_array

PSF = gaussian((1.2, 1.0, 0.8), truncate=2)
RADIUS = 2
# Half of the longest axis of PSF, rounded down.

SHAPE = (20, 36, 28)
BLOCK = (8, 16, 12)
COARSE = (10, 18, 28)
# Fewer blocks, where there are several volumes.
NETWORK_BLOCK = (16, 32, 32)
SERIAL = {"cluster": "serial", "quiet": True}
KEPT = [
    *("events.jsonl", "journal.jsonl", "manifest.json", "operators.json", "operators.npz", "options.json"),
    "report.json",
]
"""What a finished job leaves in its folder."""


CARE = "care3d-demo"
STARDIST = "stardist3d-demo"
KERAS = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads"):
        yield


def blobs(shape=SHAPE, dtype=np.uint16, seed=4):
    """Bright blobs on a background, with noise."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), [0] * (len(shape) - 3) + [1.5] * 3)
    image = 20 + 80 * (smooth > smooth.std()) + 20 * smooth / smooth.std() + rng.normal(0, 3, shape)
    return np.clip(image, 0, 255).astype(dtype)


@pytest.fixture
def store(tmp_path):
    """Write an image; returns it open, with its voxels."""

    def write(shape=SHAPE, axes="zyx", dtype=np.uint16, **options):
        data = blobs(shape, dtype)
        path = tmp_path / "in.ome.zarr"
        return cr.write_image(data, path, axes=axes, voxel_size=(2, 0.5, 0.5), **options), data

    return write


def lucy(**options):
    return cr.RichardsonLucy(PSF, iterations=3, **options)


def exact_lucy():
    """Deconvolution whose halo is deep enough for no seam at all."""
    return lucy(depth=2 * 3 * RADIUS)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_richardson_lucy_eager_lazy_and_job_agree(store, tmp_path, dtype):
    image, data = store(dtype=np.dtype(dtype))
    report = cr.run(exact_lucy(), image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    job = cr.open_image(tmp_path / "out.zarr").data.compute()
    assert job.dtype == np.float32
    lazy = apply_image(exact_lucy(), da.from_array(data, chunks=BLOCK), "zyx").compute()
    np.testing.assert_array_equal(job, lazy)
    eager = exact_lucy()(data)
    # Rounding of float32 in transforms of different lengths, through three iterations.
    np.testing.assert_allclose(job, eager, atol=1e-5 * float(np.ptp(eager)))
    assert report.seam_rms < 1e-5


def test_the_measured_seam_is_that_of_the_untiled_result(store, tmp_path):
    image, data = store()
    report = cr.run(lucy(depth=2), image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    job = cr.open_image(tmp_path / "out.zarr").data.compute()
    assert [seam.axis for seam in sorted(report.seams, key=lambda seam: seam.axis)] == [0, 1, 2]
    low, high = of_array(data, (0.1, 99.9)).values()
    for seam in report.seams:
        region = tuple(slice(max(0, x - 8), min(n, x + 8)) for x, n in zip(seam.position, SHAPE, strict=True))
        error = (job - exact_lucy()(data))[region] / (high - low)
        # The reference of the probe has twice the depth: 4, at which a little of the error is left.
        assert seam.rms == pytest.approx(float(np.sqrt(np.mean(error**2))), rel=0.2)
    shallow = report.seam_rms
    deeper = cr.run(lucy(depth=5), image, tmp_path / "deeper.zarr", block_shape=BLOCK, **SERIAL)
    assert deeper.seam_rms < shallow / 3


@pytest.mark.parametrize("value", [None, 90.0])
def test_threshold_eager_lazy_and_job_give_identical_labels(store, tmp_path, value):
    image, data = store(dtype=np.float32)
    report = cr.run(cr.Threshold(value), image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    labels = cr.open_image(tmp_path / "out.zarr/labels/labels")
    expected = cr.Threshold(value)(data)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels.data.compute(), expected)
    lazy = apply_labels(cr.Threshold(value), da.from_array(data, chunks=BLOCK), "zyx")
    np.testing.assert_array_equal(lazy.compute(), expected)
    assert report.n_objects == expected.max() > 10


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_axes_scale_channels_and_pyramid_are_carried_over(store, tmp_path, version):
    shape = (2, 2, 10, 70, 20)
    image, _ = store(shape, "tczyx", channels=["DAPI", "GFP"])
    options = {"block_shape": (10, 35, 20), "version": version, **SERIAL}
    cr.run([lucy(), cr.Threshold(60.0)], image, tmp_path / "out.zarr", **options)
    out = cr.open_image(tmp_path / "out.zarr")
    assert (out.version, out.axes, out.shape, out.dtype) == (version, "tczyx", shape, np.float32)
    assert (out.voxel_size, out.channels, out.labels) == (image.voxel_size, ("DAPI", "GFP"), ("labels",))
    assert len(out.levels) == 2
    labels = out.label("labels")
    assert (labels.version, labels.axes, labels.voxel_size) == (version, "tczyx", image.voxel_size)
    assert [level.shape for level in labels.levels] == [level.shape for level in out.levels]
    assert [level.voxel_size for level in labels.levels] == [level.voxel_size for level in out.levels]


SELECTIONS = [
    ({"channel": "GFP"}, lambda x: x[:, 1:2]),
    ({"channel": ["GFP", 0], "timepoint": 1}, lambda x: x[1:2, [1, 0]]),
    ({"timepoint": [2, 0]}, lambda x: x[[2, 0]]),
    ({"region": ((2, 18), (5, 36), (0, 21)), "channel": 0}, lambda x: x[:, :1, 2:18, 5:36, 0:21]),
]


@pytest.mark.parametrize(("selection", "cut"), SELECTIONS)
def test_a_selection_is_processed_like_an_image_of_its_own(store, tmp_path, selection, cut):
    image, data = store((3, 2, *SHAPE), "tczyx", channels=["DAPI", "GFP"])
    expected = cut(data)
    options = {"block_shape": COARSE, **SERIAL}
    report = cr.run([exact_lucy(), cr.Threshold()], image, tmp_path / "out.zarr", **selection, **options)
    out = cr.open_image(tmp_path / "out.zarr")
    assert out.shape == expected.shape
    lazy = apply_image(exact_lucy(), da.from_array(expected, chunks=(1, 1, *COARSE)), "tczyx")
    np.testing.assert_array_equal(out.data.compute(), lazy.compute())
    labels = out.label("labels")
    by_plane = lazy.compute().reshape(-1, *expected.shape[2:])
    wanted = np.stack([cr.Threshold()(plane) for plane in by_plane]).reshape(expected.shape)
    np.testing.assert_array_equal(labels.data.compute().reshape(expected.shape), wanted)
    assert labels.axes == ("tczyx" if expected.shape[1] > 1 else "tzyx")
    assert report.n_objects == sum(plane.max() for plane in wanted.reshape(-1, *expected.shape[2:]))
    start = [r[0] for r in selection["region"]] if "region" in selection else [0, 0, 0]
    assert out.translation == tuple(s * v for s, v in zip(start, image.voxel_size, strict=True))


def test_a_level_is_processed_at_its_own_resolution(store, tmp_path):
    image, _ = store((70, 72, 68))
    assert len(image.levels) > 1
    coarse = image.level(1).compute()
    cr.run(cr.Threshold(), image, tmp_path / "out.zarr", level=1, block_shape=BLOCK, **SERIAL)
    labels = cr.open_image(tmp_path / "out.zarr/labels/labels")
    np.testing.assert_array_equal(labels.data.compute(), cr.Threshold()(coarse))
    assert labels.voxel_size == image.levels[1].voxel_size


@pytest.mark.parametrize("selection", [{"region": ((2, 18), (5, 36), (0, 21))}, {"level": 1}])
def test_labels_of_a_part_lie_where_the_part_lies_in_the_image(store, selection):
    image, _ = store((70, 72, 68))
    cr.run(cr.Threshold(), image, image.path, block_shape=(35, 36, 34), **selection, **SERIAL)
    labels = cr.open_image(image.path).label("labels")
    source = image.levels[selection.get("level", 0)]
    start = [r[0] for r in selection.get("region", [(0, 0)] * 3)]
    assert labels.voxel_size == source.voxel_size
    assert labels.translation == tuple(
        t + s * v for t, s, v in zip(source.translation, start, source.voxel_size, strict=True)
    )


def test_labels_are_added_to_the_input_and_the_image_is_untouched(store, tmp_path):
    image, data = store((2, *SHAPE), "czyx", channels=["DAPI", "GFP"])
    before = tree(tmp_path / "in.ome.zarr")
    options = {"channel": "GFP", "block_shape": COARSE, **SERIAL}
    cr.run(cr.Threshold(), image.path, image.path, label_name="nuclei", **options)
    after = tree(tmp_path / "in.ome.zarr")
    assert {name: after[name] for name in before} == before
    labels = cr.open_image(image.path).label("nuclei")
    assert labels.axes == "zyx"
    np.testing.assert_array_equal(labels.data.compute(), cr.Threshold()(data[1]))
    cr.run(cr.Threshold(100.0), image.path, image.path, label_name="bright", **options)
    assert cr.open_image(image.path).labels == ("nuclei", "bright")


def test_several_labels_share_a_store_without_an_image(store, tmp_path):
    image, data = store()
    options = {"block_shape": COARSE, **SERIAL}
    for name in ("a", "b"):
        cr.run(cr.Threshold(), image, tmp_path / "out.zarr", label_name=name, **options)
    cr.run(cr.Threshold(99.0), image, tmp_path / "out.zarr", label_name="a", overwrite=True, **options)
    for name, operator in {"a": cr.Threshold(99.0), "b": cr.Threshold()}.items():
        labels = cr.open_image(tmp_path / "out.zarr/labels" / name)
        np.testing.assert_array_equal(labels.data.compute(), operator(data))


def test_two_dimensional_images_are_processed(tmp_path):
    data = blobs((1, 60, 70))[0]
    image = cr.write_image(data, tmp_path / "in.zarr", axes="yx", voxel_size=(0.5, 0.5))
    operator = cr.RichardsonLucy(PSF[2], iterations=3, depth=12)
    cr.run([operator, cr.Threshold()], image, tmp_path / "out.zarr", block_shape=(32, 32), **SERIAL)
    out = cr.open_image(tmp_path / "out.zarr")
    np.testing.assert_allclose(out.data.compute(), operator(data), atol=1e-5 * float(np.ptp(operator(data))))
    np.testing.assert_array_equal(out.label("labels").data.compute(), cr.Threshold()(out.data.compute()))


def test_chained_operators_that_need_nothing_share_a_pass(store, tmp_path):
    image, data = store()
    first = lucy(depth=6).resolve({"mean": 80.0})
    second = cr.RichardsonLucy(PSF, iterations=1, start=80.0, depth=4)
    plan = cr.plan([first, second], image, block_shape=(20, 16, 12))
    assert [len(work.operators) for work in plan.passes] == [2]
    cr.run([first, second], image, tmp_path / "out.zarr", block_shape=(20, 16, 12), **SERIAL)
    assert not (tmp_path / "out.zarr.chunkrestore/image/scratch").exists()
    expected = second(first(data))
    error = cr.open_image(tmp_path / "out.zarr").data.compute() - expected
    assert np.sqrt(np.mean(error**2)) < 1e-3 * np.ptp(expected)


def test_an_operator_that_needs_the_whole_result_reads_it_from_scratch(store, tmp_path):
    image, data = store((2, *SHAPE), "czyx")
    operators = [exact_lucy(), exact_lucy()]
    assert [len(work.operators) for work in cr.plan(operators, image, block_shape=COARSE).passes] == [1, 1]
    cr.run(operators, image, tmp_path / "out.zarr", block_shape=COARSE, **SERIAL)
    once = apply_image(exact_lucy(), da.from_array(data, chunks=(1, *COARSE)), "czyx")
    twice = apply_image(exact_lucy(), once, "czyx")
    np.testing.assert_array_equal(cr.open_image(tmp_path / "out.zarr").data.compute(), twice.compute())
    kept = sorted(p.name for p in (tmp_path / "out.zarr.chunkrestore/image").iterdir())
    assert kept == KEPT


def test_the_report_tells_what_was_done(store, tmp_path):
    image, _ = store(dtype=np.float32)
    report = cr.run([lucy(), cr.Threshold()], image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    n_blocks = len(cr.plan([lucy()], image, block_shape=BLOCK).passes[0].grid)
    assert {
        "statistics",
        "refinement",
        "blocks",
        "seams",
        "detect",
        "links",
        "join",
        "roots",
        "number",
        "paint",
    } <= report.seconds.keys()
    journal = read_journal(tmp_path / "out.zarr.chunkrestore" / "image" / "journal.jsonl")
    n_finished = {name: len(record.finished) for name, record in journal.stages.items()}
    assert all(n_finished[name] == n_blocks for name in ("blocks-0", "detect", "paint"))
    assert n_finished["seams-0"] == 3
    assert report.n_done == sum(n_finished.values())
    assert report.n_resumed == 0
    assert report.outputs == [str(tmp_path / "out.zarr"), str(tmp_path / "out.zarr/labels/labels")]
    assert [o["operator"] for o in report.operators] == ["richardson-lucy", "threshold"]
    assert report.operators[1]["value"] > 0
    assert {"python", "chunkrestore", "numpy", "scipy"} <= report.versions.keys()
    stored = json.loads((tmp_path / "out.zarr.chunkrestore/image/report.json").read_text())
    assert stored == report.content()
    text = str(report)
    assert f"wrote      {tmp_path / 'out.zarr'}\n" in text
    assert "of the dynamic range (worst of 3 probed block borders)" in text
    provenance = cr.open_image(tmp_path / "out.zarr").others["chunkrestore"]["provenance"]
    assert provenance["operators"] == report.operators[:1]
    assert provenance["input"]["store"] == image.path


def test_progress_is_told_in_lines_where_there_is_no_terminal(store, tmp_path, capsys):
    image, _ = store()
    cr.run(cr.Threshold(), image, tmp_path / "out.zarr", block_shape=BLOCK, cluster="serial")
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("detect: 27 of 27 blocks") for line in lines)


def test_relative_paths_are_those_of_the_driver(store, tmp_path, monkeypatch):
    store()
    monkeypatch.chdir(tmp_path)
    cr.run(cr.Threshold(), "in.ome.zarr", "out.zarr", block_shape=BLOCK, **SERIAL)
    assert (tmp_path / "out.zarr.chunkrestore/labels-labels/report.json").is_file()
    manifest = (tmp_path / "out.zarr.chunkrestore/labels-labels/manifest.json").read_text()
    assert str(tmp_path / "in.ome.zarr") in manifest


def test_a_plan_reads_no_voxel(store):
    image, _ = store()
    shutil.rmtree(f"{image.path}/0/c")
    assert cr.plan([lucy(), cr.Threshold()], image.path, block_shape=BLOCK).n_blocks == 2 * 27


def corrupt(image):
    """Damage the last chunk of an image's full resolution."""
    max(p for p in Path(image.path, "0", "c").rglob("*") if p.is_file()).write_bytes(b"no chunk")


@pytest.mark.parametrize("operator", [cr.Threshold(50.0), cr.Threshold(), lucy()])
def test_a_damaged_chunk_fails_the_run_and_nothing_is_published(store, tmp_path, operator):
    image, _ = store(chunks=(10, 18, 14))
    corrupt(image)
    # The last chunk begins at 10, 18, 14: the first block that reads it is the middle one.
    with pytest.raises(
        BlockError, match=r"block \(1, 1, 1\) of time point 0, channel 0 failed: CorruptChunkError"
    ):
        cr.run(operator, image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    for path in (tmp_path / "out.zarr", tmp_path / "out.zarr/labels/labels"):
        with pytest.raises((FileNotFoundError, ValueError)):
            cr.open_image(path)


def test_a_constant_volume_that_would_be_normalised_is_refused_before_anything_is_written(tmp_path):
    class Normalizing(cr.Threshold):
        needs = frozenset({1.0, 99.8})

        def resolve(self, statistics):
            as_percentiles(statistics, (1.0, 99.8))
            return self

    image = cr.write_image(
        np.full(SHAPE, 7, np.uint8), tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1)
    )
    with pytest.raises(ValueError, match="a constant volume cannot be normalised"):
        cr.run(Normalizing(1.0), image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.zarr"]


def test_an_empty_volume_is_processed(tmp_path):
    image = cr.write_image(np.zeros(SHAPE, np.uint16), tmp_path / "in.zarr", axes="zyx", voxel_size=(1, 1, 1))
    report = cr.run([lucy(), cr.Threshold(1.0)], image, tmp_path / "out.zarr", block_shape=BLOCK, **SERIAL)
    out = cr.open_image(tmp_path / "out.zarr")
    assert report.n_objects == 0
    assert not out.label("labels").data.any().compute()
    assert np.isfinite(out.data.compute()).all()


@pytest.fixture(scope="module")
def embryo(tmp_path_factory):
    pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
    from chunkrestore.simulate import embryo

    data = embryo((32, 64, 64), seed=5, arrangement="tissue").image
    path = tmp_path_factory.mktemp("embryo") / "in.ome.zarr"
    return cr.write_image(data, path, axes="zyx", voxel_size=(1, 1, 1)), data


@KERAS
def test_care_eager_lazy_and_job_agree(embryo, tmp_path):
    image, data = embryo
    care = cr.Care(CARE)
    cr.run(care, image, tmp_path / "out.zarr", block_shape=NETWORK_BLOCK, **SERIAL)
    job = cr.open_image(tmp_path / "out.zarr").data.compute()
    low, high = of_array(data, (2.0, 99.8)).values()
    eager = care(data)
    np.testing.assert_allclose(job, eager, atol=1e-5 * (high - low))
    lazy = cr.restore(da.from_array(data, chunks=NETWORK_BLOCK), CARE)
    np.testing.assert_array_equal(job, lazy.compute(scheduler="synchronous"))


@KERAS
def test_stardist_eager_lazy_and_job_give_identical_labels(embryo, tmp_path):
    image, data = embryo
    report = cr.run(cr.StarDist(STARDIST), image, tmp_path / "out.zarr", block_shape=NETWORK_BLOCK, **SERIAL)
    job = cr.open_image(tmp_path / "out.zarr/labels/labels").data.compute()
    eager = cr.segment(data, STARDIST)
    assert len(np.unique(eager)) > 10
    np.testing.assert_array_equal(job, eager)
    lazy = cr.segment(da.from_array(data, chunks=NETWORK_BLOCK), STARDIST)
    np.testing.assert_array_equal(job, lazy.compute(scheduler="synchronous"))
    assert report.n_objects >= len(np.unique(eager)) - 1
    assert report.n_rounds >= 1


@KERAS
@pytest.mark.parametrize("normalization", [(100.0, 400.0), pytest.param(None, marks=pytest.mark.slow)])
def test_a_chain_of_three_writes_the_image_and_the_labels(embryo, tmp_path, normalization):
    image, data = embryo
    deconvolve = cr.RichardsonLucy(PSF, iterations=2, depth=2 * 2 * RADIUS)
    operators = [deconvolve, cr.Care(CARE, normalization=normalization), cr.StarDist(STARDIST)]
    block_shape = (32, 64, 32)
    plan = cr.plan(operators, image, block_shape=block_shape)
    assert [len(work.operators) for work in plan.passes] == ([2, 1] if normalization else [1, 1, 1])
    cr.run(operators, image, tmp_path / "out.zarr", block_shape=block_shape, label_name="nuclei", **SERIAL)
    out = cr.open_image(tmp_path / "out.zarr")
    sharp = deconvolve(data)
    expected = operators[1](sharp)
    low, high = normalization or of_array(sharp, (2.0, 99.8)).values()
    # Rounding of deconvolution, which the network may amplify a little.
    np.testing.assert_allclose(out.data.compute(), expected, atol=1e-4 * (high - low))
    labels = out.label("nuclei").data.compute()
    np.testing.assert_array_equal(labels, cr.StarDist(STARDIST)(out.data.compute()))
    assert len(np.unique(labels)) > 10
