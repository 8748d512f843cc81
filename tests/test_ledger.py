"""What a job writes down about itself, and what is left of it after a crash."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkrestore.jobs.ledger import (
    Ledger,
    ManifestMismatchError,
    differences,
    digest,
    only_unfinished,
    work_folder_of,
)

MANIFEST = {"input": {"store": "a.zarr"}, "passes": [{"depth": [4, 4]}], "versions": {"numpy": "2.1"}}


@pytest.fixture
def begun():
    """Begin ledgers; those that a test leaves open, as a killed driver would, are closed at its end."""
    ledgers = []

    def begin(folder, manifest=MANIFEST, **options):
        ledgers.append(Ledger(folder))
        ledgers[-1].begin(manifest, **options)
        return ledgers[-1]

    yield begin
    for ledger in ledgers:
        ledger.close()


def test_what_was_recorded_is_there_after_a_crash(tmp_path, begun):
    ledger = begun(tmp_path / "job")
    ledger.decide("start", 1.5)
    ledger.record("blocks", (0, 1, 2, 3, 4), None)
    ledger.record("detect", (0, 0, 0, 0, 0), {"reach": 7})
    again = begun(tmp_path / "job")  # the first one was never closed
    assert again.value("start") == 1.5
    assert again.finished("blocks") == {(0, 1, 2, 3, 4): None}
    assert again.finished("detect") == {(0, 0, 0, 0, 0): {"reach": 7}}
    assert again.finished("paint") == {}
    assert again.value("other") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")))
def test_every_beginning_of_a_journal_is_a_journal(tmp_path_factory, begun, cut, rubbish):
    folder = tmp_path_factory.mktemp("job")
    ledger = begun(folder)
    for i in range(5):
        ledger.record("blocks", (0, 0, i), {"i": i})
    ledger.close()
    journal = folder / "journal.jsonl"
    content = journal.read_bytes()
    cut %= len(content) + 1
    journal.write_bytes(content[:cut] + rubbish)
    n_whole = max(0, content[:cut].count(b"\n") - 1)  # the first line names the manifest
    again = begun(folder)
    assert again.finished("blocks") == {(0, 0, i): {"i": i} for i in range(n_whole)}
    again.record("blocks", (0, 0, 9), None)
    again.close()
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert [line["item"][2] for line in lines if "item" in line] == [*range(n_whole), 9]


def test_what_follows_a_spoilt_line_is_done_again(tmp_path, begun):
    ledger = begun(tmp_path)
    for i in range(3):
        ledger.record("blocks", (0, 0, i), None)
    ledger.close()
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join([*lines[:2], b"\0" * 30 + b"\n", *lines[3:]]))
    assert begun(tmp_path).finished("blocks") == {(0, 0, 0): None}


def test_another_manifest_is_refused_with_what_differs(tmp_path, begun):
    begun(tmp_path).close()
    other = {"input": {"store": "b.zarr"}, "passes": [{"depth": [4, 8]}], "versions": {}}
    with pytest.raises(ManifestMismatchError) as caught:
        Ledger(tmp_path).begin(other)
    message = str(caught.value)
    assert "input.store was 'a.zarr', is 'b.zarr'" in message
    assert "passes[0].depth[1] was 4, is 8" in message
    assert "versions.numpy was '2.1', is None" in message
    assert "(--overwrite)" in message
    assert Ledger(tmp_path).manifest() == MANIFEST


def test_a_manifest_survives_json(tmp_path, begun):
    begun(tmp_path, {"depth": (4, 4)}).close()
    begun(tmp_path, {"depth": (4, 4)}).close()


def test_starting_anew_forgets_everything(tmp_path, begun):
    ledger = begun(tmp_path / "job")
    ledger.record("blocks", (0, 0, 0), None)
    (tmp_path / "job" / "tables").mkdir()
    ledger.forget()
    ledger.begin({"other": 1})
    assert ledger.finished("blocks") == {}
    assert ledger.manifest() == {"other": 1}
    assert not (tmp_path / "job" / "tables").exists()


def test_a_finished_job_keeps_its_report_and_no_scratch(tmp_path, begun):
    ledger = begun(tmp_path)
    assert ledger.unfinished
    for name in ("tables", "scratch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    ledger.finish({"n_done": 3})
    assert ledger.complete
    assert not ledger.unfinished
    assert json.loads((tmp_path / "report.json").read_text()) == {"n_done": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["journal.jsonl", "manifest.json", "report.json"]


def test_an_empty_folder_is_no_job(tmp_path):
    assert not Ledger(tmp_path).unfinished
    assert not Ledger(tmp_path / "none").unfinished


def test_a_closed_ledger_takes_nothing_down(tmp_path, begun):
    ledger = begun(tmp_path)
    ledger.close()
    with pytest.raises(RuntimeError, match="is closed"):
        ledger.record("blocks", (0, 0, 0), None)


def test_ledgers_lie_beside_the_store_and_those_of_urls_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert work_folder_of(f"{tmp_path}/a/out.zarr") == tmp_path / "a" / "out.zarr.chunkrestore"
    assert work_folder_of("s3://bucket/deep/out.zarr") == tmp_path / "bucket-deep-out.zarr.chunkrestore"
    assert work_folder_of("s3://bucket/out.zarr", "w") == tmp_path / "w"


def test_the_only_unfinished_job_is_found(tmp_path, begun):
    with pytest.raises(ValueError, match="holds no unfinished job"):
        only_unfinished(tmp_path, None)
    begun(tmp_path / "image")
    assert only_unfinished(tmp_path, None) == tmp_path / "image"
    begun(tmp_path / "labels-a")
    with pytest.raises(ValueError, match="choose one as `job`: image, labels-a"):
        only_unfinished(tmp_path, None)
    assert only_unfinished(tmp_path, "labels-a") == tmp_path / "labels-a"
    with pytest.raises(ValueError, match="no unfinished job 'labels-b'; unfinished are image, labels-a"):
        only_unfinished(tmp_path, "labels-b")


def test_a_journal_of_another_manifest_is_refused(tmp_path, begun):
    begun(tmp_path).close()
    (tmp_path / "manifest.json").write_text(json.dumps({"edited": True}))
    with pytest.raises(ManifestMismatchError, match="belong to different jobs"):
        begun(tmp_path, {"edited": True})


def test_stages_are_known_to_be_done_and_failures_until_they_are_mended(tmp_path, begun):
    ledger = begun(tmp_path)
    assert not ledger.begin_stage("paint", 2).done
    ledger.record("paint", (0, 0, 0), None)
    ledger.fail("paint", (0, 0, 1), "data", "bad")
    ledger.close()
    record = begun(tmp_path).begin_stage("paint", 2)
    assert record.failed == {(0, 0, 1): {"cause": "data", "message": "bad"}}
    again = begun(tmp_path)
    again.record("paint", (0, 0, 1), None)
    again.end_stage("paint")
    again.close()
    record = begun(tmp_path).begin_stage("paint", 2)
    assert (record.failed, record.done, record.n_items, len(record.finished)) == ({}, True, 2, 2)


def test_nothing_is_written_once_the_guard_objects(tmp_path):
    def object_to_it():
        raise RuntimeError("lost")

    ledger = Ledger(tmp_path / "job", object_to_it)
    for attempt in (lambda: ledger.begin(MANIFEST), ledger.forget, lambda: ledger.finish({})):
        with pytest.raises(RuntimeError, match="lost"):
            attempt()
    assert not (tmp_path / "job").exists()


JSON = st.recursive(
    st.booleans() | st.integers(-5, 5) | st.text(max_size=2),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=2), children, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
def test_only_equal_values_have_no_differences(a, b):
    assert differences(a, json.loads(json.dumps(a))) == []
    assert (differences(a, b) == []) == (a == b)
    assert digest(a) == digest(json.loads(json.dumps(a)))
