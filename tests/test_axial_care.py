"""Isotropic, upsampling and probabilistic CARE, block by block against CSBDeep's own prediction of the whole volume."""

import dask
import dask.array as da
import numpy as np
import pytest
from click.testing import CliRunner
from dying import Disk, Killed, bury
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import tree

import chunkrestore as cr
from chunkrestore import models
from chunkrestore.api import restore
from chunkrestore.cli import cli
from chunkrestore.grid import BlockGrid
from chunkrestore.ome_zarr import open_image, write_image
from chunkrestore.operators.axial import IsotropicCare, UpsamplingCare, care_of
from chunkrestore.operators.care import Care
from chunkrestore.operators.sampling import factor_of
from chunkrestore.operators.saved import load_operators, save_operators
from chunkrestore.pipeline import read_pipeline
from chunkrestore.statistics import of_array

pytest.importorskip("tensorflow", reason="needs the deep-learning extra")
csbdeep = pytest.importorskip("csbdeep", reason="needs the deep-learning extra")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SERIAL = {"cluster": "serial", "quiet": True}
TOLERANCE = 2e-6
# Of the normalised range, as for plain CARE (tests/test_care.py); 4e-7 was measured. Without halo it is 0.1.

ROOT = "isotropic", "mean"
"""What is a root of two results."""

FACTOR = 3.3
SHAPE = (13, 45, 38)
# 43 planes; no length is a multiple of the pooling grid, 4.
DARK = (16, 15, 14), 5
"""Of 80 planes SciPy makes the last one dark."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """CSBDeep's own classes with random weights (He initialisation), saved in folders."""
    from csbdeep.models import CARE, Config, IsotropicCARE, UpsamplingCARE

    basedir, rng, made = tmp_path_factory.mktemp("models"), np.random.default_rng(8), {}
    for name, kind, axes in (
        ("isotropic", IsotropicCARE, "YX"),
        ("upsampling", UpsamplingCARE, "ZYX"),
        ("plain", CARE, "ZYX"),
    ):
        config = Config(axes, probabilistic=True, unet_n_first=4, unet_n_depth=2, unet_kern_size=3)
        model = kind(config, name, basedir=str(basedir))
        weights = [
            rng.normal(0, np.sqrt(2 / np.prod(w.shape[:-1])) if w.ndim > 1 else 0.1, w.shape)
            for w in model.keras_model.get_weights()
        ]
        model.keras_model.set_weights(weights)
        model.keras_model.save_weights(str(model.logdir / "weights_best.h5"))
        made[name] = model
    return made


def volume(shape=SHAPE, dtype=np.uint16):
    rng = np.random.default_rng(11)
    smooth = np.abs(np.cumsum(rng.normal(size=shape), axis=-1))
    image = 100 + 20 * smooth + rng.normal(0, 30, shape)
    return np.clip(image, 0, None).astype(dtype)


def csbdeep_predict(model, image, factor):
    """Return mean and scale as CSBDeep predicts them for the whole volume."""
    from csbdeep.data import PadAndCropResizer, PercentileNormalizer

    factors = () if type(model).__name__ == "CARE" else (factor,)
    # A fresh normalizer and resizer per call: the stock default arguments are shared.
    predicted = model.predict_probabilistic(
        image, "ZYX", *factors, PercentileNormalizer(2, 99.8), PadAndCropResizer()
    )
    return {"mean": predicted.mean(), "scale": predicted.scale()}


OPERATORS = {"isotropic": IsotropicCare, "upsampling": UpsamplingCare}


@pytest.fixture(scope="module")
def expected(networks):
    return {name: csbdeep_predict(model, volume(), FACTOR) for name, model in networks.items()}


def distance(result, expected, image, *, root=False):
    low, high = np.percentile(image, (2, 99.8))
    assert (result.dtype, result.shape) == (np.float32, expected.shape)
    a, b = ((image.astype(np.float64) - low) / (high - low) for image in (result, expected))
    # A geometric mean is a root, which is steep at 0: what is compared is what it is the root of.
    return np.abs(a * a - b * b).max() / max(2 * b.max(), 1) if root else np.abs(a - b).max()


def tiled(operator, image, grid_of):
    """Return what an operator makes of a volume in memory block by block, resampled and measured as it asks for."""
    seen = operator.sampling.of_array(image)
    ready = operator.resolve(of_array(image if operator.sampling.measures_original else seen, operator.needs))
    result = np.full(seen.shape, np.nan, np.float32)
    for block in grid_of(seen.shape, ready.halo(seen.shape)):
        result[block.core] = ready(seen[block.read], block)[block.trim]
    return result


