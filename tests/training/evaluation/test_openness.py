"""The openness of gates is the mean of what they gave, over all examples and by group."""

import pytest
import torch

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from dhen.model.modeling_dhen import DhenForClickPrediction
from dhen.runtime.topology import Topology
from dhen.training.evaluation.group_metrics import GroupMetrics
from dhen.training.evaluation.openness import GateOpenness
from tests.ranks import run_ranks

SIZES = (7, 0, 5)


def model_of(kind: str) -> DhenForClickPrediction:
    torch.manual_seed(0)
    layers = [{"interactions": ["linear"]}, {"interactions": ["linear"], "gate": kind}, {"interactions": ["linear"]}]
    model = DhenForClickPrediction(DhenConfig(num_dense_features=4, layers=layers, num_embeddings_out=4)).eval()
    gate = model.model.layers[1].gate
    torch.nn.init.normal_(gate.weight, std=70.0)
    torch.nn.init.constant_(gate.bias, -512.0)
    return model


def watched(topology: Topology, kind: str) -> tuple[dict[int, float], dict[int, list[float]], list, list]:
    """Mean openness, by group, and this rank's ids and gates by the formula."""
    model, gates, groups = model_of(kind), GateOpenness(), GroupMetrics(0)
    torch.manual_seed(topology.rank)
    all_ids, all_gates = [], []
    with torch.no_grad(), gates.watching(model):
        for size in SIZES:
            dense, ids = torch.randn(size, 4), torch.randint(0, 3, (size,))
            inputs = []
            hook = model.model.layers[1].register_forward_hook(
                lambda _, given, __, inputs=inputs: inputs.append(given[0])
            )
            output = model(dense=dense)
            hook.remove()
            groups.update(SparseIds(ids, 1), output.logits, torch.ones(size), None, gates.take())
            gate = model.model.layers[1].gate
            z = 2 + (inputs[0].flatten(1) @ gate.weight[0] + gate.bias) / 256
            all_ids += ids.tolist()
            all_gates += (z.sigmoid() if kind == "soft" else (z > 0).float()).tolist()
    assert model.model.layers[1].gate._forward_hooks == {}
    return gates.mean(topology.world), groups.compute(topology).openness, all_ids, all_gates


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_openness_is_that_of_the_formula(kind):
    """On two ranks, with an empty batch."""
    results = run_ranks(2, watched, kind)
    ids, gates = (torch.tensor([each for result in results for each in result[place]]) for place in (2, 3))
    assert 0.1 < gates.mean() < 0.9
    for mean, by_group, *_ in results:
        assert mean == {1: pytest.approx(gates.mean().item(), rel=1e-6)}
        assert by_group.keys() == set(ids.tolist())
        for group, values in by_group.items():
            assert values == [pytest.approx(gates[ids == group].mean().item(), rel=1e-6)]
