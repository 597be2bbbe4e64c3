"""The planner: the minimum set is what its definition says, against brute force, and a plan behaves as memory does."""

import itertools
import json
from dataclasses import replace

import pytest

from dhen.config.dhen_section import DhenSection
from dhen.config.ds_config import Recipe, check_ds_config
from dhen.config.training_arguments import TrainingArguments
from dhen.model.configuration_dhen import DhenConfig
from dhen.planner.job import Job
from dhen.planner.limits import Limits
from dhen.planner.machine import read_machine
from dhen.planner.minimum_set import NothingFitsError, Planner, Prediction, gib
from dhen.planner.rungs import by_depth, changes
from dhen.planner.technique import SCHEMES, Technique
from dhen.tables.placement.agreed import setting_of
from dhen.tables.placement.costs import read_costs, replicated_bytes, replicated_seconds
from dhen.tables.placement.plan import PlacementError

CONFIG = DhenConfig(
    embedding_dim=64, num_layers=4, num_embeddings_out=32, head_mlp=[512, 512],
    num_dense_features=13, sparse_features=[{"name": f"C{i}", "num_embeddings": 1000} for i in range(26)],
)  # fmt: skip
MACHINE = read_machine("a100-40gb", ranks_per_node=2)
BATCH = 512
DP = Technique()
RECIPE = Recipe(TrainingArguments(per_device_train_batch_size=BATCH, learning_rate=1e-3), world_size=4)


def planner(memory_gib: float = 38.0, nodes: int = 2, layers: int = 4, **more) -> Planner:
    machine = replace(more.pop("machine", MACHINE), memory_gib=memory_gib)
    return Planner(Job(CONFIG, BATCH, machine, nodes, **more).at_depth(layers))


def plain_gib(layers: int = 4, scheme: str = "dp") -> float:
    return planner(layers=layers).predict(Technique(scheme)).memory.peak / 2**30 / 0.95


SHARES = (1.01, 0.97, 0.9, 0.7, 0.5, 0.47)
"""Of what data parallel needs at 4 layers: from plenty to very little."""


def brute_force(made: Planner) -> list[Prediction]:
    """Every set that can be written down, not only those that the planner thinks worth a look."""
    layers = range(made.job.depth + 1)
    sets = itertools.product(made.job.schemes(), layers, ("none", "optimizer", "parameters"), layers)
    allowed = [
        Technique(*each)
        for each in sets
        if (each[2] != "optimizer" or SCHEMES[each[0]]) and (each[2] != "parameters" or SCHEMES[each[0]] == 3)
    ]
    return [made.predict(technique) for technique in allowed if made.fits(technique)]


def test_tf32_is_planned_for_only_if_the_ds_config_allows_it_and_is_written_there():
    tf32 = planner(section=DhenSection(allow_tf32=True))
    rates = [made.predict(DP).samples_per_second for made in (planner(), tf32)]
    assert rates[0] < 0.9 * rates[1]
    assert [made.whole_ds_config(DP).get("dhen") for made in (planner(), tf32)] == [None, {"allow_tf32": True}]
    assert planner(machine=read_machine("cpu"), section=DhenSection(allow_tf32=True)).job.product_dtype == "fp32"


@pytest.mark.parametrize("share", SHARES)
def test_no_set_of_all_that_there_are_is_faster_and_none_as_fast_is_smaller(share):
    made = planner(share * plain_gib())
    chosen = made.plan()
    fitting = brute_force(made)
    assert chosen.fits
    fastest = max(each.samples_per_second for each in fitting)
    assert chosen.samples_per_second >= 0.999 * fastest
    as_fast = [each for each in fitting if each.samples_per_second >= 0.999 * fastest]
    assert chosen.technique.count == min(each.technique.count for each in as_fast)


