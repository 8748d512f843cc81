"""Simulations as jobs: the volume in memory bit by bit, whatever kills them on the way."""

import json
import tracemalloc
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest
import zarr
from dying import Disk, Killed, bury, kind
from observing import tree

import chunkrestore as cr
from chunkrestore.cli import main
from chunkrestore.grid import BlockGrid
from chunkrestore.jobs.ledger import ManifestMismatchError
from chunkrestore.jobs.simulating import simulate
from chunkrestore.jobs.simulation import Simulation
from chunkrestore.jobs.simulation_plan import plan_simulation
from chunkrestore.ome_zarr.layout import CHUNK_LENGTH
from chunkrestore.psf import gaussian, read_psf
from chunkrestore.psf.fields import read_psf_or_field
from chunkrestore.psf.varying import PsfField
from chunkrestore.simulate import (
    Attenuation,
    Camera,
    Ellipsoid,
    Embryo,
    LabelledPhantom,
    Microscope,
    Nuclei,
    Spheres,
    forward,
)

SERIAL = {"cluster": "serial", "quiet": True}
SHAPE = (40, 96, 70)
PSF = gaussian((1.5, 1.0, 0.7), truncate=2)
MICROSCOPE = Microscope(PSF, Camera(gain=2, offset=50), Attenuation(60, body=Ellipsoid.filling(SHAPE)))
PHANTOM = Embryo(SHAPE, seed=4, nuclei=Nuclei(radius=(4, 6)))


@pytest.fixture(scope="module")
def disk():
    return Disk()


@pytest.fixture(scope="module")
def expected():
    """Return image, labels and truth, computed in memory at once."""
    labels, photons = PHANTOM.render(tuple(slice(0, n) for n in SHAPE))
    m = MICROSCOPE
    image = forward(photons, m.psf, seed=9, camera=m.camera, attenuation=m.attenuation)
    return image, labels, photons * np.float32(2) + np.float32(m.camera.pedestal)


def run(folder, **options):
    arguments = {"microscope": MICROSCOPE, "seed": 9, "truth": folder / "truth.zarr", **SERIAL} | options
    return simulate(PHANTOM, folder / "out.zarr", **arguments)


def levels_of(path):
    image = cr.open_image(path)
    return [np.asarray(image.level(k)) for k in range(len(image.levels))]


def stored(folder):
    return [levels_of(folder / path)[0] for path in ("out.zarr", "out.zarr/labels/truth", "truth.zarr")]


