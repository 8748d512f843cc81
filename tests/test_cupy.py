"""The same kernels on a CUDA device; reported as skipped where there is none."""

import numpy as np
import pytest

from chunkrestore import backend
from chunkrestore.grid import Block, BlockGrid
from chunkrestore.kernels.blur import Blur
from chunkrestore.kernels.richardson_lucy import richardson_lucy
from chunkrestore.operators.richardson_lucy import RichardsonLucy
from chunkrestore.psf import gaussian

MISSING = backend.missing_device()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

PSF = gaussian((2.0, 1.3, 1.3), tail=0.1)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).poisson(50, (40, 51, 62)).astype(np.uint16)


def test_arrays_make_the_round_trip(image):
    on_device = backend.to_device(image, "cuda")
    assert backend.namespace(on_device) is not backend.namespace(image)
    np.testing.assert_array_equal(backend.to_numpy(on_device), image)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2), (0,)])
def test_device_transforms_are_those_of_the_host(image, axes):
    values = image.astype(np.float32)
    on_device = backend.to_device(values, "cuda")
    device_fft, host_fft = (backend.fft(backend.namespace(a)) for a in (on_device, values))
    spectrum = device_fft.rfftn(on_device, values.shape, axes)
    expected = host_fft.rfftn(values, values.shape, axes)
    np.testing.assert_allclose(
        backend.to_numpy(spectrum), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    back = device_fft.irfftn(spectrum, values.shape, axes, values.shape)
    assert back.dtype == np.float32
    np.testing.assert_allclose(backend.to_numpy(back), values, rtol=0, atol=1e-3)


def test_adjoint_holds_on_the_device():
    rng = np.random.default_rng(2)
    x, y = (backend.to_device(rng.random((24, 30, 28), dtype=np.float32), "cuda") for _ in range(2))
    blur = Blur.from_psf(gaussian((1.5, 1.0, 1.0)), (24, 30, 28), x)
    forward = np.vdot(backend.to_numpy(blur.forward(x)).astype(np.float64), backend.to_numpy(y))
    backward = np.vdot(backend.to_numpy(x).astype(np.float64), backend.to_numpy(blur.adjoint(y)))
    assert forward == pytest.approx(backward, rel=1e-6)


@pytest.mark.parametrize("acceleration", ["heavy-ball", None])
def test_device_result_is_that_of_the_host_and_stays_on_the_device(image, acceleration):
    options = {"iterations": 20, "start": 50.0, "background": 2.0, "acceleration": acceleration}
    on_device = backend.to_device(image, "cuda")
    result = richardson_lucy(on_device, PSF, **options)
    assert type(result) is type(on_device)
    assert result.dtype == np.float32
    expected = richardson_lucy(image, PSF, **options)
    np.testing.assert_allclose(backend.to_numpy(result), expected, rtol=0, atol=1e-4 * expected.max())
    np.testing.assert_array_equal(backend.to_numpy(on_device), image)


def test_blocks_on_the_device_meet_without_seams(image):
    operator = RichardsonLucy(PSF, 5, start=50.0)
    on_device = backend.to_device(image, "cuda")
    whole = backend.to_numpy(operator(on_device, Block.whole(image.shape)))
    tiled = np.empty_like(whole)
    for block in BlockGrid.regular(image.shape, (20, 30, 30), operator.halo(image.shape)):
        tiled[block.core] = backend.to_numpy(operator(on_device[block.read], block)[block.trim])
    assert np.sqrt(np.square(tiled - whole).mean()) < 1e-3 * np.ptp(whole)


def test_free_memory_of_the_device_is_known():
    assert 0 < backend.free_memory_nbytes("cuda") < 2**45
