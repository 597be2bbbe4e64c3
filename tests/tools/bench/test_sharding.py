"""tools/bench/sharding.py without a cluster: theory, table, figure, no memory, what it refuses."""

import gc
from math import inf

import pytest
import torch

from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tools.bench import sharding_ranks
from tools.bench.sharding import parse_arguments, plot, show
from tools.bench.sharding_schemes import SCHEMES, Measured


def measured(scheme: str, depth: int, seconds: list[float], **more) -> Measured:
    return Measured(scheme, depth, 2, 4, 1000, 100, seconds, **{"bytes_sent": None} | more)


def test_what_leaves_a_node_in_theory():
    sent = {name: scheme.bytes_sent(1000, 100, 2, 4) for name, scheme in SCHEMES.items()}
    assert sent["dp"] == 2 * 1000 * 3 / 4
    assert sent["zero2"] == sent["torch_fsdp"] == 3 * 1000 * 3 / 4
    assert sent["fsdp"] == sent["zero2"] - 100 * 3 / 4, "the last matrix is still gathered when the backward starts"
    assert sent["hsdp"] == sent["hsdp_sync"] == sent["torch_hsdp"] == 2 * 1000 / 2
    assert sent["hpz"] == 2 * 1000 * 3 / 4, "its backward gathers within the node"


def test_the_table_says_what_is_missing(tmp_path, capsys):
    results = [
        measured("fsdp", 4, [1.0, 1.2, 1.1], bytes_sent=2200.0),
        measured("hsdp", 4, [0.5, 0.5, 0.6], peak_mib=7.0),
        measured("dp", 4, []),
        measured("zero2", 4, [1.0, 1.0, 1.0], peak_mib=inf),
        measured("hpz", 4, [1.0, 1.0, 1.0]),
    ]
    show(results)
    rows = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["hsdp"][3:6] == ["2.20", "1.83-2.40", "-"], "no interface, no bytes"
    assert rows["dp"][2:4] == ["no", "memory"]
    assert rows["zero2"][-2:] == ["no", "memory"]
    assert rows["hpz"][2:4] == ["(own", "job)"]
    assert rows["hpz"][5:7] == ["1.10", "-"]
    plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_all_reduces_under_a_backward_are_counted():
    def event(name: str, start: int, duration: int) -> dict:
        return {"name": name, "ph": "X", "ts": start, "dur": duration}

    reduces = [event("gloo:all_reduce", 0, 4000), event("gloo:all_reduce", 9000, 2000)]
    backwards = [event("PauseBackward", 1000, 2000), event("PauseBackward", 10_000, 5000)]
    assert sharding_ranks.overlap({"traceEvents": reduces + backwards}) == (3.0, 6.0)
    assert sharding_ranks.overlap({"traceEvents": reduces}) == (0.0, 0.0), "--compute_ms 0 has no pauses"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--memory_cap_mib", "100"], "--memory_cap_mib needs a job per scheme"),
        (["--schemes", "hsdp", "hpz"], "hpz changes the other runs of its process"),
        (["--schemes", "hpz", "--depths", "2", "4"], "name only hpz and one depth"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(monkeypatch, capsys, flags, words):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        parse_arguments(flags)
    assert words in capsys.readouterr().err
    assert "hpz" not in parse_arguments([]).schemes
    assert "hpz" in parse_arguments(["--on_cluster"]).schemes


def build_where_one_rank_has_no_memory(topology: Topology) -> list[bool]:
    """Whether each of two schemes can be measured; the first one fails on rank 1."""
    build, kept = sharding_ranks.build, []

    def failing(*arguments):
        if topology.rank == 1 and not kept:
            raise torch.OutOfMemoryError("out of memory")
        return sharding_ranks.Built(torch.nn.Identity(), lambda: None, lambda: None)

    sharding_ranks.build = failing
    for name in ("dp", "hsdp"):
        built = sharding_ranks.build_and_warm(SCHEMES[name], None, topology, 0.0)
        kept.append(built is not None)
    sharding_ranks.build = build
    return kept


def test_all_ranks_leave_a_scheme_that_one_has_no_memory_for():
    assert run_ranks(2, build_where_one_rank_has_no_memory) == [[False, True]] * 2


def build_and_leave(topology: Topology) -> dict[str, tuple[int, int]]:
    """Bytes that each scheme holds after a step, and after its release."""
    config = sharding_ranks.model_config(1, 4)
    held = {}
    for name in ("dp", "zero2", "fsdp", "hsdp", "torch_fsdp"):
        before = bytes_of_tensors()
        built = sharding_ranks.build_and_warm(SCHEMES[name], config, topology, 0.0)
        with_it = bytes_of_tensors()
        sharding_ranks.free(built)
        del built
        sharding_ranks.free()
        held[name] = (with_it - before, bytes_of_tensors() - before)
    return held


def bytes_of_tensors() -> int:
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_scheme_that_is_left_gives_its_memory_back():
    held = run_ranks(4, build_and_leave, local_size=2)[0]
    for name, (with_it, after) in held.items():
        assert after < 0.05 * with_it, name
