"""Freed memory stays with the process, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

from tests import ROOT

STEPS = """
import resource, sys, torch
from dhen.runtime import topology
from dhen.runtime.host_allocator import keep_freed_memory
print({"keep": keep_freed_memory, "start": topology.start, "leave": bool}[sys.argv[1]]() is not False)
def step():
    return sum(float((torch.ones(12_000_000 + number) + 1).sum()) for number in range(3))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
print(min(faults() for _ in range(4)))  # other threads may take a piece of the heap once
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
    said, count = done.stdout.split()[-2:]
    return said, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_equal_steps_ask_for_no_new_pages():
    said, kept = faults("keep")
    _, plain = faults("leave")
    assert said == "True"
    assert plain > 10_000, "the steps are too small to show anything"
    assert kept < plain / 20


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_rank_on_a_cpu_keeps_what_it_frees():
    _, kept = faults("start", DS_ACCELERATOR="cpu")
    assert kept < 1000


def test_the_users_own_settings_are_left_alone():
    said, count = faults("keep", MALLOC_ARENA_MAX="16")
    assert said == "False"
    assert count > 10_000