@pytest.mark.parametrize("output", ["mean", "scale"])
@pytest.mark.parametrize("name", [*OPERATORS, "plain"])
def test_untiled_equals_csbdeep(networks, expected, name, output):
    of_csbdeep = expected[name][output]
    low, high = np.percentile(volume(), (2, 99.8))
    assert of_csbdeep.std() > 0.02 * (high - low), "the network must do something visible"
    parameters = {} if name == "plain" else {"factor": FACTOR}
    operator = OPERATORS.get(name, Care)(networks[name], output=output, **parameters)
    assert distance(operator(volume()), of_csbdeep, volume(), root=(name, output) == ROOT) < TOLERANCE


@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
@settings(max_examples=6)
def test_tiled_equals_csbdeep_for_every_grid(networks, expected, name, data):
    output = data.draw(st.sampled_from(["mean", "scale"]))
    block_shape = data.draw(st.tuples(st.integers(11, 43), st.integers(20, 45), st.integers(17, 38)))
    operator = OPERATORS[name](networks[name], factor=FACTOR, output=output)
    result = tiled(operator, volume(), lambda shape, halo: BlockGrid.regular(shape, block_shape, halo))
    assert distance(result, expected[name][output], volume(), root=(name, output) == ROOT) < TOLERANCE


@pytest.mark.parametrize("name", OPERATORS)
def test_less_than_the_receptive_field_is_refused(networks, name):
    needed = OPERATORS[name](networks[name], factor=FACTOR).halo((43, 45, 38)).depth
    assert needed == (24, 24, 24)
    with pytest.raises(ValueError, match=r"`depth` 23 is less than what the network looks at"):
        OPERATORS[name](networks[name], factor=FACTOR, depth=23)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_a_dark_last_plane_is_the_same_as_csbdeeps(networks, name, dtype):
    """Where SciPy's zoom takes the last plane for one beyond the volume, CSBDeep's network sees 0 there."""
    shape, factor = DARK
    image, network = volume(shape, dtype), networks[name]
    operator = OPERATORS[name](network, factor=factor)
    assert not operator.sampling.of_array(image)[-1].any()
    of_csbdeep = csbdeep_predict(network, image, factor)["mean"]
    assert distance(operator(image), of_csbdeep, image, root=name == ROOT[0]) < TOLERANCE
    result = tiled(operator, image, lambda shape, halo: BlockGrid.regular(shape, (27, 15, 14), halo))
    assert distance(result, of_csbdeep, image, root=name == ROOT[0]) < TOLERANCE


@pytest.mark.parametrize("name", OPERATORS)
def test_dask_arrays_of_odd_chunks_are_restored_lazily(networks, expected, name):
    def refuse(*_arguments, **_options):
        raise AssertionError("computed")

    image = da.from_array(np.stack([volume(), volume()[::-1]]), chunks=((1, 1), (1, 9, 3), (20, 25), (38,)))
    keyword = {"isotropic": "isotropic", "upsampling": "upsample"}[name]
    with dask.config.set(scheduler=refuse):
        lazy = restore(image, networks[name], **{keyword: FACTOR})
    assert (lazy.shape, lazy.dtype) == ((2, 43, 45, 38), np.float32)
    first = lazy[0].compute(scheduler="sync")
    assert distance(first, expected[name]["mean"], volume(), root=name == ROOT[0]) < TOLERANCE
    eager = restore(np.stack([volume()] * 2), networks[name], **{keyword: FACTOR})
    assert eager.shape == lazy.shape
    assert distance(eager[1], expected[name]["mean"], volume(), root=name == ROOT[0]) < TOLERANCE


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    write_image(volume()[np.newaxis], path, axes="czyx", voxel_size=(1.65, 0.5, 0.5), channels=["GFP"])
    return open_image(path)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_job_equals_csbdeep_and_records_where_voxels_lie(networks, expected, stored, tmp_path, name):
    operator = OPERATORS[name](networks[name], factor=FACTOR)
    part = stored.select(region=tuple(slice(0, n) for n in SHAPE))
    assert cr.plan(operator, part).shape == (43, 45, 38)
    assert cr.estimate(operator, part, n_probes=1, cluster="serial").seconds > 0
    cr.run(operator, part, tmp_path / "out.zarr", block_shape=(20, 24, 38), **SERIAL)
    result = open_image(tmp_path / "out.zarr")
    assert (
        distance(
            result.data[0].compute(scheduler="sync"), expected[name]["mean"], volume(), root=name == ROOT[0]
        )
        < TOLERANCE
    )
    assert result.voxel_size == pytest.approx((1.65 * 12 / 42, 0.5, 0.5), rel=1e-15)
    assert result.translation == (0, 0, 0)
    assert result.channels == ("GFP",)


