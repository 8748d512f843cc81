"""Richardson-Lucy: the kernel against independent implementations, and the operator on blocks."""

import itertools
import pickle
import tracemalloc

import array_api_strict
import numpy as np
import pytest
from scenes import assemble, blurred, nuclei, seam_rms, skewed
from scipy import ndimage

from chunkrestore.grid import Block, BlockGrid, Halo
from chunkrestore.kernels.blur import Blur, lattice_shape
from chunkrestore.kernels.richardson_lucy import richardson_lucy
from chunkrestore.operators.base import ImageOperator
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian, prepare
from chunkrestore.statistics import NonFiniteError

EVERYWHERE = ((True, True),) * 3


def direct(image, psf, *, iterations, start, background=0.0, accelerated=False):
    """Return the same iterations in direct space and double precision, on a canvas that nothing leaves."""
    psf, margin = psf.astype(np.float64), [(p, p) for p in psf.shape]
    mask = np.pad(np.ones(image.shape), margin)
    observed = np.pad(image.astype(np.float64), margin)

    def blur(x):
        return ndimage.convolve(x, psf, mode="constant")

    def back(x):
        return ndimage.correlate(x, psf, mode="constant")

    share = back(mask)
    now = np.full(mask.shape, float(start))
    before = now
    for k in range(1, iterations + 1):
        factor = (k - 1) / (k + 2) if accelerated else 0.0
        ahead = np.maximum(now + factor * (now - before), now / 2)
        step = back(mask * (observed / (blur(ahead) + background) - 1)) / np.maximum(share, 0.01)
        before, now = now, ahead * (1 + step)
    return now[tuple(slice(a, -b) for a, b in margin)]


# --- the blur ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("psf_shape", [(5, 7, 9), (4, 6, 3), (1, 7, 4)])
def test_blur_is_periodic_convolution_with_the_centre_at_half_the_length(psf_shape):
    psf, lattice = skewed(psf_shape), (12, 14, 16)
    image = np.random.default_rng(2).random(lattice, dtype=np.float32)
    expected = np.zeros(lattice)
    for index in np.ndindex(psf_shape):
        shift = [i - p // 2 for i, p in zip(index, psf_shape, strict=True)]
        expected += psf[index] * np.roll(image, shift, axis=(0, 1, 2))
    result = Blur.from_psf(psf, lattice, image).forward(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lattice", [(16, 18, 20), (15, 9, 21), (5, 4, 3)])
def test_back_projection_is_the_adjoint_of_the_blur(lattice):
    rng = np.random.default_rng(3)
    blur = Blur.from_psf(skewed((7, 6, 9)), lattice, np.zeros(1, np.float32))
    x, y = rng.random(lattice, dtype=np.float32), rng.random(lattice, dtype=np.float32)
    forward = np.vdot(blur.forward(x).astype(np.float64), y)
    backward = np.vdot(x, blur.adjoint(y).astype(np.float64))
    assert forward == pytest.approx(backward, rel=1e-6)


def test_psf_longer_than_the_lattice_wraps_around():
    psf, lattice = skewed((11, 9)), (4, 6)
    image = np.random.default_rng(4).random(lattice, dtype=np.float32)
    expected = np.zeros(lattice)
    for index in np.ndindex(psf.shape):
        expected += psf[index] * np.roll(image, (index[0] - 5, index[1] - 4), axis=(0, 1))
    np.testing.assert_allclose(Blur.from_psf(psf, lattice, image).forward(image), expected, atol=1e-6)


def test_lattice_holds_everything_at_borders_and_is_the_read_region_inside():
    at_border = ((True, False), (False, False), (True, True))
    assert lattice_shape((50, 64, 50), (7, 7, 1), at_border) == (56, 64, 50)
    assert lattice_shape((53, 61, 1), (7, 7, 7), at_border) == (60, 64, 8)


# --- the kernel against independent implementations --------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("shape", "psf_shape"),
    [((14, 15, 17), (5, 7, 3)), ((21, 26), (7, 5)), ((5, 8, 6), (9, 13, 11)), ((1, 20, 21), (1, 5, 5))],
)
def test_agrees_with_direct_space_up_to_the_border(shape, psf_shape, accelerated):
    psf = skewed(psf_shape)
    image = np.random.default_rng(6).poisson(30, shape).astype(np.uint16)
    result = richardson_lucy(
        image,
        psf,
        iterations=6,
        start=25.0,
        background=3.5,
        acceleration="heavy-ball" if accelerated else None,
    )
    expected = direct(image, psf, iterations=6, start=25.0, background=3.5, accelerated=accelerated)
    # Rounding of float32 transforms, 1e-7 of the largest value, grows with the iterations.
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * expected.max())


