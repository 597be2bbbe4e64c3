"""What a shard costs: by its rates, by hand; files of costs are checked; replicated tables by their traffic."""

from dataclasses import replace

import pytest

from dhen.tables.placement.costs import (
    Costs,
    CostsError,
    StepSetting,
    WorkRate,
    hop_seconds,
    read_costs,
    replicated_seconds,
    rows_touched,
    shard_seconds,
)

RATE = WorkRate(1e-6, 1e-8, 1e-7, 1e-9, 1e-10)
UPDATES = dict.fromkeys(("rowwise_adagrad/fp32", "sgd/fp32", "adagrad/fp32"), RATE)
COSTS = Costs("a machine", "made up", {"fp32": RATE}, UPDATES, 1e10, 1e9)


def test_a_shard_costs_what_its_rates_say():
    """One node of two ranks, 100 examples each, 2 ids a bag; every part by hand."""
    cost = shard_seconds(COSTS, StepSetting(2, 2, 100, optimizer="sgd"), rows=1000, columns=8, ids_per_bag=2.0)
    touched = 1000 * (1 - (1 - 1 / 1000) ** 400)
    assert rows_touched(400, 1000) == pytest.approx(touched)
    by_number = 1e-6 + 400 * 1e-8 + touched * 1e-7
    assert cost.lookup == pytest.approx(by_number + touched * 32 * 1e-9 + ((400 - touched) * 32 + 200 * 32) * 1e-10)
    assert cost.update == pytest.approx(by_number + 2 * touched * 32 * 1e-9 + 400 * 32 * 1e-10)
    # Half of the 200 bags' embeddings and gradients and of the 400 ids go to the other rank, or come from it.
    assert cost.exchange == pytest.approx((200 * 8 * (4 + 4) + 400 * 8) / 2 / 1e10)
    far = shard_seconds(COSTS, StepSetting(2, 1, 100, optimizer="sgd"), rows=1000, columns=8, ids_per_bag=2.0)
    assert far.exchange == pytest.approx(10 * cost.exchange), "between nodes, a tenth of the rate"


def test_replicas_pay_for_the_rows_that_they_exchange():
    one = StepSetting(2, 2, 100, optimizer="rowwise_adagrad")
    shape = {"rows": 1000, "columns": 8, "ids_per_bag": 1.0}
    alone = shard_seconds(COSTS, one, **shape)
    for steps, row_bytes in ((1, 4 + 4 + 8 * 4), (4, 4 + 4 + 8 * 1 + 4)):
        late = {} if steps == 1 else {"sync_moves": True, "sync_dtype": "int8"}
        setting = replace(one, num_replicas=3, sync_steps=steps, **late)
        used = 1000 * (1 - (1 - 1 / 1000) ** (200 * steps)) / steps
        seconds = 2 * used * row_bytes / COSTS.inter_node_bytes_per_second
        cost = shard_seconds(COSTS, setting, **shape)
        assert (cost.lookup, cost.update) == (alone.lookup, alone.update)
        assert cost.exchange - alone.exchange == pytest.approx(seconds)
        assert setting.shard_bytes(1000, 8) > one.shard_bytes(1000, 8) + used * row_bytes


