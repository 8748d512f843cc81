"""Estimates: structure, sizes and errors; whether times come true is measured by hand."""

import json
import math
import os
import signal
from dataclasses import dataclass

import numpy as np
import pytest

from chunkrestore import RichardsonLucy, Threshold, Wiener, run
from chunkrestore.cluster import connect
from chunkrestore.jobs.estimate import StageEstimate, estimate
from chunkrestore.jobs.plan import make_plan
from chunkrestore.jobs.probe import probed_indices
from chunkrestore.ome_zarr import write_image
from chunkrestore.psf import gaussian

PSF = gaussian((1.0, 1.0, 1.0))


@pytest.fixture
def image(tmp_path):
    rng = np.random.default_rng(3)
    voxels = rng.poisson(np.linspace(20, 200, 40)[:, None, None], (40, 36, 50)).astype(np.uint16)
    return write_image(voxels, tmp_path / "in.ome.zarr", axes="zyx", voxel_size=(1, 1, 1))


@pytest.fixture(scope="module")
def client():
    with connect("local", n_workers=2) as client:
        yield client


@dataclass(frozen=True)
class Deadly(Threshold):
    """What takes more memory than there is."""

    def detect(self, image, block):
        os.kill(os.getpid(), signal.SIGKILL)


def planned(operators, image, **options):
    return make_plan(operators, image.spatial_shape, image.dtype, voxel_size=image.voxel_size, **options)


def files(folder):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_stages_are_those_of_the_job_and_nothing_is_written(image, tmp_path):
    operators = [RichardsonLucy(PSF, iterations=2, depth=2), Threshold()]
    plan = planned(operators, image, block_shape=(20, 20, 20))
    before = files(tmp_path)
    expected = estimate(plan, image, cluster="serial")
    assert files(tmp_path) == before
    assert [(stage.name, stage.n_items) for stage in expected.stages] == [
        ("statistics", 12),
        ("blocks-0", 12),
        ("seams-0", 3),
        ("statistics", 12),
        ("refinement", 12),
        ("detect", 12),
        ("paint", 12),
    ]
    assert all(0 < s.low <= s.seconds <= s.high for s in expected.stages)
    report = run(
        operators, image, tmp_path / "out.ome.zarr", cluster="serial", block_shape=(20, 20, 20), quiet=True
    )
    between = {"links", "join", "roots", "number", "pyramid", "labels_pyramid"}
    taken = report.seconds.keys() - between
    assert {stage.name.split("-")[0] for stage in expected.stages} == taken


def test_every_worker_of_a_cluster_probes(image, tmp_path, client):
    plan = planned([RichardsonLucy(PSF, iterations=2)], image, block_shape=(20, 20, 20))
    before = files(tmp_path)
    expected = estimate(plan, image, n_probes=2, cluster=client)
    assert files(tmp_path) == before
    assert (expected.n_workers, expected.n_probes) == (2, 2)
    low, high = expected.spread
    assert 0 < expected.warm_up_seconds < low <= expected.seconds <= high


def test_a_worker_that_dies_is_named_as_the_cause(image, client):
    with pytest.raises(RuntimeError, match="could not be probed: its worker process was killed"):
        estimate(planned([Deadly(3.0)], image), image, cluster=client)


def test_pilots_are_probed(image):
    plan = planned([Wiener(PSF)], image)
    names = [stage.name for stage in estimate(plan, image, cluster="serial").stages]
    assert names[:2] == ["pilots", "statistics"] or names[:2] == ["statistics", "pilots"]
    assert [s.n_items for s in estimate(plan, image, cluster="serial").stages if s.name == "pilots"] == [1]


