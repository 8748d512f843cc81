"""Operators on dask arrays: the same numbers for every graph and chunking, and nothing computed before its time."""

import itertools
from dataclasses import dataclass, replace

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import chunkrestore as cr
from chunkrestore import backend
from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.lazy import apply_image, apply_labels, lazy_statistics
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.operators.threshold import Threshold
from chunkrestore.psf import gaussian
from chunkrestore.statistics import NonFiniteError, of_array

PSF = gaussian((1.0, 0.7, 0.7))[3:6, 2:5, 2:5]


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads"):
        yield


@dataclass(frozen=True)
class LocalSum:
    """Sum over a window of 2 depth + 1 voxels per axis, less a percentile: exact in float32 for small integers."""

    depth: int = 2
    align: int = 1
    offset: int = 0
    low: float | None = None

    name = "local-sum"

    @property
    def needs(self):
        return frozenset({50.0}) if self.low is None else frozenset()

    def resolve(self, statistics):
        return replace(self, low=statistics[50.0])

    def check(self, shape, dtype):
        if len(shape) != 3:
            raise ValueError("`image` must have three spatial axes")

    def halo(self, shape):
        return Halo((self.depth,) * 3, (self.align,) * 3, (self.offset,) * 3)

    def __call__(self, image, block=None):
        if block is None:
            operator = self.resolve(of_array(image, self.needs)) if self.needs else self
            return operator(image, Block.whole(image.shape))
        assert image.shape == block.read_shape
        for r, n in zip(block.read, block.volume_shape, strict=True):
            assert (r.start + self.offset) % self.align == 0 or r.start == 0
            assert (r.stop + self.offset) % self.align == 0 or r.stop == n
        total = image.astype(np.float64)
        for axis in range(3):
            window = np.ones(2 * self.depth + 1)
            total = ndimage.correlate1d(total, window, axis=axis, mode="constant")
        return (total - self.low).astype(np.float32)


def volume(shape=(13, 17, 11), dtype=np.uint16, seed=2):
    image = np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)
    image.setflags(write=False)
    return image


def raise_if_computed(*args, **kwargs):
    raise AssertionError("the graph was computed")


@st.composite
def chunkings(draw, shape):
    """Chunks of every kind: uneven, thinner than a halo, the whole axis."""
    chunks = []
    for n in shape:
        borders = draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else set()
        edges = [0, *sorted(borders), n]
        chunks.append(tuple(b - a for a, b in itertools.pairwise(edges)))
    return tuple(chunks)


@settings(max_examples=25)
@given(chunkings((13, 17, 11)), st.integers(0, 6), st.sampled_from([(1, 0), (4, 0), (4, 3)]))
def test_lazy_equals_eager_for_every_chunking(chunks, depth, grid):
    align, offset = grid
    image = volume()
    operator = LocalSum(depth, align, offset)
    lazy = apply_image(operator, da.from_array(image, chunks=chunks), "zyx")
    assert isinstance(lazy, da.Array)
    assert (lazy.dtype, lazy.chunks) == (np.float32, chunks)
    np.testing.assert_array_equal(lazy.compute(), operator(image))


def test_lazy_richardson_lucy_equals_the_same_blocks_bit_for_bit():
    image = volume((20, 36, 28))
    operator = RichardsonLucy(PSF, iterations=4, depth=5, start=90.0)
    chunks = ((6, 9, 5), (20, 16), (28,))
    expected = np.empty(image.shape, np.float32)
    for block in BlockGrid.from_chunks(chunks, operator.halo(image.shape)):
        expected[block.core] = operator(image[block.read], block)[block.trim]
    lazy = apply_image(operator, da.from_array(image, chunks=chunks), "zyx")
    assert lazy.dtype == np.float32
    np.testing.assert_array_equal(lazy.compute(), expected)


