"""Disturbs training runs, lets them go on with --resume_from_checkpoint auto, and compares them with undisturbed runs.

    python tools/bench/storm.py --hours 1 --output storm.jsonl

A trial is one run, on a set-up that is drawn: launcher, ranks, ZeRO stage, shard group, async_save. At random moments,
half of them during a save, it is killed or signalled: a rank, all ranks, or their launcher. Between two starts a file
of the newest checkpoint may be damaged, or the modification times of all checkpoints reversed, as by a clock that is
set back. In the end, metrics.csv and the test metrics must be those of the undisturbed run, to the last digit. --output
gets a JSON line per trial, and in the end the counts of all its lines are printed; with --trials 0, nothing else is
done. The exit status is 1 if a trial failed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that a call by path finds tools.bench

import contextlib
import csv
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import psutil

from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.synthetic import generate_click_log
from dhen.runtime.stopping import STATUS
from dhen.training.saved.checkpoint_folder import checkpoints
from tools.bench.launch import argument_parser
from tools.experiments import ROOT, code

SCRIPT = str(ROOT / "recipes/train.py")
STEPS, SAVE_STEPS = 120, 10
SETTINGS = (
    "--embedding_dim=4", "--num_layers=1", "--num_embeddings_out=4", "--dropout=0.1", "--logging_steps=7",
    "--per_device_train_batch_size=12", "--num_train_epochs=1", f"--max_steps={STEPS}", f"--save_steps={SAVE_STEPS}",
    "--eval_steps=40", "--ema_decay=0.9", "--batch_norm=true", "--warmup_steps=5", "--save_total_limit=3",
)  # fmt: skip
KILLS = ("kill a rank", "kill all ranks", "kill the launcher")
SIGNALS = ("SIGTERM to a rank", "SIGUSR1 to all ranks", "SIGINT to a rank", "SIGTERM to the launcher")
DAMAGES = ("flip bits", "truncate", "empty", "delete", "reverse the times")
_SECONDS_TO_END, _MOST_STARTS = 600.0, 40
"""If a rank is gone before the ranks have met, each of the others looks for it several times, for --timeout_minutes."""
_CLOCK = {"samples_per_second", "memory_gib", "seconds"}
"""Columns of metrics.csv that no two runs have alike."""


@dataclass(frozen=True)
class SetUp:
    """How a run is started. launcher: "ranks" for processes without one."""

    launcher: str
    ranks: int
    zero_stage: int
    shard_group: str | int = "world"
    async_save: str = "on"

    def ds_config(self, folder: Path) -> Path:
        """Write it."""
        raw = json.loads((ROOT / f"ds_configs/zero{self.zero_stage}.json").read_text("utf-8"))
        file = folder / f"zero{self.zero_stage}_{self.shard_group}.json"
        section = {"shard_group": self.shard_group, "table_optimizer": "adam"}
        file.write_text(json.dumps(raw | {"dhen": section}), "utf-8")
        return file


SET_UPS = [
    *(SetUp("ranks", 1, stage, async_save=how) for stage in (0, 2) for how in ("on", "off")),
    *(SetUp("ranks", 2, stage, async_save=how) for stage in (0, 1, 2, 3) for how in ("on", "off")),
    *(SetUp("ranks", 4, 3, 2, how) for how in ("on", "off")),
    *(SetUp(launcher, 2, stage) for launcher in ("deepspeed", "torchrun") for stage in (0, 2, 3)),
]


@dataclass
class Trial:
    """What happened. problems: empty if all went as it should."""

    set_up: SetUp
    seed: int
    commit: str
    events: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0


class Job:
    """A run that was started. Its ranks are processes of this program, or those of a launcher."""

    def __init__(self, set_up: SetUp, arguments: Sequence[str], log: Path) -> None:
        self._mark = next(word for word in arguments if word.startswith("--output_dir="))
        self._forks, self._launcher = [], None
        port = _free_port()
        if set_up.launcher == "ranks":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["dhen.training.session", "dhen.training.finish", "torch.utils.tensorboard"])
            for rank in range(set_up.ranks):
                environment = {
                    "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": set_up.ranks, "LOCAL_WORLD_SIZE": set_up.ranks,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
                }  # fmt: skip
                self._forks.append(context.Process(target=_rank, args=(environment, list(arguments), str(log))))
                self._forks[-1].start()
            return
        number = str(set_up.ranks)
        command = {
            "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", number, "--master_port", str(port)],
            "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", number, "--master_port", str(port)],
        }[set_up.launcher]
        with log.open("a", encoding="utf-8") as file:
            self._launcher = subprocess.Popen(
                [sys.executable, *command, SCRIPT, *arguments], cwd=ROOT, stdout=file, stderr=file,
                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that live."""
        if self._launcher is None:
            return [fork.pid for fork in self._forks if fork.is_alive()]
        return [process.pid for process in self._processes() if "RANK" in _environment(process)]

    def launcher(self) -> int | None:
        """Process number of the launcher that the user started; None without one."""
        return self._launcher.pid if self._launcher is not None and self._launcher.poll() is None else None

    def is_over(self) -> bool:
        """Whether no process of it is left."""
        if self._launcher is None:
            return not any(fork.is_alive() for fork in self._forks)
        return self._launcher.poll() is not None and not self._processes()

    def statuses(self) -> set[int]:
        """Exit statuses: of all ranks, or of the launcher."""
        return {self._launcher.returncode} if self._launcher else {fork.exitcode for fork in self._forks}

    def end(self, seconds: float = _SECONDS_TO_END) -> int:
        """Wait for the end; after that, kill what is left, and return how many processes that were."""
        deadline = time.monotonic() + seconds
        while not self.is_over() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [*self.ranks(), *(process.pid for process in self._processes())] if not self.is_over() else []
        for number in set(left):
            _send(number, signal.SIGKILL)
        for fork in self._forks:
            fork.join()
        return len(set(left))

    def _processes(self) -> list[psutil.Process]:
        everything = psutil.process_iter(["cmdline"])
        return [process for process in everything if self._mark in (process.info["cmdline"] or ())]


