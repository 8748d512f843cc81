"""Arrays, transforms, transfers and free memory."""

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore import backend

NAMESPACES = [np, array_api_strict]


@pytest.mark.parametrize("xp", NAMESPACES, ids=["numpy", "strict"])
@pytest.mark.parametrize("shape", [(6, 8, 10), (5, 7, 9), (8, 3), (1, 12)])
def test_real_transforms_invert_each_other_and_keep_single_precision(xp, shape):
    image = np.random.default_rng(1).random(shape, dtype=np.float32)
    for axes in {tuple(range(len(shape))), (0,), (len(shape) - 1,)}:
        fft = backend.fft(backend.namespace(xp.asarray(image)))
        spectrum = fft.rfftn(xp.asarray(image), shape, axes)
        assert str(spectrum.dtype).endswith("complex64")
        np.testing.assert_allclose(
            np.asarray(spectrum), np.fft.rfftn(image.astype(np.float64), axes=axes), rtol=0, atol=1e-4
        )
        back = fft.irfftn(spectrum, shape, axes, shape)
        assert str(back.dtype).endswith("float32")
        np.testing.assert_allclose(np.asarray(back), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("xp", NAMESPACES, ids=["numpy", "strict"])
@pytest.mark.parametrize(("shape", "lattice"), [((5, 6, 7), (8, 6, 12)), ((4, 9), (7, 10)), ((1, 5), (1, 9))])
def test_transforms_of_a_corner_are_those_of_the_padded_lattice(xp, shape, lattice):
    rng = np.random.default_rng(3)
    fft, axes = backend.fft(backend.namespace(xp.asarray(rng.random(3)))), tuple(range(len(shape)))
    corner, whole = tuple(slice(n) for n in shape), rng.random(lattice, dtype=np.float32)
    padded = np.zeros(lattice)
    padded[corner] = whole[corner]
    spectrum = fft.rfftn(xp.asarray(whole[corner].copy()), lattice, axes)
    np.testing.assert_allclose(np.asarray(spectrum), np.fft.rfftn(padded), rtol=0, atol=1e-4)
    cropped = fft.irfftn(fft.rfftn(xp.asarray(whole), lattice, axes), lattice, axes, shape)
    np.testing.assert_allclose(np.asarray(cropped), whole[corner], rtol=0, atol=1e-6)


def test_forward_transform_keeps_its_input():
    image = np.random.default_rng(2).random((6, 8), dtype=np.float32)
    before = image.copy()
    backend.fft(backend.namespace(image)).rfftn(image, image.shape, (0, 1))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("xp", NAMESPACES, ids=["numpy", "strict"])
@pytest.mark.parametrize("shape", [(7, 5), (40, 130, 128)])
def test_elementwise_is_the_function_of_whole_arrays_in_place(xp, shape):
    rng = np.random.default_rng(4)
    a, b = (rng.random(shape, dtype=np.float32) for _ in range(2))
    row = rng.random((1, *shape[1:]), dtype=np.float32)
    out = xp.asarray(a.copy())
    result = backend.elementwise(
        lambda _, x, y, z, scale: x * y + z * scale, out, out, xp.asarray(b), xp.asarray(row), 3.0
    )
    assert result is out
    np.testing.assert_allclose(np.asarray(result), a * b + row * np.float32(3), rtol=1e-6)


def test_an_error_in_a_slab_is_raised():
    def fail(_, x):
        raise FloatingPointError("slab")

    with pytest.raises(FloatingPointError, match="slab"):
        backend.elementwise(fail, np.zeros((64, 128, 128), np.float32), 1.0)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=3))
def test_slabs_cover_the_first_axis_once_and_in_order(shape):
    xp = backend.namespace(np.zeros(1))
    rows = [row for slab in backend.slabs(xp, shape) for row in range(*slab[0].indices(shape[0]))]
    assert rows == list(range(shape[0]))


def test_slabs_of_a_large_volume_stay_small():
    first = next(backend.slabs(backend.namespace(np.zeros(1)), (512, 128, 128)))[0]
    assert (first.stop - first.start) * 128 * 128 == 2**16


def test_host_arrays_are_not_copied():
    image = np.zeros((2, 3), np.float32)
    assert backend.to_numpy(image) is image
    assert backend.to_device(image, "cpu") is image


def test_strict_arrays_come_back_to_the_host():
    image = np.arange(6, dtype=np.uint16).reshape(2, 3)
    result = backend.to_numpy(array_api_strict.asarray(image))
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, image)


def test_arrays_follow_their_reference():
    reference = array_api_strict.asarray([1.0])
    assert isinstance(backend.asarray_like(np.ones(3), reference), type(reference))
    scalar = backend.full((), 2.0, reference)
    assert scalar.shape == ()
    assert scalar.dtype == array_api_strict.float32


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "CPU"])
def test_unknown_device_is_named(device):
    with pytest.raises(ValueError, match='`device` must be "cpu", "cuda"'):
        backend.to_device(np.zeros(1), device)


def test_missing_cupy_names_the_installation(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert "pip install" in backend.missing_device()
    with pytest.raises(ImportError, match=r'pip install "chunkrestore\[cupy\]"'):
        backend.to_device(np.zeros(1), "cuda")
    with pytest.raises(ImportError, match="pip install"):
        backend.free_memory_nbytes("cuda:0")


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("2,1", 2)])
def test_threads_follow_the_environment(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert backend.n_threads() == threads


@pytest.mark.parametrize("value", ["", "0", "many"])
def test_threads_default_to_the_usable_processors(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert backend.n_threads() >= 1


def test_free_memory_is_positive_and_below_a_petabyte():
    assert 0 < backend.free_memory_nbytes() < 2**50


def test_control_group_version_2_limits_memory_up_the_tree(tmp_path):
    outer, inner = tmp_path / "job", tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit, used in ((outer, "1000", "700"), (inner, "max", "600")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(used + "\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert backend._control_group_nbytes(tmp_path, own) == 1000 - 700 + 150


def test_control_group_version_1_limits_memory(tmp_path):
    folder = tmp_path / "memory" / "slurm"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("2000\n")
    (folder / "memory.usage_in_bytes").write_text("500\n")
    (folder / "memory.stat").write_text("total_inactive_file 100\n")
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,memory:/slurm\n3:pids:/\n")
    assert backend._control_group_nbytes(tmp_path, own) == 2000 - 500 + 100


def test_no_control_group_means_no_limit(tmp_path):
    assert backend._control_group_nbytes(tmp_path, tmp_path / "absent") == 2**63