# What is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"block_shape": (40, 32, 35)},
        {"block_shape": (16, 96, 24), "version": "0.4"},
        {"shards": (20, 48, 70), "compression": "lz4", "checksums": True},
        {},
    ],
)
def test_a_job_writes_the_volume_in_memory_bit_by_bit(tmp_path, expected, options):
    report = run(tmp_path, **options)
    for found, wanted in zip(stored(tmp_path), expected, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    assert report.outputs == [
        str(tmp_path / path) for path in ("out.zarr", "out.zarr/labels/truth", "truth.zarr")
    ]
    assert "megavoxels/s" in str(report)


def test_a_local_cluster_writes_the_same_bytes(tmp_path):
    for name, where in {"a": SERIAL, "b": {"cluster": "local", "n_workers": 2, "quiet": True}}.items():
        (tmp_path / name).mkdir()
        run(tmp_path / name, block_shape=(40, 32, 35), **where)
    for store in ("out.zarr", "truth.zarr"):
        assert tree(tmp_path / "a" / store) == tree(tmp_path / "b" / store)


def test_pyramids_metadata_and_provenance(tmp_path, monkeypatch):
    monkeypatch.setitem(CHUNK_LENGTH, 3, 16)
    run(tmp_path, block_shape=(16, 32, 32), voxel_size=(0.8, 0.4, 0.4), channel="his", levels=3)
    image, truth = cr.open_image(tmp_path / "out.zarr"), cr.open_image(tmp_path / "truth.zarr")
    assert (image.axes, image.voxel_size, image.channels) == ("zyx", (0.8, 0.4, 0.4), ("his",))
    assert (image.labels, truth.labels) == (("truth",), ())
    for path, method in (("out.zarr", "mean"), ("truth.zarr", "mean"), ("out.zarr/labels/truth", "nearest")):
        found = levels_of(tmp_path / path)
        common = {"axes": "zyx", "voxel_size": (0.8, 0.4, 0.4)}
        if method == "mean":
            again = cr.write_image(found[0], tmp_path / "again.zarr", levels=3, overwrite=True, **common).path
        else:
            cr.write_labels(found[0], tmp_path / "again.zarr", "truth", **common)
            again = tmp_path / "again.zarr" / "labels" / "truth"
        for level, wanted in zip(found, levels_of(again), strict=True):
            np.testing.assert_array_equal(level, wanted)
    provenance = image.others["chunkrestore"]["provenance"]
    assert provenance["simulated"]["phantom"] == PHANTOM.describe()
    assert provenance["simulated"]["microscope"]["camera"]["gain"] == 2
    assert provenance["simulated"]["seed"] == 9
    assert json.loads(json.dumps(provenance)) == provenance


def test_labels_that_are_stored_are_imaged_and_the_job_goes_on_from_them(tmp_path, disk):
    labels = PHANTOM.render(tuple(slice(0, n) for n in SHAPE))[0]
    cr.write_labels(labels, tmp_path / "in.zarr", "cells", axes="zyx", voxel_size=(1, 1, 1))
    phantom = LabelledPhantom(cr.open_source(tmp_path / "in.zarr" / "labels" / "cells"), seed=2)
    out = tmp_path / "job" / "out.zarr"
    out.parent.mkdir()
    options = {"seed": 3, "microscope": Microscope(PSF), "block_shape": (20, 48, 70)}
    with disk.dies_after(60, out.parent), suppress(Killed):
        simulate(phantom, out, **options, **SERIAL)
    bury(out)
    cr.resume(out, **SERIAL)
    light = LabelledPhantom(labels, seed=2).render(tuple(slice(0, n) for n in SHAPE))[1]
    np.testing.assert_array_equal(levels_of(out)[0], forward(light, PSF, seed=3))
    np.testing.assert_array_equal(levels_of(out / "labels" / "truth")[0], labels)


def test_two_dimensional_labels_are_imaged(tmp_path):
    labels = PHANTOM.render(tuple(slice(0, n) for n in SHAPE))[0][20]
    simulate(LabelledPhantom(labels, seed=2), tmp_path / "flat.zarr", seed=3, **SERIAL)
    assert cr.open_image(tmp_path / "flat.zarr").shape == SHAPE[1:]
    np.testing.assert_array_equal(levels_of(tmp_path / "flat.zarr" / "labels" / "truth")[0], labels)


# Interruptions --------------------------------------------------------------------------------------------


def small_job(folder):
    field = PsfField([PSF, gaussian((0.5, 0.5, 0.5), truncate=2)], [(0, 0, 0), (15, 0, 0)])
    microscope = Microscope(field, Camera(), Attenuation(9, 12, "both", "y"))
    return simulate(
        Spheres((16, 24, 20), seed=8, radius=(2, 4)),
        folder / "out.zarr",
        seed=1,
        microscope=microscope,
        truth=folder / "truth.zarr",
        psf_file=folder / "psf.yaml",
        block_shape=(16, 16, 16),
        shards=(16, 16, 16),
        **SERIAL,
    )


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_simulation_ends_byte_for_byte_the_same_without_its_script(
    tmp_path, disk, monkeypatch, every
):
    monkeypatch.setitem(CHUNK_LENGTH, 3, 4)
    (tmp_path / "a").mkdir()
    with disk.dies_after(10**9, tmp_path / "a"):
        small_job(tmp_path / "a")
    results = ("out.zarr", "truth.zarr", "psf.yaml", "psf-0.tif", "psf-1.tif")
    whole = {name: content(tmp_path / "a" / name) for name in results}
    kinds = [kind(change) for change in disk.changes]
    firsts = sorted({kinds.index(k) for k in dict.fromkeys(kinds)})
    for moment in firsts[::every] if every > 1 else range(0, len(kinds), 3):
        folder = tmp_path / f"at-{moment}"
        folder.mkdir()
        with disk.dies_after(moment, folder), suppress(Killed):
            small_job(folder)
        bury(folder / "out.zarr")
        with suppress(FileNotFoundError, ValueError):
            # What can be opened is complete.
            assert levels_of(folder / "out.zarr")
            assert content(folder / "out.zarr") == whole["out.zarr"]
        work = folder / "out.zarr.chunkrestore" / "simulate"
        if (work / "simulation.json").exists() and not (work / "report.json").exists():
            cr.resume(folder / "out.zarr", **SERIAL)
        elif not (work / "report.json").exists():
            small_job(folder)
        assert {name: content(folder / name) for name in results} == whole
        assert all(found.ok for found in cr.verify(folder / "out.zarr", **SERIAL))


def content(path):
    return tree(path) if path.is_dir() else path.read_bytes()


@dataclass(frozen=True)
class Empty:
    """A phantom of the user's own."""

    shape: tuple[int, ...] = (16, 24, 20)

    def render(self, region):
        shape = [s.stop - s.start for s in region]
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)

    def describe(self):
        return {"kind": "Empty"}


