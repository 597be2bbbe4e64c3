"""Runs a function on several ranks, each a process of its own with gloo, as a launcher would start them."""

import multiprocessing
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "dhen.training.session",
        "dhen.training.finish",
        "dhen.training.saved.scoring",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports torch.compile's compiler, 2 s
        "torch.utils.tensorboard",
        "transformers.models.auto.modeling_auto",
    ]
)
"""Ranks fork from one server that has imported what they need: importing takes longer than their work."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 300,
    local_size: int | None = None,
    on_gpu: bool = False,
) -> list[Any]:
    """`function(topology, *args)` on each rank; returns the results by rank. Raises what a rank raised, as text.

    local_size: ranks per node, where the ranks should behave as if they were on several nodes. on_gpu: each on one.
    """
    context = multiprocessing.get_context("spawn") if on_gpu else CONTEXT  # CUDA doesn't survive a fork
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(
            target=_one_rank,
            args=(rank_environment(rank, world_size, port, local_size or world_size), results, function, args),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        by_rank = {}
        for _ in ranks:
            rank, failure, result = results.get(timeout=timeout)
            if failure:
                raise AssertionError(f"rank {rank} of {world_size}:\n{failure}")
            by_rank[rank] = pickle.loads(result)
    finally:
        for process in ranks:
            process.join(timeout=10 if len(by_rank) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [by_rank[rank] for rank in range(world_size)]


def _one_rank(environment: dict[str, str], results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= environment
    rank = int(environment["RANK"])
    try:
        import torch

        from dhen.runtime import topology

        torch.set_num_threads(1)
        job = topology.start(timeout_minutes=2)
        result = function(job, *args)
        results.put((rank, None, pickle.dumps(result)))  # by value: tensors would go by file descriptor
        with suppress(RuntimeError):  # a rank that leaves breaks the groups that others still connect
            job.barrier()
        topology.stop()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise


def rank_environment(rank: int, world_size: int, port: int, local_size: int | None = None) -> dict[str, str]:
    """What a launcher sets for a rank of a job on nodes of `local_size` ranks, one node by default."""
    local_size = local_size or world_size
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    """A port that nobody listens on now, below those that the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
