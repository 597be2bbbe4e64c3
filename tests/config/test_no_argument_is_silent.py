"""Each argument that a user writes is used as it is written, or refused on one line that names the file and the key.

1,300 recipes, schemas and command lines with one mistake or oddity each, from a seed. `pytest -s` prints the counts.
"""

import dataclasses
import random
from collections import Counter
from typing import get_args, get_type_hints

import pytest
import yaml

from dhen.config.arguments import Arguments, parse_arguments
from dhen.config.data_arguments import DataArguments
from dhen.config.left_out import choose_sizes
from dhen.config.training_arguments import TrainingArguments
from dhen.data.formats.roles import ColumnRoles, parse_roles
from dhen.data.preparation.settings import PreparationSettings
from dhen.model.configuration_dhen import DhenArchitecture, DhenConfig
from tests import ROOT

RECIPES = sorted((ROOT / "recipes/configs").glob("*.yaml"))
SCHEMAS = sorted((ROOT / "recipes/configs/schemas").glob("*.yaml"))
TABLES = [{"name": "site", "num_embeddings": 100}, {"name": "user", "num_embeddings": 50}]
PARTS = (DataArguments, DhenArchitecture, TrainingArguments)
NAMES = [field.name for part in PARTS for field in dataclasses.fields(part)]
HINTS = {name: hint for part in PARTS for name, hint in get_type_hints(part).items()}
NUMERIC = [name for name, hint in HINTS.items() if {int, float} & {hint, *get_args(hint)}]
LONG = "x" * 5000
NUMBERS = [
    ".nan", ".inf", "-.inf", "1e400", "-1", "0", "1", "2", "3.0", "0.25", "1e-3", "1e-300", "1_000", "0o7", "1:30",
    "2024", "'5'", "4097", str(2**20), str(2**24), str(2**31), str(2**40), "1e18", str(10**12), str(2**63), "true",
    "null",
]  # fmt: skip
ODD = [
    *NUMBERS, "1.5", str(2**62), "0x" + "f" * 5000, "9" * 5000, "false", "''", "[]", "{}", "[1, 2]", "[-1]", "[.nan]",
    "[true]", "[a, b]", "5 5", "{a: 1}", "{a: 1, a: 2}", f"'{LONG}'", f"{{{LONG}: 1}}", '"two\\nlines"', '"nul\\0"',
    '"\\ud800"', "größe-数", "2020-01-01", "2020-13-45", "!!binary aGk=", "!!int x", "!!bool x", "!!timestamp x",
    "!!python/name:os.system x", "*nothing", "&a [*a]", "[" * 1000, "[" * 60 + "]" * 60, "auto", "none", "linear",
    """'[{"kind": "linear", "kind": "linear"}]'""", "'" + "[" * 5000 + "'", "[{kind: linear, num_embeddings: 0}]",
    "[{kind: self_attention, dropout: .nan}]", "[{kind: advanced_dlrm, over_arch: [1000000000000]}]",
    "[{interactions: [linear], dropout: .inf}]", "[{kind: convolution, num_channels: true}]",
    "[{interactions: [linear], norm: 5}]", "[{kind: linear, use_dense: 1}]",
]  # fmt: skip


def odd_value(rng: random.Random, key: str) -> str:
    """Text for an argument: for a number, mostly a number."""
    return rng.choice(NUMBERS if rng.random() < 0.6 and key in NUMERIC else ODD)


def with_a_value(rng: random.Random, base: dict, names: list[str]) -> tuple[str, str]:
    """The text of a YAML file with an odd value, and the key that has it."""
    key = rng.choice(names)
    rest = {name: value for name, value in base.items() if name != key}
    return f"{yaml.safe_dump(rest)}{key}: {odd_value(rng, key)}\n", key


def with_a_key_twice(rng: random.Random, base: dict, names: list[str]) -> tuple[str, str]:
    key = rng.choice(list(base))
    return f"{yaml.safe_dump(base)}{key}: {rng.choice(ODD[:8])}\n", key


def with_another_key(rng: random.Random, base: dict, names: list[str]) -> tuple[str, str]:
    key = rng.choice(names)
    wrong = rng.choice([key.upper(), key[:-1] + "_", key + "s", LONG, "größe", "2020"])
    return f"{yaml.safe_dump(base)}{wrong}: 1\n", wrong[:79]


def with_broken_text(rng: random.Random, base: dict, names: list[str]) -> tuple[str, str]:
    text = yaml.safe_dump(base)
    cut = rng.randrange(len(text))
    return text[:cut] + rng.choice(["\t", "[", "'", ": :", "\x07", "%", "- ", "\n  x", "*"]) + text[cut:], ""


MUTATIONS = (with_a_value, with_a_value, with_a_value, with_a_key_twice, with_another_key, with_broken_text)


