"""A step for GPUs is traced by CUDA's rules of autocast. tests/training/test_cuda_without_gpu.py compares the bytes."""

import torch
from torch.nn import functional as F

from dhen.planner.cuda_autocast import _IN_FLOAT32, _IN_WIDEST, cuda_autocast
from dhen.planner.step_trace import Precision, evaluation_bytes, trace_step
from tests.planner.test_step_trace import BATCH, config_of, kept_bytes


def dtypes() -> list[torch.dtype]:
    """Under a CPU's autocast: of a product, a norm, a sum, and the cross of bfloat16 without and with float32."""
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        product = F.linear(x, torch.ones(3, 4))
        crosses = torch.addcmul(x, x, x), torch.addcmul(x, x, x.float())
        outputs = [product, F.layer_norm(x, (4,), torch.ones(4)), x.sum(0), *crosses]
    sum(each.float().sum() for each in outputs).backward()
    return [each.dtype for each in outputs]


def test_norms_and_sums_are_in_float32_while_the_rules_hold():
    of_cpu = [*[torch.bfloat16] * 4, torch.float32]
    assert dtypes() == of_cpu
    with cuda_autocast():
        assert dtypes() == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    assert dtypes() == of_cpu


def test_torch_has_a_rule_for_each_on_cuda_and_none_on_a_cpu():
    for name in (*_IN_FLOAT32, *_IN_WIDEST):
        has_rule = [
            torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", f"Autocast{where}")
            for where in ("CUDA", "CPU")
        ]
        assert has_rule == [True, False], name


def test_norms_keep_more_on_a_gpu():
    of_cpu, of_gpu = (Precision(autocast=torch.bfloat16, is_gpu=is_gpu) for is_gpu in (False, True))
    config = config_of(3)
    assert 1.05 < kept_bytes(trace_step(config, BATCH, of_gpu)) / kept_bytes(trace_step(config, BATCH, of_cpu)) < 1.5
    assert evaluation_bytes(config, BATCH, of_gpu) > evaluation_bytes(config, BATCH, of_cpu)
    recomputed = trace_step(config, BATCH, of_gpu, "all")
    assert kept_bytes(recomputed) < kept_bytes(trace_step(config, BATCH, of_gpu)) / 2
