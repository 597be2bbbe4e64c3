"""Runs work in a daemon thread. Unlike an executor's, it does not outlive the process after Ctrl-C or a lost rank."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_background(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Call `function(*arguments)` in a new thread. The future gets its result or its exception."""
    result: Future[Result] = Future()

    def run() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    return result