@pytest.mark.parametrize(("size", "psf_size"), [(100, 9), (101, 7)])
def test_agrees_with_scikit_image_on_the_interior(size, psf_size):
    from skimage.restoration import richardson_lucy as reference

    psf, iterations = skewed((psf_size, psf_size)), 5
    image = np.random.default_rng(7).poisson(20, (size, size)).astype(np.float64)
    expected = reference(image, psf.astype(np.float64), num_iter=iterations, clip=False)
    result = richardson_lucy(image, psf, iterations=iterations, start=0.5, acceleration=None)
    # Further from the border than 2 * iterations * radius, no pixel can tell what lies beyond it.
    reach = 2 * iterations * (psf_size // 2)
    interior = (slice(reach, size - reach),) * 2
    assert expected[interior].size >= 400
    np.testing.assert_allclose(result[interior], expected[interior], rtol=0, atol=2e-5 * expected.max())


# --- what is preserved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("psf_shape", list(itertools.product((8, 9), (10, 11))))
@pytest.mark.parametrize("shape", [(40, 44), (41, 45)])
def test_nothing_moves_for_even_and_odd_sizes(psf_shape, shape):
    psf = skewed(psf_shape)
    grid = np.indices(shape)
    truth = np.exp(-((grid[0] - 19.3) ** 2 + (grid[1] - 22.6) ** 2) / 8)
    image = blurred(truth, psf).astype(np.float32)
    result = richardson_lucy(image, psf, iterations=30, start=float(image.mean()))
    for axis in (0, 1):
        shift = (grid[axis] * result).sum() / result.sum() - (grid[axis] * truth).sum() / truth.sum()
        assert abs(shift) < 0.02


def test_nothing_moves_in_3d_with_an_even_asymmetric_psf():
    psf = skewed((6, 8, 7))
    truth = np.zeros((24, 27, 26))
    truth[11, 13, 12], truth[13, 14, 15] = 900, 400
    image = blurred(ndimage.gaussian_filter(truth, 1), psf).astype(np.float32)
    result = richardson_lucy(image, psf, iterations=30, start=float(image.mean()))
    wanted = ndimage.center_of_mass(truth)
    assert np.abs(np.subtract(ndimage.center_of_mass(result), wanted)).max() < 0.02


def bright_box(psf, background):
    truth = np.zeros((56, 48, 48))
    truth[24:32, 20:28, 18:30] = np.random.default_rng(8).uniform(50, 150, (8, 8, 12))
    return truth, (blurred(truth, psf).clip(0) + background).astype(np.float32)


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_light_is_kept(acceleration):
    psf = gaussian((2.0, 1.2, 1.2), tail=0.1)
    image = np.random.default_rng(17).poisson(bright_box(psf, 0.0)[1]).astype(np.uint16)
    result = richardson_lucy(image, psf, iterations=20, start=1.0, acceleration=acceleration)
    assert result.sum(dtype=np.float64) == pytest.approx(image.sum(), rel=0.005)


def test_background_in_the_model_is_not_in_the_result():
    psf = gaussian((2.0, 1.2, 1.2), tail=0.1)
    truth, image = bright_box(psf, 2.0)
    # Where it is dark, x falls by the factor b / (b + x) only, so it takes more iterations than without b.
    result = richardson_lucy(image, psf, iterations=50, start=1.0, background=2.0)
    assert result.sum(dtype=np.float64) == pytest.approx(truth.sum(), rel=0.005)
    assert np.median(result) < 1e-3
    without = richardson_lucy(image, psf, iterations=50, start=1.0)
    assert np.median(without) > 1


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_constant_stays_constant_to_the_corners(acceleration):
    operator = RichardsonLucy(skewed((7, 9, 6)), 20, background=10.0, acceleration=acceleration)
    result = operator(np.full((18, 20, 22), 60, np.uint16))
    np.testing.assert_allclose(result, 50.0, rtol=1e-5)


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_zeros_stay_zero(acceleration):
    result = RichardsonLucy(skewed((5, 5, 5)), 10, acceleration=acceleration)(
        np.zeros((12, 13, 14), np.uint8)
    )
    np.testing.assert_array_equal(result, 0)


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_empty_regions_stay_finite_and_dark(acceleration):
    psf = gaussian((1.5, 1.5, 1.5))
    image = np.zeros((40, 32, 32), np.uint16)
    image[:8] = np.random.default_rng(9).poisson(200, (8, 32, 32))
    result = richardson_lucy(image, psf, iterations=100, start=40.0, acceleration=acceleration)
    assert np.isfinite(result).all()
    assert result.min() >= 0
    assert result[20:].max() < 1e-3


def test_one_hot_voxel_in_the_dark_keeps_its_light():
    image = np.zeros((20, 24, 24), np.uint16)
    image[10, 12, 12], image[0, 0, 0] = 60000, 1
    result = richardson_lucy(image, gaussian((2.0, 1.5, 1.5)), iterations=50, start=float(image.mean()))
    assert result[4:17, 6:19, 6:19].sum() == pytest.approx(60000, rel=0.01)


def test_negative_voxels_are_taken_as_they_are():
    image = np.random.default_rng(10).normal(5, 4, (16, 16, 16)).astype(np.float32)
    result = richardson_lucy(image, gaussian((1.0, 1.0, 1.0)), iterations=20, start=5.0)
    assert np.isfinite(result).all()
    assert result.min() >= 0


def test_acceleration_does_the_work_of_more_iterations():
    psf = gaussian((2.0, 1.2, 1.2))
    truth, image = nuclei((32, 40, 40), psf, photons=500)
    error = {
        (n, how): np.square(
            richardson_lucy(image, psf, iterations=n, start=float(image.mean()), acceleration=how) - truth
        ).mean()
        for n, how in [(10, "heavy-ball"), (10, None), (20, None)]
    }
    assert error[10, "heavy-ball"] < error[20, None] < error[10, None] < np.square(image - truth).mean()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_dtype_of_the_image_does_not_matter(dtype):
    image = np.random.default_rng(11).integers(0, 100, (12, 14, 16)).astype(dtype)
    image.setflags(write=False)
    before = image.copy()
    result = richardson_lucy(image, skewed((3, 4, 5)), iterations=5, start=50.0)
    expected = richardson_lucy(image.astype(np.float32), skewed((3, 4, 5)), iterations=5, start=50.0)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("at_border", [EVERYWHERE, ((False, False), (True, False), (False, False))])
@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_strict_array_namespace_gives_the_same_numbers(acceleration, at_border):
    image = np.random.default_rng(12).poisson(40, (12, 14, 15)).astype(np.uint16)
    psf = skewed((3, 6, 5))
    options = {"iterations": 8, "start": 40.0, "acceleration": acceleration, "at_border": at_border}
    result = richardson_lucy(array_api_strict.asarray(image), psf, **options)
    assert type(result) is type(array_api_strict.asarray(image))
    assert result.dtype == array_api_strict.float32
    expected = richardson_lucy(image, psf, **options)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-5 * expected.max())