def _rank(environment: dict[str, int | str], arguments: list[str], log: str) -> None:
    """A rank: train.py in this process."""
    import torch

    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    sys.argv = [SCRIPT, *arguments]
    runpy.run_path(SCRIPT, run_name="__main__")


def disturb(job: Job, run: Path, chance: random.Random) -> str | None:
    """Wait for a random moment, or for a save to begin, and kill or signal. Returns what was done; None if the run
    ended before.
    """
    during_save, seconds = chance.random() < 0.5, chance.uniform(0.0, 4.0)
    deadline = time.monotonic() + _SECONDS_TO_END
    while not job.ranks() and not job.is_over() and time.monotonic() < deadline:
        time.sleep(0.1)
    begun = {folder.name for folder in run.glob("checkpoint-*")}
    deadline = time.monotonic() + (60 if during_save else seconds)
    while time.monotonic() < deadline and not job.is_over():
        if during_save and any(folder.name not in begun for folder in run.glob("checkpoint-*")):
            time.sleep(chance.uniform(0.0, 0.05))
            break
        time.sleep(0.002)
    ranks = job.ranks()
    if job.is_over() or not ranks:
        return None
    event = chance.choice(KILLS * 2 + SIGNALS)
    if event.endswith("the launcher") and job.launcher() is None:
        event = "kill a rank" if event.startswith("kill") else "SIGTERM to a rank"
    to = ranks if event.endswith("all ranks") else [chance.choice(ranks)]
    to = [job.launcher()] if event.endswith("the launcher") else to
    for number in to:
        _send(number, signal.SIGKILL if event.startswith("kill") else signal.Signals[event.split()[0]])
    return event + (", in a save" if during_save else "")


