"""tools/bench/scoring.py: the plain DLRM, and the table. test_export_model.py tests the other forms."""

import pytest
import torch

from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import SparseIds
from tools.bench.scoring import Dlrm, Measured, parse_arguments, show


def test_the_dlrm_is_its_formula():
    features = [{"name": "user", "num_embeddings": 5}, {"name": "tags", "num_embeddings": 4}]
    model = Dlrm(DhenConfig(embedding_dim=4, num_dense_features=2, sparse_features=features)).eval()
    dense_BN = torch.tensor([[0.5, -1.0], [2.0, 0.1]])
    bags = SparseIds(torch.tensor([3, 1, 2, 0, 2]), 2, torch.tensor([[1, 1], [0, 3]]))
    user, tags = (bag.weight for bag in model.bags)
    bottom = model.bottom(dense_BN)
    expected = []
    for first, second, dense in zip(user[[3, 1]], [torch.zeros(4), tags[[2, 0, 2]].sum(0)], bottom, strict=True):
        dots = torch.stack([first @ second, first @ dense, second @ dense])
        expected.append(model.top(torch.cat([dense, dots])).sigmoid())
    torch.testing.assert_close(model(bags, dense_BN), torch.cat(expected))


def test_the_table_has_ratios_of_medians(capsys):
    seconds = {"eager": [0.004] * 99 + [1.0], "AOT": [0.001] * 98 + [0.5] * 2}
    measured = Measured("int8", 32, seconds)
    assert measured.times_eager("AOT") == pytest.approx(4)
    show([measured])
    lines = capsys.readouterr().out.splitlines()
    assert "8,000" in next(line for line in lines if "eager" in line and "int8" in line)  # rows per second
    assert lines[-1] == "| int8 | 32 | 4.0 (0.0) |"


def test_the_batches_of_the_goal_are_measured_by_default():
    assert parse_arguments(["runs/x"]).batches == [1, 32, 512, 4096]
