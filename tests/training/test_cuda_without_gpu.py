"""What runs on a GPU once per batch, without a GPU: on fake tensors, which have shapes and a device, but no memory.

A tensor on the wrong device, and all that makes the host wait for the GPU, fails the test. Autocast follows CUDA's
rules. Not covered: FBGEMM's CUDA build, streams, and autograd's backward passes, for which torch asks the driver.
"""

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import fbgemm_gpu.sparse_ops  # noqa: F401 registers the operators
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dhen.data.loading.batches import Batch
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.interactions import interaction_kinds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.planner.live_memory import LiveMemory
from dhen.planner.step_trace import Precision, trace_step
from dhen.runtime.topology import Topology
from dhen.tables.id_exchange import IdExchange
from dhen.tables.placement.plan import Placement, TableShard
from dhen.tables.pooled_exchange import PooledExchange, PooledLayout, Wires
from dhen.tables.row_uses import RowUses, UnseenIds
from dhen.tables.stochastic_rounding import round_stochastically
from dhen.tables.wire import Wire, _block_of_column, _units_of_blocks
from dhen.training.evaluation.metrics import ClickMetrics, RunningLoss
from dhen.training.loop import summed_loss, with_ids_ahead
from dhen.training.parallel_model import ScoringDhen
from tests.model.test_interactions import CASES
from tests.planner.test_step_trace import kept_bytes

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs torch's CUDA build; a GPU or a driver is not needed"
)
B, F, D, N, RANKS = 8, 4, 6, 3, 2
GPU = torch.device("cuda", 0)
EXPERTS = {"num_experts": 4, "over_arch": [16], "noisy_gate": True}
MODELS = [
    *({"interactions": [{"kind": kind, **options}]} for kind, options in CASES),
    {"interactions": [{"kind": "advanced_dlrm", **EXPERTS}]},
    {"interactions": [{"kind": "advanced_dlrm", **EXPERTS, "experts_per_example": 1, "use_dense": True}]},
    {"norm": "rms_norm", "norm_position": "pre", "ensemble": "weighted_sum", "head_inputs": "all"},
    {"norm": "batch_norm", "norm_position": "inner", "batch_norm": True},
    {"num_dense_features": 0, "num_dense_embeddings": 0},
]
_TO_COPY, _COPY = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
_READ = torch.ops.aten._local_scalar_dense.default


class Host(TorchDispatchMode):
    """Finds where the host would wait for the GPU, or where tensors of both meet.

    answers: what the host may read, in order. may_send: whether it may wait until its own numbers are on the GPU.
    """

    def __init__(self, answers: Iterable[int], may_send: bool) -> None:
        super().__init__()
        self.answers, self.may_send, self.waits = list(answers), may_send, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ and self.answers:
            return self.answers.pop(0)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_copy = func in (_TO_COPY, _COPY)
        # A number on the CPU is passed to a GPU's kernel as an argument.
        seen = {t.device.type for t in tensors_in((args, kwargs)) if is_copy or t.dim() or t.is_cuda}
        seen |= {t.device.type for t in tensors_in(result)}
        is_fine = kwargs.get("non_blocking") or (func is _COPY and args[2:] == (True,))
        is_fine = is_fine or (self.may_send and func is _TO_COPY and result.is_cuda)
        if len(seen) > 1 and not is_fine:
            self.waits.append(f"{func} with {[tuple(t.shape) for t in tensors_in((args, kwargs))]}")
        return result


def tensors_in(values: object) -> list[Tensor]:
    return [each for each in tree_iter(values) if isinstance(each, Tensor)]