def test_a_killed_job_is_resumed_without_its_script(networks, stored, tmp_path):
    operator = IsotropicCare(networks["isotropic"], factor=FACTOR)
    arguments = {"block_shape": (20, 24, 38), **SERIAL}
    (tmp_path / "whole").mkdir()
    cr.run(operator, stored, tmp_path / "whole" / "out.zarr", **arguments)
    disk, output = Disk(), tmp_path / "o"
    output.mkdir()
    with pytest.raises(Killed), disk.dies_after(60, output):
        cr.run(operator, stored, output / "out.zarr", **arguments)
    bury(output / "out.zarr")
    assert cr.resume(output / "out.zarr", **SERIAL).n_resumed
    assert tree(output / "out.zarr") == tree(tmp_path / "whole" / "out.zarr")


def test_the_command_line_and_pipelines_take_a_factor_or_derive_it(networks, expected, stored, tmp_path):
    model = str(models.folder(networks["isotropic"]))
    arguments = ["restore", stored.path, str(tmp_path / "out.zarr"), "--model", model, "--isotropic", "auto"]
    done = CliRunner().invoke(cli, [*arguments, "--cluster", "serial", "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0
    result = open_image(tmp_path / "out.zarr").data[0].compute(scheduler="sync")
    assert distance(result, expected["isotropic"]["mean"], volume(), root=True) < TOLERANCE
    (tmp_path / "p.yaml").write_text(
        f"input: {stored.path}\noutput: out.zarr\nsteps:\n"
        f"  - {{operator: isotropic-care, model: {model}, factor: auto, output: scale}}\n"
    )
    (operator,), *_ = read_pipeline(tmp_path / "p.yaml")
    assert operator == IsotropicCare(model, factor=FACTOR, output="scale")


def test_operators_survive_saving(networks, tmp_path):
    operators = [UpsamplingCare(networks["upsampling"], factor=4, output="scale")]
    save_operators(operators, tmp_path)
    assert load_operators(tmp_path) == operators


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: Care(n["isotropic"]), "is of class IsotropicCARE; use the operator IsotropicCare"),
        (lambda n: IsotropicCare(n["upsampling"], factor=2), "is of class UpsamplingCARE; use the operator"),
        (lambda n: IsotropicCare(n["isotropic"], factor=0.5), "`factor` must be at least 1, got 0.5"),
        (lambda n: UpsamplingCare(n["upsampling"], factor="4"), "`factor` must be one number of at least 1"),
        (lambda n: Care(n["plain"], output="variance"), "`output` must be 'mean' or 'scale'"),
        (lambda n: Care("care3d-demo", output="scale"), "`output` 'scale' needs a probabilistic model"),
        (lambda n: care_of(n["plain"], upsample=2, isotropic=2), "exclude each other"),
        (
            lambda n: IsotropicCare(n["plain"], factor=2)(volume()),
            "has axes ZYXC; isotropic restoration takes",
        ),
        (lambda n: IsotropicCare(n["isotropic"], factor=2)(volume()[0]), "has 2 spatial axes"),
        (lambda n: UpsamplingCare(n["plain"], factor=2)(volume()[0]), "takes volumes"),
        (lambda n: UpsamplingCare(n["plain"], factor=2)(volume()[:1]), "both must be at least 2"),
        (lambda n: factor_of((0.1, 0.5, 0.5)), "`factor` 'auto' is below 1"),
        (lambda n: factor_of(None), "`factor` 'auto' needs an image with a voxel size"),
    ],
)
def test_what_does_not_fit_is_refused(networks, make, message):
    with pytest.raises(ValueError, match=message):
        make(networks)


def test_a_change_of_sampling_comes_first_in_a_job(networks, stored, tmp_path):
    operator = UpsamplingCare(networks["upsampling"], factor=2)
    with pytest.raises(
        ValueError, match="upsampling-care changes the sampling and must be the first operator"
    ):
        cr.run([Care("care3d-demo"), operator], stored, tmp_path / "out.zarr", **SERIAL)


def test_projecting_networks_are_refused_by_name(networks, tmp_path):
    from csbdeep.models.care_projection import ProjectionCARE, ProjectionConfig

    model = ProjectionCARE(ProjectionConfig(unet_n_first=4), "flat", basedir=str(tmp_path))
    model.keras_model.save_weights(str(model.logdir / "weights_best.h5"))
    with pytest.raises(ValueError, match="is a ProjectionCARE model, which makes a plane of a volume"):
        Care(tmp_path / "flat")
    with pytest.raises(ValueError, match="`model` is of class ProjectionCARE"):
        Care(model)
