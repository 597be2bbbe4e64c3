"""ds_configs: every file that we ship, "auto", and each mistake with an error that names file and key."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dhen.config.ds_config import DsConfigError, Recipe, read_ds_config
from dhen.config.training_arguments import TrainingArguments
from tests import ROOT

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
TRAINING = TrainingArguments(
    per_device_train_batch_size=64, gradient_accumulation_steps=2, max_grad_norm=1.5, learning_rate=1e-3,
    weight_decay=0.01, adam_beta2=0.98, adam_epsilon=1e-7,
)  # fmt: skip
RECIPE = Recipe(TRAINING, world_size=4)


def adam(**params: object) -> dict:
    return {"optimizer": {"type": "AdamW", "params": params}}


def written(folder: Path, change: dict, *, drop: tuple[str, ...] = ()) -> Path:
    raw = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    path = folder / "changed.json"
    path.write_text(json.dumps({key: value for key, value in (raw | change).items() if key not in drop}))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_read_and_resolved(path):
    config = read_ds_config(path, RECIPE).sized({"model.layers.0.mix.weight": 1_000_000, "model.layers.0.bias": 64})
    assert '"auto"' not in json.dumps(config.as_dict())
    assert config.deepspeed["train_batch_size"] == 64 * 2 * 4
    assert config.deepspeed["gradient_clipping"] == 1.5
    assert config.deepspeed["optimizer"]["params"]["betas"] == [0.9, 0.98]
    if path.stem == "by_depth":
        return  # its rungs: tests/recipes/test_by_depth.py
    is_hybrid = path.stem.startswith("hsdp") or path.stem == "paper"
    assert config.zero_stage == (3 if is_hybrid else 0 if path.stem == "paper_dp" else int(path.stem[len("zero")]))
    assert (config.dhen.shard_group == "node") == is_hybrid


def test_the_wire_is_said_once_or_for_each_way(tmp_path):
    both = read_ds_config(written(tmp_path, {"dhen": {"all_to_all_dtype": "int8"}}), RECIPE).dhen.all_to_all_dtype
    assert (both.forward, both.backward) == ("int8", "int8")
    each = {"dhen": {"all_to_all_dtype": {"backward": "bf16"}}}
    forward_only = read_ds_config(written(tmp_path, each), RECIPE).dhen.all_to_all_dtype
    assert (forward_only.forward, forward_only.backward) == ("fp32", "bf16")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"all_to_all_dtype": "fp8"}, "dhen.all_to_all_dtype.forward is 'fp8'"),
        ({"all_to_all_dtype": {"forwards": "fp16"}}, "dhen.all_to_all_dtype: unknown key 'forwards'"),
        ({"placement": {"max_shards": 2}}, "dhen.placement: unknown key 'max_shards'"),
        ({"placement": {"memory_gib": -1}}, "dhen.placement.memory_gib is -1"),
        ({"table_dtype": "bf16"}, "dhen.table_dtype is 'bf16'"),
        ({"placement": {"tables": {"C1": True}}}, "dhen.placement.tables.C1 is True. Use a valid integer"),
        ({"activation_checkpointing": True}, "dhen.activation_checkpointing is True. Use 'none' or 'all', or "),
        ({"activation_checkpointing": "4"}, "dhen.activation_checkpointing is '4'. "),
        ({"shard_group": 0}, "dhen.shard_group is 0. Use 'world' or 'node', or a number above 0."),
    ],
)
def test_mistakes_about_tables_name_the_key(tmp_path, section, words):
    with pytest.raises(DsConfigError) as caught:
        read_ds_config(written(tmp_path, {"dhen": section}), RECIPE)
    assert words in str(caught.value).replace("no key", "unknown key"), caught.value


def test_reading_leaves_nothing_of_deepspeeds_for_us_to_set():
    config = read_ds_config(ROOT / "ds_configs/zero2.json", RECIPE)
    assert "dhen" not in config.deepspeed
    assert config.dhen.table_optimizer == "rowwise_adagrad"


def test_the_recipe_chooses_the_tables_optimizer_unless_the_ds_config_does(tmp_path):
    adam = Recipe(replace(TRAINING, table_optimizer="adam"), 4)
    for section in ({}, {"table_optimizer": "auto"}, {"table_optimizer": "adam"}):
        assert read_ds_config(written(tmp_path, {"dhen": section}), adam).dhen.table_optimizer == "adam"
    path = written(tmp_path, {"dhen": {"table_optimizer": "sgd"}})
    assert read_ds_config(path, RECIPE).dhen.table_optimizer == "sgd"
    with pytest.raises(DsConfigError, match=r"table_optimizer is 'sgd', but the recipe sets 'adam'\. Use \"auto\""):
        read_ds_config(path, adam)


def test_a_moving_average_without_fp32_weights_is_refused_before_anything_is_built():
    with pytest.raises(DsConfigError, match=r"paper.json: bf16.bf16_master_weights_and_grads leaves ema_decay no fp32"):
        read_ds_config(ROOT / "ds_configs/paper.json", Recipe(replace(TRAINING, ema_decay=0.9), 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"zero_optimisation": {"stage": 2}}, "Did you mean 'zero_optimization'"),
        ({"gradient_cliping": 1.0}, "Did you mean 'gradient_clipping'"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "zero_optimization: unknown key 'overlap_com'. Did you mean 'overlap_comm'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer: unknown key 'devise'. Did you mean 'device'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}} | adam(),
            "ratio needs ZeRO stage 3 and DeepSpeedCPUAdam. Remove ratio",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
            "without torch_adam and fused in optimizer.params",
        ),
        ({"bf16": {"enable": True}}, "bf16: unknown key 'enable'. Did you mean 'enabled'"),
        (
            {"data_types": {"grad_acum_dtype": "fp32"}},
            "data_types: unknown key 'grad_acum_dtype'. Did you mean 'grad_accum_dtype'",
        ),
        (adam(bettas=[0.9, 0.9]), "optimizer.params for AdamW: 'bettas'. Did you mean 'betas'"),
        (adam(amsgrd=True, torch_adam=True), "optimizer.params for AdamW: 'amsgrd'. Did you mean 'amsgrad'"),
        ({"optimizer": {"type": "AdamW", "params": []}}, "optimizer.params is \\[\\]. Use an object"),
        ({"zero_optimization": True}, "zero_optimization is True. Use an object"),
        (adam(max_grad_norm=1.0), "optimizer.params.max_grad_norm: the recipe sets clipping"),
        (
            {"optimizer": {"type": "AdmaW", "params": {}}},
            "unknown or unsupported optimizer.type 'AdmaW'. Did you mean 'AdamW'",
        ),
        ({"optimizer": {"type": "sgd", "params": {}}}, "optimizer.type 'sgd'. Did you mean 'SGD'"),
        ({"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}}, "for SGD: 'momentun'. Did you mean 'momentum'"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization|stage"),
        ({"dhen": {"table_optimiser": "sgd"}}, "Did you mean 'table_optimizer'"),
        ({"dhen": {"table_optimizer": "adamw"}}, "table_optimizer is 'adamw'"),
        ({"train_micro_batch_size_per_gpu": 32}, "the recipe sets 64"),
        ({"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown is "auto"'),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "bf16.enabled with ZeRO stage 0"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, 'only "bfloat16" is supported'),
        ({"torch_autocast": {"enable": True}}, "Did you mean 'enabled'"),
        ({"communication_data_type": "fp16"}, "Use 'bf16', which has the range of fp32"),
        ({"communication_data_type": "bf16", "torch_autocast": AUTOCAST}, "ignores it with torch_autocast"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "reach the weights unnoticed. Remove it"),
        ({"optimizer": {"parms": {}, "type": "AdamW"}}, "Did you mean 'params'"),
        ({"optimizer": {}}, "optimizer is missing"),
        ({"activation_checkpointing": {"partition_activations": True}}, "activation_checkpointing has no effect"),
        ({"gradient_allreduce_op": "sum"}, "would scale the dense part"),
        ({"bfloat16": {"enabled": True}}, "is not supported. Use bf16"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "lr_scheduler_type"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/no/drive"}}},
            """offload_param.device is 'nvme'. Use "cpu" or "none".""",
        ),
        ({"dhen": {"shard_group": "nodes"}}, "shard_group"),
        ({"dhen": {"shard_group": 0}}, "shard_group"),
        ({"dhen": {"all_reduce_dtype": "bf16"}}, 'no effect with dhen.shard_group "world"'),
        ({"dhen": {"async_all_reduce": False}}, 'no effect with dhen.shard_group "world"'),
        ({"dhen": {"shard_group": "node"}, "zero_optimization": {"stage": 0}}, "shards nothing"),
        ({"dhen": {"table_group": 0}}, "table_group"),
        (
            {"dhen": {"table_group": 2, "table_sync_steps": 4, "table_optimizer": "adam"}},
            "the moves of Adam's replicas do not add up",
        ),
        (
            {"dhen": {"table_group": 2, "table_sync_overlap": True, "table_optimizer": "adam"}},
            "table_sync_overlap is true, but the moves of Adam's replicas do not add up",
        ),
        ({"dhen": {"table_group": 2, "table_sync_dtype": "int8"}}, "no effect with dhen.table_sync_steps 1"),
        ({"dhen": {"table_sync_steps": 2}}, 'table_sync_steps has no effect with dhen.table_group "world"'),
        ({"dhen": {"table_sync_overlap": True}}, 'table_sync_overlap has no effect with dhen.table_group "world"'),
        ({"dhen": {"table_sync_dtype": "bf16"}}, 'table_sync_dtype has no effect with dhen.table_group "world"'),
        (
            {
                "dhen": {"shard_group": 2},
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "Use stage 2, or remove grad_accum_dtype",
        ),
        (
            {"dhen": {"shard_group": 2}, "zero_optimization": {"stage": 2, "contiguous_gradients": False}},
            "contiguous_gradients is false",
        ),
        ({"dhen": {"activation_checkpointing": "some"}}, "activation_checkpointing"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, change, says):
    path = written(tmp_path, change)
    with pytest.raises(DsConfigError, match=says) as caught:
        read_ds_config(path, RECIPE)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": {"device": "cpu"}}])
def test_stage_1_in_bf16_may_have_a_shard_group(tmp_path, offload):
    """Only with sums in fp32 on the device DeepSpeed takes its other optimizer."""
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if offload else {}
    zero = {"zero_optimization": {"stage": 1} | offload}
    path = written(tmp_path, {"dhen": {"shard_group": 2}, "bf16": {"enabled": True}} | zero | sums)
    assert read_ds_config(path, RECIPE).zero_stage == 1


@pytest.mark.parametrize(
    "change",
    [
        adam(torch_adam=True, foreach=True, amsgrad=False),
        adam(adam_w_mode=True, bias_correction=True),
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "RMSprop", "params": {"alpha": 0.9}}, "zero_allow_untested_optimizer": True},
        {"wall_clock_breakdown": True, "data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_what_deepspeed_knows_is_let_pass(tmp_path, change):
    resolved = read_ds_config(written(tmp_path, change), RECIPE).deepspeed
    assert (adam() | change)["optimizer"]["params"].items() <= resolved["optimizer"]["params"].items()
    for key in change.keys() - {"optimizer"}:
        assert resolved[key] == change[key]


def test_a_bf16_all_reduce_is_taken(tmp_path):
    for change in ({}, {"zero_optimization": {"stage": 0}, "torch_autocast": AUTOCAST}):
        config = read_ds_config(written(tmp_path, change | {"communication_data_type": "bf16"}), RECIPE)
        assert config.deepspeed["communication_data_type"] == "bf16"


def test_what_the_recipe_decides_is_always_said(tmp_path):
    """Else DeepSpeed would clip at 1.0 and step in every micro step, and AdamW decay by its own 0.01."""
    left_out = (
        "gradient_clipping",
        "gradient_accumulation_steps",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    )
    path = written(tmp_path, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, drop=left_out)
    resolved = read_ds_config(path, RECIPE).deepspeed
    assert resolved["gradient_clipping"] == 1.5
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["optimizer"]["params"] == {
        "torch_adam": True, "lr": 1e-3, "weight_decay": 0.01, "betas": [0.9, 0.98], "eps": 1e-7
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"), [('{"a": 1, "a": 2}', "'a' appears twice"), ("{,}", "not strict JSON"), ("[]", "JSON object")]
)
def test_json_must_be_strict(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DsConfigError, match=says):
        read_ds_config(path, RECIPE)


def test_a_missing_file_is_answered_with_those_that_exist():
    with pytest.raises(DsConfigError, match="zero2_offload"):
        read_ds_config(ROOT / "ds_configs/zero4.json", RECIPE)


RUNGS = [
    {"max_layers": 4, "zero_optimization": {"stage": 0}},
    {"max_layers": 8, "dhen": {"activation_checkpointing": "all"}},
    {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False},
]


@pytest.mark.parametrize(
    ("num_layers", "stage", "recomputed", "words"),
    [
        (1, 0, "none", "dhen.by_depth[0] (up to 4 layers) for 1 layers"),
        (4, 0, "none", "dhen.by_depth[0]"),
        (5, 2, "all", "dhen.by_depth[1] (up to 8 layers) for 5 layers"),
        (9, 3, "none", "dhen.by_depth[2] (any depth) for 9 layers"),
    ],
)
def test_the_depth_takes_the_first_rung_that_it_fits_under(tmp_path, num_layers, stage, recomputed, words):
    path = written(tmp_path, {"dhen": {"table_optimizer": "sgd", "by_depth": RUNGS}})
    config = read_ds_config(path, RECIPE, num_layers)
    assert (config.zero_stage, config.dhen.activation_checkpointing) == (stage, recomputed)
    assert config.dhen.table_optimizer == "sgd", "a rung changes what it names, and nothing else"
    assert words in config.rung
    assert "by_depth" not in config.as_dict()["dhen"]


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        ([{"max_layers": 4}], "the model has 9 layers, but the last rung of dhen.by_depth has max_layers 4"),
        ([{"max_layers": 4}, {"max_layers": 4}], "dhen.by_depth[1].max_layers is 4. Rungs must be in increasing order"),
        ([{}, {"max_layers": 20}], "dhen.by_depth[0].max_layers is null"),
        ([{"max_layers": "8"}], 'dhen.by_depth[0].max_layers is "8"'),
        ([{"max_layers": 2, "zero_optimisation": {}}, {}], "dhen.by_depth[0]: unknown key 'zero_optimisation'"),
        ([{"max_layers": 2, "dhen": {"table_dtype": "bf16"}}, {}], "dhen.by_depth[0]: dhen.table_dtype is 'bf16'"),
        ({"max_layers": 4}, "dhen.by_depth must be a list of objects"),
    ],
)
def test_mistakes_in_rungs_are_named(tmp_path, rungs, words):
    path = written(tmp_path, {"dhen": {"by_depth": rungs}})
    with pytest.raises(DsConfigError) as caught:
        read_ds_config(path, RECIPE, 9)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