def test_lazy_richardson_lucy_equals_eager_at_exact_depth():
    image = volume((20, 36, 28))
    iterations = 3
    operator = RichardsonLucy(PSF, iterations=iterations, depth=2 * iterations)  # times the radius, 1
    eager = operator(image)
    lazy = apply_image(operator, da.from_array(image, chunks=(5, 12, 7)), "zyx")
    # Rounding of float32 in transforms of another length, through three iterations.
    np.testing.assert_allclose(lazy.compute(), eager, atol=1e-5 * float(np.ptp(eager)))


@pytest.mark.parametrize("axes", ["czyx", "tzyx", "tczyx"])
def test_time_points_and_channels_are_volumes_of_their_own(axes):
    lead = {"czyx": (3,), "tzyx": (2,), "tczyx": (2, 3)}[axes]
    image = volume((*lead, 9, 10, 8))
    image.setflags(write=True)
    image[-1] += 100
    chunks = (*((1,) * len(lead)), 4, 10, 3)
    lazy = apply_image(LocalSum(1), da.from_array(image, chunks=chunks), axes)
    expected = np.stack([LocalSum(1)(plane) for plane in image.reshape(-1, 9, 10, 8)]).reshape(image.shape)
    assert lazy.chunks == da.from_array(image, chunks=chunks).chunks
    np.testing.assert_array_equal(lazy.compute(), expected)


def test_chunks_that_join_channels_are_preserved():
    image = volume((3, 9, 10, 8))
    source = da.from_array(image, chunks=((2, 1), (4, 5), (10,), (8,)))
    lazy = apply_labels(Threshold(), source, "czyx")
    assert lazy.chunks == source.chunks
    assert lazy.dtype == np.int32
    np.testing.assert_array_equal(lazy.compute(), np.stack([Threshold()(plane) for plane in image]))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: cr.deconvolve(x, PSF, iterations=2),
        lambda x: apply_image(LocalSum(), x, "zyx"),
        lambda x: apply_labels(Threshold(), x, "zyx"),
        lambda x: lazy_statistics(x, (1.0, 99.8)),
    ],
)
def test_building_the_graph_computes_nothing(make):
    source = da.from_array(volume(), chunks=5).map_blocks(raise_if_computed, meta=np.empty((0, 0, 0), "u2"))
    with dask.config.set(scheduler=raise_if_computed):
        lazy = make(source)
    with pytest.raises(AssertionError, match="the graph was computed"):
        lazy.compute()


def test_operators_are_chained_lazily():
    image = volume()
    source = da.from_array(image, chunks=(4, 6, 11))
    chained = apply_labels(Threshold(), apply_image(LocalSum(1, low=0.0), source, "zyx"), "zyx")
    np.testing.assert_array_equal(chained.compute(), Threshold()(LocalSum(1, low=0.0)(image)))


def test_one_call_has_one_name():
    source = da.from_array(volume(), chunks=5)
    assert apply_image(LocalSum(), source, "zyx").name == apply_image(LocalSum(), source, "zyx").name
    assert apply_image(LocalSum(), source, "zyx").name != apply_image(LocalSum(3), source, "zyx").name
    first, again = (cr.deconvolve(source, PSF, iterations=2).name for _ in range(2))
    assert first == again
    assert cr.deconvolve(source, PSF * np.eye(3, dtype="f4") + 1e-3, iterations=2).name != first


def test_a_result_does_not_keep_its_halo_in_memory():
    lazy = apply_image(LocalSum(3, low=0.0), da.from_array(volume(), chunks=5), "zyx")
    part = lazy.to_delayed()[1, 1, 1].compute()
    assert part.shape == (5, 5, 5)
    assert part.base is None


def test_arrays_that_are_no_longer_numpy_stay_what_they_are():
    class Elsewhere(np.ndarray):
        """Stands for an array of a device."""

    source = da.from_array(volume().view(Elsewhere), chunks=(13, 17, 11), asarray=False)
    assert isinstance(source._meta, Elsewhere)
    lazy = apply_image(LocalSum(low=0.0), source, "zyx")
    assert type(lazy._meta) is Elsewhere
    assert lazy._meta.dtype == np.float32


