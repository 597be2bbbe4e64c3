"""Mutated ds_configs: what a user might get wrong, at random but from a seed."""

import copy
import json
import random
from typing import Any

from dhen.config.deepspeed_sections import SETTINGS, Works
from dhen.config.dhen_section import DhenSection
from tests import ROOT
from tests.config.test_deepspeed_sections import walked

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
JUNK = (
    *(None, True, False, 0, 1, 2, 3, -1, 5e8, 1e-3, 1e30, 10**30, 2**63, float("nan"), float("inf"), "", "auto", "cpu"),
    *("fp32", "bf16", "none", "nvme", "two\nlines", "x" * 3000, [], [0.9, 0.999], [None], {}, {"enabled": True}),
    *({"enabled": False}, {"device": "cpu"}, {"type": "Adam"}, {"a": {"b": {"c": [1]}}}),
)
_KEYS = sorted(set(walked()))
_WORKING = [key for key, works in SETTINGS.items() if isinstance(works, Works) and works.values not in (dict, str)]
_OPTIMIZERS = ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "NAdam", "Muon", "Lamb", "LBFGS", "adamw", "sgd", 3)
_PARAMS = ("fused", "foreach", "torch_adam", "amsgrad", "momentum", "adam_w_mode", "eps", "capturable", "weight_decay")


def mutated(seed: int) -> bytes:
    """The text of a ds_config: a shipped one, with one to three mistakes."""
    chance = random.Random(seed)
    raw = json.loads(chance.choice(SHIPPED).read_text())
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        chance.choice((_change, _change, _drop, _rename, _add, _add, _set_well, _set_well, _set_optimizer, _set_dhen))(
            chance, raw
        )
    text = json.dumps(raw)
    if chance.random() < 0.05:
        place = chance.randrange(len(text))
        text = chance.choice(
            (text[:place], text[:place] + '"' + text[place:], text.replace('{"', '{"a": 1, "a": 2, "', 1))
        )
    return chance.choice((b"\xef\xbb\xbf", b"\xff", b"")) + text.encode() if chance.random() < 0.02 else text.encode()


def _sections(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and each object in it that is not empty."""
    inner = [value for value in raw.values() if isinstance(value, dict) and value]
    return [raw, *(one for section in inner for one in _sections(section))]


def _change(chance: random.Random, raw: dict[str, Any]) -> None:
    section = chance.choice(_sections(raw))
    section[chance.choice(list(section))] = copy.deepcopy(chance.choice(JUNK))


def _drop(chance: random.Random, raw: dict[str, Any]) -> None:
    section = chance.choice(_sections(raw)[1:] or [raw])
    del section[chance.choice(list(section))]


def _rename(chance: random.Random, raw: dict[str, Any]) -> None:
    section = chance.choice(_sections(raw))
    key = chance.choice(list(section))
    section[key[1:] + key[:1]] = section.pop(key)


def _add(chance: random.Random, raw: dict[str, Any]) -> None:
    _set(raw, chance.choice(_KEYS), copy.deepcopy(chance.choice(JUNK)))


def _set_well(chance: random.Random, raw: dict[str, Any]) -> None:
    """Up to four settings that work, with values that they may have."""
    for _ in range(chance.randrange(1, 5)):
        key = chance.choice(_WORKING)
        values = SETTINGS[key].values
        few = {bool: (True, False), float: (0.5, 1)}.get(values, values)
        value = chance.choice((few.start, 3, 1000, 1e5) if isinstance(few, range) and few.stop > 4 else few)
        _set(raw, key, value)
        if key.startswith(("bf16.", "torch_autocast.")):
            _set(raw, key.split(".")[0] + ".enabled", True)
        if ".offload_" in key:
            _set(raw, key.rpartition(".")[0] + ".device", "cpu")


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            return
    raw[name] = value


def _set_optimizer(chance: random.Random, raw: dict[str, Any]) -> None:
    params = {key: chance.choice((True, False, 0.9, 1, None)) for key in chance.sample(_PARAMS, 2)}
    raw["optimizer"] = {"type": chance.choice(_OPTIMIZERS), "params": {"torch_adam": True} | params}
    raw["zero_allow_untested_optimizer"] = chance.choice((True, True, False))


def _set_dhen(chance: random.Random, raw: dict[str, Any]) -> None:
    if isinstance(raw.get("dhen"), dict):
        raw["dhen"][chance.choice(list(DhenSection.model_fields))] = copy.deepcopy(chance.choice(JUNK))
