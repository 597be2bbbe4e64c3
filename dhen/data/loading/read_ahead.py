"""Reads ahead: a thread produces the next items before the consumer asks for them."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")
POLL_SECONDS = 0.05


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def read_ahead(make: Callable[[], Generator[Item, None, None]], depth: int) -> Iterator[Item]:
    """Yield the items of `make()`. A thread produces them: up to `depth` are queued, and one more is in progress.

    Errors in the thread are raised here. The thread starts when the first item is requested. It closes the generator
    and ends when the items run out or when the iterator is closed or dropped.
    """
    ready: queue.Queue = queue.Queue(depth)
    is_dropped = threading.Event()

    def put(item: object) -> bool:
        while not is_dropped.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            with contextlib.closing(make()) as items:
                for item in items:
                    if not put(item):
                        return
        except BaseException as error:  # any error goes to the consumer
            put(_Failure(error))
        else:
            put(_END)

    thread = threading.Thread(target=produce, name="read ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        is_dropped.set()
        thread.join()
