"""Drivers, schedulers and workers are killed at random moments; jobs end as if nothing had happened."""

import json
import sys
from pathlib import Path

import pytest
from faults import Fault, Session

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kill_schedules
from kill_schedules import Kill, LostError, Schedule


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return kill_schedules.Job(tmp_path_factory.mktemp("job"))


def killed(outcome):
    return [kill["victim"] for kill in outcome["kills"]]


def test_a_driver_that_is_killed_three_times(job, tmp_path):
    faults = Fault("after-write", "kill", nth=7), Fault("before-journal", "kill", nth=15)
    plan = Schedule(0, "serial", (Kill("driver", 0.9),), faults)
    outcome = kill_schedules.survive(job, plan, tmp_path / "job")
    assert killed(outcome) == ["driver"] * 3
    assert outcome["exit_statuses"] == [-9, -9, -9, 0]
    assert outcome["n_redone"] <= 3


def test_a_serial_schedule(job, tmp_path):
    plan = kill_schedules.schedule(3, job.n_arrivals)
    assert plan.kind == "serial"
    outcome = kill_schedules.survive(job, plan, tmp_path / "job")
    assert 0 < len(killed(outcome)) <= len(plan.kills) + len(plan.faults)


def test_workers_and_the_scheduler_are_killed(job, tmp_path):
    plan = Schedule(0, "processes", (Kill("worker", 0.2), Kill("scheduler", 0.6)), ())
    outcome = kill_schedules.survive(job, plan, tmp_path / "job")
    assert killed(outcome) == ["worker", "scheduler"]
    assert outcome["exit_statuses"] == [75, 0]


def test_a_worker_and_the_driver_are_killed(job, tmp_path):
    plan = Schedule(0, "processes", (Kill("driver", 0.5),), (Fault("before-write", "kill", nth=5),))
    outcome = kill_schedules.survive(job, plan, tmp_path / "job")
    assert killed(outcome) == ["worker", "driver"]
    assert outcome["exit_statuses"] == [-9, 0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_a_schedule(job, tmp_path, seed):
    kill_schedules.survive(job, kill_schedules.schedule(seed, job.n_arrivals), tmp_path / "job")


def test_schedules_depend_on_their_seed_alone_and_cover_every_kind(job):
    plans = [kill_schedules.schedule(seed, job.n_arrivals) for seed in range(200)]
    assert plans == [kill_schedules.schedule(seed, job.n_arrivals) for seed in range(200)]
    assert {plan.kind for plan in plans} == set(kill_schedules.SHARES)
    assert {kill.victim for plan in plans for kill in plan.kills} == {"driver", "worker", "scheduler"}
    assert {fault.point for plan in plans for fault in plan.faults} == set(kill_schedules.POINTS)
    assert min(job.n_arrivals.values()) > 0


# --- the judgement itself ----------------------------------------------------------------------------------


@pytest.fixture
def done(job, tmp_path):
    """Session and output of an undisturbed run."""
    import chunkrestore as cr

    with Session.create(tmp_path / "session").installed() as session:
        cr.run(job.operators, job.source, tmp_path / "out.zarr", cluster="serial", quiet=True, **job.options)
    kill_schedules.check(job, session, tmp_path / "out.zarr", {})
    return session, tmp_path / "out.zarr"


def test_another_byte_in_the_output_is_noticed(job, done):
    session, output = done
    chunk = next(path for path in (output / "0" / "c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(LostError, match=r"1 files of .* differ"):
        kill_schedules.check(job, session, output, {})


def test_a_block_that_the_journal_lacks_is_noticed(job, done):
    session, output = done
    journal = output.with_name("out.zarr.chunkrestore") / "image" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    lines.remove(next(line for line in lines if '"item"' in line))
    journal.write_text("".join(lines))
    with pytest.raises(LostError, match=r"the journal .* lists"):
        kill_schedules.check(job, session, output, {})


def test_a_block_that_was_done_again_is_counted(job, done):
    session, _ = done
    assert session.redone() == []
    (*_, last) = session.events("task")
    session.log("task", stage=last["stage"], item=last["item"], driver=last["driver"])
    assert session.redone() == [(last["stage"], tuple(last["item"]))]


def test_a_block_that_an_earlier_driver_had_journalled_is_noticed(job, done):
    session, output = done
    (*_, last) = session.events("task")
    before = {(last["stage"], tuple(last["item"]))}
    with pytest.raises(LostError, match="begun again"):
        kill_schedules.check(job, session, output, {last["driver"]: before})


def test_results_are_json(job, done):
    plan = Schedule(0, "serial", (Kill("driver", 0.1),), ())
    session, _ = done
    session.log("kill", victim="driver", victim_pid=1)
    outcome = kill_schedules.outcome_of(job, plan, session, [0], 1.0)
    assert json.loads(json.dumps(kill_schedules.summary([outcome])))["n_kills"] == 1
