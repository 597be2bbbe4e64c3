"""Arguments: the command line over the YAML over the defaults, each of its declared type, errors that say where."""

import json
from dataclasses import replace

import pytest
import yaml

from dhen.config.arguments import parse_arguments
from dhen.config.command_line import ArgumentError
from dhen.training.saved.scoring import parse_scoring_arguments
from dhen.yaml_files import write_yaml

EVERY_KIND = {
    "dataset_name": "rows.csv", "split_fractions": [0.5, 0.25, 0.25], "num_layers": 2, "head_mlp": [8, 4],
    "interactions": ["linear", {"kind": "attention", "num_embeddings": 3}],
    "layers": [{"interactions": ["linear"]}, {"interactions": ["advanced_dlrm"], "dropout": 0.5}],
    "embedding_init_std": 0.01, "batch_norm": True, "learning_rate": 0.5, "load_best_model_at_end": False,
    "freeze": "tables", "resume_from_checkpoint": "true", "seed": 7,
}  # fmt: skip


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return f"--config={path}"


def values(*flags):
    return parse_arguments(list(flags)).as_dict()


def test_the_command_line_wins_over_yaml_and_yaml_over_the_defaults(tmp_path):
    got = values(recipe(tmp_path, "num_layers: 5\nseed: 3\n"), "--seed", "4", "--dataset_name=x")
    assert (got["num_layers"], got["seed"], got["logging_steps"]) == (5, 4, 20)
    # Also where the flag says what the default says anyway.
    assert values(recipe(tmp_path, "num_layers: 5\n"), "--num_layers=3")["num_layers"] == 3


@pytest.mark.parametrize("flag", ["--ds_config", "--deepspeed_config"])
def test_the_ds_config_has_deepspeeds_name_for_it_too(flag):
    assert parse_arguments([flag, "ds_configs/zero3.json", "--local_rank=1"]).ds_config == "ds_configs/zero3.json"
    assert parse_arguments([]).ds_config == "ds_configs/zero2.json"


@pytest.mark.parametrize("as_flags", [False, True])
def test_every_kind_of_value_by_yaml_and_by_flags(tmp_path, as_flags):
    if as_flags:
        texts = {name: json.dumps(EVERY_KIND[name]) for name in ("interactions", "layers")}
        several = ("split_fractions", "head_mlp")
        flags = [f"--{name}={texts.get(name, value)}" for name, value in EVERY_KIND.items() if name not in several]
        for name in several:
            flags += [f"--{name}", *(str(number) for number in EVERY_KIND[name])]
        got = values(*flags)
        got |= {name: json.loads(got[name]) for name in texts}  # DhenConfig reads the text
    else:
        got = values(recipe(tmp_path, yaml.safe_dump(EVERY_KIND)))
    assert {name: got[name] for name in EVERY_KIND} == EVERY_KIND
    assert {name: type(got[name]) for name in EVERY_KIND} == {name: type(value) for name, value in EVERY_KIND.items()}


def test_written_arguments_read_back_the_same(tmp_path):
    arguments = parse_arguments([recipe(tmp_path, yaml.safe_dump(EVERY_KIND))])
    write_yaml(arguments.as_dict(), tmp_path / "arguments.yaml")
    again = parse_arguments([f"--config={tmp_path / 'arguments.yaml'}"])
    assert again == arguments
    other = replace(arguments, training=replace(arguments.training, seed=8))
    assert again != other


def test_yaml_numbers_as_people_write_them(tmp_path):
    # YAML 1.1 reads 1e-3, without a dot, as text.
    got = values(recipe(tmp_path, "learning_rate: 1e-3\ntable_learning_rate: 1\nresume_from_checkpoint: true\n"))
    assert (got["learning_rate"], got["table_learning_rate"]) == (0.001, 1.0)
    assert got["resume_from_checkpoint"] == "true"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rates: 1", ["recipe.yaml", "'learning_rates'", "Did you mean 'learning_rate'?"]),
        ("num_layers: many", ["recipe.yaml: num_layers is 'many'", "integer"]),
        ("save_steps: 1.5", ["recipe.yaml: save_steps is 1.5", "integer"]),
        ("seed: true", ["recipe.yaml: seed is 'True'", "valid integer"]),
        ("freeze: all", ["recipe.yaml: freeze: 'all' is not allowed", "'tables', 'dense', 'features'", "'layers:0-3'"]),
        ("head_mlp: [a]", ["recipe.yaml: head_mlp.0 is 'a'"]),
        ("dataset_name: 5", ["recipe.yaml: dataset_name is 5", "string"]),
        ("- linear", ["recipe.yaml: expected a mapping", "got a list"]),
        ("a: [", ["recipe.yaml: not valid YAML", "line 1"]),
    ],
)
def test_a_mistake_in_yaml_names_file_key_and_value(tmp_path, text, words):
    with pytest.raises(ArgumentError) as error:
        values(recipe(tmp_path, text))
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--deepspeed", "ds.json"], ["'--deepspeed'", "Use --ds_config"]),
        (["--bf16=true"], ["'--bf16'", "The ds_config sets the precision"]),
        (["--gradient-checkpointing"], ["'--gradient_checkpointing'", "use dhen.activation_checkpointing"]),
        (["--learning_rates=1"], ["'--learning_rates'", "Did you mean '--learning_rate'?"]),
        (["--learning_rate=fast"], ["command line", "learning_rate", "'fast'"]),
        (["--freeze=all"], ["command line", "freeze", "'all'", "dense"]),
        (["--interactions", "linear", "attention"], ["'attention'", "one word"]),
        (["--config"], ["command line", "--config", "expected one argument"]),
        (["--config=none.yaml"], ["none.yaml", "no such file"]),
        (["--per_device_train_batch_size=0"], ["per_device_train_batch_size is 0", "1 or more"]),
        (["--max_steps=0"], ["max_steps is 0", "-1"]),
        (["--weight_decay=-1"], ["weight_decay is -1.0", "0 or more"]),
        (["--adam_beta1=1"], ["adam_beta1 is 1.0"]),
        (["--dataset_name=a", "--train_file=b"], ["dataset_name and train_file"]),
        (["--test_file=a"], ["without train_file"]),
        (["--resume_from_checkpoint=true", "--overwrite_output_dir"], ["both set"]),
        (["--freeze=tables", "--whole_table_l2=0.1"], ["freeze is 'tables'", "whole_table_l2 0.1", "no effect"]),
        (["--freeze=dense, tables,", "--model_name_or_path=m"], ["freeze: 'dense, tables,' is not allowed"]),
        (
            ["--freeze=dense, tables", "--model_name_or_path=m", "--new_row_learning_rate=1"],
            ["freeze is 'dense, tables'", "new_row_learning_rate 1.0 would have no effect", "table_learning_rate to 0"],
        ),
        (["--freeze=dense", "--new_head", "--model_name_or_path=m"], ["new_head would stay random", "features"]),
        (["--new_head", "--resume_from_checkpoint=true"], ["new_head is True", "Add --model_name_or_path, or remove"]),
        (["--new_row_learning_rate=0"], ["new_row_learning_rate is 0.0", "--model_name_or_path"]),
        (["--layer_learning_rate_decay=0"], ["layer_learning_rate_decay is 0.0", "above 0"]),
        (["--layer_learning_rate_decay=1.1"], ["layer_learning_rate_decay is 1.1", "1 or less"]),
        (["--freeze=tables"], ["freeze is 'tables'", "no trained model", "--model_name_or_path"]),
        (["--table_epsilon=-1"], ["table_epsilon is -1"]),
    ],
)
def test_a_mistake_on_the_command_line_names_flag_and_value(flags, words):
    with pytest.raises(ArgumentError) as error:
        values(*flags)
    assert [word for word in words if word not in str(error.value)] == []


