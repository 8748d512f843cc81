"""Iterations in sweeps over one half spectrum, against the same iterations on whole volumes."""

import tracemalloc

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore import backend
from chunkrestore.kernels import richardson_lucy as kernel
from chunkrestore.kernels import sweeps
from chunkrestore.kernels.blur import BlendedBlur, Blur
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian, prepare

LARGE = (44, 150, 160)
"""Of the least size that is swept unless a test says otherwise, in more parts than are done on one thread."""


def skewed(shape, seed=5):
    """Return an asymmetric point spread function: random, brightest near the centre."""
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    squares = sum(((g - n // 2) / (n / 4 + 0.3)) ** 2 for g, n in zip(grid, shape, strict=True))
    return prepare(np.exp(-0.5 * squares) * np.random.default_rng(seed).uniform(0.2, 1, shape))


def photons(shape, seed=1):
    return np.random.default_rng(seed).poisson(30, shape).astype(np.uint16)


def swept_and_whole(image, blur, **options):
    """Return all estimates of both ways, copied."""
    results = []
    for least in (1, 2**60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweeps, "LEAST_VOXELS", least)
            assert sweeps.can_sweep(blur, image) == (least == 1)
            results.append([e.copy() for e in kernel.estimates(image, blur, start=25.0, **options)])
    return results


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
@pytest.mark.parametrize("options", [{}, {"background": 3.5}, {"mask": True}], ids=str)
@pytest.mark.parametrize(
    ("shape", "lattice"),
    [
        ((14, 15, 17), (18, 20, 24)),  # at the border
        ((14, 15, 17), (14, 15, 17)),  # inside
        ((14, 15, 17), (14, 21, 18)),
        ((1, 20, 21), (8, 24, 25)),
        ((1, 1, 1), (1, 1, 1)),
        ((2, 1, 3), (5, 4, 3)),
        ((5, 250, 260), (6, 256, 270)),  # plane by plane
    ],
)
def test_every_estimate_is_that_of_whole_volumes(shape, lattice, options, acceleration):
    image, options = photons(shape), dict(options)
    blur = Blur.from_psf(skewed((5, 6, 7)), lattice, image)
    if "mask" in options:
        options["mask"] = np.random.default_rng(2).random(shape) < 0.8
        options["mask"][..., : shape[2] // 2] = shape[0] == 1
    swept, whole = swept_and_whole(image, blur, iterations=6, acceleration=acceleration, **options)
    assert len(swept) == len(whole) == 6
    for one, other in zip(swept, whole, strict=True):
        assert one.dtype == np.float32
        # Rounding of float32 transforms, 1e-7 of the largest value, grows with the iterations.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * other.max())


@given(
    st.tuples(*(st.tuples(st.integers(1, 9), st.integers(0, 5)) for _ in range(3))),
    st.booleans(),
    st.integers(0, 99),
)
def test_two_sweeps_are_a_blur(lengths, adjoint, seed):
    shape, lattice = tuple(n for n, _ in lengths), tuple(n + more for n, more in lengths)
    image = np.random.default_rng(seed).random(shape, dtype=np.float32)
    blur = Blur.from_psf(skewed((3, 4, 2), seed), lattice, image)
    spectrum = sweeps.blurred_constant(0.0, blur)
    sweeps.over_planes(spectrum, lattice, shape, lambda planes, empty: image[planes])
    spectrum[shape[0] :] = np.nan  # neither read
    sweeps.blur_planes(spectrum, blur, adjoint=adjoint, given=shape[0], wanted=shape[0])
    assert np.isnan(spectrum[shape[0] :]).all()  # nor written
    result = np.empty(shape, np.float32)
    sweeps.over_planes(spectrum, lattice, shape, lambda planes, real: result.__setitem__(planes, real))
    expected = (blur.adjoint if adjoint else blur.forward)(image, shape)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_a_blurred_constant_is_the_blur_of_a_constant():
    lattice = (7, 12, 9)
    blur = Blur.from_psf(skewed((3, 5, 4)) * np.float32(0.7), lattice, np.zeros(1))
    planes = []
    sweeps.over_planes(
        sweeps.blurred_constant(3.0, blur), lattice, lattice, lambda _, real: planes.append(real.copy())
    )
    np.testing.assert_allclose(np.concatenate(planes), 2.1, rtol=1e-6)


def test_results_are_the_same_bits_for_any_number_of_threads(monkeypatch):
    image = photons(tuple(n - 6 for n in LARGE))
    blur = Blur.from_psf(skewed((5, 6, 7)), LARGE, image)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        assert sweeps.can_sweep(blur, image)
        results.append(kernel.last_estimate(image, blur, iterations=3, start=30.0))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_read_only_inputs_are_enough_and_stay_as_they_are():
    image, mask = photons(LARGE), np.random.default_rng(3).random(LARGE) < 0.9
    blur = Blur.from_psf(skewed((3, 3, 3)), LARGE, image)
    kept = [array.copy() for array in (image, mask, blur.otf)]
    for array in (image, mask, blur.otf):
        array.setflags(write=False)
    kernel.last_estimate(image, blur, iterations=2, start=30.0, mask=mask)
    for array, before in zip((image, mask, blur.otf), kept, strict=True):
        np.testing.assert_array_equal(array, before)


def test_no_blur_is_made_before_it_is_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(sweeps, "LEAST_VOXELS", 1)
    monkeypatch.setattr(kernel, "blur_planes", lambda *a, **o: made.append(o) or sweeps.blur_planes(*a, **o))
    image = photons((6, 7, 8))
    blur = Blur.from_psf(skewed((3, 3, 3)), image.shape, image)
    # The first blurred estimate is a constant; each later iteration needs a blur and its adjoint.
    counts = [len(made) for _ in kernel.estimates(image, blur, iterations=3, start=30.0)]
    assert counts == [1, 3, 5]
    assert len(made) == 5


def test_whole_volumes_are_used_where_sweeps_do_not_apply(monkeypatch):
    image, psf = photons((6, 7, 8)), skewed((3, 3, 3))
    blur = Blur.from_psf(psf, image.shape, image)
    assert not sweeps.can_sweep(blur, image)  # too small
    monkeypatch.setattr(sweeps, "LEAST_VOXELS", 1)
    assert sweeps.can_sweep(blur, image)
    assert not sweeps.can_sweep(blur, array_api_strict.asarray(image))
    assert not sweeps.can_sweep(BlendedBlur((blur,), ((np.ones((6, 1, 1), np.float32),),)), image)
    assert not sweeps.can_sweep(Blur.from_psf(psf[:1], image.shape, image), image)
    assert not sweeps.can_sweep(Blur.from_psf(psf[0], (7, 8), image), image[0])
    monkeypatch.setattr(kernel, "_swept_estimates", lambda *a: pytest.fail("swept"))
    kernel.last_estimate(image, blur, iterations=1, start=30.0, total_variation=0.01)


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
@pytest.mark.parametrize("shape", [(40, 150, 160), (10, 600, 610)])
def test_memory_formula_bounds_the_peak_of_sweeps(monkeypatch, shape, acceleration):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    operator = RichardsonLucy(gaussian((2.0, 1.5, 1.5)), 2, acceleration=acceleration, start=10.0)
    image = photons(shape)
    LAST_BLUR.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= operator.memory_nbytes(shape) <= 1.05 * peak + 4 * 2**20
    assert backend.n_threads() == 1
