"""Jobs on the fields of plates and other collections: what they write, and how they go on after an interruption."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from observing import tree, wait_for
from plates import attributes, edit, validate, voxels, write_plate, write_series
from scipy import ndimage

import chunkrestore as cr
from chunkrestore.jobs import tasks
from chunkrestore.jobs.fields import FieldsError, resume_fields, run_fields
from chunkrestore.jobs.fields import summary as told_of
from chunkrestore.jobs.ledger import ManifestMismatchError, work_folder_of
from chunkrestore.jobs.lock import Lock, LockedError
from chunkrestore.jobs.runner import draining
from chunkrestore.jobs.status import status, summary
from chunkrestore.jobs.tasks import process as compute
from chunkrestore.jobs.verify import verify
from chunkrestore.ome_zarr import describe, facts_of, open_collection, open_image
from chunkrestore.ome_zarr.collecting import CollectionWriter
from chunkrestore.ome_zarr.limits import MAX_DOCUMENT_NBYTES
from chunkrestore.psf import gaussian

VERSIONS = ("0.4", "0.5")
SERIAL = {"cluster": "serial", "quiet": True}
MEMBERS = ["A/01/0", "A/01/1", "A/02/0", "A/02/1", "B/02/0", "B/02/1"]


def deconvolution(iterations=1):
    return cr.RichardsonLucy(gaussian((1.0, 1.0, 1.0), truncate=2), iterations=iterations, depth=2)


@pytest.fixture(scope="module", params=VERSIONS)
def plate(request, tmp_path_factory):
    """Do not change it."""
    return write_plate(tmp_path_factory.mktemp("plates") / "plate.zarr", request.param, field_count=2)


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """A plate of version 0.5; do not change it."""
    return write_plate(tmp_path_factory.mktemp("plates") / "plate.zarr", "0.5")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.zarr"


@contextmanager
def stopped_after(n, error=KeyboardInterrupt):
    """Let `n` blocks be computed, and no more."""
    original, left = tasks.process, [n]

    def process(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "process", process)
        yield


def members(path):
    return [f.member for f in open_collection(path).fields]


def listed(path, version):
    """Return the fields that a well lists on disk, whether or not its plate is published."""
    own = attributes(path)
    own = own.get("ome", {}) if version == "0.5" else own
    return [image["path"] for image in own.get("well", {}).get("images", [])]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_is_what_a_job_on_it_alone_makes(plate, output, tmp_path, version):
    reports = run_fields(deconvolution(), plate, output, version=version, **SERIAL)
    assert [report.outputs for report in reports] == [[f"{output}/{member}"] for member in MEMBERS]
    assert members(output) == MEMBERS
    for member in MEMBERS:
        alone = tmp_path / "alone" / f"{member.replace('/', '-')}.zarr"
        cr.run(deconvolution(), f"{plate}/{member}", alone, version=version, **SERIAL)
        np.testing.assert_array_equal(
            open_image(f"{output}/{member}").data.compute(), open_image(alone).data.compute()
        )
    validate(output, version)


def test_metadata_of_plate_and_wells_is_carried_over(plate, output, tmp_path):
    source = shutil.copytree(plate, tmp_path / "in.zarr")
    version = open_collection(plate).version

    def note(ome):
        key = "plate" if "plate" in ome else "well"
        ome[key]["mine"] = {"kept": [1, 2]}

    edit(source, note)
    edit(source / "A" / "01", note)
    run_fields([], source, output, wells=["A1", "B2"], version=version, **SERIAL)
    before, after = open_collection(source), open_collection(output)
    expected = before.ome["plate"] | {"wells": [before.ome["plate"]["wells"][i] for i in (0, 2)]}
    assert after.ome["plate"] == expected
    assert (after.rows, after.columns, after.name) == (before.rows, before.columns, before.name)
    assert after.well_attributes("A/01") == before.well_attributes("A/01")
    assert after.others["chunkrestore"]["provenance"]["input"] == {"store": str(source)}
    assert "made by     copy" in describe(output)
    validate(output, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_selection_lists_what_was_processed_and_counts_its_fields(plate, output, version):
    run_fields([], plate, output, wells="B2", fields=1, version=version, **SERIAL)
    found = open_collection(output)
    assert (members(output), found.field_count, found.wells) == (["B/02/1"], 1, ("B/02",))
    np.testing.assert_array_equal(open_image(found.first.path).data.compute(), voxels("B/02/1"))
    validate(output, version)


def test_later_calls_add_to_the_same_plate(newer, output):
    run_fields([], newer, output, wells="B2", **SERIAL)
    run_fields([], newer, output, fields=0, **SERIAL)
    assert members(output) == ["A/01/0", "A/02/0", "B/02/0", "B/02/1"]
    validate(output, "0.5")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_interrupted_call_leaves_no_plate_and_no_half_of_a_field(plate, output, version):
    with stopped_after(3 * 2 + 1), pytest.raises(KeyboardInterrupt):
        run_fields(deconvolution(), plate, output, version=version, **SERIAL)
    with pytest.raises(ValueError, match=r"is unfinished"):
        open_collection(output)
    with pytest.raises(ValueError, match=r"is unfinished"):
        open_image(output)
    assert facts_of(output)["kind"] == "unfinished"
    assert listed(output / "A" / "01", version) == ["0", "1"]
    assert listed(output / "A" / "02", version) == ["0"]
    assert not (output / "B").exists()
    with pytest.raises(ValueError, match=r"is unfinished"):
        open_image(output / "A" / "02" / "1")


def test_an_interrupted_call_goes_on_where_it_stopped(plate, output, tmp_path):
    run_fields(deconvolution(), plate, tmp_path / "reference" / "out.zarr", **SERIAL)
    with stopped_after(3 * 2 + 1), pytest.raises(KeyboardInterrupt):
        run_fields(deconvolution(), plate, output, **SERIAL)
    before = tree(output / "A" / "01")
    with stopped_after(6 * 2 - 3 * 2 - 1):  # what is finished is not computed again
        reports = run_fields(deconvolution(), plate, output, **SERIAL)
    assert tree(output / "A" / "01") == before
    assert [report.n_resumed > 0 for report in reports] == [False, False, False, True, False, False]
    for member in MEMBERS:
        first, second = (
            open_image(f"{root}/{member}") for root in (output, tmp_path / "reference" / "out.zarr")
        )
        np.testing.assert_array_equal(first.data.compute(), second.data.compute())
    validate(output, "0.5")


def test_a_finished_plate_is_left_as_it_is(newer, output):
    run_fields([], newer, output, **SERIAL)
    before = tree(output)
    with stopped_after(0):
        reports = run_fields([], newer, output, **SERIAL)
    assert len(reports) == 6
    images = {path: content for path, content in before.items() if "/c/" in str(path)}
    assert images.items() <= tree(output).items()
    validate(output, "0.5")


def test_resume_needs_no_script(newer, output):
    with stopped_after(5), pytest.raises(KeyboardInterrupt):
        run_fields(deconvolution(), newer, output, wells=["A1", "A2"], **SERIAL)
    reports = resume_fields(output, **SERIAL)
    assert len(reports) == 4
    assert members(output) == MEMBERS[:4]
    with pytest.raises(ValueError, match=r"holds no unfinished job on fields"):
        resume_fields(output, **SERIAL)


def test_a_field_that_fails_does_not_stop_the_others(newer, output, tmp_path):
    source = shutil.copytree(newer, tmp_path / "in.zarr")
    chunk = next(path for path in (source / "A" / "02" / "0").rglob("c/*/*/*/*") if path.is_file())
    content = chunk.read_bytes()
    chunk.write_bytes(content[:20])
    with pytest.raises(FieldsError, match=r"1 of 6 fields failed: A/02/0: .*BlockError") as caught:
        run_fields([], source, output, **SERIAL)
    assert len(caught.value.reports) == 5
    assert listed(output / "A" / "02", "0.5") == ["1"]
    with pytest.raises(ValueError, match=r"is unfinished"):
        open_collection(output)
    chunk.write_bytes(content)
    with stopped_after(1):
        run_fields([], source, output, **SERIAL)
    assert members(output) == MEMBERS
    validate(output, "0.5")


def test_what_fails_for_all_fields_is_not_tried_on_all_of_them(tmp_path, output):
    source = write_plate(tmp_path / "in.zarr", "0.5", {"A/01": 12})
    with (
        stopped_after(0, OSError(28, "no space")),
        pytest.raises(FieldsError, match=r"10 of 12 .*2 were not tried"),
    ):
        run_fields([], source, output, **SERIAL)


def test_other_parameters_are_refused_unless_all_is_made_anew(newer, output):
    run_fields(deconvolution(1), newer, output, wells=["A1", "B2"], **SERIAL)
    for wells in ("A1", "A2"):
        with pytest.raises(ManifestMismatchError, match=r"operators.*iterations was 1, is 2"):
            run_fields(deconvolution(2), newer, output, wells=wells, **SERIAL)
    with pytest.raises(ValueError, match=r"fields beside the chosen ones .* overwrite all of them"):
        run_fields(deconvolution(2), newer, output, wells="A1", overwrite=True, **SERIAL)
    run_fields(deconvolution(2), newer, output, overwrite=True, **SERIAL)
    assert members(output) == MEMBERS
    made = open_image(f"{output}/A/01/0").others["chunkrestore"]["provenance"]["operators"]
    assert {operator["iterations"] for operator in made} == {2}


def test_an_interrupted_overwriting_goes_on_without_saying_so_again(newer, output):
    run_fields(deconvolution(1), newer, output, **SERIAL)
    with stopped_after(5), pytest.raises(KeyboardInterrupt):
        run_fields(deconvolution(2), newer, output, overwrite=True, **SERIAL)
    with pytest.raises(ValueError, match=r"is unfinished"):
        open_collection(output)
    assert listed(output / "B" / "02", "0.5") == []
    with stopped_after(2 * 6 - 5):
        run_fields(deconvolution(2), newer, output, **SERIAL)
    assert members(output) == MEMBERS
    validate(output, "0.5")


def test_overwriting_a_part_withdraws_it_first_and_keeps_the_rest(newer, output):
    run_fields([], newer, output, **SERIAL)
    with stopped_after(0), pytest.raises(KeyboardInterrupt):
        run_fields([], newer, output, wells="A2", overwrite=True, **SERIAL)
    assert members(output) == [m for m in MEMBERS if not m.startswith("A/02")]
    validate(output, "0.5")
    run_fields([], newer, output, wells="A2", **SERIAL)
    assert members(output) == MEMBERS


def test_what_exists_and_is_not_ours_is_left_alone(newer, output, tmp_path):
    with pytest.raises(ValueError, match=r"is the input"):
        run_fields([], newer, newer, **SERIAL)
    other = write_plate(tmp_path / "other.zarr", "0.5", ["A/01"], 1)
    before = tree(other)
    with pytest.raises(FileExistsError, match=r"exists"):
        run_fields([], newer, other, **SERIAL)
    with pytest.raises(ValueError, match=r"is OME-Zarr 0.5"):
        run_fields([], newer, other, version="0.4", overwrite=True, **SERIAL)
    with pytest.raises(FileExistsError, match=r"is no plate"):
        run_fields([], newer, f"{other}/A/01/0", overwrite=True, **SERIAL)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is no collection"):
        run_fields([], newer, output, overwrite=True, **SERIAL)
    assert tree(other) == before


def test_wrong_arguments_are_refused_before_anything_is_written(newer, output):
    with pytest.raises(ValueError, match=r"`wells`: 'C1' .* does not exist"):
        run_fields([], newer, output, wells="C1", **SERIAL)
    with pytest.raises(TypeError, match=r"no argument itereations"):
        run_fields([], newer, output, itereations=3, **SERIAL)
    with pytest.raises(ValueError, match=r"channel 5 does not exist"):
        run_fields([], newer, output, channel=5, **SERIAL)
    with pytest.raises(ValueError, match=r"`version`"):
        run_fields([], newer, output, version="0.3", **SERIAL)
    assert not output.exists()
    assert not work_folder_of(str(output)).exists()


def test_labels_go_into_the_plate_itself(plate, tmp_path):
    source = shutil.copytree(plate, tmp_path / "in.zarr")
    version = open_collection(plate).version
    before = attributes(source)
    reports = run_fields(cr.Threshold(300.0), source, source, channel=0, label_name="cells", **SERIAL)
    assert [report.n_objects for report in reports] == [1] * 6
    assert "6 fields" in told_of(reports)
    assert "objects    6" in told_of(reports)
    for member in MEMBERS:
        found = open_image(f"{source}/{member}").label("cells").data.compute()
        expected, _ = ndimage.label(voxels(member)[0] > 300)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    assert attributes(source) == before
    validate(source, version)
    with stopped_after(0):
        assert (
            len(run_fields(cr.Threshold(300.0), source, source, channel=0, label_name="cells", **SERIAL)) == 6
        )


def test_labels_go_into_a_plate_that_was_made_from_it(newer, output):
    with pytest.raises(FileNotFoundError):
        run_fields(cr.Threshold(300.0), newer, output, **SERIAL)
    run_fields([], newer, output, wells="A1", **SERIAL)
    with pytest.raises(ValueError, match=r"has no field A/02/0"):
        run_fields(cr.Threshold(300.0), newer, output, **SERIAL)
    run_fields(cr.Threshold(300.0), newer, output, wells="A1", **SERIAL)
    assert open_image(f"{output}/A/01/1").labels == ("labels",)
    validate(output, "0.5")


@pytest.mark.parametrize("version", VERSIONS)
def test_series_keep_their_list_and_their_acquisition_metadata(tmp_path, output, version):
    source = write_series(tmp_path / "series.zarr", version, listed=version == "0.5")
    run_fields(deconvolution(), source, output, version=version, **SERIAL)
    assert members(output) == ["0", "1", "2"]
    xml = "OME/METADATA.ome.xml"
    assert (output / xml).read_bytes() == (source / xml).read_bytes()
    own = attributes(output / "OME")
    assert (own["ome"] if version == "0.5" else own)["series"] == ["0", "1", "2"]
    validate(output, version, "series")


def test_a_part_of_a_series_does_not_claim_the_metadata_of_all(tmp_path, output):
    source = write_series(tmp_path / "series.zarr")
    run_fields([], source, output, fields=[0, 2], **SERIAL)
    assert members(output) == ["0", "2"]
    assert not (output / "OME" / "METADATA.ome.xml").exists()
    run_fields([], source, output, fields=1, **SERIAL)
    assert members(output) == ["0", "1", "2"]
    assert (output / "OME" / "METADATA.ome.xml").exists()


def test_acquisition_metadata_that_is_too_large_is_left_behind_and_said(tmp_path, output):
    source = write_series(tmp_path / "series.zarr", n=1)
    with (source / "OME" / "METADATA.ome.xml").open("wb") as file:
        file.truncate(MAX_DOCUMENT_NBYTES + 1)
    with pytest.warns(UserWarning, match=r"acquisition metadata is left behind"):
        run_fields([], source, output, **SERIAL)
    assert members(output) == ["0"]


def test_a_plate_inside_bioformats2raw_stays_one(newer, output, tmp_path):
    source = shutil.copytree(newer, tmp_path / "in.zarr")
    edit(source, lambda ome: ome.update({"bioformats2raw.layout": 3}))
    (source / "OME").mkdir()
    (source / "OME" / "METADATA.ome.xml").write_text("<OME/>")
    run_fields([], source, output, **SERIAL)
    assert (output / "OME" / "METADATA.ome.xml").read_text() == "<OME/>"
    assert attributes(output / "OME")["ome"]["series"] == MEMBERS
    assert members(output) == MEMBERS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_well_alone_becomes_a_well(plate, output, version):
    run_fields([], f"{plate}/A/02", output, version=version, **SERIAL)
    found = open_collection(output)
    assert (found.kind, members(output)) == ("well", ["0", "1"])
    validate(output, version, "well")


def test_status_and_verify_tell_of_every_field(newer, output):
    with stopped_after(5), pytest.raises(KeyboardInterrupt):
        run_fields(deconvolution(), newer, output, **SERIAL)
    found = status(output)
    assert [job.name for job in found] == [f"{member}/image" for member in MEMBERS]
    assert [job.state for job in found] == ["done", "done", "interrupted", *["never begun"] * 3]
    assert "A/02/0/image: interrupted" in summary(found)
    told = summary(found * 2)
    assert told.startswith("12 jobs: 6 never begun, 2 interrupted, 4 done")
    assert "never begun" not in told.partition("\n")[2]
    checked = verify(output, **SERIAL)
    assert [job.job for job in checked] == [f"{member}/image" for member in MEMBERS[:3]]
    assert all(job.ok and job.n_blocks for job in checked)
    chunk = next(path for path in (output / "A" / "01" / "1").rglob("c/*/*/*/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-4])
    assert [job.ok for job in verify(output, **SERIAL)] == [True, False, True]


def test_the_verbs_for_jobs_find_that_of_a_single_field(newer, output):
    run_fields([], newer, output, wells="A1", **SERIAL)
    assert [job.name for job in status(output / "A" / "01" / "1")] == ["image"]
    (checked,) = verify(output / "A" / "01" / "1", **SERIAL)
    assert checked.ok


def test_two_drivers_do_not_write_into_one_plate(newer, output):
    with Lock(work_folder_of(str(output))), pytest.raises(LockedError, match=r"another driver"):
        run_fields([], newer, output, **SERIAL)
    assert not output.exists()


def test_a_damaged_record_is_told_of(newer, output):
    run_fields([], newer, output, wells="A1", **SERIAL)
    path = work_folder_of(str(output)) / "fields-image" / "fields.json"
    path.write_text(json.dumps({"input": 3}))
    with pytest.raises(ValueError, match=r"fields.json is damaged"):
        run_fields([], newer, output, **SERIAL)


@pytest.fixture(scope="module")
def client():
    """Four workers as threads of this process."""
    from distributed import Client

    with Client(
        processes=False, n_workers=4, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as client:
        yield client


@dataclass(frozen=True)
class Meeting:
    """Computes a block when blocks of three fields are under way; workers are sent it by pickle."""

    folder: str

    def __call__(self, item, source, *arguments):
        Path(self.folder, source.store.replace("/", "-")).touch()
        wait_for(lambda: len(os.listdir(self.folder)) >= 3, "blocks of three fields")
        return compute(item, source, *arguments)


def drain(*arguments):
    """Compute a block, and ask for no more."""
    draining.request()
    return compute(*arguments)


@pytest.mark.slow
def test_small_fields_are_done_several_at_a_time(newer, output, client, tmp_path, monkeypatch):
    (tmp_path / "met").mkdir()
    monkeypatch.setattr(tasks, "process", Meeting(str(tmp_path / "met")))
    reports = run_fields(deconvolution(), newer, output, cluster=client, quiet=True)
    assert [report.outputs for report in reports] == [[f"{output}/{member}"] for member in MEMBERS]
    assert members(output) == MEMBERS
    validate(output, "0.5")


@pytest.mark.slow
def test_fields_that_are_done_at_a_time_stop_together_and_go_on(newer, output, client):
    draining.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "process", drain)
        with pytest.raises(KeyboardInterrupt):
            run_fields(deconvolution(), newer, output, cluster=client, quiet=True)
    draining.forget()
    with pytest.raises(ValueError, match=r"is unfinished"):
        open_collection(output)
    states = {job.state for job in status(output)}
    assert states & {"interrupted", "never begun"}
    assert states <= {"interrupted", "never begun", "done"}
    run_fields(deconvolution(), newer, output, cluster=client, quiet=True)
    assert members(output) == MEMBERS


@pytest.mark.slow
def test_what_ends_the_driver_stops_fields_that_are_done_at_a_time(newer, output, client):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CollectionWriter, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_fields(deconvolution(), newer, output, cluster=client, quiet=True)
    assert not draining.requested
    run_fields(deconvolution(), newer, output, **SERIAL)
    assert members(output) == MEMBERS


@pytest.mark.slow
def test_one_cluster_serves_all_fields(newer, output, tmp_path):
    run_fields(deconvolution(), newer, tmp_path / "serial.zarr", **SERIAL)
    reports = run_fields(deconvolution(), newer, output, cluster="local", n_workers=2, quiet=True)
    assert len(reports) == 6
    for member in MEMBERS:
        first, second = (open_image(f"{root}/{member}") for root in (output, tmp_path / "serial.zarr"))
        np.testing.assert_array_equal(first.data.compute(), second.data.compute())
    validate(output, "0.5")