def test_a_phantom_of_the_users_own_works_and_is_resumed_by_its_script_alone(tmp_path, disk):
    job = tmp_path / "out.zarr"
    with disk.dies_after(40, tmp_path), suppress(Killed):
        simulate(Empty(), job, seed=1, **SERIAL)
    bury(job)
    with pytest.raises(ValueError, match="repeat the command or script"):
        cr.resume(job, **SERIAL)
    with pytest.raises(ManifestMismatchError, match=r"input\.seed was 1, is 2"):
        simulate(Empty(), job, seed=2, **SERIAL)
    simulate(Empty(), job, seed=1, **SERIAL)
    assert levels_of(job)[0].mean() == pytest.approx(108, abs=1)


@pytest.mark.parametrize("victim", ["out.zarr/0", "out.zarr/labels/truth/1", "truth.zarr/0"])
def test_a_changed_voxel_of_any_output_is_found(tmp_path, victim):
    run(tmp_path, block_shape=(40, 48, 70))
    array = zarr.open_array(tmp_path / victim, mode="r+")
    array[5, 6, 7] += 1
    (found,) = cr.verify(tmp_path / "out.zarr", **SERIAL)
    assert [problem for problem in found.problems if str(tmp_path / victim) in problem]
    assert len(found.problems) == 1


