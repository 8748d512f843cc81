"""Running one function over many items in this process; `test_cluster.py` has the same on a cluster."""

import weakref

import numpy as np
import pytest

from chunkrestore.jobs.runner import BlockError, Runner

ITEMS = [(0, 1, i, 2) for i in range(6)]


def double(item, factor):
    return item[2] * factor


def fail_at_three(item):
    if item[2] == 3:
        error = ValueError("bad voxel")
        error.add_note("in this block")
        raise error
    return item[2]


def test_every_item_is_run_once_with_its_arguments():
    results = dict(Runner(None).map(double, ITEMS, lambda item: (item[2] + 10,)))
    assert results == {item: item[2] * (item[2] + 10) for item in ITEMS}


def test_a_failing_block_stops_the_run_and_is_named():
    seen = []
    with pytest.raises(BlockError) as caught:
        seen += (item[2] for item, _ in Runner(None).map(fail_at_three, ITEMS, lambda _: ()))
    assert str(caught.value) == (
        "block (3, 2) of time point 0, channel 1 failed: ValueError: bad voxel in this block"
    )
    assert isinstance(caught.value.__cause__, ValueError)
    assert seen == [0, 1, 2]


def test_an_error_without_words_is_named_by_its_type():
    def fail(item):
        raise MemoryError

    with pytest.raises(BlockError, match=r"failed: MemoryError$"):
        list(Runner(None).map(fail, ITEMS, lambda _: ()))


def test_an_interrupt_is_not_taken_for_a_failing_block():
    def interrupt(item):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Runner(None).map(interrupt, ITEMS, lambda _: ()))


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
    for _, result in Runner(None).map(lambda item: np.zeros(4).view(Result), ITEMS, lambda _: ()):
        alive.append(weakref.ref(result))
        del result
        assert sum(reference() is not None for reference in alive) <= 1


def test_nothing_to_do_is_done():
    assert list(Runner(None).map(double, [], lambda _: ())) == []