def test_a_file_of_costs_is_checked(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    assert read_costs(str(path)) == COSTS
    path.write_text(path.read_text().replace('"source"', '"sauce"'))
    with pytest.raises(CostsError, match="source"):
        read_costs(str(path))
    with pytest.raises(CostsError, match="calibrate_costs"):
        read_costs(str(tmp_path / "none.json"))


def test_a_file_without_a_needed_rate_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    assert read_costs(str(path), StepSetting(2, 2, 100, "sgd")) == COSTS
    for setting, words in (
        (StepSetting(2, 2, 100, "sgd", "fp16"), ("lookup has no 'fp16'", "has only 'fp32'")),
        (StepSetting(2, 2, 100, "rowwise_adagrad"), ()),
    ):
        if not words:
            replace(COSTS, update={"sgd/fp32": RATE}).save(path)
            words = ("update has no 'rowwise_adagrad/fp32'", "has only 'sgd/fp32'")
        with pytest.raises(CostsError) as caught:
            read_costs(str(path), setting)
        for word in (str(path), "calibrate_costs", *words):
            assert word in str(caught.value)


def test_stochastic_rounding_of_fp16_tables_has_a_price_of_its_own():
    """On the CPU the update is then not FBGEMM's kernel."""
    nearest, rounded = (
        StepSetting(2, 2, 4096, table_dtype="fp16", table_rounding=r) for r in ("nearest", "stochastic")
    )
    assert rounded.update_key == "rowwise_adagrad/fp16 rounded"
    costs = read_costs("cpu", nearest, rounded)
    by_nearest, by_rounded = (shard_seconds(costs, setting, 100_000, 64, 1.0) for setting in (nearest, rounded))
    assert by_rounded.update > 1.5 * by_nearest.update
    assert by_rounded.lookup == by_nearest.lookup
    assert StepSetting(2, 2, 4096).update_key == "rowwise_adagrad/fp32", "fp32 isn't rounded"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_shipped_costs_have_every_rate_and_are_coherent(name):
    settings = [
        StepSetting(2, 2, 100, optimizer, dtype, table_rounding=rounding)
        for optimizer in ("rowwise_adagrad", "adagrad", "sgd")
        for dtype in ("fp32", "fp16")
        for rounding in ("nearest", "stochastic")
    ]
    costs = read_costs(name, *settings)
    assert costs.inter_node_bytes_per_second <= costs.intra_node_bytes_per_second
    assert "not measured" in costs.source


def test_replicated_tables_pay_for_the_dense_parts_traffic():
    """Four ranks, two on a node: bytes over links, by hand, over what the same table costs without traffic."""
    far = replace(COSTS, inter_node_bytes_per_second=1e6, intra_node_bytes_per_second=1e7)
    free = replace(COSTS, inter_node_bytes_per_second=1e30, intra_node_bytes_per_second=1e30)
    weight_bytes = 1000 * 8 * 4
    for setting, expected in (
        (StepSetting(4, 2, 100), 2 * 3 / 4 / 1e6),
        (StepSetting(4, 2, 100, zero_stage=2), 3 * 3 / 4 / 1e6),
        (StepSetting(4, 2, 100, zero_stage=3), 3 * 3 / 4 / 1e6),
        (StepSetting(4, 4, 100, zero_stage=3), 3 * 3 / 4 / 1e7),
        (StepSetting(4, 2, 100, zero_stage=3, shard_size=2), 3 / 2 / 1e7 + 2 * (1 / 2) / 2 / 1e6),
    ):
        traffic = replicated_seconds(far, setting, 1000, 8, 1.0) - replicated_seconds(free, setting, 1000, 8, 1.0)
        assert traffic == pytest.approx(expected * weight_bytes)


def test_two_hops_save_messages_and_cost_bytes_inside_the_node_and_copies():
    setting = StepSetting(12, 4, 100, wire_forward="fp16", wire_backward="fp32")
    costs = replace(COSTS, seconds_per_exchange=1e-2, seconds_per_message=1e-3, intra_node_bytes_per_second=1e6)
    assert hop_seconds(costs, setting, 50, hops=1) == pytest.approx(2 * 1e-2 + 2 * 11e-3)
    assert hop_seconds(costs, setting, 0, hops=1) == 0.0
    replicas = replace(setting, num_replicas=3, sync_steps=4)
    of_replicas = hop_seconds(costs, replicas, 50, hops=1) - hop_seconds(costs, setting, 50, hops=1)
    assert of_replicas == pytest.approx((2 * 1e-2 + 2 * 2e-3) / 4)
    own = 100 * 50 * (2 + 4)  # what a rank sends and receives per step, of embeddings and gradients
    passed_on = own * 2 / 3 * 3 / 4
    copies = 4 * own * costs.lookup["fp32"].seconds_per_other_byte
    assert hop_seconds(costs, setting, 50, hops=2) == pytest.approx(4 * 1e-2 + 2 * 5e-3 + passed_on / 1e6 + copies)
    for world, local, can_hop in ((12, 4, True), (4, 4, False), (2, 4, False), (3, 1, False), (6, 4, False)):
        assert StepSetting(world, local, 100).can_hop == can_hop