def damage(run: Path, chance: random.Random, damaged: set[int]) -> str | None:
    """Damage a file of the newest checkpoint if there is an older one that is sound. Returns what was done.

    damaged: inodes of the checkpoints that are not.
    """
    found = checkpoints(run)
    if all(folder.stat().st_ino in damaged for folder in found[:-1]) or chance.random() < 0.25:
        return None
    what = chance.choice(DAMAGES)
    if what == "reverse the times":
        for number, folder in enumerate(reversed(found)):
            for file in folder.iterdir():
                os.utime(file, (number, number))
        return what
    file = chance.choice(sorted(found[-1].iterdir()))
    size = file.stat().st_size
    if what == "flip bits":
        content = bytearray(file.read_bytes())
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif what == "delete":
        file.unlink()
    else:
        os.truncate(file, 0 if what == "empty" else chance.randrange(size))
    return f"{what} {file.name}"


def newest_step(folders: Sequence[Path]) -> int:
    """Step of the last of these checkpoints, 0 without one."""
    return int(folders[-1].name.split("-")[1]) if folders else 0


def finished(run: Path) -> tuple[list[dict[str, str]], dict]:
    """What must be the same in the end: metrics.csv without the clock, and the metrics of summary.json."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{key: value for key, value in row.items() if key not in _CLOCK} for row in csv.DictReader(file)]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    return rows, {key: summary[key] for key in ("test", "eval", "steps", "tested_step")}


def run_trial(set_up: SetUp, seed: int, data: Path, folder: Path) -> Trial:
    """Disturb one run until it is done. Its folder stays if there was a problem."""
    trial, chance, began = Trial(set_up, seed, code()["commit"]), random.Random(seed), time.monotonic()
    flags = [f"--ds_config={set_up.ds_config(folder)}", f"--dataset_name={data}", *SETTINGS]
    flags += [f"--async_save={set_up.async_save}", "--resume_from_checkpoint=auto", "--timeout_minutes=1"]
    plain = SetUp("ranks", set_up.ranks, set_up.zero_stage, set_up.shard_group, "off")
    reference = folder / f"reference-{plain.ranks}-{plain.zero_stage}-{plain.shard_group}"
    if not (reference / "summary.json").is_file():
        undisturbed = Job(plain, [*flags, f"--output_dir={reference}"], reference.with_suffix(".log"))
        if undisturbed.end(10 * _SECONDS_TO_END) or undisturbed.statuses() != {0}:
            raise RuntimeError(f"the undisturbed run failed: see {reference.with_suffix('.log')}")
    run = folder / f"trial-{seed}"
    log = run.with_suffix(".log")
    most_disturbed, sound, damaged = chance.randint(3, 15), 0, set[int]()
    while trial.starts < _MOST_STARTS and not trial.problems:
        trial.starts += 1
        size = log.stat().st_size if log.is_file() else 0
        job = Job(set_up, [*flags, f"--output_dir={run}"], log)
        event = disturb(job, run, chance) if trial.starts <= most_disturbed else None
        orphans = job.end(_SECONDS_TO_END if event else 10 * _SECONDS_TO_END)
        said = log.read_text("utf-8", errors="replace")[size:] if log.is_file() else ""
        if orphans:
            trial.problems.append(f"{orphans} processes were left after {event}")
        is_ours = f'File "{ROOT}/' in said  # torchrun prints a traceback of its own when a rank fails
        if is_ours and not ("SIGINT" in str(event) and "KeyboardInterrupt" in said):  # Python's, in the first imports
            trial.problems.append(f"a traceback after {event}")
        if newest_step(checkpoints(run)) < sound:
            trial.problems.append(f"the newest sound checkpoint, {sound}, is lost after {event}")
        if event is None:
            if job.statuses() != {0}:
                trial.problems.append(f"undisturbed, it ended with {sorted(job.statuses())}")
            elif (run / "summary.json").is_file():
                break
            continue
        if job.statuses() == {0} and not (run / "summary.json").is_file():
            trial.problems.append(f"it ended with 0 before its work was done, after {event}")
        trial.events.append(event)
        if event.startswith("SIG") and set_up.launcher == "ranks":
            while_python_starts = -signal.Signals[event.split()[0]]
            expected = {0, STATUS, while_python_starts}
            if "cannot join the job" in said:
                expected.add(1)  # of the ranks that waited for one which was not yet able to tell them
            if job.statuses() - expected:
                trial.problems.append(f"it ended with {sorted(job.statuses())} after {event}")
        newest = checkpoints(run)[-1:]  # before its state may become unreadable
        if what := damage(run, chance, damaged):
            trial.events.append(what)
            if what != "reverse the times":
                damaged.add(newest[0].stat().st_ino)
        sound = newest_step([folder for folder in checkpoints(run) if folder.stat().st_ino not in damaged])
    if not trial.problems and finished(run) != finished(reference):
        trial.problems.append("metrics.csv or the test metrics differ from the undisturbed run's")
    if not trial.problems:
        shutil.rmtree(run)
        log.unlink()
    trial.seconds = round(time.monotonic() - began, 1)
    return trial


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _send(number: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, what)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse_arguments() -> Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--hours", type=float, default=1.0, help="time after which no trial is begun")
    parser.add_argument("--output", type=Path, default=Path("storm.jsonl"), help="file to append a line per trial to")
    parser.add_argument("--folder", type=Path, help="folder of the runs; by default a temporary one")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--trials", type=int, default=10**9, help="the most trials")
    parser.add_argument("--launchers", nargs="+", choices=["ranks", "deepspeed", "torchrun"], help="only these")
    return parser.parse_args()


def main() -> int:
    """Run trials until the time is over. Returns the exit status."""
    arguments = parse_arguments()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    deadline, num_problems = time.monotonic() + arguments.hours * 3600, 0
    set_ups = [each for each in SET_UPS if each.launcher in (arguments.launchers or each.launcher)]
    data = _click_log(folder) if arguments.trials else Path()
    for seed in range(arguments.seed, arguments.seed + arguments.trials):
        if time.monotonic() > deadline:
            break
        trial = run_trial(set_ups[seed % len(set_ups)], seed, data, folder)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")
        num_problems += len(trial.problems)
        problems = f": {'; '.join(trial.problems)}, see {folder}/trial-{seed}.log" if trial.problems else ""
        what = f"trial {seed}, {trial.set_up.launcher}: {len(trial.events)} events, {trial.seconds} s"
        print(what + problems, flush=True)
    for launcher, counts in totals(arguments.output).items():
        print(f"{launcher}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(num_problems > 0)


def totals(output: Path) -> dict[str, Counter[str]]:
    """What happened in all trials of a file, by launcher."""
    found: dict[str, Counter[str]] = {}
    for trial in map(json.loads, output.read_text("utf-8").splitlines() if output.is_file() else ()):
        kinds = [event.split(",")[0] for event in trial["events"]]
        damages, kills = sum(kind.startswith(DAMAGES) for kind in kinds), sum(kind in KILLS for kind in kinds)
        counts = {"trials": 1, "kills": kills, "kills of several ranks' runs": kills * (trial["set_up"]["ranks"] > 1)}
        counts |= {"signals": len(kinds) - damages - kills, "damages": damages, "problems": len(trial["problems"])}
        found.setdefault(trial["set_up"]["launcher"], Counter()).update(counts)
    return found


def _click_log(folder: Path) -> Path:
    rows = {"train": 1600, "validation": 200, "test": 300}
    if not (folder / "raw").is_dir():
        generate_click_log(folder / "raw", rows)
    files = {f"{split}_file": str(folder / "raw" / f"{split}.tsv.gz") for split in rows}
    settings = PreparationSettings(**files, dataset_format="criteo", id_encoding="vocabulary")
    return prepare_cached(settings, folder / "prepared")


if __name__ == "__main__":
    sys.exit(main())
