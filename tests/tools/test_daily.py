"""tools/daily.py: each day from the day before; what is finished is skipped; a mistake is one line."""

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from tests import ROOT
from tests.recipes.launch import summary
from tests.tools.forked_python import call
from tools import daily
from tools.later_rows import write_days

TINY = {"per_device_train_batch_size": 64, "num_layers": 1, "embedding_dim": 4, "num_embeddings_out": 4}


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The scripts that the tool starts, which fork from the tests' server."""
    calls = []

    def start(command: list[str]) -> int:
        calls.append(" ".join([Path(command[0]).name, *command[1:]]))
        done = call(str(Path(command[0]).relative_to(ROOT)), *command[1:])
        print(done.stdout, done.stderr)
        return done.status

    monkeypatch.setattr(daily, "start", start)
    return calls


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *days: object, **arguments: int) -> int:
    recipe = yaml.safe_load((ROOT / "recipes/configs/daily.yaml").read_text()) | TINY | arguments
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = [f"--config={folder / 'recipe.yaml'}", f"--output={folder / 'all'}", "--days", *map(str, days)]
    monkeypatch.setattr("sys.argv", ["tools/daily.py", *flags])
    return daily.main()


def test_each_day_goes_on_from_the_day_before_and_what_is_finished_is_skipped(monkeypatch, tmp_path, started, capfd):
    days, runs = write_days(tmp_path / "days", 4, 200), tmp_path / "all"
    assert run(monkeypatch, tmp_path, *days[:3]) == 0
    scripts = [each.split()[0] for each in started]
    assert scripts == ["train.py"] * 3 + ["evaluate.py"] + ["train.py"], "the last one is the third day's"
    said = capfd.readouterr().out
    assert f"keep_optimizer: the optimizers go on from {runs / 'daily/day_02'}/checkpoint-" in said
    assert summary(runs / "scratch/day_02")["samples_seen"] == 400 == 2 * summary(runs / "daily/day_02")["samples_seen"]
    lines = [json.loads(line) for line in (runs / "daily.jsonl").read_text().splitlines()]
    assert [(line["day"], line["tested_on"]) for line in lines] == [("day_01", "day_02"), ("day_02", "day_03")]
    assert lines[0]["daily"] == lines[0]["never"] == lines[0]["scratch"]
    assert lines[1]["daily"]["ne"] == summary(runs / "daily/day_02")["test"]["ne"]
    assert len({lines[1][way]["ne"] for way in daily.WAYS}) == 3
    assert (runs / "daily.png").read_bytes()[:4] == b"\x89PNG"

    before = (runs / "daily.jsonl").read_text()
    started.clear()
    assert run(monkeypatch, tmp_path, *days[:3]) == 0
    assert not started
    assert (runs / "daily.jsonl").read_text() == before
    assert run(monkeypatch, tmp_path, tmp_path / "days" / "*.csv") == 0  # a day has come
    assert [each.split()[0] for each in started] == ["train.py", "evaluate.py", "evaluate.py", "train.py"]
    assert (runs / "daily.jsonl").read_text().startswith(before)
    assert "day_04" in (runs / "daily.jsonl").read_text().splitlines()[2]
    assert run(monkeypatch, tmp_path, *days, "--scratch_every=2") == 0
    lines = [json.loads(line) for line in (runs / "daily.jsonl").read_text().splitlines()]
    assert ["scratch" in line for line in lines] == [True, False, True]

    started.clear()
    capfd.readouterr()
    assert run(monkeypatch, tmp_path, *days[1:]) == 1
    said = f"daily: {runs / 'recipes/daily-day_02.yaml'}: model_name_or_path was 'day_01' in this finished run, but now"
    assert said in capfd.readouterr().err
    assert run(monkeypatch, tmp_path, *days, num_layers=2) == 1
    assert "num_layers was 1 in this finished run, but now it is 2. Leave recipe and days" in capfd.readouterr().err
    assert not started


def test_a_mistake_is_one_line(monkeypatch, tmp_path, started, capfd):
    (day,) = write_days(tmp_path / "days", 1, 200)
    assert run(monkeypatch, tmp_path, day, tmp_path / "none*.csv") == 1
    assert capfd.readouterr().err == "daily: --days: 1 files found. Name two or more, each with another name.\n"
    broken = tmp_path / "broken.csv"
    broken.write_text("label,C1\n1,2\n")
    assert run(monkeypatch, tmp_path, day, broken) == 1
    assert (
        "daily: train.py ended with status 1; see above. The same command goes on from there.\n"
        in capfd.readouterr().err
    )


def test_a_drifting_log_keeps_its_click_rate_and_gets_new_values(tmp_path):
    frames = [pl.read_csv(path) for path in write_days(tmp_path, 3, 4000)]
    assert [len(frame) for frame in frames] == [4000] * 3
    assert max(frame["label"].mean() for frame in frames) - min(frame["label"].mean() for frame in frames) < 0.03
    values = [set(frame["C25"].drop_nulls()) for frame in frames]
    assert values[0] < values[1] < values[2]
