"""torch.compile of the layers: a layer's forward and backward become a few fused kernels.

Training steps run compiled layers; evaluations run them as written, and so do the experts of a layer, except for MLPs.
Layers of equal shapes share their kernels. They are compiled at the first step, and once more for the first batch of
another size. Each compilation is logged.
"""

import functools
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch._dynamo
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, on_compile_end, on_compile_start

from dhen.model.layer import DhenLayer
from dhen.model.mixture_of_experts import ModuleExperts, Output
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.extensions_cache import missing_compiler

logger = logging.getLogger(__name__)

_Forward = Callable[[Tensor, Tensor], Output]
_SHAPES_OF_A_LAYER = 6
"""Batches of one size, of other sizes, of one row and of none, each with up to two other states of the process."""


def compile_layers(model: DhenForClickPrediction, what: Literal["none", "layers"], device: torch.device) -> None:
    """Compile the forward and backward of each layer, if `what` is "layers".

    Call this before `checkpoint_layers` and `offload_layers`, which wrap the compiled layers. ZeRO stage 3 gathers and
    releases the weights of a compiled layer together: its hooks on the modules inside would break the layer into
    pieces. Raises ValueError if there is no compiler.
    """
    if what == "none":
        return
    _check_compiler(device)
    layers = [module for module in model.modules() if isinstance(module, DhenLayer)]
    for module in model.modules():
        if isinstance(module, ModuleExperts):  # their numbers of rows differ in each step
            module.forward = torch.compiler.disable(module.forward)
    # torch keeps one list of compiled versions for all layers, because they share their code. Over its limit, it would
    # run the rest as written.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES_OF_A_LAYER * len(layers))
    set_z3_leaf_modules(model, [DhenLayer])
    log = _CompilationLog()
    for index, layer in enumerate(layers):
        layer.forward = functools.partial(_run, log, index, layer.forward, torch.compile(layer.forward))
    logger.info("compile: %d layers by torch.compile, when the first steps need them", len(layers))


def _run(log: "_CompilationLog", index: int, as_written: _Forward, compiled: _Forward, *inputs: Tensor) -> Output:
    if not torch.is_grad_enabled():
        return as_written(*inputs)
    log.running = f"layer {index} for {inputs[0].shape[0]} examples"
    return compiled(*inputs)


class _CompilationLog:
    """Logs what torch compiles, and how long it takes."""

    running = ""
    """The layer whose forward ran last."""

    def __init__(self) -> None:
        self._started = 0.0
        on_compile_start(self._start)
        on_compile_end(self._end)

    def _start(self, _: CallbackArgs) -> None:
        self._started = time.monotonic()

    def _end(self, arguments: CallbackArgs) -> None:
        is_backward = arguments.callback_trigger is CallbackTrigger.LAZY_BACKWARD
        what = "the backward of a layer" if is_backward else self.running
        logger.info("compile: %s, in %.1f s", what, time.monotonic() - self._started)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                '"layers", but triton is not installed, which compiles for GPUs. Install it, or use "none".'
            )
        return
    if names := missing_compiler():
        raise ValueError(f'"layers", but there is no C++ compiler ({names}) on PATH. Install one, or use "none".')