def off(technique: Technique) -> list[Technique]:
    """The set with one technique less, in each way, also with one layer less of it."""
    less = []
    if technique.scheme != "dp" and technique.offload == "none":
        less.append(replace(technique, scheme="dp"))
    if technique.offload != "none":
        less.append(replace(technique, offload="none"))
    for name in ("checkpointing", "offload_activations"):
        count = getattr(technique, name)
        less += [replace(technique, **{name: fewer}) for fewer in {0, max(count - 1, 0)} if count]
    return less


@pytest.mark.parametrize("share", SHARES)
def test_nothing_of_the_plan_can_be_turned_off(share):
    made = planner(share * plain_gib())
    chosen = made.plan()
    for technique in off(chosen.technique):
        if made.fits(technique):
            assert made.predict(technique).samples_per_second < chosen.samples_per_second, technique


def test_what_is_not_needed_could_be_turned_off():
    """Negative control: a set with more than it needs is caught by the same question."""
    made = planner(38.0)
    too_much = made.predict(Technique("hsdp", checkpointing=4))
    assert any(
        made.fits(less) and made.predict(less).samples_per_second >= too_much.samples_per_second
        for less in off(too_much.technique)
    )


def test_more_memory_never_gives_a_slower_plan():
    speeds = [planner(share * plain_gib()).plan().samples_per_second for share in sorted(SHARES)]
    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[-1], "the cap makes no difference, so this shows nothing"


def test_deeper_is_never_faster():
    limit = 0.7 * plain_gib(8)
    plans = [planner(limit, layers=layers).plan() for layers in (1, 2, 4, 8)]
    speeds = [plan.samples_per_second for plan in plans]
    assert speeds == sorted(speeds, reverse=True)
    assert plans[-1].technique.checkpointing or plans[-1].technique.offload_activations


def test_when_nothing_fits_it_says_what_it_needs_what_there_is_and_what_to_change():
    made = planner(0.02)
    with pytest.raises(NothingFitsError) as caught:
        made.plan()
    message = str(caught.value)
    smallest = min((made.memory(technique).peak for technique in made.candidates()), default=0)
    assert f"needs {gib(smallest)} GiB and " in message
    assert "a rank has 0.019 GiB and " in message
    assert "Possible solutions: a smaller per_device_train_batch_size" in message


def test_the_reason_names_what_is_too_large_and_what_is_slower():
    made = planner(0.97 * plain_gib())
    reason = made.reason(made.plan())
    has = f"{gib(made.has_bytes)} GiB"
    assert f"dp needs {gib(made.memory(Technique()).peak)}" in reason
    assert f"of {has}" in reason
    assert reason.endswith("is the fastest that fits")
    roomy = planner(38.0)
    assert "of 36.10 GiB)" in roomy.reason(roomy.plan())


def test_hosts_memory_counts_too():
    poor = replace(MACHINE, host_memory_gib=0.001)
    limit = 0.47 * plain_gib()
    assert planner(limit).plan().memory.host
    with pytest.raises(NothingFitsError):
        planner(limit, machine=poor).plan()


def test_a_rank_alone_has_no_sharding_but_a_gpu_alone_has_offload():
    alone = replace(MACHINE, ranks_per_node=1)
    made = planner(38.0, nodes=1, machine=alone)
    assert made.plan().technique == Technique("dp")
    assert {technique.scheme for technique in planner(0.02, nodes=1, machine=alone).candidates()} >= {"dp", "zero2"}
    cpu = replace(read_machine("cpu"), ranks_per_node=1)
    assert {technique.scheme for technique in planner(0.02, nodes=1, machine=cpu).candidates()} == {"dp"}


def test_the_tables_exchange_takes_as_long_as_the_machines_links_let_it():
    """Embeddings and gradients of the ranks of the other node cross a link that the ranks of a node share."""
    slow, slower = (
        planner(machine=replace(MACHINE, node_bytes_per_second=rate, link_efficiency=0.5)) for rate in (2e6, 1e6)
    )
    assert slow.placement_of(DP) == slower.placement_of(DP), (
        "placed as the job will place them, which knows no machine file"
    )
    of_rank = [slow.placement_of(DP).of_rank(rank) for rank in range(4)]
    foreign_bags = 2 * BATCH
    crossing = max(sum(foreign_bags * (shard.num_columns * (4 + 4) + 8) for shard in own) for own in of_rank)
    assert slower.table_seconds(DP) - slow.table_seconds(DP) == pytest.approx(crossing / (1e6 / 2 * 0.5) / 2, rel=1e-6)


