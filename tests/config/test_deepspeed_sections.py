"""Every setting that the installed DeepSpeed reads works, or is refused in a line that says what to use."""

from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from dhen.config.deepspeed_sections import SETTINGS, ZERO, Works
from dhen.config.ds_config import DsConfigError, read_ds_config
from dhen.config.optimizer_section import OPTIMIZERS
from tests import ROOT
from tests.config.test_ds_config import RECIPE, adam, written

OFFLOADS = {"offload_param": DeepSpeedZeroOffloadParamConfig, "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig}
README = ROOT / "ds_configs/README.md"


class Recorder(dict):
    """A config that records which of its keys the parser asks for.

    DeepSpeed lists its keys nowhere: its constants lack 27 of the 60 top-level ones and mix in keys of sections.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> "Recorder":  # parts of the parser check `key in config.keys()`
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        return self


def walked() -> Iterator[str]:
    """All settings: top-level keys, and the keys of the sections that work."""
    top = Recorder({"train_micro_batch_size_per_gpu": 1})
    deepspeed.DeepSpeedConfig(top)
    yield from top.asked
    sections = [key for key, setting in SETTINGS.items() if isinstance(setting, Works) and setting.values is dict]
    models = {ZERO: DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}
    models |= {f"{ZERO}.{name}": model for name, model in OFFLOADS.items()}
    for section in sections:
        if section in models:
            yield from (f"{section}.{field.alias or name}" for name, field in models[section].model_fields.items())
        elif "." not in section:
            keys = Recorder({"type": "Adam"} if section == "optimizer" else {})
            deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, section: keys})
            yield from (f"{section}.{key}" for key in keys.asked)
    yield from (f"{ZERO}.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS)


REFUSED = sorted(key for key, setting in SETTINGS.items() if isinstance(setting, str))
ON = {"enabled": True, "anything": 1}
"""A value that no setting has by default."""


def with_setting(key: str, value: Any) -> dict[str, Any]:
    """A change of a ds_config that gives the dotted `key` this value."""
    top, *rest = key.split(".")
    section: dict[str, Any] = {ZERO: {"stage": 3}, "optimizer": adam(torch_adam=True)["optimizer"]}.get(top, {})
    change = inner = {top: section} if rest else {top: value}
    for name in (top, *rest)[:-1]:
        inner = inner.setdefault(name, {})
    inner[(top, *rest)[-1]] = value
    for offload in OFFLOADS.keys() & change.get(ZERO, {}).keys():
        if isinstance(change[ZERO][offload], dict):
            change[ZERO][offload].setdefault("device", "cpu")
    return change


def test_the_table_has_every_setting_that_deepspeed_reads():
    assert sorted(SETTINGS) == sorted(set(walked()))


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_setting_says_why_or_what_to_use(tmp_path, key):
    path = written(tmp_path, with_setting(key, ON))
    with pytest.raises(DsConfigError) as caught:
        read_ds_config(path, RECIPE)
    assert str(caught.value) == f"{path}: {key} {SETTINGS[key]}"
    assert "Remove" in SETTINGS[key] or "Use" in SETTINGS[key] or "use" in SETTINGS[key]


@pytest.mark.parametrize(
    "change",
    [
        {"fp16": {"enabled": False, "loss_scale": 0}},
        {"wandb": {"enabled": False, "project": "p"}, "compile": {"deepcompile": False}},
        {"tensor_parallel": {"autotp_size": 0}, "timers": {"throughput": {"enabled": False}}},
        {"managed_gradient_accumulation": True, "gradient_predivide_factor": 1.0, "sparse_gradients": False},
        {"bf16": {"enabled": False, "bf16_master_weights_and_grads": True}, "steps_per_print": None},
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}, "zero_hpz_partition_size": 1}},
        {"zero_optimization": {"stage": 1, "zenflow": None, "ignore_unused_parameters": True, "cpu_offload": False}},
        {"zero_optimization": {"stage": 0, "overlap_comm": False, "reduce_bucket_size": "auto"}},
    ],
)
def test_what_is_switched_off_is_let_pass_and_left_out(tmp_path, change):
    taken = read_ds_config(written(tmp_path, change), RECIPE).deepspeed
    assert taken.keys().isdisjoint(change.keys() - {ZERO})
    if ZERO in change:
        assert taken[ZERO].keys() <= {"stage", "overlap_comm"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True. Use a whole number from 0 to 3."),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is '2'. Use a whole number from 0 to 3."),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**30}}, "Use a whole number from 1 to 2,147,"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": 1}}, "overlap_comm is 1. Use true or false."),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": True}}, "zero_hpz_partition_size is not"),
        ({"zero_optimization": {"stage": 0, "round_robin_gradients": True}}, "has no effect at ZeRO stage 0, only at"),
        ({"zero_optimization": {"stage": 2, "sub_group_size": 10}}, "sub_group_size has no effect at ZeRO stage 2"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param has no effect"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, "offload_optimizer.device is missing"),
        ({"zero_optimization": {"stage": 2, "prefetch_bucket_size": 9}}, "Did you mean 'stage3_prefetch_bucket_size'"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 3}}, "is 3. Use an even number from 2 to"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}} | adam(),
            "ratio needs ZeRO stage 3 and DeepSpeedCPUAdam. Remove ratio",
        ),
        ({"bf16": []}, "bf16 is []. Use an object"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16.enabled is missing, so bf16 would do nothing"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": False}},
            "bf16.bf16_master_weights_and_grads needs bf16_optimizer_states and no offload_optimizer",
        ),
        (
            {
                "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
            "or offload_optimizer with DeepSpeedCPUAdam, which is",
        ),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "DeepSpeed rejects this ds_config: bf16_opt"),
        ({"train_batch_size": {}}, "train_batch_size is {}. Use a whole number"),
        ({"gradient_clipping": True}, "gradient_clipping is True. Use a number."),
        ({"gradient_clipping": "5" * 5000}, "(5,002 characters). Use a number."),
        ({"x\n" * 3000: 1}, "characters). Allowed: bf16"),
        ({"communication_data_type": 16}, 'communication_data_type is 16. Use "bf16" or "fp32"'),
        ({"wandb": {"project": "mine"}}, "wandb is not supported: this project reports its numbers itself"),
        (adam(torch_adam=True, fused=True, foreach=True), "optimizer.params for AdamW: `fused` and `foreach`"),
        (adam(torch_adam=True, fused=1), "optimizer.params.fused is 1. Use a value like true."),
        (adam(torch_adam=True, eps=True), "optimizer.params.eps is True"),
        (adam(torch_adam=True, betas=[True, 0.5]), "optimizer.params.betas is [True, 0.5]"),
        (adam(torch_adam=True, maximize=True), "optimizer.params for AdamW: 'maximize'"),
        (adam(torch_adam=True, adam_w_mode=False), 'adam_w_mode is false, but optimizer.type is AdamW'),
        (adam(amsgrad=True), "for AdamW: 'amsgrad'"),
        ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "With it, ZeRO needs zero_allow_untested_opt"),
        (
            {"optimizer": {"type": "SGD", "params": {"nesterov": True}}, "zero_allow_untested_optimizer": True},
            "optimizer.params for SGD: Nesterov momentum requires a momentum and zero dampening",
        ),
        ({"bf16": {"device": "none"}}, "bf16: unknown key 'device'"),
        ({"bf16": {"enabled": "none"}}, "bf16.enabled is 'none'. Use true or false."),
        ({"optimizer": {"type": ["Adam"]}}, "optimizer.type is ['Adam']. Use a text."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_in_one_line(tmp_path, change, says):
    path = written(tmp_path, change)
    with pytest.raises(DsConfigError) as caught:
        read_ds_config(path, RECIPE)
    message = str(caught.value)
    assert says in message
    assert message.startswith(str(path))
    assert len(message) <= 500
    assert "\n" not in message


@pytest.mark.parametrize("name", ["Lamb", "Lion", "Muon", "OneBitAdam", "MuAdam", "LBFGS", "SparseAdam", "Adafactor"])
def test_an_optimizer_that_does_not_train_here_is_refused(tmp_path, name):
    with pytest.raises(DsConfigError, match=f"optimizer.type (is )?'{name}'.*AdamW"):
        read_ds_config(written(tmp_path, {"optimizer": {"type": name}}), RECIPE)
    assert name not in OPTIMIZERS
    assert all(hasattr(torch.optim, known) for known in OPTIMIZERS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 100_000, "not strict JSON"),
        (b'{"bf16": ' * 900 + b"1" + b"}" * 900, "not strict JSON: it is nested more than 30 levels deep"),
        (b"", "not strict JSON"),
        (b'{"gradient_clipping": NaN}', "'gradient_clipping' is nan. Use a finite number"),
        (b'{"optimizer": {"params": {"betas": [0.9, 1e999]}}}', "'betas' is inf. Use a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not strict JSON: Exceeds the limit"),
        (b'{"\xff": 1}', "not strict JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"NaN", "nan"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(DsConfigError) as caught:
        read_ds_config(path, RECIPE)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_is_no_ds_config_and_a_byte_order_mark_is_let_pass(tmp_path):
    with pytest.raises(DsConfigError, match="no such ds_config"):
        read_ds_config(tmp_path, RECIPE)
    path = written(tmp_path, {})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_ds_config(path, RECIPE).zero_stage == 2


def table() -> str:
    """The rows of ds_configs/README.md: a section that works with its keys, and refused ones by the reason."""
    works, sections, refused = [], [], {}
    for key, setting in SETTINGS.items():
        inner = [f"`{one.removeprefix(key)[1:]}`" for one in SETTINGS if one.startswith(f"{key}.") and is_works(one)]
        if "." in key:
            continue
        if isinstance(setting, str):
            refused.setdefault(setting, []).append(f"`{key}`")
        elif inner:
            sections.append(f"| `{key}` | works, with {', '.join(inner)} |")
        else:
            works.append(f"`{key}`")
    rows = [f"| {', '.join(keys)} | {why} |" for why, keys in refused.items()]
    return "\n".join([f"| {', '.join(works)} | works |", *sections, *rows])


def is_works(key: str) -> bool:
    is_section = any(one.startswith(f"{key}.") for one in SETTINGS)
    return isinstance(SETTINGS[key], Works) and not is_section


def test_the_readme_has_the_table():
    assert table() in README.read_text(), (
        "run `python -m tests.config.test_deepspeed_sections`, and paste what it prints"
    )


if __name__ == "__main__":
    print(table())
