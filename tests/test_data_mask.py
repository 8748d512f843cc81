"""Voxels that were not observed: saturated, missing, or excluded by a mask."""

import json
import pickle
import tracemalloc

import array_api_strict
import numpy as np
import pytest
from scenes import assemble, blurred, seam_rms
from scipy import signal

from chunkrestore.grid import Block, BlockGrid
from chunkrestore.kernels.richardson_lucy import richardson_lucy
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian

PSF = gaussian((1.5, 1.0, 1.0))
FULL_WELL = 400.0


def nuclei(shape, seed=1):
    """Return balls of 50 to 150 on 5."""
    rng = np.random.default_rng(seed)
    truth, grid = np.full(shape, 5.0), np.indices(shape)
    for _ in range(max(3, int(np.prod(shape)) // 2500)):
        centre = [rng.uniform(0, n) for n in shape]
        ball = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < rng.uniform(2.5, 5) ** 2
        truth[ball] = rng.uniform(50, 150)
    return truth


def saturated(shape=(24, 36, 36), seed=2):
    """Return a scene with bright spots and its image, cut off at `FULL_WELL`."""
    rng, truth = np.random.default_rng(seed), nuclei(shape)
    for _ in range(8):
        at = [int(rng.integers(4, n - 5)) for n in shape]
        truth[tuple(slice(a, a + 2) for a in at)] = rng.uniform(2000, 4000)
    image = np.minimum(rng.poisson(blurred(truth, PSF).clip(0)), FULL_WELL).astype(np.uint16)
    assert 50 < (image == FULL_WELL).sum() < 0.1 * image.size
    return truth, image


def wedge(shape=(20, 40, 48), seed=3):
    """Return the truth, the image and where it was observed: a parallelogram, as after deskewing."""
    truth = nuclei(shape, seed)
    z, _, x = np.indices(shape)
    observed = (x >= z) & (x < shape[2] - shape[0] + z)
    image = np.random.default_rng(seed).poisson(blurred(truth, PSF).clip(0) + 1.0) + 1
    return truth, np.where(observed, image, 0).astype(np.uint16), observed


def direct(image, psf, observed, *, iterations, start):
    """Return plain iterations with a mask in direct space and double precision."""
    margin = [(p, p) for p in psf.shape]
    seen, y = np.pad(observed.astype(np.float64), margin), np.pad(image.astype(np.float64), margin)
    psf = psf.astype(np.float64)
    back = psf[(slice(None, None, -1),) * psf.ndim]  # odd lengths

    def convolved(x, h):
        return signal.convolve(x, h, mode="same", method="direct")

    share, x = convolved(seen, back), np.full(seen.shape, float(start))
    for _ in range(iterations):
        step = convolved(seen * (y / convolved(x, psf) - 1), back)
        x = x * (1 + step / np.maximum(share, 0.01))
    x[share <= 0.01] = 0
    return x[tuple(slice(a, -b) for a, b in margin)]


# --- what comes out ----------------------------------------------------------------------------------------


def test_agrees_with_direct_space():
    rng = np.random.default_rng(4)
    image, observed = rng.poisson(30, (9, 12, 14)).astype(np.uint16), rng.random((9, 12, 14)) < 0.8
    observed[:, :6, :5] = False
    psf = gaussian((0.7, 1.0, 0.6), truncate=2.5)
    expected = direct(image, psf, observed, iterations=6, start=25.0)
    result = RichardsonLucy(psf, 6, start=25.0, mask=observed, acceleration=None)(image)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * expected.max())


def test_saturated_spots_are_recovered():
    truth, image = saturated()
    believed, masked = (
        RichardsonLucy(PSF, 40, saturation=saturation)(image) for saturation in (None, FULL_WELL)
    )
    spots = truth > 1000
    lost, kept = (abs(x[spots].sum() / truth[spots].sum() - 1) for x in (believed, masked))
    assert lost > 0.25
    assert kept < 0.5 * lost
    # Nor does the cut-off dent what surrounds them.
    error = [np.square(x - truth).mean() for x in (believed, masked)]
    assert error[1] < 0.7 * error[0]


def test_missing_voxels_leave_no_halo_at_their_rim_and_nothing_far_inside():
    _, image, observed = wedge()
    image[observed] = 100
    believed, masked = (RichardsonLucy(PSF, 20, missing=missing)(image) for missing in (None, 0))
    np.testing.assert_allclose(masked[observed], 100, rtol=0.02)  # from a start of 58
    right = RichardsonLucy(PSF, 20, missing=0, start=100.0)(image)
    np.testing.assert_allclose(right[observed], 100, rtol=1e-5)
    assert abs(believed[observed] - 100).max() > 20
    # No light of these voxels reaches an observed one.
    share = blurred(observed.astype(float), PSF)
    assert (share < 0.005).sum() > 1000
    np.testing.assert_array_equal(masked[share < 0.005], 0)


def test_structures_at_the_rim_are_as_good_as_elsewhere():
    truth, image, observed = wedge()
    believed, masked = (
        RichardsonLucy(PSF, 20, background=2.0, missing=missing)(image) for missing in (None, 0)
    )
    outside = ~observed
    near = observed & (blurred(outside.astype(float), PSF) > 0.02)
    inner = observed & (blurred(outside.astype(float), PSF) < 1e-6)
    error = [np.sqrt(np.square(x - truth)[part].mean()) for part in (near, inner) for x in (believed, masked)]
    assert error[1] < 0.7 * error[0]
    assert error[1] < 1.6 * error[3]
    assert error[3] == pytest.approx(error[2], rel=0.1)


def test_where_nothing_was_observed_the_result_is_zero():
    image = np.random.default_rng(5).poisson(30, (12, 14, 16)).astype(np.uint16)
    np.testing.assert_array_equal(RichardsonLucy(PSF, 5, mask=np.zeros(image.shape, bool))(image), 0)


def test_unobserved_values_do_not_matter():
    _, image, observed = wedge()
    image[:, :20] = 0  # dark, so that ratios are largest
    first = RichardsonLucy(PSF, 15, start=30.0, mask=observed)(image.astype(np.float32))
    for value in (-1000.0, 65535.0, 3e38, -3e38):
        other = np.where(observed, image, value).astype(np.float32)
        np.testing.assert_array_equal(RichardsonLucy(PSF, 15, start=30.0, mask=observed)(other), first)


@pytest.mark.parametrize("shape", [(24, 36, 36), (60, 64)])
def test_a_mask_of_the_saturated_voxels_gives_the_same_as_the_threshold(shape):
    psf = PSF if len(shape) == 3 else gaussian((1.5, 1.0))
    image = np.minimum(np.random.default_rng(6).poisson(300, shape), 320).astype(np.uint16)
    image.flat[:500] = 0
    options = {"start": 250.0, "background": 10.0}
    by_value = RichardsonLucy(psf, 8, saturation=320, missing=0, **options)(image)
    by_mask = RichardsonLucy(psf, 8, mask=(image < 320) & (image != 0), **options)(image)
    np.testing.assert_array_equal(by_value, by_mask)
    half = RichardsonLucy(psf, 8, saturation=320, mask=image != 0, **options)(image)
    np.testing.assert_array_equal(half, by_mask)


def test_a_mask_that_is_true_everywhere_changes_nothing():
    _, image = saturated()
    options = {"start": 60.0}
    plain = RichardsonLucy(PSF, 10, **options)(image)
    masked = RichardsonLucy(PSF, 10, mask=np.ones(image.shape, bool), **options)(image)
    np.testing.assert_allclose(masked, plain, rtol=0, atol=1e-6 * plain.max())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_strict_array_namespace_gives_the_same_numbers(dtype):
    image = np.random.default_rng(7).integers(0, 60, (12, 14, 15)).astype(dtype)
    mask = np.random.default_rng(8).random(image.shape) < 0.9
    operator = RichardsonLucy(gaussian((1.0, 0.8, 0.8)), 6, start=30.0, saturation=55.5, missing=0, mask=mask)
    result = operator(array_api_strict.asarray(image))
    assert result.dtype == array_api_strict.float32
    expected = operator(image)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize("value", [300, 1e6])
def test_values_beyond_the_dtype_mask_nothing(value):
    image = np.random.default_rng(9).integers(1, 255, (12, 14, 15)).astype(np.uint8)
    for given in (image, array_api_strict.asarray(image)):
        masked = RichardsonLucy(PSF, 3, start=100.0, saturation=value, missing=-value)(given)
        plain = RichardsonLucy(PSF, 3, start=100.0)(image)
        np.testing.assert_allclose(np.asarray(masked), plain, rtol=0, atol=1e-5 * plain.max())


def test_kernel_takes_a_mask():
    image = np.random.default_rng(10).poisson(30, (12, 14, 16)).astype(np.uint16)
    mask = image < 40
    result = richardson_lucy(image, PSF, iterations=5, start=30.0, mask=mask)
    np.testing.assert_array_equal(result, RichardsonLucy(PSF, 5, start=30.0, mask=mask)(image))


# --- tiled against untiled ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["saturation", "missing", "mask"])
def test_tiled_equals_untiled_at_default_depth(what):
    shape = (20, 80, 84)
    if what == "saturation":
        image, options = saturated(shape)[1], {"saturation": FULL_WELL}
    elif what == "missing":
        image, options = wedge(shape)[1], {"missing": 0}
    else:
        mask = np.random.default_rng(11).random(shape) < 0.9
        mask[:, 30:44, 20:41] = False
        image, options = np.where(mask, saturated(shape)[1], 9).astype(np.uint16), {"mask": mask}
    operator = RichardsonLucy(PSF, 15, start=float(image.mean()), **options)
    grid = BlockGrid(((0, 20), (0, 22, 43, 80), (0, 27, 50, 84)), operator.halo(shape))
    assert any(not any(side for axis in block.at_border[1:] for side in axis) for block in grid)
    assert seam_rms(assemble(operator, image, grid), operator(image), grid) <= 1e-3


def test_exact_depth_leaves_rounding_only():
    psf, iterations = gaussian((0.7, 0.7), truncate=2.0), 4
    rng = np.random.default_rng(12)
    image, mask = rng.poisson(30, (90, 80)).astype(np.uint16), rng.random((90, 80)) < 0.8
    operator = RichardsonLucy(psf, iterations, depth=2 * iterations * 2, start=30.0, mask=mask)
    grid = BlockGrid.regular(image.shape, (20, 25), operator.halo(image.shape))
    whole = operator(image)
    np.testing.assert_allclose(assemble(operator, image, grid), whole, rtol=0, atol=2e-5 * whole.max())


# --- the parameter -----------------------------------------------------------------------------------------


def test_a_stored_mask_is_read_by_blocks_and_travels_as_its_place(tmp_path):
    import zarr

    image, mask = saturated()[1], np.random.default_rng(13).random((24, 36, 36)) < 0.9
    stored = zarr.create_array(tmp_path / "mask.zarr", shape=mask.shape, chunks=(8, 16, 16), dtype=bool)
    stored[...] = mask
    operator = RichardsonLucy(PSF, 6, start=60.0, depth=6, mask=stored)
    assert len(pickle.dumps(operator)) < PSF.nbytes + 10_000
    operator = pickle.loads(pickle.dumps(operator))
    grid = BlockGrid.regular(image.shape, (24, 18, 36), operator.halo(image.shape))
    expected = assemble(RichardsonLucy(PSF, 6, start=60.0, depth=6, mask=mask), image, grid)
    np.testing.assert_array_equal(assemble(operator, image, grid), expected)


def test_description_changes_with_the_mask(tmp_path):
    import dask.array as da
    import zarr

    mask = np.random.default_rng(14).random((24, 36, 36)) < 0.9
    other = mask.copy()
    other[12, 20, 20] ^= True
    stores = [
        zarr.create_array(tmp_path / name, shape=mask.shape, chunks=(8, 16, 16), dtype=bool) for name in "ab"
    ]
    lazy = [da.from_array(array, chunks=12) for array in (mask, other)]
    digests = [
        json.loads(json.dumps(RichardsonLucy(PSF, mask=array).describe()))["mask_sha256"]
        for array in (None, mask, other, *stores, *lazy)
    ]
    assert len(set(digests)) == 7
    assert RichardsonLucy(PSF, mask=mask) == RichardsonLucy(PSF, mask=mask.astype(np.uint8))
    assert RichardsonLucy(PSF, mask=mask) != RichardsonLucy(PSF, mask=other)


def test_a_mask_is_kept_as_it_was_given():
    image, mask = saturated()[1], np.ones((24, 36, 36), bool)
    operator = RichardsonLucy(PSF, 3, start=60.0, mask=mask)
    before = operator(image)
    mask[:] = False
    np.testing.assert_array_equal(operator(image), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": [True, False]}, TypeError, "`mask` must be an array .* got list"),
        ({"mask": "mask.zarr"}, TypeError, "`mask` must be an array .* got str"),
        ({"saturation": "high"}, TypeError, "`saturation` must be a number"),
        ({"saturation": 0}, ValueError, "`saturation` 0 must lie above `background` 0"),
        ({"saturation": np.inf}, ValueError, "`saturation` must be finite"),
        ({"missing": np.nan}, ValueError, "`missing` must be finite"),
    ],
)
def test_bad_parameters_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RichardsonLucy(PSF, **arguments)