def test_torch_gives_the_same_numbers():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    image = np.random.default_rng(13).poisson(40, (12, 14, 15)).astype(np.float32)
    result = richardson_lucy(torch.asarray(image), skewed((3, 6, 5)), iterations=8, start=40.0)
    expected = richardson_lucy(image, skewed((3, 6, 5)), iterations=8, start=40.0)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-5 * expected.max())


# --- tiled against untiled ---------------------------------------------------------------------------------

SKEWED = prepare(gaussian((1.4, 0.9, 0.9)) * np.linspace(0.5, 1.5, 9))
GRIDS = {
    "cubes": lambda shape, halo: BlockGrid.regular(shape, (32, 32, 32), halo),
    "slabs": lambda shape, halo: BlockGrid.regular(shape, (17, 64, 50), halo),
    "uneven": lambda shape, halo: BlockGrid(((0, 9, 40, 64), (0, 31, 72), (0, 20, 27, 72)), halo),
}


@pytest.fixture(scope="module")
def volume():
    return nuclei((64, 72, 72), SKEWED)[1]


@pytest.mark.parametrize("name", GRIDS)
def test_tiled_equals_untiled_at_default_depth(volume, name):
    operator = RichardsonLucy(SKEWED, 20, start=float(volume.mean()))
    grid = GRIDS[name](volume.shape, operator.halo(volume.shape))
    assert len(grid) > 3
    assert seam_rms(assemble(operator, volume, grid), operator(volume), grid) <= 1e-3


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_seams_fall_as_depth_grows(volume, acceleration):
    image = volume[:, :48, :48]
    whole = RichardsonLucy(SKEWED, 10, acceleration=acceleration, start=10.0)(image)
    errors = []
    for depth in (0, 4, 8, 12, 16):
        operator = RichardsonLucy(SKEWED, 10, acceleration=acceleration, start=10.0, depth=depth)
        # Without fast lengths, so that `depth` alone decides what is read.
        grid = BlockGrid.regular(image.shape, (21, 48, 48), Halo(operator.halo(image.shape).depth))
        errors.append(seam_rms(assemble(operator, image, grid), whole, grid))
    assert errors[0] > 0.01
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_exact_depth_leaves_rounding_only(acceleration):
    psf, iterations = skewed((3, 5)), 4
    exact = tuple(2 * iterations * (p // 2) for p in psf.shape)
    image = np.random.default_rng(14).poisson(30, (70, 90)).astype(np.uint16)
    operator = RichardsonLucy(psf, iterations, acceleration=acceleration, depth=exact, start=30.0)
    grid = BlockGrid.regular(image.shape, (14, 17), operator.halo(image.shape))
    assert any(not any(side for axis in block.at_border for side in axis) for block in grid)
    whole = operator(image)
    np.testing.assert_allclose(assemble(operator, image, grid), whole, rtol=0, atol=2e-5 * whole.max())


# --- the operator ------------------------------------------------------------------------------------------

PSF = gaussian((1.5, 1.0, 1.0))


def test_operator_keeps_to_the_protocol():
    assert isinstance(RichardsonLucy(PSF), ImageOperator)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"psf": -PSF}, ValueError, "`psf` holds .* negative"),
        ({"psf": np.zeros((3, 3))}, ValueError, "`psf` is zero"),
        ({"psf": "psf.tif"}, TypeError, "read_psf"),
        ({"iterations": 0}, ValueError, "`iterations` must be a whole number of at least 1, got 0"),
        ({"iterations": 2.5}, TypeError, "`iterations`"),
        ({"iterations": True}, ValueError, "`iterations`"),
        ({"background": -1}, ValueError, "`background` must be at least 0"),
        ({"background": np.inf}, ValueError, "`background` must be finite"),
        ({"background": "dark"}, TypeError, "`background` must be a number"),
        ({"acceleration": "biggs"}, ValueError, "`acceleration`"),
        ({"tolerance": 0}, ValueError, "`tolerance`"),
        ({"tolerance": 1.0}, ValueError, "`tolerance`"),
        ({"start": 0}, ValueError, "`start` must be above 0"),
        ({"depth": -1}, ValueError, "`depth`"),
        ({"depth": (4, 4)}, ValueError, "`depth`.*3-dimensional"),
        ({"depth": 1.5}, TypeError, "`depth`"),
    ],
)
def test_bad_parameters_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RichardsonLucy(**{"psf": PSF, **arguments})


