"""The role of each raw column: label, dense, sparse or ignored. Most formats take it from a small YAML file.

label: click              # 0 or 1; or {column: answer, positive: yes}, or {column: rating, greater_than: 3}
tasks:                    # optional: further labels, by name, which the model also predicts; a blank is no label
  buy: {column: bought, given_click: true}                  # `given_click`: only where the label is 1
  stay: {column: seconds, greater_than: 30}
row_weight: w             # optional: a column of numbers from 0 on, the weights of the rows in loss and metrics
delimiter: ","            # this and the next three are for text files; the values shown are the defaults
header: true              # if false, also give `columns: [name, ...]` in the order of the file
quote: '"'                # null turns quoting off
null_values: [""]         # values that count as blank
dense:
  - price                 # log1p
  - {name: age, column: c7, transform: identity}              # reads the column c7
  - {name: income, scale: standard, missing_indicator: true}  # also the feature income_is_missing, 0 or 1
sparse:
  - user
  - {name: item, encoding: vocabulary, min_count: 2}          # overrides the command's settings; also hash_size
  - {name: genres, separator: "|", pooling: mean}             # multi-valued, "7|12|40"
  - {name: tags, separator: "|", weights: tag_weights}        # weights from another column, "1|0.5|0.5"
  - {name: history, multi_valued: true}                       # Parquet: a list column
  - {name: hour_of_day, column: time, characters: [6, 8]}     # characters 6 and 7 (from 0) of the column `time`
  - {name: age_bin, column: c7, bins: 20}                     # numbers, by their quantiles in the train split
  - {name: seen, parts: [hour, weekday]}                      # of a date: the features seen_hour and seen_weekday
  - {name: at, parts: [day], date_format: "%y%m%d%H"}         # of a date that is written in another way
  - {name: count, transform: log_squared}                     # of a number: floor(log(x)^2) as a category
  - {name: bought, separator: "|", table: item, pooling: attention, target: item, max_length: 50}  # the last 50
  - {name: last_item, table: item}                            # shares the ids and the table of the feature `item`
  - {name: title, pretrained: {file: titles.parquet, key: id, frozen: true}}  # its table starts from these vectors
ignored: [id]             # all other columns must be listed here; "*" ignores all of them

A name in these three lists may be a shell pattern, such as "cat_*" or {name: "age_*", transform: identity}. It stands
for the columns of the file that it matches and that are named nowhere else.
"""

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, field, fields, replace
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from dhen.data.formats.column_role import STRICT, DenseRole, LabelRole, Part, SparseRole, TaskRole
from dhen.data.schema import LABEL
from dhen.model.names import first_mistake, is_valid_table_name, listed, quoted, shown, unknown_name
from dhen.paths import find
from dhen.yaml_files import parse_yaml, read_yaml

_MISPLACED = (  # where a key is wrong, the key, where it is right, and what to do
    ("dense", "bins", "sparse", "List {{name: {0}_bin, column: {0}, bins: …}} under sparse."),
    ("sparse", "scale", "dense", "List the column under dense, or remove it."),
    ("sparse", "missing_indicator", "dense", "Remove it: a blank of a sparse column already has its own id."),
)
COLUMNS_FILE = "columns.yaml"
"""The roles of the raw columns, as such a file, in a prepared folder and in an exported model."""
_FEATURE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. \-]{0,199}")


