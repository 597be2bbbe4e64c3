"""tools/bench/storm.py: a few trials end as undisturbed runs, and a run that is not the same is reported."""

import json
import re
import subprocess
import sys

from tests import ROOT


def storm(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench/storm.py", "--launchers=ranks", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


def test_disturbed_runs_end_as_undisturbed_ones(tmp_path):
    flags = [f"--folder={tmp_path / 'runs'}", f"--output={tmp_path / 'storm.jsonl'}"]
    done = storm(*flags, "--trials=4", "--seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = [json.loads(line) for line in (tmp_path / "storm.jsonl").read_text().splitlines()]
    assert len(trials) == 4
    assert all(trial["problems"] == [] for trial in trials)
    events = sum(len(trial["events"]) for trial in trials)
    assert events >= 5
    assert re.search(r"^ranks: 4 trials, .*, 0 problems$", done.stdout, re.MULTILINE)
    counted = storm(*flags, "--trials=0").stdout
    assert counted == done.stdout.splitlines(keepends=True)[-1]
    assert sum(int(count) for count in re.findall(r"(\d+) (?:kills|signals|damages),", counted)) == events
    # The undisturbed run is known by now. With another result of it, the next trial must differ.
    for metrics in (tmp_path / "runs").glob("reference-*/metrics.csv"):
        metrics.write_text(metrics.read_text().replace("0.5", "0.6"))
    again = storm(*flags, "--trials=1", "--seed=1")
    assert again.returncode == 1
    assert "differ from the undisturbed run's" in again.stdout
