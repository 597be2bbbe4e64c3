"""What the all-to-all carries: what each dtype keeps of a row, saturation, NaN; bytes counted where they leave."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.model.features import SparseIds
from dhen.model.sparse_feature import SparseFeature
from dhen.runtime.topology import Topology
from dhen.tables.placement.costs import StepSetting, read_costs
from dhen.tables.placement.plan import PlacementOptions, place_tables
from dhen.tables.pooled_exchange import Wires
from dhen.tables.sharded_tables import ShardedTables
from dhen.tables.updated_tables import TableUpdate
from dhen.tables.wire import Wire
from tests.ranks import run_ranks

LARGEST_FP16 = torch.finfo(torch.float16).max
RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from([4, 8, 12]), min_size=0, max_size=5),
    rows=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_rows_come_back_as_exactly_as_their_dtype_holds_them(widths, rows, seed):
    x = torch.randn(rows, sum(widths), generator=torch.Generator().manual_seed(seed))
    for dtype, error in RELATIVE_ERROR.items():
        wire = Wire(dtype)
        sent = wire.encode(x, widths)
        assert sent.shape == (rows, wire.row_size(widths))
        torch.testing.assert_close(wire.decode(sent, widths), x, rtol=error, atol=1e-7 if error else 0.0)
    wire = Wire("int8")
    sent = wire.encode(x, widths)
    assert sent.shape == (rows, wire.row_size(widths))
    back = wire.decode(sent, widths)
    for ours, theirs in zip(back.split(widths, dim=1), x.split(widths, dim=1), strict=True):
        # Half a step of each row's and block's own scale, by its formula.
        step = theirs.abs().amax(1, keepdim=True) / 127
        assert ((ours - theirs).abs() <= step / 2 * (1 + 1e-5)).all()


def test_a_small_block_beside_a_large_one_keeps_its_digits():
    x = torch.tensor([[1e-6, -2e-6, 3e-6, 4e-6, 1e3, 2e3, -3e3, 4e3]])
    back = Wire("int8").decode(Wire("int8").encode(x, [4, 4]), [4, 4])
    torch.testing.assert_close(back[:, :4], x[:, :4], rtol=0, atol=4e-6 / 127)
    together = Wire("int8").decode(Wire("int8").encode(x, [8]), [8])
    assert (together[:, :4] == 0).all(), "with one scale for both it would be lost"


def test_fp16_saturates_and_never_becomes_infinite():
    x = torch.tensor([[1e6, -1e6, 65504.0, 1.0]])
    back = Wire("fp16").decode(Wire("fp16").encode(x, [4]), [4])
    assert back.tolist() == [[LARGEST_FP16, -LARGEST_FP16, LARGEST_FP16, 1.0]]
    assert torch.isinf(x.half()).any(), "a plain cast would"


@pytest.mark.parametrize("scale", [1.0, 2.0**14])
def test_what_is_infinite_stays_so_and_shows(scale):
    x = torch.tensor([[float("inf"), float("-inf"), 1.0, 2.0]])
    wire = Wire("fp16")
    assert wire.decode(wire.encode(x, [4], scale), [4], scale).tolist() == x.tolist()
    assert not Wire("int8").decode(Wire("int8").encode(x, [4]), [4]).isfinite().all()


def test_small_gradients_keep_their_digits_on_an_fp16_wire():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 1e-7
    wire = Wire("fp16")
    scaled = wire.decode(wire.encode(x, [8], 2.0**14), [8], 2.0**14)
    # To half a unit in the last place, or of the smallest number that the wire then has.
    torch.testing.assert_close(scaled, x, rtol=2**-11, atol=2.0 ** -(24 + 14 + 1))
    assert ((wire.decode(wire.encode(x, [8]), [8]) - x).norm() / x.norm()) > 0.1, "unscaled they don't"
    exact = x.half().float() * 2**14
    assert torch.equal(wire.decode(wire.encode(exact / 2**14, [8], 2.0**14), [8], 2.0**14), exact / 2**14)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_nan_stays_nan(dtype):
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    back = Wire(dtype).decode(Wire(dtype).encode(x, [4]), [4])
    assert back[0].isnan().any()
    assert not back[1].isnan().any()


TABLES = tuple(SparseFeature(f"C{index}", 50) for index in range(4))
DIM, BATCH = 16, 32


def bytes_of_a_step(topology: Topology, forward: str, backward: str) -> tuple[int, int, torch.Tensor]:
    """What this rank sends to the other one in float exchanges, forward and backward; and the embeddings."""
    setting = StepSetting(2, 2, BATCH, "sgd")
    placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=PlacementOptions(max_column_shards=1))
    wires = Wires(Wire(forward), Wire(backward))
    tables = ShardedTables(TABLES, DIM, placement, topology, update=TableUpdate("sgd"), wires=wires)
    tables.set_learning_rate(0.1)
    sent: list[int] = []
    right = dist.all_to_all_single

    def counted(received, flat, receive, send, **options):
        if flat.dtype not in (torch.int32, torch.int64):
            sent.append(send[1 - topology.rank] * flat.element_size())
        return right(received, flat, receive, send, **options)

    dist.all_to_all_single = counted
    generator = torch.Generator().manual_seed(topology.rank)
    embeddings = tables(SparseIds(torch.randint(0, 50, (4 * BATCH,), generator=generator), 4))
    embeddings.sum().backward()
    dist.all_to_all_single = right
    going, coming = sent
    return going, coming, embeddings.detach()


def update_from_a_mean(topology: Topology, backward: str) -> torch.Tensor:
    """What a step of a loss that is a mean over a large batch, 1e-7 an example and number, changes in the tables."""
    setting = StepSetting(2, 2, BATCH, "sgd")
    placement = place_tables(TABLES, DIM, setting, read_costs("cpu"), options=PlacementOptions(max_column_shards=1))
    wires = Wires(backward=Wire(backward))
    tables = ShardedTables(TABLES, DIM, placement, topology, update=TableUpdate("sgd"), wires=wires)
    for _, tensors in tables.shard_tensors():
        tensors["weight"].zero_()
    tables.set_learning_rate(1.0)
    generator = torch.Generator().manual_seed(topology.rank)
    embeddings = tables(SparseIds(torch.randint(0, 50, (4 * BATCH,), generator=generator), 4))
    (embeddings * torch.randn(embeddings.shape, generator=generator)).sum().mul(1e-7).backward()
    return torch.cat([tensors["weight"].flatten() for _, tensors in tables.shard_tensors()])


def update_by_wire(topology: Topology) -> dict[str, torch.Tensor]:
    return {dtype: update_from_a_mean(topology, dtype) for dtype in ("fp32", "fp16", "bf16", "int8")}


def test_small_gradients_reach_the_tables_over_every_wire():
    """Multiplied by 64, the global batch; on an fp16 wire as they are, 17 % of them would be lost."""
    for of_rank in run_ranks(2, update_by_wire):
        exact = of_rank.pop("fp32")
        for dtype, update in of_rank.items():
            error = (update - exact).norm() / exact.norm()
            assert error < {"fp16": 4e-3, "bf16": 4e-3, "int8": 1e-2}[dtype], dtype


def count_all(topology: Topology) -> dict[str, tuple[int, int, torch.Tensor]]:
    return {dtype: bytes_of_a_step(topology, dtype, dtype) for dtype in ("fp32", "fp16", "bf16", "int8")} | {
        "mixed": bytes_of_a_step(topology, "fp16", "int8")
    }


def test_bytes_that_leave_a_rank_and_what_arrives():
    # Two tables a rank: 32 examples of the other rank times 2 * 16 numbers; int8 has a 4-byte scale a table beside.
    full, eighth = BATCH * 2 * DIM * 4, BATCH * 2 * (DIM + 4)
    expected = {
        "fp32": (full, full), "fp16": (full // 2, full // 2), "bf16": (full // 2, full // 2),
        "int8": (eighth, eighth), "mixed": (full // 2, eighth),
    }  # fmt: skip
    for counted in run_ranks(2, count_all):
        exact = counted["fp32"][2]
        for dtype, (forward, backward, embeddings) in counted.items():
            assert (forward, backward) == expected[dtype], dtype
            error = (embeddings - exact).abs().max() / exact.abs().max()
            assert error < {"fp32": 1e-9, "fp16": 1e-3, "bf16": 1e-2, "int8": 1e-2, "mixed": 1e-3}[dtype]
