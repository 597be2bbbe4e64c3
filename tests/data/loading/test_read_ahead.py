"""The read-ahead thread is bounded, passes errors on, and ends with its iterator."""

import threading
import time

import pytest

from dhen.data.loading.batches import BatchLoader
from dhen.data.loading.read_ahead import read_ahead
from tests.data.prepared_folders import write_prepared

OURS = ("read ahead", "decode")


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(OURS)]


class Counter:
    """A generator function that records what it has yielded and whether it was closed."""

    def __init__(self, items=10**9, fails_at=None):
        self.items, self.fails_at = items, fails_at
        self.made = 0
        self.is_closed = False

    def __call__(self):
        try:
            while self.made < self.items:
                if self.made == self.fails_at:
                    raise OSError("the disk is on fire")
                self.made += 1
                yield self.made - 1
        finally:
            self.is_closed = True


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    assert threads() == []
    yield
    assert threads() == []


def test_it_yields_what_is_made_in_order():
    counter = Counter(items=50)
    assert list(read_ahead(counter, depth=3)) == list(range(50))
    assert counter.is_closed


def test_it_is_bounded_and_waits_for_the_consumer():
    counter = Counter()
    items = read_ahead(counter, depth=3)
    assert counter.made == 0
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.3)
    assert counter.made == 5 + 3 + 1  # taken, queued, in progress
    items.close()


def test_it_reads_ahead_while_the_consumer_works():
    is_ahead = threading.Event()

    def numbers():
        yield 0
        yield 1
        is_ahead.set()
        yield 2

    items = read_ahead(numbers, depth=3)
    assert next(items) == 0
    assert is_ahead.wait(60), "the consumer has not asked for more"
    assert list(items) == [1, 2]


def test_an_error_comes_after_the_items_before_it():
    counter = Counter(fails_at=3)
    items = read_ahead(counter, depth=10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="on fire"):
        next(items)
    assert counter.is_closed
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("how", ["close", "drop", "break", "error"])
def test_the_thread_ends_with_the_iterator(how):
    counter = Counter()
    items = read_ahead(counter, depth=3)
    if how == "break":
        for _ in items:
            break
    elif how == "error":
        with pytest.raises(ZeroDivisionError):
            sum(1 / item for item in items)
    else:
        next(items)
    assert len(threads()) == 1
    if how == "close":
        items.close()
    del items
    assert counter.is_closed


def test_an_iterator_that_is_never_asked_starts_nothing():
    counter = Counter()
    read_ahead(counter, depth=3)
    assert counter.made == 0


@pytest.mark.parametrize("taken", [0, 1, 1000])
def test_the_loader_leaves_no_thread_behind(tmp_path, taken):
    prepared = write_prepared(tmp_path / "p", 83)
    batches = BatchLoader(prepared.folder, "train", batch_size=5, shuffle=True, window_rows=20).epoch(0)
    for _ in zip(range(taken), batches, strict=False):
        assert len(threads()) <= 2
    del batches
