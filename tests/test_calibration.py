"""Halos found on the image itself, blocks sized by memory, and what happens when memory runs out."""

import json

import numpy as np
import pytest
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs import tasks
from chunkrestore.jobs.plan import make_plan
from chunkrestore.jobs.prepare import budget
from chunkrestore.jobs.runner import BlockError
from chunkrestore.operators.calibration import calibrate
from chunkrestore.operators.threshold import Threshold
from chunkrestore.psf import gaussian

PSF = gaussian((1.4, 1.0, 1.0))
SERIAL = {"cluster": "serial", "quiet": True}


@pytest.fixture(scope="module")
def image():
    """Points of light, blurred and noisy."""
    rng = np.random.default_rng(11)
    truth = np.zeros((72, 80, 84))
    truth[tuple(rng.integers(0, n, 300) for n in truth.shape)] = 3000
    return rng.poisson(ndimage.gaussian_filter(truth, (2.0, 1.6, 1.6)) + 2).astype(np.uint16)


@pytest.fixture(scope="module")
def store(image, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "in.zarr"
    return cr.write_image(image, path, axes="zyx", voxel_size=(1, 1, 1))


def test_calibrated_depth_is_less_than_the_default_and_keeps_the_tolerance(image):
    operator = cr.RichardsonLucy(PSF, 10)
    found = calibrate(operator, lambda region: image[region], image.shape)
    assert all(d < default for d, default in zip(found.depth, found.default_depth, strict=True))
    assert all(seam <= operator.tolerance / 2 for seam in found.seam)
    calibrated = cr.RichardsonLucy(PSF, 10, depth=found.depth, start=float(image.mean()))
    whole = calibrated(image)
    grid = BlockGrid.regular(image.shape, (36, 40, 42), calibrated.halo(image.shape))
    error = np.empty(image.shape)
    for block in grid:
        error[block.core] = calibrated(image[block.read], block)[block.trim] - whole[block.core]
    scale = np.percentile(whole, 99.9) - np.percentile(whole, 0.1)
    planes = [np.take(error, edge, axis=axis) for axis, n in enumerate((36, 40, 42)) for edge in (n - 1, n)]
    assert max(np.sqrt(np.square(plane).mean()) for plane in planes) <= operator.tolerance * scale


def test_a_tighter_tolerance_calibrates_to_a_deeper_halo(image):
    loose, tight = (
        calibrate(cr.RichardsonLucy(PSF, 10, tolerance=t), lambda region: image[region], image.shape)
        for t in (1e-2, 1e-4)
    )
    assert all(a < b for a, b in zip(loose.depth, tight.depth, strict=True))


def test_an_axis_without_blur_or_too_short_for_two_blocks_keeps_its_depth(image):
    flat = cr.RichardsonLucy(gaussian((0.0, 1.0, 1.0)), 5)
    found = calibrate(flat, lambda region: image[region], image.shape)
    assert found.depth[0] == 0
    assert found.seam[0] is None
    thin = image[:20]
    found = calibrate(cr.RichardsonLucy(PSF, 5), lambda region: thin[region], thin.shape)
    assert (found.depth[0], found.seam[0]) == (found.default_depth[0], None)


def test_a_job_calibrates_first_and_tells_the_figures(image, store, tmp_path):
    operator = cr.RichardsonLucy(PSF, 10)
    report = cr.run(
        operator, store, tmp_path / "out.zarr", calibrate=True, block_shape=(40, 40, 42), **SERIAL
    )
    found = calibrate(operator, lambda region: image[region], image.shape).describe()
    assert report.calibration == found
    assert report.plan["passes"][0]["depth"] == [found["depth"]]
    assert report.seam_rms < operator.tolerance
    assert "by calibration" in str(report)
    attributes = json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())["attributes"]
    assert found in [v for entry in _mappings(attributes) for v in entry.values()]


def _mappings(value):
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(child)


