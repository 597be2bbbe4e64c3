"""Trains a model further on each day's rows, and compares it with never training again and with starting anew.

    python tools/daily.py --config recipes/configs/daily.yaml --days 'logs/day_*.csv' --output runs/daily
    python tools/daily.py --config recipes/configs/daily.yaml --drifting 20 --output runs/drifting

Each day's model starts from that of the day before, with its optimizer states (`--keep_optimizer`), and is tested on
the next day, as are the first day's model (`never`) and one that is trained on all days until then (`scratch`).
--config is a recipe for one day; its own data is not used. --days is the files in their order, or a pattern in quotes,
whose files are ordered by name. --drifting generates a log whose truth changes from day to day.

The same command goes on where it was stopped, and with the days that have come since: what is finished is skipped.
daily.jsonl has a line per day, and daily.png their NE. The last day's model is in daily/<name of the day>/model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a call by path finds tools.later_rows

import argparse
import glob
import json
import subprocess
from typing import Any

from matplotlib.figure import Figure

from dhen.config.arguments import parse_arguments as parse_recipe
from dhen.model.names import quoted
from dhen.paths import find, write_atomically
from dhen.training.reporting.run_folder import SUMMARY_FILE, write_json
from dhen.yaml_files import read_yaml, write_yaml
from tools.bench.report import print_table
from tools.later_rows import write_days

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
WAYS = ("daily", "never", "scratch")
_NOT_COMPARED = {"output_dir", "cache_dir", "test_file", "keep_optimizer"}
_DATA = {"dataset_name", "train_file", "validation_file", "test_file", "output_dir", "max_steps"}


class Daily:
    """The runs of each day in `folder`. recipe: of one day. launch: what starts a script."""

    def __init__(
        self, recipe: dict[str, Any], days: list[Path], folder: Path, ds_config: str, launch: list[str]
    ) -> None:
        self.recipe = {name: value for name, value in recipe.items() if name not in _DATA}
        self.days, self.folder, self.ds_config, self.launch = days, folder, ds_config, launch

    def run(self, ways: list[str], scratch_every: int) -> None:
        """Train and test what is not finished. Writes daily.jsonl after each day."""
        lines = []
        for number, day in enumerate(self.days):
            runs = {"daily": self._train("daily", number), "never": self.folder / "daily" / self.days[0].stem}
            following = self.days[number + 1 : number + 2]
            if following and "scratch" in ways and number % scratch_every == 0:
                runs["scratch"] = self._train("scratch", number) if number else runs["daily"]
            for next_day in following:
                metrics = {way: self._test(runs[way], next_day) for way in ways if way in runs}
                lines.append({"day": day.stem, "tested_on": next_day.stem} | metrics)
                write_atomically(self.folder / "daily.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        show(lines, ways, self.folder / "daily.png")

    def _train(self, way: str, number: int) -> Path:
        """The run of a day: from the day before, or from scratch on all days until then."""
        run, is_further = self.folder / way / self.days[number].stem, way == "daily" and number > 0
        days = self.days[: number + 1] if way == "scratch" else [self.days[number]]
        more = {"train_file": [str(day) for day in days], "output_dir": str(run)}
        more |= {"cache_dir": str(self.folder / "prepared"), "resume_from_checkpoint": "auto"}
        following = self.days[number + 1 : number + 2]
        more |= {"test_file": str(following[0])} if following else {}
        if is_further:
            more |= {"model_name_or_path": str(run.with_name(self.days[number - 1].stem)), "keep_optimizer": True}
        recipe = self.folder / "recipes" / f"{way}-{run.name}.yaml"
        if (run / SUMMARY_FILE).is_file():
            _check_same(recipe, self.recipe | more)
            return run
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_yaml(self.recipe | more, recipe)
        self._call("train.py", f"--config={recipe}", f"--ds_config={self.ds_config}")
        for day in following:
            write_json(run / f"on-{day.stem}.json", json.loads((run / SUMMARY_FILE).read_text())["test"])
        return run

    def _test(self, run: Path, day: Path) -> dict[str, float]:
        """The metrics of a run's model on a day."""
        path = run / f"on-{day.stem}.json"
        if not path.is_file():
            cache = f"--cache_dir={self.folder / 'prepared'}"
            self._call("evaluate.py", f"--model_name_or_path={run}", f"--dataset_name={day}", cache, f"--output={path}")
        return {name: value for name, value in json.loads(path.read_text()).items() if isinstance(value, float)}

    def _call(self, script: str, *flags: str) -> None:
        """Run a script, whose output is seen. Raises ValueError if it fails."""
        print(f"daily: {script} {' '.join(flags)}", file=sys.stderr, flush=True)
        if status := start([*self.launch, str(RECIPES / script), *flags]):
            raise ValueError(f"{script} ended with status {status}; see above. The same command goes on from there.")


