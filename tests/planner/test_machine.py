"""Machine files: those that ship can be planned for, and a mistake in a user's own gets one line that names the key."""

from pathlib import Path

import pytest
import yaml

from dhen.planner.machine import read_machine, shipped_machines

GPU, CPU = (yaml.safe_load(shipped_machines()[name].read_text()) for name in ("a100-40gb", "cpu"))


def written(folder: Path, values: dict) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("name", shipped_machines())
def test_shipped_machines_are_read_and_have_what_a_plan_needs(name):
    machine = read_machine(name)
    assert machine.source, "where are the figures from?"
    assert machine.memory_bytes > 0
    assert machine.costs == ("gpu" if machine.is_gpu else "cpu")
    assert set(machine.flops) == {"fp32", "bf16"} | ({"tf32"} if machine.is_gpu else set())
    assert not machine.is_gpu or machine.flops["tf32"] > 5 * machine.flops["fp32"], "fp32 is the rate without TF32"


def test_a_file_of_the_users_own_is_read_and_values_can_be_replaced(tmp_path):
    path = written(tmp_path, GPU | {"name": "mine", "memory_gib": 20})
    assert read_machine(path).memory_bytes == 20 * 2**30
    changed = read_machine(path, ranks_per_node=4, memory_gib=10.0)
    assert (changed.ranks_per_node, changed.memory_gib, changed.name) == (4, 10.0, "mine")
    assert changed.host_bytes == 2 * read_machine(path).host_bytes, "fewer ranks share the host"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_gi": 3}, "unknown key 'memory_gi'. Did you mean 'memory_gib'?"),
        ({"memory_gib": -1}, "memory_gib is -1. Use a number above 0."),
        ({"memory_gib": "much"}, "memory_gib is 'much'. Use a valid number"),
        ({"ranks_per_node": 0}, "ranks_per_node is 0. Use 1 or more."),
        ({"ranks_per_node": 2.5}, "ranks_per_node is 2.5."),
        ({"seconds_per_operation": -1e-6}, "seconds_per_operation is -1e-06. Use 0 or more."),
        ({"host_memory_gib": -2}, "host_memory_gib is -2. Use 0 or more."),
        ({"flops": {"fp32": -1}}, "flops.fp32 is -1. Use a number above 0."),
        ({"flops": {"bf16": 1e12}}, "flops has only bf16. Add fp32"),
        ({"flops": {"fp32": 1e14, "bf16": 3e14}}, "flops has no tf32. Add it, and the rate without TF32 as fp32"),
        ({"host_bytes_per_second": 0}, "is missing. Give both"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_file_and_key(tmp_path, change, words):
    path = written(tmp_path, GPU | change)
    with pytest.raises(ValueError, match=r"\.yaml: ") as caught:
        read_machine(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message
    assert "Value error" not in message


@pytest.mark.parametrize("key", ["memory_gib", "flops", "name", "source", "ranks_per_node"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=f"{key}. Field required"):
        read_machine(written(tmp_path, {name: value for name, value in GPU.items() if name != key}))


def test_a_cpu_needs_no_host_beside_it(tmp_path):
    without = {name: value for name, value in CPU.items() if not name.startswith("host_")} | {"host_memory_gib": 0}
    assert not read_machine(written(tmp_path, without)).is_gpu


def test_other_mistakes_are_one_line_too(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'a100-40gb'"):
        read_machine("a100-40")
    with pytest.raises(ValueError, match="memory_gib is -3"):
        read_machine("h100", memory_gib=-3)
    (tmp_path / "list.yaml").write_text("- 3")
    with pytest.raises(ValueError, match="expected a mapping"):
        read_machine(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML") as caught:
        read_machine(str(tmp_path / "broken.yaml"))
    assert "\n" not in str(caught.value)


def test_a_smaller_node_has_a_smaller_link_where_each_gpu_has_its_own():
    whole, half = read_machine("h100"), read_machine("h100", ranks_per_node=4)
    assert half.node_bytes_per_second == whole.node_bytes_per_second / 2
    assert half.exchange_rates == whole.exchange_rates
    papers = read_machine("a100-40gb", ranks_per_node=4)
    assert papers.node_bytes_per_second == read_machine("a100-40gb").node_bytes_per_second


def test_an_all_reduce_takes_a_trees_hops_on_gpus_and_a_rings_elsewhere():
    gpu = read_machine("a100-40gb", seconds_per_collective=1.0)
    assert round(gpu.all_reduced(0, nodes=32, ranks=256)) == 2 * (7 + 5)
    assert round(gpu.replicated(0, nodes=32)) == 2 * 5
    assert round(gpu.gathered(0, nodes=32, ranks=256)) == 255
    cpu = read_machine("cpu", seconds_per_collective=1.0)
    assert round(cpu.all_reduced(0, nodes=2, ranks=4)) == 2 * 3
    ring = {"nodes": 2, "ranks": 4}
    assert cpu.all_reduced(1e9, **ring) == pytest.approx(2 * cpu.gathered(1e9, **ring)), "the same bytes, twice"
