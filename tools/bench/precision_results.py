"""The results of tools/bench/precision.py: a line per run, and what the paper's common optimizations gain (4.3.3)."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from tools.markdown import head, row
from tools.over_seeds import Statistic, over_seeds, signed

COMMON = ("dp", "dp, fp16 tables", "dp, bf16 autocast", "dp, bf16 all-reduce", "dp, bf16 all-to-all", "paper_dp")
"""Plain data parallelism, each of the paper's common optimizations alone, and all of them."""
FILE = "common_optimizations.jsonl"
_HEAD = """\
## The common optimizations

FP16 tables, mixed precision, BF16 all-reduce and BF16 all-to-all on a DHEN of 8 layers under data parallelism, on the
generated log `planted-500k`: on 2 nodes of 2 ranks, which are namespaces of one machine (`tools/cluster.py`). The paper
(4.3.3) gains 1.08 times the speed on GPUs; a CPU has no fast bf16, and its links are not a cluster's.

```bash
python tools/paper.py common_optimizations
```
"""


@dataclass(frozen=True)
class Result:
    """One run. bytes_per_step: what node 0 sends. table_bytes: of all ranks, with the optimizer's states.

    seconds_per_step: of rank 0, the median. flags: that the benchmark gave to recipes/train.py, without the seed.
    """

    variant: str
    seed: int
    bytes_per_step: float
    table_bytes: int
    ne: float
    auc: float
    seconds_per_step: float = 0.0
    flags: tuple[str, ...] = ()
    commit: str | None = None


def read(file: Path) -> list[Result]:
    """The lines of a file, which need not exist. Keys of other versions are ignored."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [TypeAdapter(Result).validate_json(line) for line in lines]


def add(file: Path, result: Result) -> None:
    """Append a line, in a folder that may be new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(result)) + "\n")


def common_section(results: Sequence[Result]) -> str:
    """The report's section on the common optimizations: each against plain data parallelism, paired by seed."""
    runs = {name: {result.seed: result for result in results if result.variant == name} for name in COMMON}
    if not any(runs.values()):
        return f"{_HEAD}\nNot run."
    return f"{_HEAD}\n" + "\n".join(_lines(runs))


def _lines(runs: dict[str, dict[int, Result]]) -> Iterator[str]:
    base = runs[COMMON[0]]
    yield from head(
        ["set-up", "seeds", "speed", "bytes between nodes", "bytes of the tables", "NE difference in percent"]
    )
    for name in COMMON:
        pairs = [(run, base[seed]) for seed, run in runs[name].items() if seed in base]
        if not pairs:
            yield row([name, "not run", "", "", "", ""])
            continue
        ne = over_seeds([100 * (run.ne / first.ne - 1) for run, first in pairs])
        ratios = [
            statistics.mean(first.seconds_per_step / run.seconds_per_step for run, first in pairs),
            statistics.mean(run.bytes_per_step / first.bytes_per_step for run, first in pairs),
            statistics.mean(run.table_bytes / first.table_bytes for run, first in pairs),
        ]
        yield row([name, str(len(pairs)), *(f"{ratio:.2f}" for ratio in ratios), _ne(name, ne)])
    commits = sorted({(run.commit or "unknown")[:10] for of_variant in runs.values() for run in of_variant.values()})
    yield "\nSpeed and bytes are ratios to `dp`, paired by seed; the set-ups took turns. Commits: " + ", ".join(commits)


def _ne(name: str, found: Statistic | None) -> str:
    return "" if name == COMMON[0] else signed(found, 3)
