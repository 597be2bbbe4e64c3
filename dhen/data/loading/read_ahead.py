"""Reading ahead: a thread makes what the consumer will ask for next."""

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
    """Yield what `make()` yields, made by a thread that is at most `depth` items ahead, and one in its hands.

    Its error is raised here. The thread begins with the first item asked for; it ends, with the generator closed,
    when the items end or the iterator is closed or dropped.
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
        except BaseException as error:  # handed to the consumer, whatever it is
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