# Memory and refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(48, 64, 64), (64, 128, 128)])
def test_a_task_takes_no_more_memory_than_its_formula_says(tmp_path, block):
    microscope = Microscope(gaussian((2.0, 1.5, 1.5), truncate=3))
    phantom = Embryo((160, 256, 256), seed=1)
    plan = plan_simulation(
        phantom,
        tmp_path / "o.zarr",
        seed=1,
        microscope=microscope,
        truth=tmp_path / "t.zarr",
        block_shape=block,
    )
    grid = BlockGrid.regular(phantom.shape, block, microscope.halo)
    middle = grid.block([n // 2 for n in grid.n_blocks])
    simulation = plan.simulation
    simulation.make(grid.block((0, 0, 0)))
    tracemalloc.start()
    made = simulation.make(middle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made["image"].shape == middle.core_shape
    wanted = simulation.memory_nbytes(block)
    assert 0.3 * wanted < peak < wanted


def test_outputs_that_exist_are_replaced_only_when_that_is_asked_for(tmp_path):
    run(tmp_path)
    before = tree(tmp_path)
    for options in ({}, {"truth": None}):
        with pytest.raises(FileExistsError, match="--overwrite"):
            run(tmp_path, **options)
    assert tree(tmp_path) == before
    run(tmp_path, seed=10, overwrite=True)
    image = levels_of(tmp_path / "out.zarr")[0]
    run(tmp_path, overwrite=True)
    assert (levels_of(tmp_path / "out.zarr")[0] != image).mean() > 0.5
    with pytest.raises(ValueError, match=r"labels 'truth' of shape \(40, 96, 70\), which do not fit"):
        simulate(Empty(), tmp_path / "out.zarr", seed=1, overwrite=True, **SERIAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "`seed`"),
        ({"microscope": Microscope(np.ones((3, 3)) / 9)}, "`microscope`"),
        ({"voxel_size": (1, 1)}, "`voxel_size`"),
        ({"voxel_size": (1, 0, 1)}, "`voxel_size`"),
        ({"truth": "out.zarr"}, "`truth`"),
        ({"block_shape": (8, 8)}, "`block_shape`"),
        ({"block_shape": (8, 8, 8), "shards": (16, 16, 16)}, "`block_shape` 8"),
        ({"shards": (16, 16, 0)}, "`shards`"),
        ({"compression": "zip"}, "`compression`"),
        ({"version": "0.3"}, "`version`"),
        ({"levels": 0}, "`levels`"),
        ({"psf_file": "psf.yaml"}, r"`psf_file` .* must end in .tif or .tiff"),
        ({"psf_file": "nowhere/psf.tif"}, "`psf_file` .* folder does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        simulate(PHANTOM, "out.zarr", **{"microscope": MICROSCOPE, "seed": 1} | options, **SERIAL)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_place_for_an_image(tmp_path):
    (tmp_path / "out.zarr").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path)
    assert (tmp_path / "out.zarr").read_text() == "mine"


def test_the_noise_of_a_simulation_is_that_of_its_seed():
    one, two = (Simulation(PHANTOM, MICROSCOPE, seed).describe() for seed in (1, 2))
    assert one["phantom"] == two["phantom"]
    assert one != two


# The command line -----------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["simulate", *map(str, arguments)])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


HERE = ("--cluster", "serial", "-q")


def test_the_command_writes_image_labels_and_psf(command, tmp_path):
    small = ("emb.ome.zarr", "--shape", "24,40,40", "--seed", 3, *HERE)
    assert command(*small) == (0, "", "")
    image = cr.open_image("emb.ome.zarr")
    assert (image.shape, image.dtype, image.voxel_size) == ((24, 40, 40), np.uint16, (0.4, 0.4, 0.4))
    labels, photons = Embryo((24, 40, 40), seed=3).render(np.s_[:24, :40, :40])
    psf = read_psf("emb.psf.tif")
    np.testing.assert_array_equal(np.asarray(image.data), forward(photons, psf, seed=3))
    np.testing.assert_array_equal(np.asarray(image.label("truth").data), labels)
    status, _, err = command(*small)
    assert (status, err.count("\n")) == (2, 1)
    assert command(*small, "--overwrite")[0] == 0


def test_the_command_says_what_it_would_do(command, tmp_path):
    status, out, _ = command(
        "big.zarr", "--shape", "1024,2048,2048", "--truth", "t.zarr", "--dry-run", "--phantom", "tissue"
    )
    assert status == 0
    assert "1024 x 2048 x 2048 voxels of 0.4 x 0.4 x 0.4 um, 6 levels" in out
    assert "blocks     256 of 256 x 256 x 256, chunks 64 x 64 x 64 in shards of 256 x 256 x 256" in out
    assert "before compression" in out
    assert not list(tmp_path.iterdir())


def test_the_command_takes_phantoms_microscopes_and_labels(command):
    cr.psf.write_psf("mine.tif", gaussian((1.0, 1.0, 1.0), truncate=2), (1.0, 0.5, 0.5))
    look = (
        "--phantom",
        "spheres",
        "--shape",
        "16,40,40",
        "--photons",
        "20,30",
        "--radius",
        "3,4",
        "--seed",
        5,
    )
    optics = ("--psf", "mine.tif", "--gain", 2, "--background", 1, "--offset", 10, "--read-noise", 0)
    lossy = ("--voxel-size", "1,0.5,0.5", "--attenuation", "20,inf", "--sides", "both")
    assert command("a.zarr", *look, *optics, *lossy, "--truth", "t.zarr", *HERE) == (0, "", "")
    photons = Spheres((16, 40, 40), 5, radius=(3, 4), photons=(20, 30)).render(np.s_[:16, :40, :40])[1]
    camera = Camera(1, 2, 10, 0)
    expected = forward(
        photons,
        read_psf_or_field("mine.tif"),
        seed=5,
        camera=camera,
        attenuation=Attenuation(40, sides="both"),
    )
    np.testing.assert_array_equal(np.asarray(cr.open_image("a.zarr").data), expected)
    np.testing.assert_array_equal(np.asarray(cr.open_image("t.zarr").data), photons * 2 + np.float32(12))
    again = ("b.zarr", "--labels", "a.zarr", "--labels-name", "truth", *HERE)
    assert command(*again) == (0, "", "")
    assert command("c.zarr", "--labels", "a.zarr/labels/truth", *HERE) == (0, "", "")
    b, c = map(cr.open_image, ("b.zarr", "c.zarr"))
    assert b.voxel_size == (1.0, 0.5, 0.5)
    np.testing.assert_array_equal(np.asarray(b.data), np.asarray(c.data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels-name", "truth"), "`--labels`"),
        (("--labels", "x.zarr", "--radius", "2,3"), "`--radius`"),
        (("--labels", "x.zarr"), "x.zarr"),
        (("--phantom", "beads", "--radius", "2,3"), "`--radius`"),
        (("--photons", "5"), "5"),
        (("--photons", "1,2,3"), "two numbers"),
        (("--sides", "both"), "`--attenuation`"),
        (("--attenuation", "0,5"), "`illumination`"),
        (("--gain", "0"), "`gain`"),
        (("--psf", "none.tif"), "none.tif"),
        (("--shape", "16,16"), "`shape`"),
    ],
)
def test_the_command_refuses_in_one_line(command, tmp_path, arguments, message):
    status, _, err = command("out.zarr", *arguments, *HERE)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