def test_a_resumed_job_keeps_its_calibration(store, tmp_path, monkeypatch):
    from chunkrestore.jobs import prepare as module

    options = {"calibrate": True, "block_shape": (40, 40, 42), **SERIAL}
    process, calls = tasks.process, []

    def stop_at_third(*arguments):
        calls.append(arguments[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return process(*arguments)

    monkeypatch.setattr(tasks, "process", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        cr.run(cr.RichardsonLucy(PSF, 5), store, tmp_path / "out.zarr", **options)
    monkeypatch.setattr(tasks, "process", process)
    monkeypatch.setattr(module, "calibrate", lambda *_: pytest.fail("calibrated again"))
    report = cr.run(cr.RichardsonLucy(PSF, 5), store, tmp_path / "out.zarr", **options)
    assert report.n_resumed == 2
    assert report.calibration["depth"] == report.plan["passes"][0]["depth"][0]


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        (cr.RichardsonLucy(PSF), {"calibrate": True, "depth": 4}, "`depth` and `calibrate` exclude"),
        (Threshold(3.0), {"calibrate": True}, "`calibrate` has nothing to do: threshold is exact"),
        (cr.RichardsonLucy(PSF), {"memory": "lots"}, "`memory` must be bytes"),
        (cr.RichardsonLucy(PSF), {"memory": -1}, "`memory` must be bytes"),
        (cr.RichardsonLucy(PSF), {"memory": 1000}, "`memory` of .* is too little"),
        (cr.RichardsonLucy(PSF), {"device": "gpu"}, '`device` must be "cpu", "cuda"'),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(store, tmp_path, operator, options, message):
    with pytest.raises(ValueError, match=message):
        cr.run(operator, store, tmp_path / "out.zarr", **options, **SERIAL)
    assert list(tmp_path.iterdir()) == []


def test_memory_sizes_blocks():
    shape, u16 = (3000, 3000, 3000), np.dtype(np.uint16)
    operator = cr.RichardsonLucy(PSF, 10)
    small, large = (make_plan([operator], shape, u16, memory_nbytes=n) for n in (2**29, 2**35))
    assert small.memory_nbytes <= 2**29 < large.memory_nbytes <= 2**35
    # What is not used would not hold the next larger block; blocks have an even number of chunks.
    edge = large.passes[0].grid.edges[0][1] + 2 * 64
    assert make_plan([operator], shape, u16, block_shape=(edge,) * 3).memory_nbytes > 2**35


def test_memory_is_text_bytes_or_what_is_free():
    assert budget(None, "cpu", 1) is None
    assert budget("2 GB", "cpu", 1) == 2 * 10**9
    assert budget(12345, "cpu", 1) == 12345
    one, four = budget("free", "cpu", 1), budget("free", "cpu", 4)
    assert 0 < four < one / 2


class Hungry(cr.RichardsonLucy):
    """Richardson-Lucy on a machine where only small regions fit into memory."""

    limit = 0

    def __call__(self, image, block=None):
        if image.size > self.limit:
            raise MemoryError(f"cannot allocate {image.size} voxels")
        return super().__call__(image, block)


def test_a_block_that_does_not_fit_is_done_in_parts(image, store, tmp_path, monkeypatch):
    monkeypatch.setattr(Hungry, "limit", 250_000)
    options = {"iterations": 3, "depth": 10}
    report = cr.run(Hungry(PSF, **options), store, tmp_path / "a.zarr", block_shape=(72, 80, 42), **SERIAL)
    assert report.n_split == 2
    assert "did not fit" in str(report)
    cr.run(cr.RichardsonLucy(PSF, **options), store, tmp_path / "b.zarr", **SERIAL)
    a, b = (cr.open_image(tmp_path / f"{name}.zarr").data.compute() for name in "ab")
    assert np.square(a - b).mean() ** 0.5 <= 1e-4 * np.ptp(b)


def test_a_block_that_does_not_fit_in_any_parts_is_named(store, tmp_path):
    with pytest.raises(BlockError, match=r"block .* MemoryError: block .* not even in parts of .* voxels"):
        cr.run(Hungry(PSF, 3), store, tmp_path / "out.zarr", block_shape=(40, 40, 42), **SERIAL)


def test_parts_of_networks_stay_on_their_grid():
    """CARE reads on its pooling grid; parts begin there too, and any other error is not an excuse to cut."""
    from chunkrestore.grid import Halo

    seen = []

    class Pooled:
        def halo(self, shape):
            return Halo((8, 8, 8), align=(4, 4, 4))

        def __call__(self, image, block):
            seen.append(block.core[0].start)
            if image.shape[0] > 60:
                raise MemoryError
            return image

    volume = np.arange(100, dtype=np.float32)[:, None, None] + np.zeros((1, 20, 20), np.float32)
    core = (slice(0, 100), slice(0, 20), slice(0, 20))
    result, n_parts = tasks.apply_within_memory(
        [Pooled()], core, volume.shape, (0, 0, 0), lambda r: volume[r]
    )
    np.testing.assert_array_equal(result, volume)
    assert n_parts > 1
    assert all(start % 4 == 0 for start in seen)
