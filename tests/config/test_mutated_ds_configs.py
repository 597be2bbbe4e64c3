"""Mutated ds_configs: each is read, with no key ignored, or refused in one line. DHEN_MUTATIONS=20000 tries more."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest

from dhen.config.ds_config import DsConfigError, read_ds_config
from tests.config.mutations import mutated
from tests.config.test_ds_config import RECIPE

MUTATIONS = int(os.environ.get("DHEN_MUTATIONS", "1000"))


def ignored(raw: dict[str, Any], taken: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of `raw` that ask for something, but are not in `taken`."""
    for key, value in raw.items():
        if key == "dhen" or value is None:
            continue
        if key not in taken and not asks_for_nothing(key, value):
            yield f"{prefix}{key}: {value!r}"
        elif isinstance(taken.get(key), dict):
            yield from ignored(value, taken[key], f"{prefix}{key}.")
        elif key in taken and value not in ("auto", taken[key]):
            yield f"{prefix}{key}: {value!r} became {taken[key]!r}"


def asks_for_nothing(key: str, value: Any) -> bool:
    if isinstance(value, dict):
        is_off = value.get("enabled") is False or value.get("device") == "none"
        return is_off or (bool(value) and all(not one or asks_for_nothing("", one) for one in value.values()))
    names = {f.alias or n: f.default for n, f in deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields.items()}
    defaults = vars(deepspeed.DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})) | names
    return value == "auto" or value is False or value == defaults.get(key, False)


def outcome(path: Path, text: bytes) -> str:
    """ "read", or the error, after checking both."""
    path.write_bytes(text)
    message = ""
    try:
        taken = read_ds_config(path, RECIPE)
    except DsConfigError as error:
        message = str(error)
    if message:
        assert message.startswith(f"{path}: ")
        assert len(message) <= 500
        assert "\n" not in message
        return message
    raw = json.loads(text.decode("utf-8-sig"))
    if "by_depth" not in raw.get("dhen", {}):
        assert not list(ignored(raw, taken.deepspeed))
    return "read"


@pytest.mark.parametrize("part", range(4))
def test_a_mutated_ds_config_is_read_whole_or_refused_in_a_line(tmp_path, part):
    outcomes = {}
    for seed in range(part, MUTATIONS, 4):
        try:
            outcomes[seed] = outcome(tmp_path / "mutated.json", mutated(seed))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {mutated(seed)!r:.3000}") from error
    read = list(outcomes.values()).count("read")
    assert 0.05 < read / len(outcomes) < 0.6, "too few of one outcome to show anything"
