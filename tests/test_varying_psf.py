"""Point spread functions that change with position: weights, blur and adjoint, blocks, and what it is good for."""

import itertools
import json
import pickle
import tracemalloc

import array_api_strict
import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import assemble, seam_rms

import chunkrestore as cr
from chunkrestore.grid import BlockGrid
from chunkrestore.kernels.blur import BlendedBlur, Blur
from chunkrestore.operators.deconvolution import LAST_BLUR
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian, prepare
from chunkrestore.psf.varying import PsfField


def skewed(shape, seed):
    """Return an asymmetric point spread function."""
    return prepare(np.random.default_rng(seed).uniform(0.1, 1, shape))


def blended(field, shape, lattice, origin=None, reference=None):
    """Return the blur of a region of the volume."""
    reference = np.zeros(1, np.float32) if reference is None else reference
    weights = field.weights(origin or (0,) * field.ndim, shape, lattice)
    xp = reference.__array_namespace__()
    return BlendedBlur(
        tuple(Blur.from_psf(field.psfs[k], lattice, reference) for k in weights),
        tuple(tuple(xp.asarray(f) for f in factors) for factors in weights.values()),
    )


def total_weights(weights, lattice):
    """Return per point spread function its weight at every voxel, float64."""
    return {
        k: np.broadcast_to(np.prod(np.broadcast_arrays(*map(np.float64, factors)), axis=0), lattice)
        for k, factors in weights.items()
    }


def spread(truth, psfs, weights):
    """Return `truth` with every voxel spread by its own blend; nothing outside comes in. Double precision."""
    result = np.zeros([n + p - 1 for n, p in zip(truth.shape, psfs[0].shape, strict=True)])
    for voxel in np.ndindex(truth.shape):
        own = sum(w[voxel] * psfs[k].astype(np.float64) for k, w in weights.items())
        around = tuple(slice(i, i + p) for i, p in zip(voxel, own.shape, strict=True))
        result[around] += truth[voxel] * own
    return result[tuple(slice(p // 2, p // 2 + n) for p, n in zip(psfs[0].shape, truth.shape, strict=True))]


def deepening(n=5, length=64):
    """Return a field whose point spread function widens along z from 1 to 3 voxels."""
    depths = np.linspace(0, length - 1, n)
    widths = np.linspace(1.0, 3.0, n)
    return PsfField([gaussian((w, w / 2, w / 2)) for w in widths], [(z, 0, 0) for z in depths])


def scene(shape, seed=1):
    """Return balls and points on a dim ground."""
    rng, grid = np.random.default_rng(seed), np.indices(shape)
    truth = np.full(shape, 5.0)
    for _ in range(int(np.prod(shape)) // 1500):
        centre = [rng.uniform(0, n) for n in shape]
        ball = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) < rng.uniform(1, 5) ** 2
        truth[ball] = rng.uniform(50, 300)
    return truth


def seen_through(field, truth):
    """Return the image of a field along z: planes spread one by one (SciPy), independent of `BlendedBlur`."""
    from scipy import signal

    weights = total_weights(field.weights((0,) * 3, truth.shape, truth.shape), truth.shape)
    total = 0.0
    for k, weight in weights.items():
        total = total + signal.fftconvolve(truth * weight, field.psfs[k].astype(np.float64), mode="same")
    return np.maximum(total, 0)


GRID = PsfField(
    [skewed((3, 5, 3), seed) for seed in range(6)],
    list(itertools.product((2.0,), (0.0, 7.5), (-1.0, 6.0, 10.0))),
)
SCATTERED = PsfField(
    [skewed((3, 5, 3), seed) for seed in range(4)], [(1, 2, 3), (5, 9, 0), (2.5, 4, 11), (0, 10, 9)]
)
FLAT = PsfField([skewed((1, 5, 3), seed) for seed in range(3)], [(0, 2, 3), (0, 9, 0), (0, 4, 11)])

# --- weights -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.sets(st.tuples(*(st.integers(-20, 60) for _ in range(3))), min_size=1, max_size=6),
    st.booleans(),
    st.tuples(*(st.integers(0, 50) for _ in range(3))),
    st.tuples(*(st.integers(1, 9) for _ in range(3))),
    st.tuples(*(st.integers(0, 7) for _ in range(3))),
)
def test_weights_sum_to_one_and_follow_the_volume(places, rectilinear, origin, shape, more):
    if rectilinear:
        axes = [sorted({place[axis] for place in places})[:2] for axis in range(3)]
        places = set(itertools.product(*axes))
    field = PsfField([np.ones((1, 1, 1))] * len(places), sorted(places))
    lattice = tuple(n + m for n, m in zip(shape, more, strict=True))
    weights = total_weights(field.weights(origin, shape, lattice), lattice)
    np.testing.assert_allclose(sum(weights.values()), 1, rtol=0, atol=1e-6)
    assert all((w >= 0).all() for w in weights.values())
    # A region sees the weights that the whole volume has there.
    volume = tuple(o + n for o, n in zip(origin, shape, strict=True))
    whole = total_weights(field.weights((0, 0, 0), volume, volume), volume)
    region = tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))
    inside = tuple(slice(n) for n in shape)
    for k in set(whole) | set(weights):
        own = weights.get(k, np.zeros(lattice))[inside]
        np.testing.assert_allclose(own, whole.get(k, np.zeros(volume))[region], rtol=0, atol=1e-6)


