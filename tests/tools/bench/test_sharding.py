"""tools/bench/sharding.py without a cluster: theory, table, figure, what it refuses."""

import gc
from math import inf

import pytest
import torch

from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tools.bench import sharding_ranks
from tools.bench.sharding import parse_arguments, plot, show
from tools.bench.sharding_ranks import SCHEMES, Measured


def measured(scheme: str, depth: int, seconds: list[float], **more) -> Measured:
    return Measured(scheme, depth, 2, 4, 1000, 100, seconds, **{"bytes_sent": None} | more)


def test_what_leaves_a_node_in_theory():
    sent = {name: scheme.bytes_sent(1000, 100, 2, 4) for name, scheme in SCHEMES.items()}
    assert sent["dp"] == 2 * 1000 * 3 / 4
    assert sent["zero2"] == sent["torch_fsdp"] == 3 * 1000 * 3 / 4
    assert sent["fsdp"] == sent["zero2"] - 100 * 3 / 4, "the last matrix is still gathered when the backward starts"
    assert sent["hsdp"] == sent["hsdp_sync"] == sent["torch_hsdp"] == 2 * 1000 / 2


def test_the_table_says_what_is_missing(tmp_path, capsys):
    results = [
        measured("fsdp", 4, [1.0, 1.2, 1.1], bytes_sent=2200.0),
        measured("hsdp", 4, [0.5, 0.5, 0.6], peak_mib=7.0),
        measured("zero2", 4, [1.0, 1.0, 1.0], peak_mib=inf),
    ]
    show(results)
    rows = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["hsdp"][3:6] == ["2.20", "1.83-2.40", "-"], "no interface, no bytes"
    assert rows["zero2"][-2:] == ["no", "memory"]
    plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_what_a_launcher_cannot_do_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        parse_arguments(["--memory_cap_mib", "100"])
    assert "--memory_cap_mib needs a job per scheme" in capsys.readouterr().err


def build_and_leave(topology: Topology) -> dict[str, tuple[int, int]]:
    """Bytes that each scheme holds after a step, and after its release."""
    config = sharding_ranks.model_config(1, 4)
    held = {}
    for name in ("dp", "zero2", "fsdp", "hsdp", "torch_fsdp"):
        before = bytes_of_tensors()
        take_step, release = sharding_ranks.build(SCHEMES[name], config, topology)
        take_step()
        with_it = bytes_of_tensors()
        release()
        del take_step, release
        gc.collect()
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
