"""Freed memory stays with the process, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

from tests import ROOT

STEPS = """
import resource, sys, torch
from dhen.parallel.host_allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def step():
    return sum(float((torch.ones(12_000_000 + number) + 1).sum()) for number in range(3))
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str, **environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and pages that five equal steps had to ask the system for."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, what],
        cwd=ROOT,
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_equal_steps_ask_for_no_new_pages():
    said, kept = faults("keep")
    _, plain = faults("leave")
    assert said == "True"
    assert plain > 10_000, "the steps are too small to show anything"
    assert kept < plain / 20


def test_the_users_own_settings_are_left_alone():
    said, count = faults("keep", MALLOC_ARENA_MAX="16")
    assert said == "False"
    assert count > 10_000