@pytest.mark.gpu
@pytest.mark.skipif(backend.missing_device() is not None, reason=str(backend.missing_device()))
def test_cupy_blocks_stay_on_the_device():
    import cupy

    image = volume((20, 36, 28))
    source = da.from_array(image, chunks=(10, 18, 28)).map_blocks(cupy.asarray)
    lazy = cr.deconvolve(source, PSF, iterations=4)
    assert isinstance(lazy._meta, cupy.ndarray)
    result = lazy.compute(scheduler="synchronous")
    assert isinstance(result, cupy.ndarray)
    expected = cr.deconvolve(da.from_array(image, chunks=(10, 18, 28)), PSF, iterations=4).compute()
    np.testing.assert_allclose(result.get(), expected, atol=1e-4 * float(np.ptp(expected)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_lazy_percentiles_are_exact(dtype):
    image = volume(dtype=dtype)
    expected = np.percentile(image.astype(np.float64), (1, 99.8))
    np.testing.assert_allclose(cr.percentiles(da.from_array(image, chunks=(3, 17, 4))), expected, rtol=1e-12)
    np.testing.assert_allclose(cr.percentiles(image), expected, rtol=1e-12)


def test_statistics_of_many_chunks_are_merged_in_steps():
    image = volume((40, 4, 4), np.float32)
    numbers = lazy_statistics(da.from_array(image, chunks=(1, 2, 4)), (50.0, "mean", "otsu")).compute()
    assert numbers == of_array(image, (50.0, "mean", "otsu"))


def test_voxels_that_are_not_finite_are_refused_with_their_chunk():
    image = volume(dtype=np.float32).copy()
    image[12, 3, 10] = np.nan
    with pytest.raises(NonFiniteError, match=r"chunk \(1, 0, 2\): image holds 1 voxels that are NaN"):
        cr.percentiles(da.from_array(image, chunks=(7, 17, 4)))


def test_numpy_arrays_are_processed_at_once_volume_by_volume():
    image = volume((2, 9, 10, 8), np.float32)
    result = cr.deconvolve(image, PSF, iterations=2)
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype) == (image.shape, np.float32)
    for plane, expected in zip(result, image, strict=True):
        np.testing.assert_array_equal(plane, RichardsonLucy(PSF, iterations=2)(expected))
    flat = cr.deconvolve(image[:, 0], PSF[1], iterations=2, axes="cyx")
    assert flat.shape == (2, 10, 8)


def test_lazy_and_numpy_calls_agree():
    image = volume((2, 9, 10, 8))
    whole = da.from_array(image, chunks=(1, 9, 10, 8))
    np.testing.assert_array_equal(
        cr.deconvolve(whole, PSF, iterations=2).compute(), cr.deconvolve(image, PSF, iterations=2)
    )


@pytest.mark.parametrize("axes", ["zyq", "qzyx", "yyx", "xyz", "ctzyx"[-4:] + "x", "zcyx", "yx"])
@pytest.mark.parametrize("lazily", [True, False])
def test_axes_that_do_not_fit_are_refused(axes, lazily):
    image = volume((4, 5, 6, 7))
    source = da.from_array(image) if lazily else image
    with pytest.raises(ValueError, match=f"`axes` '{axes}' must be a subset of 'tczyx' in that order"):
        cr.deconvolve(source, PSF, axes=axes)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (da.zeros((4, 5, 6)), "float64; accepted are uint8, uint16, int16, float32"),
        (da.zeros((4, 5), dtype="u2"), r"`psf` has 3 dimensions .* but the image has 2 spatial axes"),
        (da.ones((4, 5, 6), dtype="u2")[da.ones(4) > 0], "unknown chunk sizes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_computed(source, message):
    with dask.config.set(scheduler=raise_if_computed), pytest.raises(ValueError, match=message):
        cr.deconvolve(source, PSF)


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match=r"`method` must be one of 'richardson-lucy', .*; got 'blind'"):
        cr.deconvolve(volume(), PSF, method="blind")


def test_parameters_of_another_method_are_refused():
    with pytest.raises(ValueError, match="`regularization` is no parameter of the method 'richardson-lucy'"):
        cr.deconvolve(volume(), PSF, regularization=0.1)