@contextlib.contextmanager
def running(*answers: int, gradients: bool = False, autocast: bool = False, may_send: bool = False) -> Iterator[None]:
    """Fails if the host waits for the GPU, or does not read all `answers`."""
    torch.set_autocast_enabled("cuda", autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.set_grad_enabled(gradients), Host(answers, may_send) as host:
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert not host.waits
    assert not host.answers


@pytest.fixture(autouse=True)
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode():
        yield
    for of_another_mode in (_block_of_column, _units_of_blocks):
        of_another_mode.cache_clear()


def on_gpu(module: nn.Module, gradients: bool = False) -> nn.Module:
    """The module with its weights and buffers, and nothing else, on the GPU. torch cannot move fake weights."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)

    for each in module.modules():
        for name, weight in each.named_parameters(recurse=False):
            each._parameters[name] = nn.Parameter(moved(weight), requires_grad=gradients)
        for name, buffer in each.named_buffers(recurse=False):
            each._buffers[name] = moved(buffer)
    return module


def ids(count: int, device: torch.device = GPU) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)


def sparse_of(kind: str, device: torch.device = GPU) -> SparseIds:
    """kind: "single", "bags" or "weighted"."""
    if kind == "single":
        return SparseIds(ids(F * B, device), F, counts_F=[B] * F)
    weights = torch.empty(50, device=device) if kind == "weighted" else None
    return SparseIds(ids(50, device), F, ids(F * B, device).view(F, B), weights, counts_F=[20, 15, 0, 15])


def config_of(**more: Any) -> DhenConfig:
    features = [
        {"name": f"C{index}", "num_embeddings": 10, "pooling": "mean" if index == 1 else "sum"} for index in range(F)
    ]
    values = {"num_dense_features": N, "sparse_features": features, "embedding_dim": D, "num_embeddings_out": 3}
    kinds = ["self_attention", "linear", "deep_cross"]
    return DhenConfig(**values | {"num_layers": 2, "interactions": kinds, "dropout": 0.1} | more)


def check_dtype(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    """CUDA's autocast normalizes in float32; that of a CPU would in bfloat16."""
    assert output.dtype == (torch.float32 if isinstance(module, nn.LayerNorm) else torch.bfloat16)


def has_experts(more: dict[str, Any]) -> bool:
    """In float32, experts read the sizes of their groups: see expert_mlps.py."""
    return "num_experts" in str(more)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("more", "autocast"),
    [(more, autocast) for more in MODELS for autocast in (True, False) if autocast or not has_experts(more)],
    ids=str,
)
def test_the_dense_part_and_its_loss_stay_on_the_gpu(more, autocast, gradients):
    model = on_gpu(DhenForClickPrediction(config_of(**more), with_tables=False), gradients).train(gradients)
    for module in model.modules():
        if autocast and isinstance(module, nn.LayerNorm | nn.Linear) and not has_experts(more):
            module.register_forward_hook(check_dtype)
    x_BFD = torch.empty(B, F, D, device=GPU, requires_grad=gradients)
    dense_BN, labels_B = torch.empty(B, model.config.num_dense_features, device=GPU), torch.empty(B, device=GPU)
    running_loss, metrics = RunningLoss(GPU), ClickMetrics()
    metrics.update(labels_B, labels_B)  # an evaluation's first batch brings the sums to the GPU
    for num_passes in (1, 2):
        with running(gradients=gradients, autocast=autocast):
            output = model(inputs_embeds=lambda: x_BFD, dense=dense_BN, num_passes=num_passes)
            loss, logits_B = summed_loss(output, labels_B, num_passes)
            running_loss.update(logits_B, labels_B)
            metrics.update(logits_B, labels_B)
        assert loss.is_cuda
        assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    "more",
    # Attention's kernel is chosen by the driver. torch 2.11, which has no rule for rms_norm on CUDA, is too old for it.
    [more for more in MODELS if "attention" not in str(more) and more.get("norm") != "rms_norm"],
    ids=str,
)
def test_the_planner_traces_what_a_forward_keeps_on_a_gpu(more):
    config = config_of(**{"interactions": ["linear"]} | more | {"dropout": 0.0})  # a CPU's dropout keeps another mask
    trace = trace_step(config, B, Precision(autocast=torch.bfloat16, is_gpu=True))
    model = on_gpu(DhenForClickPrediction(config, with_tables=False), gradients=True)
    inputs = {"inputs_embeds": torch.empty(B, F, D, device=GPU, requires_grad=True)}
    inputs |= {"dense": torch.empty(B, config.num_dense_features, device=GPU), "labels": torch.empty(B, device=GPU)}
    external = [*model.parameters(), *model.buffers(), *inputs.values()]
    with LiveMemory(external) as memory:
        with running(gradients=True, autocast=True):
            loss = model(**inputs).loss
        assert loss.is_cuda
        assert kept_bytes(trace) == memory.bytes


def test_every_kind_of_interaction_is_covered():
    kinds = {each["interactions"][0]["kind"] for each in MODELS if isinstance(each.get("interactions", [""])[0], dict)}
    assert kinds >= set(interaction_kinds()) - {"users_product"}