def assert_one_line(error: Exception, *named: str) -> None:
    text = str(error)
    assert len(text) <= 500, text
    assert text.isprintable(), text
    assert all(name in text for name in named), f"{text} does not name {named}"


def is_honoured(written: object, got: object) -> bool:
    """Whether the argument is what was written: `null` asks for the default, and numbers may be written as text."""
    written = written.decode() if isinstance(written, bytes) else written
    if (
        written is None
        or got == written
        or [got] == written
        or str(got) == str(written)
        or (written, got) == (True, "true")
    ):
        return True
    if isinstance(got, list):
        written = written if isinstance(written, list) else [written]
        return len(got) == len(written) and all(map(is_honoured, written, got))
    if isinstance(got, bool):
        return str(written).lower() in (
            ("1", "1.0", "true", "yes", "on") if got else ("0", "0.0", "false", "no", "off")
        )
    return isinstance(got, int | float) and not isinstance(written, bool | list | dict) and got == float(written)


def check_what_follows(arguments: Arguments, key: str, rng: random.Random) -> bool:
    """Build what the arguments describe. Returns whether it can be built."""
    assert choose_sizes(arguments.training, 10_000, 2) is not None
    data = {
        item.name: getattr(arguments.data, item.name)
        for item in dataclasses.fields(PreparationSettings)
        if hasattr(arguments.data, item.name)
    }
    try:
        PreparationSettings(**data)
    except ValueError as error:
        assert_one_line(error)
    try:
        DhenConfig(**vars(arguments.architecture), num_dense_features=3, sparse_features=TABLES)
    except ValueError as error:
        assert_one_line(error, *({key} & {"interactions", "layers"}))
        return False
    return True


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_used_as_written_or_refused(tmp_path, path):
    rng, counts, base = random.Random(path.stem), Counter(), yaml.safe_load(path.read_text())
    file = tmp_path / "recipe.yaml"
    for _ in range(250):
        mutation = rng.choice(MUTATIONS)
        text, key = mutation(rng, base, NAMES)
        file.write_text(text)
        try:
            arguments = parse_arguments([f"--config={file}"])
        except ValueError as error:
            names_key = mutation is with_a_key_twice or "not valid YAML" not in str(error)
            assert_one_line(error, *([key] if names_key else ["recipe.yaml"]))
            counts["refused"] += 1
            continue
        assert mutation in (with_a_value, with_broken_text), text
        got = arguments.as_dict()
        for name, value in yaml.safe_load(text).items():
            assert is_honoured(value, got[name]), f"{name}: {value!r:.200} became {got[name]!r:.200}"
        counts["accepted" if check_what_follows(arguments, key, rng) else "refused with the model"] += 1
    print(f"\n{path.name}: {dict(counts)}")
    assert counts["accepted"] > 10 < counts["refused"]


def odd_words(rng: random.Random, key: str) -> tuple[list[str], list[str]]:
    """Words of a command line, and the values in them."""
    text = odd_value(rng, key).strip("'").replace(".nan", "nan").replace(".inf", "inf")
    kind = rng.randrange(10)
    if kind == 0:
        return [f"--{key}"], []
    if kind == 1:
        return [f"--{key}x={text}"], []
    if kind == 2:
        return [f"--{key}", text, text], [text]
    if kind == 3:
        return [f"--{key}={LONG}"], [LONG]
    if kind == 4:
        return [f"--{key}=1", f"--{key}={text}"], [text]
    return [f"--{key}={text}"], [text]


def test_a_flag_is_used_as_written_or_refused():
    rng, counts = random.Random(0), Counter()
    for _ in range(400):
        key = rng.choice(NAMES)
        words, values = odd_words(rng, key)
        try:
            arguments = parse_arguments(["--dataset_name=a", *words] if key != "train_file" else words)
        except ValueError as error:
            is_loose = "belong to any argument" in str(error)
            assert_one_line(error, *([] if is_loose else [key]))
            counts["refused"] += 1
            continue
        got = arguments.as_dict()[key]
        counts["accepted" if check_what_follows(arguments, key, rng) else "refused with the model"] += 1
        if values:
            assert is_honoured(values * len(got) if isinstance(got, list) else values[-1], got), (
                f"{words!r:.200} became {got!r:.200}"
            )
    print(f"\ncommand lines: {dict(counts)}")
    assert counts["accepted"] > 40 < counts["refused"]


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_a_schema_is_used_as_written_or_refused(path):
    rng, counts, base = random.Random(path.stem), Counter(), yaml.safe_load(path.read_text())
    for _ in range(75):
        text, _ = rng.choice(MUTATIONS)(rng, base, list(ColumnRoles.__dataclass_fields__))
        try:
            parse_roles(text, "schema.yaml")
            counts["accepted"] += 1
        except ValueError as error:
            assert_one_line(error, "schema.yaml")
            counts["refused"] += 1
    print(f"\n{path.name}: {dict(counts)}")
    assert counts["accepted"] < counts["refused"]
