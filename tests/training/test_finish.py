"""What a finished run says about itself."""

import math

from dhen.config.arguments import Arguments, parse_arguments
from dhen.data.schema import Schema, SplitCounts
from dhen.training.evaluation.metrics import MetricValues
from dhen.training.finish import doubts
from dhen.training.loop import Evaluation

SCHEMA = Schema((), (), {"validation": SplitCounts(1000, 200), "test": SplitCounts(1000, 0)})


def given(*flags: str) -> Arguments:
    return parse_arguments(["--dataset_name=a", *flags])


def evaluation(calibration: float) -> Evaluation:
    return Evaluation(MetricValues(auc=0.7, ne=0.9, logloss=0.4, calibration=calibration, examples=1000), {})


def test_a_short_run_and_predictions_far_from_the_click_rate_are_said():
    assert doubts(given(), 100, 100, {"validation": evaluation(1.04)}, SCHEMA) == []
    for flags, way_out in ((), "more num_train_epochs"), (["--max_steps=99"], "Use a larger max_steps."):
        (short,) = doubts(given(*flags), 99, 99, {"validation": evaluation(2.0)}, SCHEMA)
        assert short.startswith("the run made only 99 steps")
        assert way_out in short
    for calibration, way, why in ((1.06, "high", "chance explains this"), (0.8, "low", "Train longer")):
        (far,) = doubts(given(), 100, 100, {"validation": evaluation(calibration)}, SCHEMA)
        assert far.startswith(f"validation: the predictions are too {way} on average: calibration is {calibration:.3f}")
        assert why in far
        assert (f"standard error is {math.sqrt(0.8 / 200):.3f}" in far) == (calibration > 1)


def test_the_advice_depends_on_the_run():
    far = {"validation": evaluation(0.7)}
    assert (
        "Train longer or with less dropout, or use --calibrate, and"
        in doubts(given("--dropout=0.1"), 200, 200, far, SCHEMA)[0]
    )
    assert "The model overfits after that step" in doubts(given(), 200, 150, far, SCHEMA)[0]


def test_a_split_without_clicks_has_no_calibration():
    assert doubts(given(), 100, 100, {"test": evaluation(math.nan)}, SCHEMA) == []