def test_a_mask_of_another_shape_is_refused_before_anything_is_computed():
    operator = RichardsonLucy(PSF, mask=np.ones((8, 9, 10), bool))
    with pytest.raises(ValueError, match=r"`mask` has shape \(8, 9, 10\) but the image has \(8, 9, 11\)"):
        operator.check((8, 9, 11), np.dtype(np.uint16))
    with pytest.raises(ValueError, match="`mask` has shape"):
        operator(np.ones((8, 9, 11), np.float32))


def test_blocks_see_their_part_of_the_mask():
    mask = np.ones((20, 30, 30), bool)
    mask[:, :, 20:] = False
    operator = RichardsonLucy(PSF, 2, start=5.0, depth=0, mask=mask)
    core = (slice(0, 20), slice(0, 30), slice(24, 30))
    block = Block.around(core, mask.shape, operator.halo(mask.shape))
    np.testing.assert_array_equal(operator(np.full((20, 30, 6), 7, np.uint16), block), 0)


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
@pytest.mark.parametrize("options", [{"saturation": 15.0, "missing": 0.0}, {"mask": True}])
def test_memory_formula_bounds_the_measured_peak(acceleration, options):
    shape = (40, 90, 100)
    image = np.random.default_rng(15).poisson(10, shape).astype(np.uint16)
    options = {"mask": image < 15} if "mask" in options else options
    operator = RichardsonLucy(PSF, 3, acceleration=acceleration, start=10.0, **options)
    operator(image)
    LAST_BLUR.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= operator.memory_nbytes(shape) <= 1.3 * peak + 4 * 2**20