def test_the_plan_takes_the_faster_table_group():
    sections = {group: DhenSection(table_group=group) for group in ("world", "node", "auto")}
    made = {group: Planner(Job(CONFIG, BATCH, MACHINE, 2, section=section)) for group, section in sections.items()}
    placed = {group: each.placement_of(DP) for group, each in made.items()}
    assert placed["world"].world_size == 2 * placed["node"].world_size == 2 * MACHINE.ranks_per_node
    both = placed["world"], placed["node"]
    assert placed["auto"] == min(both, key=lambda placement: placement.makespan + placement.hop_seconds)
    assert made["auto"].whole_ds_config(DP)["dhen"]["table_group"] == "auto"


def test_where_replicas_leave_no_room_auto_is_all_ranks(tmp_path):
    """Their tables fit alone, and would be faster where messages are slow, but not beside the dense part."""
    path = tmp_path / "costs.json"
    replace(read_costs("gpu"), seconds_per_message=1.0).save(path)
    section = DhenSection(table_group="auto", placement={"costs": str(path)})
    features = [{"name": f"C{i}", "num_embeddings": 1_500_000} for i in range(26)]
    config = DhenConfig(**LARGE.to_dict() | {"num_embeddings_out": 128, "sparse_features": features})
    made = Planner(Job(config, 16384, replace(MACHINE, memory_gib=8.0), 2, section=section))
    assert made.placement_of(DP).world_size == 2
    assert made.plan().fits
    assert made.placement_of(DP).world_size == 4
    assert made.whole_ds_config(DP)["dhen"].get("table_group", "world") == "world"


def test_a_table_group_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(PlacementError, match=r"table_group is 3 .* has 4 ranks, 2 on each node. Use one of 2, 4"):
        Planner(Job(CONFIG, BATCH, MACHINE, 2, section=DhenSection(table_group=3)))


def test_replicas_of_tables_do_not_go_to_host_memory():
    small = replace(MACHINE, memory_gib=1.0)
    assert Planner(Job(LARGE, BATCH, small, nodes=2)).table_bytes(DP)[1], "without replicas they do"
    with pytest.raises(PlacementError, match="a table group of 2 ranks has too little GPU memory"):
        Planner(Job(LARGE, BATCH, small, nodes=2, section=DhenSection(table_group="node")))


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({}, "compute"),
        ({"seconds_per_step": {0: 2.0}, "seconds_per_value": 1e-9}, "host's start"),
        ({"seconds_per_step": {0: 1e-9}, "seconds_per_value": 1e-3}, "loader"),
        ({"node_bytes_per_second": 1e8}, "links"),
        ({"seconds_per_collective": 0.1}, "rings' latency"),
        ({"is_gpu": False, "seconds_per_step": {0: 0.01}, "seconds_per_value": 1e-3}, "loader"),
    ],
)
def test_the_parts_of_a_step_sum_to_it_and_name_what_limits_it(change, limit):
    made = planner(machine=replace(MACHINE, **change))
    limits = Limits.of(made, DP)
    assert sum(limits.parts.values()) == pytest.approx(made.predict(DP).seconds.total)
    assert min(limits.parts.values()) >= 0
    assert limits.limited_by == limit


def test_latency_is_the_hops_of_the_rings():
    """Two nodes of two ranks: the one all-reduce of data parallel has two hops up NCCL's tree and two down."""
    made = planner(machine=replace(MACHINE, seconds_per_collective=0.01))
    assert made.ring_latency(DP) == pytest.approx(4 * 0.01)
    assert Limits.of(made, Technique("zero3")).limited_by == "rings' latency"


