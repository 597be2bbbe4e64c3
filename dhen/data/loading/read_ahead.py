"""Reads ahead: a thread produces the next items before the consumer asks for them."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(make: Callable[[], Generator[Item, None, None]], depth: int) -> Generator[Item, None, None]:
    """Yield the items of `make()`. A thread produces them: up to `depth` are queued, and one more is in progress.

    Errors in the thread are raised here. The thread starts when the first item is requested. It ends, and the generator
    is closed, when the items run out or when the iterator is closed or dropped.
    """
    items = make()
    thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    try:
        ahead = deque(thread.submit(next, items, _END) for _ in range(depth + 1))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
        items.close()
