"""The moving average of tables is brought up to date row by row, and equals the average of every step."""

import pytest
import torch

from dhen.tables.averaged_tables import AveragedTables
from dhen.tables.lookup import make_lookup

SIZES = [(7, 4), (5, 4), (9, 8)]
STEPS = 60


@pytest.mark.parametrize("changes_all", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:2]], ids=["two widths", "one width"])
def test_it_equals_the_average_of_every_step(sizes, changes_all):
    generator = torch.Generator().manual_seed(1)
    weights = make_lookup(sizes, torch.device("cpu"), "sgd").split_embedding_weights()
    for weight in weights:
        weight.normal_(generator=generator)
    averages = AveragedTables(weights, all_rows_change=changes_all)
    expected = [weight.double() for weight in weights]
    starts = torch.tensor([0, *(rows for rows, _ in sizes)]).cumsum(0)
    untouched = int(starts[-1]) - 1
    for step in range(1, STEPS + 1):
        changed = torch.randint(0, untouched, (4,), generator=generator)  # some twice; the last row never
        averages.before_update(changed)
        for weight, first, last in zip(weights, starts[:-1], starts[1:], strict=True):
            inside = changed[(changed >= first) & (changed < last)] - first
            weight[slice(None) if changes_all else inside] += 0.1
        decay = min(0.9, (1 + step) / (10 + step))
        averages.after_step(decay)
        expected = [decay * e + (1 - decay) * w.double() for e, w in zip(expected, weights, strict=True)]
        if step % 25 == 0:
            averages.settle()  # an evaluation in between
    averages.settle()
    for average, wanted, weight in zip(averages.weights, expected, weights, strict=True):
        torch.testing.assert_close(average.double(), wanted, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(average, weight), "the average is the weight itself, so this shows nothing"
    if not changes_all:
        assert torch.equal(averages.weights[-1][-1], weights[-1][-1]), "a row that never changes is its own average"


def test_it_starts_again_at_the_present_weights():
    weights = make_lookup(SIZES, torch.device("cpu"), "sgd").split_embedding_weights()
    averages = AveragedTables(weights, all_rows_change=False)
    averages.before_update(torch.tensor([0]))
    weights[0][0] = 5.0
    averages.after_step(0.5)
    averages.restart()
    averages.settle()
    for average, weight in zip(averages.weights, weights, strict=True):
        assert torch.equal(average, weight)