def test_expected_size_is_that_of_the_stored_chunks(tmp_path):
    rng = np.random.default_rng(5)
    voxels = rng.poisson(100, (70, 80, 90)).astype(np.float32)
    voxels[:, :, 64:] = 0  # chunks that are not stored
    image = write_image(voxels, tmp_path / "in.ome.zarr", axes="zyx", voxel_size=(1, 1, 1))
    operator = RichardsonLucy(PSF, iterations=1)
    expected = estimate(planned([operator], image), image, cluster="serial")
    run(operator, image, tmp_path / "out.ome.zarr", cluster="serial", quiet=True)
    chunks = [p for p in (tmp_path / "out.ome.zarr").rglob("c/**/*") if p.is_file()]
    assert len(chunks) == 8 + 1
    assert expected.disk_nbytes == sum(path.stat().st_size for path in chunks)
    full = sum(path.stat().st_size for path in chunks if "0" in path.relative_to(tmp_path).parts[1])
    assert expected.compression == (full / (4 * voxels.size),)


def test_tables_and_scratch_are_part_of_the_expected_size(image):
    operators = [RichardsonLucy(PSF, iterations=1), Threshold()]
    plan = planned(operators, image, block_shape=(20, 20, 20))
    restored, labelled = estimate(plan, image, n_probes=12, cluster="serial").compression
    assert 0 < labelled < restored < 1
    expected = estimate(plan, image, n_probes=12, cluster="serial").disk_nbytes
    voxels = math.prod(image.shape)
    assert 4 * voxels * (restored + labelled) < expected < 4 * voxels * 2


def test_an_estimate_as_json_and_as_text(image):
    plan = planned([Threshold(50.0)], image, block_shape=(20, 20, 20))
    expected = estimate(plan, image, cluster="serial")
    described = json.loads(json.dumps(expected.describe()))
    assert described["seconds"] == expected.seconds
    assert [stage["name"] for stage in described["stages"]] == ["detect", "paint"]
    text = str(expected)
    assert "on 1 worker (" in text
    assert "12 blocks of" in text
    assert "percentiles and means are those of the probed blocks" in text


def test_more_workers_share_the_blocks():
    stage = StageEstimate("blocks-0", 10, 2.0, 1.0, 3.0)
    assert [stage.wall_seconds(n) for n in (1, 3, 10, 64)] == [20.0, 8.0, 2.0, 2.0]


def test_a_part_of_an_image_is_probed_where_it_lies(image, tmp_path):
    voxels = np.zeros((2, 3, 16, 16, 16), np.uint16)
    voxels[1, 2] = np.random.default_rng(1).poisson(100, (16, 16, 16))
    both = write_image(voxels, tmp_path / "tczyx.ome.zarr", axes="tczyx", voxel_size=(1, 1, 1))
    part = both.select(t=1, c=2, region=(slice(0, 16), slice(0, 8), slice(4, 16)))
    estimate(planned([Wiener(PSF)], part), part, cluster="serial")
    with pytest.raises(ValueError, match="`plan` is for"):
        estimate(planned([Wiener(PSF)], both), part, cluster="serial")


def test_errors_say_what_to_change(image, tmp_path):
    plan = planned([Threshold(3.0)], image)
    with pytest.raises(ValueError, match="`n_probes` 0 must be at least 1"):
        estimate(plan, image, n_probes=0, cluster="serial")
    bad = np.ones((16, 16, 16), np.float32)
    bad[3, 4, 5] = np.nan
    holed = write_image(bad, tmp_path / "nan.ome.zarr", axes="zyx", voxel_size=(1, 1, 1))
    with pytest.raises(ValueError, match="NaN or infinite"):
        estimate(planned([Threshold(3.0)], holed), holed, cluster="serial")


def test_probed_blocks_are_different_and_reach_the_corner_and_the_middle():
    assert probed_indices((9, 9, 9), 1) == [(4, 4, 4)]
    assert probed_indices((9, 9, 9), 2) == [(4, 4, 4), (0, 0, 0)]
    many = probed_indices((9, 9, 9), 40)
    assert len(set(many)) == 40
    assert all(0 <= i < 9 for index in many for i in index)
    assert sorted(probed_indices((2, 1, 3), 100)) == [(z, 0, x) for z in range(2) for x in range(3)]
    assert probed_indices((1, 1), 5) == [(0, 0)]