def test_the_tables_wait_for_their_messages_and_less_in_two_hops(tmp_path):
    """Two nodes of two ranks: three messages each way, or two."""
    seconds = {}
    for per_message, hops in ((0.0, 1), (0.01, 1), (0.01, 2)):
        path = tmp_path / f"{per_message}.json"
        replace(read_costs("gpu"), seconds_per_exchange=0.0, seconds_per_message=per_message).save(path)
        section = DhenSection(all_to_all_hops=hops, placement={"costs": str(path)})
        seconds[per_message, hops] = planner(section=section).table_seconds(DP)
    assert seconds[0.01, 1] - seconds[0.0, 1] == pytest.approx(6 * 0.01)
    assert seconds[0.01, 2] - seconds[0.0, 1] == pytest.approx(4 * 0.01, rel=0.01)


def test_tables_that_fit_on_no_rank_are_said_so():
    with pytest.raises(PlacementError, match="does not fit"):
        planner(1e-6, machine=replace(MACHINE, host_memory_gib=0.0))


LARGE = DhenConfig(
    embedding_dim=64, num_layers=1, num_embeddings_out=8, num_dense_features=13,
    sparse_features=[{"name": f"C{i}", "num_embeddings": 1_000_000} for i in range(26)],
)  # fmt: skip


def test_tables_beyond_the_gpus_go_to_the_host_and_are_counted_there():
    made = Planner(Job(LARGE, BATCH, replace(MACHINE, memory_gib=1.0), nodes=2))
    device, host = made.table_bytes(DP)
    whole = max(made.placement_of(DP).bytes_of_rank(rank) for rank in range(4))
    assert device <= 0.8 * 2**30 < whole
    widest = max(made.placement_of(DP).of_rank(0), key=lambda shard: shard.num_bytes)
    left = host / widest.num_bytes
    assert left.is_integer(), "the largest leave first"
    assert device + host == whole + left * widest.cached_bytes
    assert made.memory(Technique()).host == host
    assert made.memory(Technique()).parts["tables"] == device
    roomy = Planner(Job(LARGE, BATCH, replace(MACHINE, memory_gib=4.0), nodes=2))
    assert roomy.table_bytes(DP) == (max(roomy.placement_of(DP).bytes_of_rank(rank) for rank in range(4)), 0)


def test_tables_give_way_to_the_dense_part_only_where_nothing_fits_otherwise():
    """1.6 GiB of tables beside a dense part that no technique gets below 1.1 GiB."""
    config = DhenConfig(**{**LARGE.to_dict(), "head_mlp": [16384, 8192]})
    roomy, tight = (Planner(Job(config, BATCH, replace(MACHINE, memory_gib=gib), nodes=2)) for gib in (3.0, 2.4))
    whole, _ = roomy.table_bytes(DP)
    chosen = roomy.plan()
    assert chosen.fits
    assert roomy.table_bytes(chosen.technique) == (whole, 0)
    assert not any(tight.fits(technique) for technique in tight.candidates())
    chosen = tight.plan()
    assert chosen.fits
    on_device, on_host = tight.table_bytes(chosen.technique)
    assert chosen.memory.parts["tables"] == on_device < whole < on_device + on_host
    fitting = [technique for technique in tight.candidates() if tight.fits(technique)]
    assert on_host == min(tight.table_bytes(technique)[1] for technique in fitting), "as few as possible"
    assert f"{gib(on_host)} GiB of tables go to host memory" in tight.reason(chosen)