@pytest.mark.parametrize("field", [GRID, SCATTERED, FLAT])
def test_at_its_position_a_psf_has_all_the_weight(field):
    shape = (8, 12, 12)
    weights = total_weights(field.weights((0, 0, 0), shape, shape), shape)
    for k, place in enumerate(field.positions):
        if all(x == int(x) and 0 <= x < n for x, n in zip(place, shape, strict=True)):
            at = tuple(map(int, place))
            assert weights[k][at] == pytest.approx(1, abs=1e-5)


def test_grid_weights_are_linear_between_and_constant_beyond_positions():
    field = PsfField([np.ones((1, 1))] * 3, [(2, 0), (6, 0), (14, 0)])
    first, second, third = (
        w[:, 0] for w in total_weights(field.weights((0, 0), (18, 4), (18, 4)), (18, 4)).values()
    )
    np.testing.assert_allclose(first[:7], [1, 1, 1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    np.testing.assert_allclose(second[6:15], np.linspace(1, 0, 9), atol=1e-6)
    np.testing.assert_allclose(third[14:], 1, atol=1e-6)


def test_the_order_of_positions_does_not_matter():
    order = [3, 0, 5, 1, 4, 2]
    shuffled = PsfField([GRID.psfs[k] for k in order], [GRID.positions[k] for k in order])
    image = np.random.default_rng(1).random((6, 12, 14), dtype=np.float32)
    a, b = (blended(field, image.shape, image.shape).forward(image) for field in (GRID, shuffled))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_scattered_weights_change_smoothly_and_favour_the_nearest():
    shape = (1, 60, 60)
    places = [(0, 5, 5), (0, 50, 10), (0, 20, 52), (0, 55, 55)]
    field = PsfField([np.ones((1, 1, 1))] * 4, places)
    weights = np.stack(list(total_weights(field.weights((0, 0, 0), shape, shape), shape).values()))[:, 0]
    assert max(np.abs(np.diff(weights, axis=axis)).max() for axis in (1, 2)) < 0.15
    grid = np.indices((60, 60))
    distance = np.stack([np.hypot(grid[0] - y, grid[1] - x) for _, y, x in places])
    two = np.sort(distance, axis=0)
    clear = two[0] < 0.5 * two[1]
    assert (weights.argmax(axis=0) == distance.argmin(axis=0))[clear].all()
    assert weights.max(axis=0)[clear].min() > 0.75


def test_what_holds_at_the_outermost_positions_goes_on_beyond_them():
    # Beads on a cover slip, and a volume that goes on far above it.
    field = PsfField([np.ones((1, 1, 1))] * 3, [(2, 5, 5), (2, 50, 10), (2, 20, 52)])
    shape = (100, 60, 60)
    weights = total_weights(field.weights((0, 0, 0), shape, shape), shape)
    for weight in weights.values():
        np.testing.assert_allclose(weight, np.broadcast_to(weight[2], shape), atol=1e-6)
    field = PsfField([np.ones((1, 1))] * 3, [(10, 10), (30, 12), (12, 30)])
    (weight, *_) = total_weights(field.weights((0, 0), (40, 40), (40, 40)), (40, 40)).values()
    np.testing.assert_allclose(weight[:10, 10], weight[10, 10], atol=1e-6)


# --- the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [GRID, SCATTERED, FLAT])
def test_every_voxel_is_spread_by_its_own_psf(field):
    shape = (6, 9, 11)
    lattice = tuple(n + p + 1 if p > 1 else n for n, p in zip(shape, field.shape, strict=True))
    truth = np.random.default_rng(2).gamma(1, 10, shape).astype(np.float32)
    weights = total_weights(field.weights((0, 0, 0), shape, lattice), lattice)
    blur = blended(field, shape, lattice)
    padded = np.zeros(lattice, np.float32)
    padded[tuple(slice(n) for n in shape)] = truth
    expected = spread(truth, field.psfs, weights)
    np.testing.assert_allclose(blur.forward(padded, shape), expected, rtol=0, atol=1e-6 * expected.max())
    np.testing.assert_array_equal(blur.forward(truth, shape), blur.forward(padded, shape))


@pytest.mark.parametrize("field", [GRID, SCATTERED, FLAT])
def test_back_projection_is_the_adjoint_of_the_blur(field):
    rng, lattice = np.random.default_rng(3), (10, 15, 18)
    blur = blended(field, (8, 12, 13), lattice, origin=(1, 0, 2))
    x, y = rng.random((2, *lattice), dtype=np.float32)
    forward = np.vdot(blur.forward(x).astype(np.float64), y)
    assert forward == pytest.approx(np.vdot(x, blur.adjoint(y).astype(np.float64)), rel=1e-6)
    corner = (8, 12, 13)
    np.testing.assert_array_equal(blur.adjoint(y, corner), blur.adjoint(y)[tuple(slice(n) for n in corner)])


@pytest.mark.parametrize("field", [GRID, SCATTERED])
def test_strict_array_namespace_gives_the_same_numbers(field):
    image = np.random.default_rng(4).poisson(30, (8, 12, 14)).astype(np.uint16)
    operator = RichardsonLucy(field, 4, start=30.0)
    result = operator(array_api_strict.asarray(image))
    assert result.dtype == array_api_strict.float32
    expected = operator(image)
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    "positions", [[(0, 0, 0), (9, 0, 0), (20, 0, 0)], [(0, 1, 2), (9, 14, 3), (4, 7, 15)]]
)
def test_equal_psfs_give_the_plain_result(positions):
    psf = skewed((5, 4, 7), 5)
    image = np.random.default_rng(6).poisson(40, (20, 18, 22)).astype(np.uint16)
    plain = RichardsonLucy(psf, 8, start=40.0)(image)
    field = PsfField([psf] * 3, positions)
    varying = RichardsonLucy(field, 8, start=40.0)(image)
    np.testing.assert_allclose(varying, plain, rtol=0, atol=2e-5 * plain.max())


def test_psfs_of_odd_and_even_shapes_share_their_centre():
    shapes = [(5, 5), (4, 6), (3, 8), (7, 2), (1, 1)]
    points = []
    for shape in shapes:
        psf = np.zeros(shape)
        psf[tuple(n // 2 for n in shape)] = 1
        points.append(psf)
    field = PsfField(points, [(10 * k, 0) for k in range(len(shapes))])
    assert field.shape == (7, 9)
    for psf in field.psfs:
        assert psf[3, 4] == 1
    image = np.random.default_rng(7).random((12, 20), dtype=np.float32)
    np.testing.assert_allclose(blended(field, (12, 20), (12, 20)).forward(image), image, atol=1e-6)


def test_constant_stays_constant_with_equal_psfs():
    field = PsfField([skewed((5, 5, 5), 8)] * 2, [(0, 0, 0), (20, 0, 0)])
    np.testing.assert_allclose(RichardsonLucy(field, 15)(np.full((20, 18, 16), 50, np.uint8)), 50, rtol=1e-5)


def test_light_is_kept():
    field, truth = deepening(length=40), np.zeros((40, 24, 24))
    truth[15:25, 9:15, 9:15] = 100
    image = seen_through(field, truth).astype(np.float32)
    result = RichardsonLucy(field, 20)(image)
    assert result.sum(dtype=np.float64) == pytest.approx(truth.sum(), rel=0.005)


def test_the_field_restores_better_than_any_one_psf():
    field, truth = deepening(length=48), scene((48, 32, 32))
    image = np.random.default_rng(9).poisson(seen_through(field, truth)).astype(np.uint16)

    def error(psf):
        return np.square(RichardsonLucy(psf, 20, start=40.0)(image) - truth)[4:-4, 4:-4, 4:-4].mean()

    assert error(field) < 0.95 * min(error(psf) for psf in field.psfs)


# --- tiled against untiled ---------------------------------------------------------------------------------


def light_sheet(length=80):
    """Return a field along x: sharp at the waist of the sheet, twice as long in z away from it."""
    return PsfField(
        [gaussian((w, 0.8, 0.8)) for w in (2.0, 1.0, 2.0)], [(0, 0, x) for x in (0, length // 2, length - 1)]
    )


@pytest.mark.parametrize("name", ["depth", "light sheet", "scattered"])
def test_tiled_equals_untiled_at_default_depth(name):
    if name == "depth":
        field, edges, shape = deepening(4, 72), ((0, 20, 45, 72), (0, 16, 32), (0, 32)), (72, 32, 32)
    elif name == "light sheet":
        field, edges, shape = light_sheet(80), ((0, 13, 28), (0, 24), (0, 30, 52, 80)), (28, 24, 80)
    else:
        psfs = [gaussian((1.0, 0.7, 1.2)), gaussian((1.0, 1.3, 0.7)), gaussian((1.5, 0.7, 0.7), tail=0.1)]
        field = PsfField(psfs, [(3, 5, 8), (20, 50, 20), (10, 30, 55)])
        edges, shape = ((0, 24), (0, 20, 60), (0, 33, 60)), (24, 60, 60)
    image = np.random.default_rng(10).poisson(scene(shape)).astype(np.uint16)
    operator = RichardsonLucy(field, 15, start=float(image.mean()))
    grid = BlockGrid(edges, operator.halo(shape))
    assert seam_rms(assemble(operator, image, grid), operator(image), grid) <= 1e-3


def test_exact_depth_leaves_rounding_only():
    field = PsfField([skewed((3, 5), 1), skewed((5, 3), 2), skewed((3, 3), 3)], [(5, 8), (60, 20), (30, 70)])
    iterations = 3
    image = np.random.default_rng(11).poisson(30, (70, 80)).astype(np.uint16)
    operator = RichardsonLucy(field, iterations, depth=2 * iterations * 2, start=30.0)
    grid = BlockGrid.regular(image.shape, (18, 23), operator.halo(image.shape))
    whole = operator(image)
    np.testing.assert_allclose(assemble(operator, image, grid), whole, rtol=0, atol=2e-5 * whole.max())


def test_blocks_leave_out_psfs_that_do_not_reach_them():
    field = deepening(5, 100)
    assert list(field.weights((0, 0, 0), (20, 8, 8), (20, 8, 8))) == [0, 1]
    assert list(field.weights((60, 0, 0), (10, 8, 8), (12, 8, 8))) == [2, 3]


def test_depth_is_that_of_the_widest_psf():
    field = deepening()
    depths = [RichardsonLucy(psf).halo((999,) * 3).depth for psf in field.psfs]
    assert RichardsonLucy(field).halo((999,) * 3).depth == tuple(map(max, zip(*depths, strict=True)))


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
@pytest.mark.parametrize(
    "positions", [[(0, 0, 0), (20, 0, 0), (40, 0, 0)], [(0, 1, 2), (9, 80, 3), (40, 7, 90)]]
)
def test_memory_formula_bounds_the_measured_peak(positions, acceleration):
    shape = (40, 90, 100)
    psfs = [gaussian(sigma) for sigma in [(2.0, 1, 1), (1, 1.5, 1.5), (1, 1, 1)]]
    operator = RichardsonLucy(PsfField(psfs, positions), 2, acceleration=acceleration, start=10.0)
    image = np.random.default_rng(12).poisson(10, shape).astype(np.uint16)
    operator(image)
    LAST_BLUR.get(None, lambda: None)
    tracemalloc.start()
    operator(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= operator.memory_nbytes(shape) <= 1.15 * peak + 4 * 2**20


# --- the field as a parameter ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("psfs", "positions", "error", "message"),
    [
        ([], [], ValueError, "`psfs` is empty"),
        ([np.ones((3, 3))], [(0, 0), (1, 1)], ValueError, "`positions` must hold 2 finite numbers"),
        ([np.ones((3, 3))], [(0, 0, 0)], ValueError, "`positions` must hold 2 finite numbers"),
        ([np.ones((3, 3))], [(0, np.nan)], ValueError, "`positions` must hold 2 finite numbers"),
        ([np.ones((3, 3))] * 2, [(0, 0), (0, 0)], ValueError, "`positions` names one place twice"),
        ([np.ones((3, 3)), np.ones((3, 3, 3))], [(0, 0), (1, 1)], ValueError, "as many axes"),
        ([-np.ones((3, 3))], [(0, 0)], ValueError, "negative"),
        (["psf.tif"], [(0, 0)], TypeError, "read_psf"),
    ],
)
def test_bad_fields_are_named(psfs, positions, error, message):
    with pytest.raises(error, match=message):
        PsfField(psfs, positions)


def test_operators_tell_fields_apart_and_pickle():
    field = deepening(3)
    moved = PsfField(field.psfs, [(z + 1, y, x) for z, y, x in field.positions])
    one, same, other = (RichardsonLucy(f) for f in (field, deepening(3), moved))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != RichardsonLucy(field.psfs[0])
    assert json.loads(json.dumps(one.describe()))["psf_shape"] == list(field.shape)
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_shifted_field_is_that_of_a_region():
    shape, origin = (8, 10, 12), (3, 2, 4)
    for field in (GRID, SCATTERED):
        here = total_weights(field.weights(origin, shape, shape), shape)
        there = total_weights(field.shifted(origin).weights((0, 0, 0), shape, shape), shape)
        for k in here:
            np.testing.assert_allclose(there[k], here[k], atol=1e-6)


# --- one point spread function for planes, stacks and time series ------------------------------------------


def poisson(shape, seed=13):
    return np.random.default_rng(seed).poisson(40, shape).astype(np.uint16)


@pytest.fixture
def threads():
    with dask.config.set(scheduler="threads"):
        yield


def test_a_psf_of_one_plane_deconvolves_plane_by_plane():
    image, psf = poisson((5, 24, 26)), skewed((5, 4), 14)
    stack = RichardsonLucy(psf[None], 8, start=40.0)(image)
    planes = np.stack([RichardsonLucy(psf, 8, start=40.0)(plane) for plane in image])
    np.testing.assert_allclose(stack, planes, rtol=0, atol=2e-5 * planes.max())
    assert RichardsonLucy(psf[None], 8).halo(image.shape).depth[0] == 0


@pytest.mark.parametrize(("axes", "lead"), [("tyx", (3,)), ("tczyx", (2, 2))])
def test_time_points_and_channels_equal_one_by_one(threads, axes, lead):
    space = (28, 30) if axes == "tyx" else (10, 20, 22)
    psf = skewed((3, 3, 3)[-len(space) :], 15)
    image = poisson((*lead, *space))
    image[-1] *= 3
    depth = 2 * 4  # exact for 4 iterations of radius 1
    chunks = (*((1,) * len(lead)), *(max(5, n // 2) for n in space))
    lazy = cr.deconvolve(da.from_array(image, chunks=chunks), psf, iterations=4, depth=depth, axes=axes)
    assert lazy.dtype == np.float32
    expected = np.stack([RichardsonLucy(psf, 4)(one) for one in image.reshape(-1, *space)]).reshape(
        image.shape
    )
    np.testing.assert_allclose(lazy.compute(), expected, rtol=0, atol=2e-5 * expected.max())
    eager = cr.deconvolve(image, psf, iterations=4, axes=axes)
    np.testing.assert_array_equal(eager, expected)


def test_stacks_of_a_time_series_take_a_psf_of_one_plane(threads):
    image, psf = poisson((2, 4, 20, 22)), skewed((3, 5), 16)
    lazy = cr.deconvolve(
        da.from_array(image, chunks=(1, 2, 20, 11)), psf[None], iterations=3, depth=(0, 6, 12), axes="tzyx"
    )
    expected = np.stack(
        [[RichardsonLucy(psf, 3, start=float(stack.mean()))(plane) for plane in stack] for stack in image]
    )
    np.testing.assert_allclose(lazy.compute(), expected, rtol=0, atol=2e-5 * expected.max())