@checked_dataclass(frozen=True, config=STRICT)
class ColumnRoles:
    """The parsed YAML file. Raises ValueError if it contradicts itself."""

    time_column, kept = None, {}  # no keys of the file, and so no fields: TimedRoles and KeptRoles have them
    label: LabelRole = field(default_factory=LabelRole)
    dense: tuple[DenseRole, ...] = ()
    sparse: tuple[SparseRole, ...] = ()
    ignored: tuple[str, ...] | Literal["*"] = ()
    delimiter: str = ","
    row_weight: str | None = None
    tasks: dict[str, TaskRole] = field(default_factory=dict)
    header: bool = True
    columns: tuple[str, ...] = ()
    quote: str | None = '"'
    null_values: tuple[str, ...] = field(default=("",))

    def __post_init__(self) -> None:
        names = [name for feature in (*self.dense, *self.sparse) for name in feature.features]
        if not names:
            raise ValueError("there are no features. List at least one under dense or sparse.")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"the feature {quoted(name)} appears twice. Use a different name for each feature. To use a column "
                    f"twice, such as under dense and sparse, write {{name: {shown(name)}_2, column: {shown(name)}}}."
                )
        for feature in (*self.dense, *self.sparse):
            if not has_magic(feature.source):
                _check_names(feature)
            for column in self.label_columns.intersection(feature.columns):
                raise ValueError(
                    f"the feature {quoted(feature.name)} uses the column {quoted(column)}, which is a label. The model "
                    f"would see what it has to predict. Remove the feature, or set `label` or `tasks` to another "
                    f"column."
                )
        for name in self.tasks:
            if not is_valid_table_name(name) or not _FEATURE_NAME.fullmatch(name) or name == LABEL:
                raise ValueError(
                    f"tasks: {quoted(name)} is not allowed as a name. Use letters, digits and '_', but not {LABEL!r} "
                    "or the name of a module attribute ('type', 'training', …)."
                )
        if self.row_weight in self.label_columns:
            raise ValueError(f"row_weight is {quoted(self.row_weight)}, which is a label. Use another column.")
        for key, letter in (("delimiter", self.delimiter), ("quote", self.quote)):
            if letter is not None and (len(letter) != 1 or not letter.isascii()):
                raise ValueError(f"{key} is {quoted(letter)}. Use a single ASCII character.")
        if self.header and self.columns:
            raise ValueError("`columns` is only for files without a header. Add `header: false` or remove `columns`.")
        for feature in self.sparse:
            if feature.separator == "":
                raise ValueError(
                    f"the separator of {quoted(feature.name)} is empty. Give the text that separates two ids."
                )
            if feature.characters is not None and feature.is_multi_valued:
                raise ValueError(
                    f"{quoted(feature.name)} has `characters`, but is multi-valued. Remove one of the two."
                )
        singles = [feature.name for feature in self.sparse if not feature.is_multi_valued]
        for feature in self.sparse:
            if feature.target is not None and feature.target not in singles and not self.has_patterns:
                raise ValueError(
                    f"the target of {quoted(feature.name)} is {quoted(feature.target)}. Use a sparse feature with one "
                    f"id per row: {listed(singles) or 'there is none'}."
                )
        for table, role in self.tables.items():
            if role.table not in (None, role.name) and not self.has_patterns:
                raise ValueError(
                    f"{unknown_name('table', table, set(self.tables) - {table})} Only "
                    f"{quoted(role.name)} has it as `table`. Name a feature, or give it to several."
                )

    @property
    def tables(self) -> dict[str, SparseRole]:
        """By table, its feature, or what its features say about it. Raises ValueError if they contradict each other."""
        of_tables: dict[str, list[SparseRole]] = {}
        for feature in self.sparse:
            of_tables.setdefault(feature.table_name, []).append(feature)
        return {table: of[0] if len(of) == 1 else _shared(table, of) for table, of in of_tables.items()}

    @property
    def label_columns(self) -> frozenset[str]:
        """The raw columns with the label and the labels of the further tasks."""
        return frozenset([self.label.column, *(task.column for task in self.tasks.values())])

    @property
    def numbers(self) -> tuple[str, ...]:
        """The raw columns that are read as numbers."""
        binned = (feature.source for feature in self.sparse if feature.bins is not None)
        return tuple(dict.fromkeys((*(feature.source for feature in self.dense), *binned)))

    @property
    def has_patterns(self) -> bool:
        """Whether a name in a list looks like a pattern, so that `expanded` is needed."""
        names = [feature.source for feature in (*self.dense, *self.sparse)]
        return any(map(has_magic, names + ([] if self.ignored == "*" else list(self.ignored))))

    def expanded(self, present: list[str], file: str, *, is_label_required: bool = True) -> "ColumnRoles":
        """Return the roles with the columns of `file` that each pattern matches, in the order of the file.

        A name that is a column itself is no pattern. Columns that are named without a pattern, in whatever role, are
        left out. Raises ValueError for a pattern that matches no other column (which `ignored` may in data to predict),
        for a column that patterns of two roles match, and for a column that cannot give its name to a feature.
        """
        ignored = () if self.ignored == "*" else self.ignored
        given = [*ignored, *(column for feature in (*self.dense, *self.sparse) for column in feature.columns)]
        named = {
            *self.label_columns,
            self.row_weight,
            *(name for name in given if name in present or not has_magic(name)),
        }
        first_match: dict[str, tuple[str, str]] = {}

        def matches(pattern: str, role: str) -> list[str]:
            if pattern in named:
                return [pattern]
            found = [column for column in present if column not in named and fnmatchcase(column, pattern)]
            if not found and (role != "ignored" or is_label_required):
                raise ValueError(
                    f"the pattern {quoted(pattern)} under {role} matches no column that is not named elsewhere. The "
                    f"columns are {listed(present)}. Correct the schema (--dataset_schema) or remove the pattern."
                )
            for column in found:
                other_role, other = first_match.setdefault(column, (role, pattern))
                if other_role != role:
                    raise ValueError(
                        f"the column {quoted(column)} matches {quoted(other)} under {other_role} and {quoted(pattern)} "
                        f"under {role}. Name the column itself where it belongs, or change a pattern."
                    )
            return found

        def features(roles: tuple[Any, ...], kind: str) -> tuple[Any, ...]:
            found = [(role, column) for role in roles for column in matches(role.source, kind)]
            return tuple(
                dict.fromkeys(
                    replace(role, name=role.name.replace(role.source, column), column=column) for role, column in found
                )
            )

        with _one_line(file):
            dense, sparse = features(self.dense, "dense"), features(self.sparse, "sparse")
            for feature in (*dense, *sparse):
                _check_names(feature)
            dropped = tuple(column for name in ignored for column in matches(name, "ignored"))
            return replace(self, dense=dense, sparse=sparse, ignored=self.ignored if self.ignored == "*" else dropped)

    def check_columns(self, present: list[str], file: str, *, is_label_required: bool) -> None:
        """Raise ValueError if a column is missing, is duplicated, or has no role."""
        for name in present:
            if present.count(name) > 1:
                raise ValueError(f"{file}: row 1: two columns are named {quoted(name)}. Rename one of them.")
        used = [column for feature in (*self.dense, *self.sparse) for column in feature.columns]
        of_rows = [*self.label_columns, *([self.row_weight] if self.row_weight else [])]
        wanted = [*used, *of_rows] if is_label_required else used
        for column in [*wanted, *([self.time_column] if self.time_column else []), *self.kept]:
            if column not in present:
                near = difflib.get_close_matches(column, present, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                flag = "--keep" if column in self.kept else "--time_column"
                raise ValueError(
                    f"{file}: there is no column {quoted(column)}. The columns are {listed(present)}.{hint} Correct "
                    f"{'the schema (--dataset_schema)' if column in wanted else flag} or the file."
                )
        if self.ignored == "*":
            return
        known = {*used, *of_rows, *self.ignored}
        for column in present:
            if column not in known:
                raise ValueError(
                    f"{file}: the column {quoted(column)} has no role. List it under dense, sparse or ignored in the "
                    f'schema (--dataset_schema), or write `ignored: "*"` there to ignore all such columns.'
                )


@checked_dataclass(frozen=True, config=STRICT)
class TimedRoles(ColumnRoles):
    """The roles, and a column of numbers or dates by which rows are put in order, which the command names."""

    time_column: str | None = None
    has_dates: bool = False


@checked_dataclass(frozen=True, config=STRICT)
class KeptRoles(ColumnRoles):
    """The roles, and the columns whose raw values to keep, with their types in the first file, if it has types."""

    kept: dict[str, Any] = field(default_factory=dict)


def _shared(table: str, features: list[SparseRole]) -> SparseRole:
    said: dict[str, Any] = {}
    for key in ("bins", "encoding", "hash_size", "min_count", "pretrained"):
        by_value = {getattr(feature, key): feature.name for feature in features if getattr(feature, key) is not None}
        if len(by_value) > 1 or (by_value and key == "bins"):
            of_each = ", ".join(f"{key} {quoted(value)} of {quoted(name)}" for value, name in by_value.items())
            rule = "Such features cannot share a table" if key == "bins" else "Give it once"
            raise ValueError(
                f"the features {listed([feature.name for feature in features])} share the table {quoted(table)}, which "
                f"does not go together with {of_each}. {rule}, or remove `table`."
            )
        if by_value:
            said[key] = next(iter(by_value))
    return SparseRole(table, **said)


def load_roles(path: str | Path) -> ColumnRoles:
    """Read a YAML schema. Raises FileNotFoundError, or ValueError naming the file, the key and what is allowed."""
    path = find(str(path))
    return _roles_of(read_yaml(path, "Give a YAML file with the role of each column."), path)


def parse_roles(text: str | bytes, path: str | Path) -> ColumnRoles:
    """Parse the text of a YAML schema. Raises ValueError that begins with `path`."""
    return _roles_of(parse_yaml(text, path), path)


def as_yaml(roles: ColumnRoles) -> str:
    """The text of a YAML schema that says the same, without what is the default anyway."""

    def told(role: Any, kind: type) -> dict[str, Any]:
        values = {item.name: getattr(role, item.name) for item in fields(kind)}
        defaults = {item.name: item.default for item in fields(kind)}
        return {key: value for key, value in values.items() if value != defaults[key]}

    values = told(roles, ColumnRoles) | {"label": told(roles.label, LabelRole)}
    values |= {name: [told(role, type(role)) for role in getattr(roles, name)] for name in ("dense", "sparse")}
    values |= {"tasks": {name: told(role, TaskRole) for name, role in roles.tasks.items()}}
    plain = json.loads(json.dumps({key: each for key, each in values.items() if each not in ([], {})}, default=asdict))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _roles_of(content: dict[str, Any], path: str | Path) -> ColumnRoles:
    allowed = ColumnRoles.__dataclass_fields__
    for key in content:
        if key not in allowed:
            raise ValueError(f"{path}: {unknown_name('key', str(key), allowed)}")
    for kind in ("dense", "sparse"):
        entries = content.get(kind) or []
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {kind} is {quoted(entries)}. Use a list of columns.")
        content[kind] = [entry if isinstance(entry, dict) else {"name": str(entry)} for entry in entries]
    for wrong, key, right, use in _MISPLACED:
        for entry in content[wrong]:
            if key in entry:
                name = shown(entry.get("name"))
                raise ValueError(f"{path}: {wrong}: {name} has {key}, which is for {right} columns. {use.format(name)}")
    content["sparse"] = [feature for entry in content["sparse"] for feature in _by_part(entry, path)]
    if not isinstance(content.get("label", {}), dict):
        content["label"] = {"column": str(content["label"])}
    if isinstance(tasks := content.get("tasks"), dict):
        content["tasks"] = {}
        for name, entry in tasks.items():
            if not isinstance(entry, dict | str | int) or str(name) in content["tasks"]:
                raise ValueError(f"{path}: tasks.{name} is {quoted(entry)}, or appears twice. Name its column.")
            told = entry if isinstance(entry, dict) else {"column": str(entry)}
            content["tasks"][str(name)] = {"column": str(name)} | told
    ignored = content.get("ignored") or []
    content["ignored"] = [str(column) for column in ignored] if isinstance(ignored, list) else ignored
    with _one_line(path):
        return TypeAdapter(ColumnRoles).validate_python(content)


@contextmanager
def _one_line(place: str | Path) -> Iterator[None]:
    """Turn an error about roles into a ValueError in one line that begins with `place` and names the key."""
    try:
        yield
    except ValidationError as error:
        raise ValueError(f"{place}: {first_mistake(error)}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_names(role: DenseRole | SparseRole) -> None:
    is_sparse = isinstance(role, SparseRole)
    for name in (*role.features, role.table_name) if is_sparse else role.features:
        if name == LABEL or not _FEATURE_NAME.fullmatch(name) or (is_sparse and not is_valid_table_name(name)):
            raise ValueError(
                f"{quoted(name)} is not allowed as a feature name, because files, columns and tables are named after "
                f"it. Use at most 200 letters, digits, '_', '-', '.' and spaces, but not {LABEL!r}; for a sparse "
                "feature also no dot, no '__' at the start, and no name of a module attribute ('type', 'training', …). "
                f"To rename it, write {{name: new, column: {shown(role.source)}}}."
            )


def _by_part(entry: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """One feature for each of the entry's `parts`; without them, the entry itself."""
    parts = entry.get("parts")
    if parts is None:
        return [entry]
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{path}: parts is {quoted(parts)}. Use a list of {', '.join(get_args(Part))}.")
    rest = {key: value for key, value in entry.items() if key != "parts"}
    name = str(entry.get("name"))
    return [rest | {"name": f"{name}_{part}", "column": entry.get("column", name), "part": part} for part in parts]
