"""tools/plan.py: the table and the reasons, ds_configs that are accepted and pick their rung, mistakes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dhen.config.ds_config import Recipe, read_ds_config
from dhen.config.training_arguments import TrainingArguments
from dhen.planner.machine import read_machine, shipped_machines
from tests import ROOT
from tests.tools.forked_python import call
from tools import plan

RECIPE = Recipe(TrainingArguments(per_device_train_batch_size=256, learning_rate=1e-3), world_size=16)
DEPTHS = (1, 2, 4, 6)
CRITEO = ("--config", "recipes/configs/criteo.yaml", "--embedding_dim", "64", "--num_embeddings_out", "32",
          "--per_device_train_batch_size", "256", "--per_device_eval_batch_size", "1",
          "--head_mlp", "512", "512", "--rows_per_table", "1000")  # fmt: skip
CLUSTER = ("--gpu", "a100-40gb", "--nodes", "4", "--gpus_per_node", "4")
CAPPED = (*CRITEO, *CLUSTER, "--memory_gib", "0.085", "--depths", *map(str, DEPTHS))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one call writes, and its output."""
    path = tmp_path_factory.mktemp("plans")
    files = ["--write", path / "ds", "--json", path / "plan.json", "--plot", path / "new/figure6.png"]
    done = call("tools/plan.py", *CAPPED, *files, "--ds_config", "ds_configs/paper.json")
    assert done.status == 0, done.stderr
    (path / "output.txt").write_text(done.stdout)
    return path


def test_the_table_has_a_row_a_depth_and_a_reason_for_each(folder):
    output = (folder / "output.txt").read_text()
    head = next(line for line in output.splitlines() if line.startswith("depth"))
    for scheme in ("dp", "zero1", "zero2", "hsdp", "zero3", "minimum set"):
        assert scheme in head
    for depth in DEPTHS:
        assert any(line.split()[:1] == [str(depth)] for line in output.splitlines())
        assert f"{depth} layers: " in output
    assert "dp needs" in output
    assert "is the fastest that fits" in output


def test_json_has_every_prediction(folder):
    planned = json.loads((folder / "plan.json").read_text())
    assert [each["depth"] for each in planned["depths"]] == list(DEPTHS)
    assert planned["machine"]["ranks_per_node"] == 4
    first, last = planned["depths"][0], planned["depths"][-1]
    assert first["plain"]["dp"]["fits"]
    assert not last["plain"]["dp"]["fits"]
    assert last["minimum_set"]["fits"]
    assert last["plain"]["dp"]["peak_bytes"] == sum(last["plain"]["dp"]["parts"].values())


def test_the_parts_of_a_step_sum_to_it_in_print_and_in_json(folder):
    *_, table = (folder / "output.txt").read_text().split("other groups of ranks:\n")
    head, *rows = (re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[: len(DEPTHS) + 1])
    planned = json.loads((folder / "plan.json").read_text())["depths"]
    for row, each in zip(rows, planned, strict=True):
        shown, chosen = dict(zip(head, row, strict=True)), each["minimum_set"]
        parts = [float(shown[name]) for name in chosen["limits"]["parts"]]
        assert sum(parts) == pytest.approx(float(shown["step"]), abs=0.005 * (len(parts) + 1))
        assert float(shown["step"]) == pytest.approx(1e3 * sum(chosen["seconds"].values()), abs=0.005)
        assert sum(chosen["limits"]["parts"].values()) == pytest.approx(sum(chosen["seconds"].values()))
        assert (shown["depth"], shown["table group"]) == (str(each["depth"]), "world")
        assert shown["limited by"] == chosen["limits"]["limited_by"]
        assert float(shown["tables over world"]) == float(shown["tables"]) != float(shown["tables over node"])


def test_the_hosts_limits_are_those_of_the_machine(folder):
    machine = read_machine("a100-40gb")
    planned = json.loads((folder / "plan.json").read_text())
    expected = {"loading rows": 16 / ((13 + 26) * machine.seconds_per_value)}
    for stage in range(4):
        expected[f"starting steps of ZeRO-{stage}"] = 16 * 256 / machine.seconds_per_step[stage]
    assert planned["most_samples_per_second"] == pytest.approx(expected)
    shown = "; ".join(f"{name} {value:,.0f}" for name, value in expected.items())
    assert f"Most samples/s that the hosts allow: {shown}\n" in (folder / "output.txt").read_text()


def test_the_figure_is_drawn(folder):
    assert (folder / "new/figure6.png").stat().st_size > 10_000


@pytest.mark.parametrize(("sync_steps", "faster"), [(1, "world"), (1000, "node")])
def test_the_table_group_changes_the_prediction_and_auto_takes_the_faster_one(tmp_path, sync_steps, faster):
    section, rows = {"table_group": "node", "table_sync_steps": sync_steps}, ("--rows_per_table", "100000")
    (tmp_path / "ds.json").write_text(json.dumps({"dhen": section}))
    made = {}
    for group in ("world", "node", "auto", "2"):
        flags = (*CRITEO, *CLUSTER, "--ds_config", str(tmp_path / "ds.json"), "--table_group", group, *rows)
        made[group] = plan.plan_depth(plan.job_of(*plan.parse_command_line(flags)), 1)
    seconds = made["world"].limits.table_seconds
    assert seconds == made["2"].limits.table_seconds
    assert seconds["world"] != seconds["node"]
    for group in ("world", "node"):
        assert made[group].limits.parts["tables"] == made[group].chosen.seconds.tables == seconds[group]
    assert made["auto"].chosen.seconds.tables == min(seconds.values())
    assert [made[group].limits.table_group for group in made] == ["world", "node", faster, "2 ranks"]
    assert "table_sync_steps" not in made["world"].ds_config.get("dhen", {}), "a run would refuse it"