@pytest.fixture
def job() -> Iterator[Topology]:
    """Rank 0 of 2. The collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield Topology(0, RANKS, 0, RANKS, GPU, dist.group.WORLD, timedelta(minutes=1))
    dist.destroy_process_group()


def shards_by_rank(*, cut: bool) -> list[list[TableShard]]:
    """Tables 0 and 3 on rank 0, table 1 on rank 1, and table 2 there or on both."""
    of_2 = [(0, 2, (0, 2)), (1, 2, (2, D))] if cut else [(1, 2, (0, D))]
    places = [(0, 0, (0, D)), (0, 3, (0, D)), *of_2, (1, 1, (0, D))]
    shards = [TableShard(table, f"C{table}", 10, *columns, rank) for rank, table, columns in places]
    return [[shard for shard in shards if shard.rank == rank] for rank in range(RANKS)]


@pytest.mark.parametrize("kind", ["single", "bags", "weighted"])
def test_ids_are_sent_without_a_read(kind, job, monkeypatch):
    """From the GPU: the sizes of the batches travel between the hosts, which read them."""
    monkeypatch.setattr(dist, "new_group", lambda **_: job.world)  # the hosts' own needs a real store
    exchange = IdExchange(config_of().tables, shards_by_rank(cut=True), job)
    has_bags = kind != "single"
    of_both_ranks = [each for fact in (B, has_bags, has_bags, 30) for each in [fact] * RANKS]
    with running(*of_both_ranks, may_send=True):
        sent = exchange.send(sparse_of(kind))
        own = exchange.receive(sent)
    assert {each.device for each in tensors_in(vars(own))} == {GPU}


@pytest.mark.parametrize("batch", [B, B - 2])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_embeddings_and_gradients_are_exchanged_on_the_gpu(dtype, batch, job):
    by_rank = shards_by_rank(cut=True)
    own = sum(shard.num_columns for shard in by_rank[0])
    layout = PooledLayout(by_rank, F, D, 0, Wires(Wire(dtype), Wire(dtype)), GPU)
    exchange = PooledExchange(layout, batch, B, job.world, overlap=False)
    for is_first in (True, False):  # the first step sends the order of the columns to the GPU
        with running(may_send=is_first):
            embeddings_BFD = exchange.finish(exchange.start(torch.empty(RANKS * B, own, device=GPU)))
            exchange.send_gradient(torch.empty_like(embeddings_BFD))
            gradient = exchange.receive_gradient()
    assert embeddings_BFD.shape == (batch, F, D)
    assert gradient.shape == (RANKS * B, own)
    assert {embeddings_BFD.device, gradient.device} == {GPU}


def test_uses_and_unseen_ids_are_counted_on_the_gpu():
    uses, lengths_SR = RowUses([10, 5], GPU), ids(2 * B).view(2, B)
    means = [torch.empty(D, device=GPU), torch.empty(2, device=GPU)]
    unseen = UnseenIds(uses, lambda: means)
    with running():
        uses.add(ids(30), lengths_SR.sum(1))
        weights, missing_SR = unseen.split(ids(30), lengths_SR, None)
        assert unseen.mean_parts(missing_SR).shape == (B, D + 2)
        assert weights.is_cuda
        assert round_stochastically(torch.empty(5, D, device=GPU)).is_cuda


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("replicated", [["C0", "C1", "C2", "C3"], ["C1", "C3"]], ids=str)
@pytest.mark.parametrize("kind", ["single", "bags", "weighted"])
def test_an_evaluation_sends_batches_ahead(kind, replicated, unseen, job):
    """with_ids_ahead, the split of the ids between replicated and sharded tables, the scores and the metrics."""
    config, num_own = config_of(), len(replicated)
    dense_part = on_gpu(DhenForClickPrediction(config, with_tables=replicated)).eval()
    model = ScoringDhen(config, job, Placement((), RANKS, tuple(replicated)), None, dense_part)
    others_BFD = torch.empty(B, F - num_own, D, device=GPU) if num_own < F else None
    cpu = torch.device("cpu")
    batch = Batch(torch.empty(B), torch.empty(B, N), sparse_of(kind, cpu), ids(B, cpu), B)
    metrics = ClickMetrics()
    metrics.update(*[torch.empty(B, device=GPU)] * 2)
    with contextlib.ExitStack() as stack:
        if unseen:
            means = [torch.empty(D, device=GPU)] * num_own
            stack.enter_context(model.replicated.watched_by(UnseenIds(model.replicated.uses, lambda: means)))
            dense_part.tables.register_forward_hook(model.replicated.add_means)
        stack.enter_context(running())
        for on_device, sent in with_ids_ahead(model, iter([batch, batch])):
            assert sent is None
            assert on_device.rows_B.device == cpu
            model.replicated.others(on_device.sparse)
            metrics.update(model.score(others_BFD, on_device.dense_BN, on_device.sparse), on_device.labels_B)


FAULTS = {
    "a tensor of the CPU": (lambda x: x + torch.empty(3), RuntimeError),
    "an index of the CPU": (lambda x: x[torch.zeros(2, dtype=torch.int64)], AssertionError),
    "a list as an index": (lambda x: x[[0, 1]], AssertionError),
    "item": (lambda x: x.sum().item(), DataDependentOutputException),
    "tolist": (lambda x: x.tolist(), DataDependentOutputException),
    "a condition": (lambda x: bool((x > 0).any()), DataDependentOutputException),
    "cpu": (lambda x: x.cpu(), AssertionError),
    "to": (lambda x: x.to("cpu"), AssertionError),
    "a copy to the CPU": (lambda x: torch.empty(3).copy_(x), AssertionError),
    "a new tensor of the host's numbers": (lambda x: x.new_tensor([1.0, 2.0]), AssertionError),
    "a shape of the GPU's numbers": (lambda x: x.nonzero(), DynamicOutputShapeException),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_fault_is_found(fault):
    """Negative controls."""
    function, error = FAULTS[fault]
    with pytest.raises(error), running():
        function(torch.empty(3, device=GPU))


def test_asynchronous_copies_and_numbers_of_the_host_are_none():
    with running():
        x = torch.empty(3).to(GPU, non_blocking=True)
        x.mul_(2.0).add_(x.new_full((), 3.0))
    assert x.device.type == "cuda", "a fault is only looked for on the GPU"