def test_replicated_tables_are_counted_on_every_rank():
    features = [{"name": f"C{i}", "num_embeddings": 4 if i else 100_000} for i in range(4)]
    config = DhenConfig(embedding_dim=64, num_layers=1, num_embeddings_out=8, sparse_features=features)
    section = DhenSection(placement={"replicate_below_rows": 100})
    made = Planner(Job(config, BATCH, read_machine("cpu"), 2, section=section))
    assert made.placement_of(DP).replicated == ("C1", "C2", "C3")
    rows = 4 * 3
    sharded = max(made.placement_of(DP).bytes_of_rank(rank) for rank in range(made.job.world_size))
    assert made.table_bytes(DP) == (sharded + replicated_bytes(rows, 64), 0)


def test_replicated_tables_take_their_time():
    """A rank's own lookups and updates, and the reduction of the whole table's gradient, as the placement weighs it."""
    features = [{"name": "C0", "num_embeddings": 4}]
    config = DhenConfig(embedding_dim=64, num_layers=1, num_embeddings_out=8, sparse_features=features)
    section = DhenSection(placement={"replicate_below_rows": 100})
    made = Planner(Job(config, BATCH, read_machine("cpu"), 2, section=section))
    zero2 = Technique("zero2")
    for technique, stage in ((DP, 0), (zero2, 2)):
        assert made.placement_of(technique).replicated == ("C0",)
        setting = replace(setting_of(section, 4, 2, BATCH), zero_stage=stage, shard_size=4)
        assert made.table_seconds(technique) == replicated_seconds(read_costs("cpu"), setting, 4, 64, 1.0) > 0
    assert made.table_seconds(zero2) > made.table_seconds(DP), "stage 2 gathers the weights besides"


def test_only_equal_layers_have_other_depths():
    config = DhenConfig(layers=[{}, {}], num_dense_features=3)
    with pytest.raises(ValueError, match="lists its layers one by one"):
        Job(config, BATCH, MACHINE).at_depth(3)


SECTION = DhenSection(table_dtype="fp16", all_reduce_dtype="bf16", shard_group="node")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("section", [DhenSection(), SECTION], ids=["defaults", "base"])
def test_every_candidates_ds_config_is_accepted(precision, section):
    made = planner(0.47 * plain_gib(), precision=precision, section=section)
    for technique in dict.fromkeys(made.candidates()):
        config = check_ds_config("plan", made.whole_ds_config(technique), RECIPE, 4)
        assert config.zero_stage == SCHEMES[technique.scheme]
        assert config.dhen.shard_group == ("node" if technique.scheme == "hsdp" else "world")
        assert config.dhen.table_dtype == section.table_dtype
        assert config.dhen.all_reduce_dtype == (section.all_reduce_dtype if technique.scheme == "hsdp" else None)


TECHNIQUES = {
    1: Technique(),
    2: Technique("hsdp"),
    4: Technique("zero3", checkpointing=4, offload="parameters"),
    8: Technique("hsdp", checkpointing=7),
    12: Technique("zero2", checkpointing=12, offload_activations=3, offload="optimizer"),
}
LADDER = {depth: planner(layers=depth).whole_ds_config(technique) for depth, technique in TECHNIQUES.items()}


@pytest.mark.parametrize("depth", LADDER)
def test_the_rung_of_a_depth_is_its_own_plan_whatever_the_base_turns_on(depth):
    for ladder in (LADDER, {deeper: LADDER[deeper] for deeper in LADDER if deeper >= depth}):
        config = by_depth(ladder)
        taken = check_ds_config("ladder", json.loads(json.dumps(config)), RECIPE, depth)
        assert taken.as_dict() == check_ds_config("own", LADDER[depth], RECIPE).as_dict()


def test_depths_between_are_never_asked_for_more_layers_than_they_have():
    config = by_depth(LADDER)
    for depth in range(1, 13):
        section = check_ds_config("ladder", config, RECIPE, depth).dhen
        for layers in (section.activation_checkpointing, section.activation_offload):
            assert layers in ("none", "all") or layers <= depth


def test_a_rung_takes_away_what_the_base_turns_on():
    assert changes({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"c": 3}}) == {"a": None, "b": {"d": None, "c": 3}}
    assert changes({"a": {"b": 1}}, {"a": {"b": 1}}) == {}
