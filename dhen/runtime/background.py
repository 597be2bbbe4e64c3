"""Work in a thread that doesn't outlive the process, as those of an executor would after Ctrl-C or a lost rank."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_background(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Call it in a thread of its own; the future has what it returned or raised."""
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result