def test_check_names_what_does_not_fit():
    operator = RichardsonLucy(PSF)
    operator.check((64, 64, 64), np.dtype(np.uint16))
    with pytest.raises(ValueError, match=r"`psf` has 3 dimensions .* 2 spatial axes"):
        operator.check((64, 64), np.dtype(np.uint16))
    with pytest.raises(ValueError, match="float64; accepted are"):
        operator.check((64, 64, 64), np.dtype(np.float64))


def test_start_is_the_mean_above_background_and_always_positive():
    assert RichardsonLucy(PSF).needs == {"mean"}
    resolved = RichardsonLucy(PSF, background=10.0).resolve({"mean": 35.0})
    assert resolved.needs == frozenset()
    assert resolved.start == 25.0
    for mean, background in [(5.0, 10.0), (0.0, 0.0), (-3.0, 0.0)]:
        assert 0 < RichardsonLucy(PSF, background=background).resolve({"mean": mean}).start <= 10


def test_plain_iterations_forget_the_start_value(volume):
    image, inside = volume[:32, :40, :40], ((False, False),) * 3
    a, b = (
        richardson_lucy(image, SKEWED, iterations=20, start=start, acceleration=None, at_border=inside)
        for start in (5.0, 50.0)
    )
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * a.max())


def test_resolving_does_not_change_the_psf():
    operator = RichardsonLucy(skewed((9, 9, 9)))
    assert operator.resolve({"mean": 3.0}).describe()["psf_sha256"] == operator.describe()["psf_sha256"]


def test_unresolved_operator_refuses_a_block():
    image = np.ones((8, 8, 8), np.float32)
    with pytest.raises(ValueError, match="`start` is not decided"):
        RichardsonLucy(PSF)(image, Block.whole(image.shape))