def _check_same(recipe: Path, now: dict[str, Any]) -> None:
    """Raise ValueError if a finished run had another recipe, other days or another day before it."""
    before = read_yaml(str(recipe))
    for name in sorted((before.keys() | now.keys()) - _NOT_COMPARED):
        was, value = (_name_of_days(name, values.get(name)) for values in (before, now))
        if was != value:
            raise ValueError(
                f"{recipe}: {name} was {quoted(was)} in this finished run, but now it is {quoted(value)}. Leave recipe "
                "and days as they were, or choose another --output."
            )


def _name_of_days(name: str, value: Any) -> Any:
    """Without the folders of files and runs, which may have moved."""
    if name == "model_name_or_path":
        return value and Path(value).name
    return [Path(path).name for path in value] if name == "train_file" else value


def start(command: list[str]) -> int:
    """Run a Python script to its end, and return its exit status."""
    return subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode


def show(lines: list[dict[str, Any]], ways: list[str], plot: Path) -> None:
    """Print the NE of each day, and draw it."""
    rows = [[line["tested_on"], *(f"{line[way]['ne']:.5f}" if way in line else "" for way in ways)] for line in lines]
    print_table(["tested on", *ways], rows)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="day that the models are tested on", ylabel="normalized entropy")
    for way in ways:
        known = [line for line in lines if way in line]
        axes.plot([line["tested_on"] for line in known], [line[way]["ne"] for line in known], marker=".", label=way)
    axes.tick_params("x", rotation=90)
    axes.legend()
    figure.savefig(plot, dpi=130, bbox_inches="tight")


def main() -> int:
    """Exit status: 0, or 1 with a message on stderr."""
    arguments = parse_arguments()
    folder = arguments.output.resolve()
    try:
        parse_recipe([f"--config={arguments.config}", f"--ds_config={arguments.ds_config}"])
        if arguments.drifting:
            shape = arguments.drifting, arguments.rows
            days = write_days(folder / f"{shape[0]}_days_of_{shape[1]}", *shape)
        else:
            found = [sorted(glob.glob(pattern)) for pattern in arguments.days]
            days = [Path(path).resolve() for paths in found for path in paths]
        if len(days) < 2 or len({day.stem for day in days}) < len(days):
            raise ValueError(f"--days: {len(days)} files found. Name two or more, each with another name.")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.nproc}"]
        recipe = read_yaml(find(arguments.config))
        launch = launch if arguments.nproc > 1 else []
        runs = Daily(recipe, days, folder, arguments.ds_config, launch)
        runs.run(arguments.compare, arguments.scratch_every)
    except (ValueError, OSError) as error:
        print(f"daily: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="recipe of one day")
    parser.add_argument("--ds_config", default="ds_configs/zero0.json", metavar="JSON", help="default: %(default)s")
    days = parser.add_mutually_exclusive_group(required=True)
    days.add_argument("--days", nargs="+", metavar="FILE", help="a file per day, in order, or a pattern")
    days.add_argument("--drifting", type=int, metavar="DAYS", help="generate a log of so many days")
    parser.add_argument("--rows", type=int, default=20_000, help="of a generated day; default: %(default)s")
    parser.add_argument("--compare", nargs="+", choices=WAYS, default=WAYS, help="default: all")
    parser.add_argument("--scratch_every", type=int, default=1, metavar="DAYS", help="train from scratch less often")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of a run")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of all runs")
    arguments = parser.parse_args()
    for name in ("drifting", "rows", "scratch_every", "nproc"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}. Use 1 or more.")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