def test_several_files_by_flags_and_by_yaml(tmp_path):
    got = values("--train_file", "a.tsv", "b.tsv", "--test_file=c.tsv")
    assert (got["train_file"], got["test_file"]) == (["a.tsv", "b.tsv"], "c.tsv")
    got = values(recipe(tmp_path, "train_file: [a.tsv, b.tsv]\nvalidation_file: [c.tsv]\n"))
    assert (got["train_file"], got["validation_file"]) == (["a.tsv", "b.tsv"], "c.tsv")
    scoring = ["--model_name_or_path=m", "--dataset_name", "a.tsv", "b.tsv"]
    assert parse_scoring_arguments(scoring, "").dataset_name == ["a.tsv", "b.tsv"]


def test_values_that_another_leaves_unread_are_named():
    flags = ["--plateau_factor=0.5", "--plateau_patience=2", "--plateau_restores_best", "--base_batch_size=64"]
    said = parse_arguments(flags).training.without_effect()
    assert [line.split(" has no effect: ")[0] for line in said] == [
        "plateau_factor", "plateau_patience", "plateau_restores_best", "base_batch_size"
    ]  # fmt: skip
    frozen = ["--freeze=dense", "--model_name_or_path=m", "--self_ensemble"]
    assert parse_arguments(frozen).training.without_effect() == ["self_ensemble has no effect: freeze is dense"]
    sgd = parse_arguments(["--table_optimizer=sgd", "--table_epsilon=1e-3"]).training
    assert sgd.without_effect() == ["table_epsilon has no effect: table_optimizer is sgd"]
    read = [*flags, "--lr_scheduler_type=reduce_lr_on_plateau", "--learning_rate_scaling=sqrt"]
    assert parse_arguments(read).training.without_effect() == []


def test_help_shows_each_flag_once_with_its_type_and_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"], description="Train.")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "Train." in text
    wanted = ("--max_hash_size INT", "(default: 2048)", "--batch_norm [BOOL]", "Turn --load_best_model_at_end off.")
    assert [words for words in wanted if words not in text] == []
    noise = ("--hash-size", "default: None", "default: []", "--local_rank")
    assert [words for words in noise if words in text] == []


def test_the_quickstart_is_for_those_who_name_nothing(tmp_path):
    quickstart = tmp_path / "quickstart.yaml"
    quickstart.write_text("dataset_name: quickstart\n")

    def name(*flags):
        return parse_arguments(list(flags), quickstart=quickstart).data.dataset_name

    assert name() == name("--seed=3") == "quickstart"
    assert name("--train_file=a") is None
    assert name("--dataset-name", "b") == "b"
    assert name(recipe(tmp_path, "seed: 1")) is None


def test_help_shows_the_defaults_of_a_run_on_ones_own_data(tmp_path, capsys):
    quickstart = tmp_path / "quickstart.yaml"
    quickstart.write_text("dataset_name: quickstart\nper_device_eval_batch_size: 512\n")
    for flags, default in ([], 4096), ([f"--config={quickstart}"], 512):
        with pytest.raises(SystemExit):
            parse_arguments([*flags, "--help"], quickstart=quickstart)
        _, said = capsys.readouterr().out.split("  --per_device_eval_batch_size INT\n")
        assert f"(default: {default})" in said.split("  --")[0]


def test_the_default_rate_of_the_tables_is_that_of_their_optimizer():
    rates = [
        parse_arguments(["--dataset_name=a", f"--table_optimizer={kind}"]).training.table_learning_rate
        for kind in ("adagrad", "adam")
    ]
    assert rates == [0.05, 1e-3]
