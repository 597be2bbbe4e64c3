"""What a rank's memory holds: the parts add up to the live bytes, and are those that a scheme must hold."""

import pytest
import torch

from dhen.planner.live_memory import LiveMemory
from dhen.runtime.topology import Topology
from tests.ranks import run_ranks
from tools.bench.composition import PARTS, Composed, Composition, measured_parts, predicted_parts, show
from tools.bench.sharding_ranks import model_bytes, model_config
from tools.bench.sharding_schemes import SCHEMES
from tools.bench.stand_ins import replace_reduce_scatter

NAMES = ("dp", "hsdp", "torch_hsdp")
CONFIG = model_config(4, 20)


def parts_of_all(topology: Topology) -> dict[str, tuple[dict[str, int], dict[str, int] | None]]:
    replace_reduce_scatter()
    return {
        name: (measured_parts(SCHEMES[name], CONFIG, topology), predicted_parts(SCHEMES[name], CONFIG, topology))
        for name in NAMES
    }


def test_parts_are_those_of_the_scheme():
    measured = run_ranks(4, parts_of_all, local_size=2)[0]
    whole = model_bytes(CONFIG)
    for name, share in zip(NAMES, (1, 0.5, 0.5), strict=True):
        parts, predicted = measured[name]
        assert set(parts) <= set(PARTS)
        assert parts["optimizer"] == pytest.approx(2 * share * whole, rel=0.02), "two moments, no master weights"
        assert parts["weights"] >= 0.98 * share * whole
        if predicted is not None:
            assert sum(parts.values()) == pytest.approx(sum(predicted.values()), rel=0.1)
    assert measured["dp"][0].get("gathered", 0) == 0 < measured["hsdp"][0]["gathered"]
    assert measured["torch_hsdp"][1] is None


def test_the_peak_is_that_of_live_memory():
    with LiveMemory() as expected, Composition() as memory:
        kept = torch.ones(1000)
        both = torch.cat([kept, kept])
        del both
        kept.add_(1)
    assert sum(memory.parts.values()) == expected.peak == 4 * 3000


def test_the_table_has_measured_beside_predicted(capsys):
    measured = {"weights": 2**20, "buckets": 2**19}
    show([Composed("dp", 2**20, measured, None), Composed("hsdp", 2**20, measured, {"weights": 2**18})])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["dp", "measured", "1.00", "0.00", "0.00", "0.00", "0.50", "0.00", "1.50", "1.5"]
    assert [line.split()[0] for line in lines[2:]] == ["hsdp", "predicted"]
