"""Running one function over many items in this process; `test_cluster.py` has the same on a cluster."""

import errno
import itertools
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkrestore.jobs.causes import RetryPolicy, cause_of
from chunkrestore.jobs.runner import BlockError, Failed, Finished, Retried, Runner, draining

ITEMS = [(0, 1, i, 2) for i in range(6)]
AT_ONCE = RetryPolicy(first_delay=0.0)


def run(function, items=ITEMS, arguments=lambda _: (), policy=AT_ONCE):
    return list(Runner(None, policy).map(function, items, arguments))


def finished(happenings):
    return {h.item: h.outcome.result for h in happenings if isinstance(h, Finished)}


def double(item, factor):
    return item[2] * factor


def fail_at_three(item):
    if item[2] == 3:
        error = ValueError("bad voxel")
        error.add_note("in this block")
        raise error
    return item[2]


def test_every_item_is_run_once_with_its_arguments():
    happenings = run(double, arguments=lambda item: (item[2] + 10,))
    assert finished(happenings) == {item: item[2] * (item[2] + 10) for item in ITEMS}
    assert len(happenings) == len(ITEMS)


def test_a_failing_block_is_given_up_at_once_and_the_others_go_on():
    happenings = run(fail_at_three)
    assert finished(happenings) == {item: item[2] for item in ITEMS if item[2] != 3}
    (failure,) = (h for h in happenings if not isinstance(h, Finished))
    assert (type(failure), failure.item, failure.cause) == (Failed, (0, 1, 3, 2), "data")
    assert failure.message == "ValueError: bad voxel in this block"
    assert isinstance(failure.error, ValueError)


def test_the_error_names_the_first_blocks_and_counts_the_others():
    failures = [Failed((0, 1, i, 2), "data", f"reason {i}", ValueError()) for i in range(8)]
    assert str(BlockError(failures[:1], 9)).startswith(
        "block (0, 2) of time point 0, channel 1 failed: reason 0. "
    )
    many = str(BlockError(failures, 9))
    assert "block (4, 2) of time point 0, channel 1 failed: reason 4" in many
    assert "; and 3 more of 9. What is finished is kept" in many


def test_an_error_without_words_is_named_by_its_type():
    def fail(item):
        raise NotImplementedError

    assert {h.message for h in run(fail)} == {"NotImplementedError"}


def failing(error, n_times, items=ITEMS[2:3]):
    """Return a task that fails so many times for some items, and then succeeds."""
    counts = {item: itertools.count() for item in items}

    def task(item):
        if item in counts and next(counts[item]) < n_times:
            raise error
        return item[2]

    return task


TRANSIENT = OSError(errno.EIO, "bad cable")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (TRANSIENT, "transient"),
        (ConnectionResetError("peer"), "transient"),
        (TimeoutError("slow"), "transient"),
        (OSError(errno.ESTALE, "stale"), "transient"),
        (OSError(errno.ENOSPC, "full"), "full"),
        (OSError(errno.EDQUOT, "quota"), "full"),
        (MemoryError(), "memory"),
        (FileNotFoundError(errno.ENOENT, "gone"), "data"),
        (PermissionError(errno.EACCES, "no"), "data"),
        (ValueError("x"), "data"),
    ],
)
def test_errors_have_causes(error, cause):
    assert cause_of(error) == cause


def test_failed_input_is_tried_again_until_it_works():
    happenings = run(failing(TRANSIENT, 5))
    assert len(finished(happenings)) == len(ITEMS)
    assert [(h.attempt, h.cause) for h in happenings if isinstance(h, Retried)] == [
        (n, "transient") for n in range(1, 6)
    ]


def test_input_that_keeps_failing_is_given_up():
    happenings = run(failing(TRANSIENT, 6))
    assert [type(h) for h in happenings if h.item == ITEMS[2]] == [Retried] * 5 + [Failed]
    assert len(finished(happenings)) == len(ITEMS) - 1