@pytest.mark.parametrize("depth", DEPTHS)
def test_what_it_writes_is_accepted_and_the_rung_is_the_depths_own(folder, depth):
    own = read_ds_config(folder / f"ds/depth_{depth}.json", RECIPE, depth)
    rung = read_ds_config(folder / "ds/by_depth.json", RECIPE, depth)
    assert rung.as_dict() == own.as_dict()
    assert f"for {depth} layers" in rung.rung
    assert own.dhen.table_dtype == "fp16", "the tables' settings are the base's"


def test_each_planned_depth_has_a_file_and_they_differ(folder):
    files = sorted(path.name for path in (folder / "ds").iterdir())
    assert files == sorted(["by_depth.json", *(f"depth_{depth}.json" for depth in DEPTHS)])
    assert (folder / "ds/depth_1.json").read_text() != (folder / "ds/depth_6.json").read_text()


def test_where_nothing_fits_at_a_depth_it_says_so_and_goes_on(capsys, tmp_path):
    flags = (*CRITEO, *CLUSTER, "--memory_gib", "0.035", "--depths", "1", "200")
    assert plan.main([*flags, "--write", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "nothing fits" in output
    assert "200 layers with 256 examples per rank do not fit on 4 x 4 ranks" in output
    assert "Possible solutions" in output
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["by_depth.json", "depth_1.json"]


def test_where_nothing_fits_at_all_the_status_is_1(capsys):
    assert plan.main([*CRITEO, *CLUSTER, "--memory_gib", "0.005", "--depths", "4"]) == 1
    assert "do not fit on 4 x 4 ranks" in capsys.readouterr().out


def test_features_are_the_prepared_datas_or_as_asked_for(click_log):
    from dhen.data.schema import Schema

    flags = (*CRITEO[:-2], *CLUSTER, "--dataset_name", str(click_log))
    rows = [column.num_embeddings for column in Schema.load(click_log).sparse]
    assert [table.num_embeddings for table in plan.job_of(*plan.parse_command_line(flags)).config.tables] == rows
    asked = plan.job_of(*plan.parse_command_line([*flags, "--num_sparse_features", "3", "--rows_per_table", "7"]))
    assert [table.num_embeddings for table in asked.config.tables] == [7, 7, 7]
    assert asked.config.num_dense_features == 13
    larger = plan.job_of(*plan.parse_command_line([*flags, "--rows_per_table", "7"])).config.tables
    assert [(table.name, table.num_embeddings) for table in larger] == [
        (column.name, 7) for column in Schema.load(click_log).sparse
    ]


@pytest.mark.parametrize(
    ("flag", "value"), [("--nodes", "x"), ("--depths", "0"), ("--num_dense_features", "-1"), ("--table_group", "nodes")]
)
def test_a_number_that_cant_be_is_said_so(capsys, flag, value):
    with pytest.raises(SystemExit):
        plan.main([*CRITEO, *CLUSTER, f"{flag}={value}"])
    assert f"argument {flag}: '{value}' is not " in capsys.readouterr().err


@pytest.fixture(scope="module")
def click_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.recipes.launch import prepared_click_log

    return prepared_click_log(tmp_path_factory.mktemp("click_log"), rows=64)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "a100-40"], "Did you mean 'a100-40gb'"),
        (["--gpu", "cpu", "--memory_gib", "-1"], "memory_gib is -1.0. Use a number above 0."),
        (["--gpu", "cpu", "--num_layer", "3"], "Did you mean '--num_layers'"),
        (["--gpu", "cpu", "--ds_config", "ds_configs/none.json"], "ds_configs/none.json: no such ds_config"),
        (["--gpu", "cpu", "--rows_per_table", "1000000000"], "does not fit"),
        (["--gpu", "a100-40gb", "--table_group", "3"], "dhen.table_group is 3 (3 ranks per group), but this job has 8"),
        (["--gpu", "cpu", "--depths", "1", "--layers", '[{"interactions": ["linear"]}, {}]'], "one by one"),
    ],
)
def test_mistakes_are_one_line(capsys, flags, words):
    assert plan.main([*CRITEO[:2], *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("plan: ")
    assert words in error
    assert "\n" not in error


def test_a_machine_of_the_users_own(capsys, tmp_path):
    mine = yaml.safe_load(shipped_machines()["cpu"].read_text()) | {"name": "my two boards"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    flags = (*CRITEO[:2], "--machine", str(tmp_path / "mine.yaml"), "--depths", "1")
    assert plan.main(flags) == 0
    assert "my two boards" in capsys.readouterr().out
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(mine | {"memory": 3}))
    assert plan.main([*flags[:3], str(tmp_path / "other.yaml")]) == 1
    assert "unknown key 'memory'" in capsys.readouterr().err
