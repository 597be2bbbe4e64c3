"""What stands for a GPU cluster on this machine: pauses for compute, and a ring for reduce-scatter."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


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
