"""What a job writes down about itself, and what is left of it after a crash."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkrestore.jobs.ledger import Ledger, ManifestMismatchError, differences, digest, job_folder

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
    n_whole = content[:cut].count(b"\n")
    again = begun(folder)
    assert again.finished("blocks") == {(0, 0, i): {"i": i} for i in range(n_whole)}
    again.record("blocks", (0, 0, 9), None)
    again.close()
    assert [json.loads(line)["item"][2] for line in journal.read_bytes().splitlines()] == [*range(n_whole), 9]


def test_what_follows_a_spoilt_line_is_done_again(tmp_path, begun):
    ledger = begun(tmp_path)
    for i in range(3):
        ledger.record("blocks", (0, 0, i), None)
    ledger.close()
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(lines[0] + b"\0" * 30 + b"\n" + lines[2])
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
    ledger.begin({"other": 1}, anew=True)
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


def test_job_folder_lies_beside_the_store(tmp_path):
    assert job_folder(tmp_path / "out.zarr", "image") == tmp_path / "out.zarr.chunkrestore" / "image"
    assert job_folder(f"{tmp_path}/out.zarr/", "image") == tmp_path / "out.zarr.chunkrestore" / "image"


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
