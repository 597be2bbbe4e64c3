"""The schedule against its formulas and Hugging Face's schedulers; plateau and early stopping, resumed exactly."""

import doctest
import json
import math
import random

import pytest
import torch
from transformers import get_scheduler

import dhen.training.learning_rate
from dhen.config.training_arguments import ScheduleKind, TrainingArguments
from dhen.training.learning_rate import BestMetric, LearningRateSchedule, batch_size_scale

TOTAL = 100
KINDS: tuple[ScheduleKind, ...] = ("constant", "linear", "cosine", "inverse_sqrt", "reduce_lr_on_plateau")


def schedule_of(kind: ScheduleKind, total_steps: int = TOTAL, **options: float) -> LearningRateSchedule:
    return LearningRateSchedule(TrainingArguments(lr_scheduler_type=kind, **options), total_steps)


def hugging_face(kind: str, warmup: int) -> list[float]:
    """The factors of transformers' own scheduler of that name."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL)
    factors = []
    for _ in range(TOTAL):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 1, 20])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_after_warm_up_the_factor_is_hugging_faces_of_that_name(kind: ScheduleKind, warmup: int) -> None:
    schedule = schedule_of(kind, warmup_steps=warmup)
    ours = [schedule.factor(step) for step in range(warmup, TOTAL)]
    assert ours == pytest.approx(hugging_face(kind, warmup)[warmup:], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_is_a_line_that_does_not_waste_the_first_update(kind: ScheduleKind) -> None:
    schedule = schedule_of(kind, warmup_steps=8)
    assert [schedule.factor(step) for step in range(9)] == [(step + 1) / 8 for step in range(8)] + [1.0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_ends_at_min_lr_ratio_and_never_rises(kind: ScheduleKind) -> None:
    schedule = schedule_of(kind, warmup_steps=10, min_lr_ratio=0.2)
    factors = [schedule.factor(step) for step in range(10, TOTAL + 50)]
    assert factors == sorted(factors, reverse=True)
    assert factors[TOTAL - 10 :] == pytest.approx([0.2] * 50)
    assert schedule.factor(55) == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["inverse_sqrt", "reduce_lr_on_plateau"])
def test_min_lr_ratio_is_a_floor(kind: ScheduleKind) -> None:
    schedule = schedule_of(kind, total_steps=10**6, warmup_steps=1, min_lr_ratio=0.3)
    for _ in range(5):
        schedule.after_evaluation(improved=False)
    assert schedule.factor(10**5) == 0.3


def test_a_warm_up_longer_than_the_run_stays_finite() -> None:
    schedule = schedule_of("cosine", total_steps=10, warmup_steps=40)
    assert [schedule.factor(step) for step in (0, 9)] == [1 / 40, 10 / 40]


@pytest.mark.parametrize(("patience", "factor_after"), [(1, [1, 0.5, 0.25, 0.25]), (2, [1, 1, 0.5, 0.5])])
def test_plateau_drops_at_the_patience_th_evaluation_in_a_row(patience: int, factor_after: list[float]) -> None:
    schedule = schedule_of("reduce_lr_on_plateau", plateau_factor=0.5, plateau_patience=patience)
    factors = []
    for improved in (True, False, False, True):
        before, drops = schedule.factor(50), schedule.after_evaluation(improved)
        factors.append(schedule.factor(50))
        assert drops == (factors[-1] < before)
    assert factors == factor_after


def test_a_factor_at_its_floor_drops_no_more() -> None:
    schedule = schedule_of("reduce_lr_on_plateau", plateau_factor=0.5, min_lr_ratio=0.3)
    assert [schedule.after_evaluation(improved=False) for _ in range(4)] == [True, True, False, False]


def test_plateau_equals_torchs() -> None:
    values = random.Random(0)
    metric = [0.9 + 0.1 * math.exp(-n / 10) + values.uniform(-0.005, 0.005) for n in range(60)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    best = BestMetric("ne")
    ours = schedule_of("reduce_lr_on_plateau", plateau_factor=0.5, plateau_patience=3)
    drops = set()
    for value in metric:
        theirs.step(value)
        ours.after_evaluation(best.update(value))
        assert ours.factor(0) == theirs.get_last_lr()[0]
        drops.add(ours.factor(0))
    assert len(drops) > 3, "the metric gave the plateau nothing to do"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reduce_lr_on_plateau"])
def test_other_kinds_do_not_drop(kind: ScheduleKind) -> None:
    schedule = schedule_of(kind)
    before = schedule.factor(30)
    schedule.after_evaluation(improved=False)
    assert schedule.factor(30) == before


def test_resumed_anywhere_plateau_and_stopping_go_on_exactly() -> None:
    values = random.Random(1)
    metric = [values.uniform(0.7, 0.8) for _ in range(30)]

    def fresh() -> tuple[BestMetric, LearningRateSchedule]:
        schedule = schedule_of("reduce_lr_on_plateau", plateau_factor=0.3, plateau_patience=2)
        return BestMetric("auc"), schedule

    def run(best: BestMetric, schedule: LearningRateSchedule, values: list[float]) -> list[tuple[object, ...]]:
        seen = []
        for value in values:
            is_best = best.update(value)
            schedule.after_evaluation(is_best)
            seen.append((is_best, best.value, best.evaluations_since, best.has_stalled(3), schedule.factor(40)))
        return seen

    whole = run(*fresh(), metric)
    assert len({row[-1] for row in whole}) > 3
    for cut in range(len(metric)):
        first = fresh()
        start = run(*first, metric[:cut])
        states = [json.loads(json.dumps(part.state_dict())) for part in first]  # as a checkpoint keeps them
        second = fresh()
        for part, state in zip(second, states, strict=True):
            part.load_state_dict(state)
        assert start + run(*second, metric[cut:]) == whole


@pytest.mark.parametrize(
    ("name", "values", "best"), [("auc", [0.7, 0.8, 0.75], 0.8), ("ne", [0.9, 0.8, 0.85], 0.8), ("logloss", [5], 5)]
)
def test_best_goes_by_the_metrics_direction(name: str, values: list[float], best: float) -> None:
    tracker = BestMetric(name)
    for value in values:
        tracker.update(value)
    assert tracker.value == best


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_neither_best_nor_worse(value: float) -> None:
    best = BestMetric("auc")
    assert not best.update(value)
    assert best.update(0.5)
    assert not best.update(value)
    assert (best.value, best.evaluations_since) == (0.5, 0)


def test_an_equal_value_is_no_improvement() -> None:
    best = BestMetric("ne")
    assert [best.update(0.8), best.update(0.8)] == [True, False]


def test_early_stopping_after_patience_evaluations_and_never_at_patience_0() -> None:
    best = BestMetric("ne")
    stalled = []
    for value in (0.9, 0.91, 0.89, 0.95, 0.94):
        best.update(value)
        stalled.append((best.has_stalled(2), best.has_stalled(0)))
    assert stalled == [(False, False)] * 4 + [(True, False)]


@pytest.mark.parametrize(("rule", "scale"), [("none", 1), ("linear", 16), ("sqrt", 4)])
def test_learning_rate_scaling_rules(rule: str, scale: float) -> None:
    arguments = TrainingArguments(learning_rate_scaling=rule, base_batch_size=512)
    assert batch_size_scale(arguments, 8192) == pytest.approx(scale)
    assert batch_size_scale(arguments, 128) == pytest.approx({"none": 1, "linear": 1 / 4, "sqrt": 1 / 2}[rule])


def test_examples_of_the_docstrings() -> None:
    assert doctest.testmod(dhen.training.learning_rate).failed == 0


@pytest.mark.parametrize("before", [False, True])
def test_the_best_of_the_average_is_none_of_the_last_weights(before: bool) -> None:
    best = BestMetric("ne", of_average=before)
    best.update(0.8)
    for now in (False, True):
        resumed = BestMetric("ne", of_average=now)
        resumed.load_state_dict(best.state_dict())
        assert resumed.value == (0.8 if now == before else None)
