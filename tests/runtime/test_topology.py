"""Joining a job: whatever goes wrong is one line that says what to do."""

import os

import pytest

from dhen.runtime import topology
from tests.ranks import CONTEXT, free_port, rank_environment


@pytest.fixture(autouse=True)
def _own_variables(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_variables_that_a_launcher_did_not_set_are_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConnectionError, match="RANK is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT") as caught:
        topology.start()
    assert "\n" not in str(caught.value)


def join_error(environment: dict[str, str]) -> str:
    os.environ.update(environment)
    try:
        topology.start(timeout_minutes=0.05)
    except ConnectionError as error:
        return str(error)
    return "joined"


def test_a_rank_that_finds_nobody_says_so_in_one_line():
    """Rank 1 of 2, where no rank 0 listens."""
    environment = rank_environment(1, 2, free_port())
    with CONTEXT.Pool(1) as pool:
        said = pool.apply(join_error, (environment,))
    place = f"127.0.0.1:{environment['MASTER_PORT']}"
    assert said.startswith(f"Rank 1 of 2 cannot join the job at {place}: ")
    assert said.endswith(f"Check that all ranks started, and that every node can reach {place}.")
    assert "\n" not in said


def test_only_a_network_failure_is_blamed_on_the_network(monkeypatch):
    for name, value in rank_environment(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    assert topology._why_not_joined("CUDA error: out of memory.\nmore").endswith(": CUDA error: out of memory.")
    assert "Check that all ranks started" in topology._why_not_joined("Connection reset by peer")
