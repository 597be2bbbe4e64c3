"""What stands for a GPU cluster on this machine: pauses for compute, a ring for reduce-scatter, a cap on memory."""

import ctypes
import gc
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist

from dhen.runtime.topology import Topology

_STACK_BYTES = 2**19
_OUT_OF_MEMORY = 12


def paused(function: Callable, forward_seconds: float, backward_seconds: float) -> Callable:
    """`function`, whose forward and backward take so many seconds longer."""

    class Pause(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(forward_seconds)
            ctx.save_for_backward(x.new_empty(0))  # a recomputation stops at the last tensor that is saved
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(backward_seconds)
            return gradient

    return lambda *inputs: Pause.apply(function(*inputs))


def replace_reduce_scatter() -> None:
    """Replace gloo's reduce_scatter_tensor, which moves as many bytes as an all-reduce, by a ring of sends."""

    def ring(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        group = group or dist.group.WORLD
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        after = dist.get_global_rank(group, (rank + 1) % size)
        before = dist.get_global_rank(group, (rank - 1) % size)
        chunks = list(input.view(size, -1).unbind())
        passed = chunks[(rank - 1) % size].clone()
        for hop in range(2, size + 1):
            received = passed.clone()
            sending = dist.isend(passed, after, group)
            dist.recv(received, before, group)
            sending.wait()
            passed = received.add_(chunks[(rank - hop) % size])
        output.view(-1).copy_(passed)
        if op == dist.ReduceOp.AVG:
            output.div_(size)
        return SimpleNamespace(wait=lambda: None) if async_op else None

    dist.reduce_scatter_tensor = dist.reduce_scatter_single = ring
    deepspeed.comm.reduce_scatter_fn = lambda output, inputs, group=None, **_: ring(output, inputs, group=group)


def run_under_a_cap(cap_mib: float, file: Path, topology: Topology, function: Callable[[], Any]) -> NoReturn:
    """Call `function`; rank 0 writes what it returns as JSON. Communicates; ends the rank.

    The process may allocate at most `cap_mib` more than it has. A rank that cannot allocate writes null and ends the
    job. Threads that start later reserve 0.5 MiB of stack, not 8: the cap counts reserved memory, and gloo starts
    several.
    """
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(_STACK_BYTES))
    libc.pthread_setattr_default_np(attributes)
    gc.collect()
    libc.malloc_trim(0)
    limit = int(status_kib("VmData") * 1024 + cap_mib * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    result, fits = None, True
    try:
        result = function()
    except (MemoryError, RuntimeError) as error:
        fits = False
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if not fits:
        file.write_text("null")
        os._exit(_OUT_OF_MEMORY)
    topology.barrier()
    if topology.is_main:
        file.write_text(json.dumps(result))
    os._exit(0)


def status_kib(key: str) -> int:
    """A line of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