def test_delays_double_and_other_blocks_are_done_meanwhile():
    policy = RetryPolicy(first_delay=0.01)
    assert [policy.delay("transient", n) for n in range(1, 7)] == [0.01, 0.02, 0.04, 0.08, 0.16, None]
    happenings = run(failing(TRANSIENT, 2, ITEMS[:1]), policy=policy)
    order = [h.item for h in happenings if isinstance(h, Finished)]
    assert order == [*ITEMS[1:], ITEMS[0]]


def test_a_block_that_runs_out_of_memory_is_done_again_and_then_alone_at_the_end():
    happenings = run(failing(MemoryError("no room"), 2))
    assert [h.item for h in happenings if isinstance(h, Finished)] == [*ITEMS[:2], *ITEMS[3:], ITEMS[2]]
    assert len([h for h in happenings if isinstance(h, Retried)]) == 2


def test_a_block_that_runs_out_of_memory_alone_is_given_up():
    happenings = run(failing(MemoryError("no room"), 3))
    assert [type(h) for h in happenings if h.item == ITEMS[2]] == [Retried, Retried, Failed]


@given(
    st.lists(
        st.tuples(st.sampled_from([TRANSIENT, MemoryError(), ValueError()]), st.integers(0, 8)), max_size=6
    )
)
def test_whatever_fails_every_item_ends_exactly_once(plan):
    tasks = {item: failing(error, n, [item]) for item, (error, n) in zip(ITEMS, plan, strict=False)}
    happenings = run(lambda item: tasks.get(item, lambda i: i[2])(item))
    ends = [h.item for h in happenings if not isinstance(h, Retried)]
    assert sorted(ends) == ITEMS
    most = {"transient": 5, "memory": 2, "data": 0}
    expected = {item for item, (error, n) in zip(ITEMS, plan, strict=False) if n > most[cause_of(error)]}
    assert {h.item for h in happenings if isinstance(h, Failed)} == expected


def test_an_interrupt_is_not_taken_for_a_failing_block():
    def interrupt(item):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupt)


def test_draining_finishes_the_block_in_flight_and_starts_no_other():
    started = []

    def task(item):
        started.append(item)
        if item == ITEMS[2]:
            assert draining.request()
            assert not draining.request()

    seen = []
    try:
        with pytest.raises(KeyboardInterrupt):
            seen += (h.item for h in Runner(None).map(task, ITEMS, lambda _: ()))
    finally:
        draining.forget()
    assert seen == started == ITEMS[:3]


def test_draining_does_not_wait_for_what_is_to_be_tried_again():
    policy = RetryPolicy(first_delay=3600.0)
    happenings = Runner(None, policy).map(failing(TRANSIENT, 9, ITEMS), ITEMS, lambda _: ())
    try:
        assert [type(next(happenings)) for _ in ITEMS] == [Retried] * len(ITEMS)
        threading.Timer(0.05, draining.request).start()
        with pytest.raises(KeyboardInterrupt):
            next(happenings)
    finally:
        draining.forget()


def test_nobody_heeds_a_request_where_nothing_runs():
    try:
        assert not draining.request()
    finally:
        draining.forget()


def test_items_run_only_when_they_are_asked_for():
    started = []
    results = Runner(None).map(lambda item: started.append(item), ITEMS, lambda _: ())
    assert started == []
    next(results)
    assert started == ITEMS[:1]
    results.close()


def test_no_result_is_kept():
    class Result(np.ndarray):
        """An array that can be referred to weakly."""

    alive = []
    for happening in Runner(None).map(lambda item: np.zeros(4).view(Result), ITEMS, lambda _: ()):
        alive.append(weakref.ref(happening.outcome.result))
        del happening
        assert sum(reference() is not None for reference in alive) <= 1


def test_nothing_to_do_is_done():
    assert run(double, []) == []