def test_image_must_be_what_the_block_reads():
    with pytest.raises(ValueError, match=r"`image` has shape \(8, 8, 7\) but .* reads \(8, 8, 8\)"):
        RichardsonLucy(PSF, start=1.0)(np.ones((8, 8, 7), np.float32), Block.whole((8, 8, 8)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_name_the_block(value):
    image = np.ones((8, 8, 8), np.float32)
    image[3, 4, 5] = value
    with pytest.raises(NonFiniteError, match=r"block \(0, 0, 0\) \(core 0:8, 0:8, 0:8\)"):
        RichardsonLucy(PSF, start=1.0)(image, Block.whole(image.shape))


def test_depth_follows_the_psf_and_never_exceeds_the_exact_depth():
    wide = gaussian((4.0, 2.0, 0.0))
    few, many = (RichardsonLucy(wide, n).halo((999,) * 3).depth for n in (10, 50))
    assert few[0] > few[1] > few[2] == 0
    assert all(b >= a for a, b in zip(few, many, strict=True))
    assert RichardsonLucy(wide, 1, tolerance=1e-6).halo((999,) * 3).depth == (32, 16, 0)
    tighter = RichardsonLucy(wide, 10, tolerance=1e-4).halo((999,) * 3).depth
    assert tighter[0] > few[0]
    assert RichardsonLucy(wide, 10, depth=(3, 2, 1)).halo((999,) * 3) == Halo((3, 2, 1), fast=True)


def test_depth_covers_a_broad_skirt():
    skirted = gaussian((1.0, 1.0), tail=0.3, tail_sigma=(12.0, 12.0))
    from chunkrestore.psf import energy_radius

    depth = RichardsonLucy(skirted, 10).halo((999, 999)).depth
    assert all(d >= 1.5 * r for d, r in zip(depth, energy_radius(skirted), strict=True))


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
@pytest.mark.parametrize("shape", [(64, 120, 130), (900, 910)])
def test_memory_formula_bounds_the_measured_peak(monkeypatch, shape, acceleration):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # each thread has temporaries
    psf = gaussian((2.0, 1.5, 1.5)[-len(shape) :])
    operator = RichardsonLucy(psf, 3, acceleration=acceleration, start=10.0)
    image = np.random.default_rng(15).poisson(10, shape).astype(np.uint16)
    operator(image)
    LAST_BLUR.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The formula counts 4 MiB for temporaries whatever the block, beside the lattice.
    predicted = operator.memory_nbytes(shape)
    assert peak <= predicted <= 1.1 * peak + 4 * 2**20


def test_operators_compare_and_hash_by_what_they_compute():
    same, other = RichardsonLucy(PSF.copy()), RichardsonLucy(skewed((5, 5, 5)))
    assert RichardsonLucy(PSF) == same
    assert hash(RichardsonLucy(PSF)) == hash(same)
    assert len({RichardsonLucy(PSF), same, other, RichardsonLucy(PSF, 10)}) == 3
    assert RichardsonLucy(PSF) != "richardson-lucy"


def test_pickle_is_small_and_equal_and_the_psf_cannot_be_changed():
    operator = RichardsonLucy(PSF, start=3.0)
    operator(np.ones((40, 40, 40), np.float32))
    assert len(pickle.dumps(operator)) < PSF.nbytes + 2000
    assert pickle.loads(pickle.dumps(operator)) == operator
    with pytest.raises(ValueError, match="read-only"):
        operator.psf[0, 0, 0] = 1


def test_one_transfer_function_serves_blocks_of_one_shape(monkeypatch):
    made = []
    make = Blur.from_psf
    monkeypatch.setattr(Blur, "from_psf", lambda *a: made.append(a[1]) or make(*a))
    operator = RichardsonLucy(skewed((5, 5, 5), seed=16), 1, start=1.0)
    image = np.ones((30, 24, 24), np.float32)
    operator(image)
    operator(image)
    pickle.loads(pickle.dumps(operator))(image)
    assert len(made) == 1
    operator(image[:20])
    assert len(made) == 2


def test_describe_identifies_the_result():
    import json

    operator = RichardsonLucy(PSF, 7, background=2.0, depth=5, start=1.5)
    described = json.loads(json.dumps(operator.describe()))
    assert described["operator"] == "richardson-lucy"
    assert (described["iterations"], described["background"], described["depth"]) == (7, 2.0, [5, 5, 5])
    assert len(described["psf_sha256"]) == 64


def test_benchmark_runs_on_a_tiny_volume(tmp_path):
    import json
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).parents[1] / "benchmarks" / "richardson_lucy.py"
    options = [
        "--shape",
        "20",
        "24",
        "26",
        "--iterations",
        "2",
        "--repeats",
        "1",
        "--output",
        tmp_path / "r.json",
    ]
    subprocess.run([sys.executable, script, *options], check=True, capture_output=True)
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"commit", "cpu", "cores", "versions"} <= set(result)
    assert result["contenders"]["chunkrestore, plain"]["psnr_db"] > result["input_psnr_db"]
