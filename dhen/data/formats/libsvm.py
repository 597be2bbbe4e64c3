"""libsvm, libfm and libffm text: a label and tokens, separated by spaces.

There are two forms. The more common one in the first lines of the first file is used:

    1 17:1 203:1 998:1        `id:value` (or a bare `id`): token i of a row is field i, from 1; every row has all fields
    1 0:17:1 2:203:1          `field:id:value` (libffm): fields may be omitted, which means blank

A sparse feature takes the ids, and each value must be 1. Without a YAML schema, the fields in the first line of that
form become single-valued sparse features named by their numbers. A schema (roles.py) refers to fields by number:

    sparse:
      - 1
      - {name: user, column: "2"}
      - {name: tags, column: "3", multi_valued: true}         # libffm: any number of tokens in field 3
      - {name: words, column: "4", weights: value}            # the values are the weights of the ids
    dense:
      - {name: price, column: "5"}                            # takes the value and ignores the id
    ignored: [6]

Labels are 0 and 1, or -1 and 1. Comments (`# ...`) and `qid:` are not supported.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from dhen.data.formats import columns, text_blocks
from dhen.data.formats.column_role import DenseRole, LabelRole, SparseRole
from dhen.data.formats.raw_rows import WHOLE, BadRow, DataError, RawChunk, RowChecks, Stretch
from dhen.data.formats.roles import ColumnRoles
from dhen.data.schema import LABEL, weights_column

_LIBFFM = 0
VALUE = "value"
"""`weights` has this value in the schema if the values next to the ids are their weights."""


@dataclass(frozen=True)
class LibsvmReader:
    """Reads both forms, plain or compressed. `num_fields` is None for libffm, where each token names its field."""

    roles: ColumnRoles
    num_fields: int | None
    is_label_required: bool = True
    block_bytes: int = text_blocks.BLOCK_BYTES

    @classmethod
    def for_file(
        cls, file: str, roles: ColumnRoles | None, *, is_label_required: bool, block_bytes: int
    ) -> "LibsvmReader":
        """Return a reader for the form of `file`. Raises DataError for an unknown form, ValueError for wrong roles."""
        is_libffm, fields = _form(file)
        if roles is None:
            roles = ColumnRoles(sparse=tuple(SparseRole(field) for field in dict.fromkeys(fields)))
        else:
            _check_roles(roles, file, None if is_libffm else fields)
        return cls(roles, None if is_libffm else len(fields), is_label_required, block_bytes)

    def stretches(self, file: str, num_bytes: float) -> list[Stretch]:
        """Cut a file (`Reader.stretches`)."""
        return text_blocks.stretches(file, num_bytes)

    def chunks(self, file: str, stretch: Stretch = WHOLE) -> Iterator[RawChunk]:
        """Yield the rows of `file` in order. Raises FileNotFoundError or DataError."""
        for block in text_blocks.text_blocks(file, block_bytes=self.block_bytes, stretch=stretch):
            yield self._typed(block)

    def row_counts(self, file: str, stretch: Stretch = WHOLE) -> Iterator[tuple[int, int]]:
        """Yield the number of lines, and where they end."""
        return text_blocks.line_counts(file, stretch)

    def _typed(self, block: text_blocks.TextBlock) -> RawChunk:
        lines = _lines(block)
        checks = RowChecks(block.file, block.rows, lambda i: lines[i])
        words = lines.str.split(" ")
        first = words.list.first().fill_null("")
        has_label = ~first.str.contains(":", literal=True).to_numpy()
        labels = pl.select(pl.when(pl.Series(has_label)).then(first)).to_series()
        label = columns.label_column(
            _arrow(labels), LabelRole(), checks, is_required=self.is_label_required, minus_one=True
        )
        tokens = _Tokens.of(words, has_label, self.num_fields is None, checks)
        if self.num_fields is not None:
            counts = np.bincount(tokens.rows, minlength=len(lines))
            checks.refuse(
                counts != self.num_fields,
                lambda i: f"the row has {counts[i]} fields, but most of the first rows have {self.num_fields}",
            )
        self._refuse_unknown_fields(tokens, checks)
        typed = {LABEL: label}
        for dense in self.roles.dense:
            at = self._single(tokens, dense, checks)
            numbers = pa.array(tokens.values, from_pandas=True).take(at)
            typed[dense.name] = columns.number_column(numbers, f"field {dense.source}", checks)
        for sparse in self.roles.sparse:
            typed |= self._sparse(tokens, sparse, checks)
        return checks.finish(pa.table(typed), block.bad, end_row=block.end_row, bytes_read=block.bytes_read)

    def _sparse(self, tokens: "_Tokens", role: SparseRole, checks: RowChecks) -> dict[str, pa.Array]:
        where = tokens.of_field(role.source)
        if not role.is_weighted:
            _refuse_rows(
                tokens.rows[where][tokens.values[where] != 1],
                f"field {role.source}: a value is not 1. If the values are weights, set `weights: {VALUE}` in the "
                f"schema; if they are numbers, list the field under dense",
                checks,
            )
        if not role.is_multi_valued:
            return {role.name: tokens.keys.take(self._single(tokens, role, checks))}
        # Skip empty ids.
        where = where[tokens.keys.is_valid().to_numpy(zero_copy_only=False)[where]]
        lengths = np.bincount(tokens.rows[where], minlength=len(checks.rows))
        lists = {role.name: columns.lists_of(lengths, tokens.keys.take(pa.array(where)))}
        if role.is_weighted:
            weights = pa.array(tokens.values[where].astype(np.float32), from_pandas=False)
            lists[weights_column(role.name)] = columns.lists_of(lengths, weights)
        return lists

    def _single(self, tokens: "_Tokens", role: DenseRole | SparseRole, checks: RowChecks) -> pa.Array:
        """Return the index of each row's token in the field, null if the row has none."""
        where = tokens.of_field(role.source)
        counts = np.bincount(tokens.rows[where], minlength=len(checks.rows))
        checks.refuse(
            counts > 1,
            lambda i: f"field {role.source} appears {counts[i]} times. To allow this, set `multi_valued: true` for it",
        )
        at = np.zeros(len(checks.rows), dtype=np.int64)
        at[tokens.rows[where]] = where
        return pa.array(at, mask=counts == 0)

    def _refuse_unknown_fields(self, tokens: "_Tokens", checks: RowChecks) -> None:
        if self.roles.ignored == "*":
            return
        known = [*(feature.source for feature in (*self.roles.dense, *self.roles.sparse)), *self.roles.ignored]
        is_unknown = ~tokens.fields.is_in(known).fill_null(True).to_numpy()
        _refuse_rows(
            tokens.rows[is_unknown],
            f"the row has a field other than {', '.join(known):.100}. The fields come from --dataset_schema or, "
            "without a schema, from the first good row",
            checks,
        )


@dataclass(frozen=True)
class _Tokens:
    """All tokens in a block as flat columns: row, field name, key (null if empty) and value."""

    rows: np.ndarray
    fields: pl.Series
    keys: pa.Array
    values: np.ndarray

    @classmethod
    def of(cls, words: pl.Series, has_label: np.ndarray, is_libffm: bool, checks: RowChecks) -> "_Tokens":
        """Parse the words after each label. Marks rows with a malformed token or a non-finite value as bad."""
        lengths = words.list.len().to_numpy().astype(np.int64)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths) - has_label[rows]
        is_token = places >= 0
        rows, places = rows[is_token], places[is_token]
        texts = words.explode().filter(pl.Series(is_token))
        colons = texts.str.count_matches(":", literal=True).to_numpy()
        form = "field:id:value" if is_libffm else "id:value"
        _refuse_rows(
            rows[(colons != 2) if is_libffm else (colons > 1)], f"a token does not have the form {form}", checks
        )
        parts = [texts.str.split_exact(":", 2).struct.field(f"field_{i}") for i in range(3)]
        fields, keys, values = parts if is_libffm else (pl.Series(places + 1).cast(pl.String), parts[0], parts[1])
        numbers, unread = columns.parse_numbers(_arrow(values.fill_null("1")), pl.Float64)
        is_bad = unread | ~columns.fit_float32(numbers)
        _refuse_rows(rows[is_bad], f"the value of a token is not {columns.A_NUMBER}", checks)
        keys = pl.select(pl.when(keys != "").then(keys)).to_series()
        return cls(rows, fields, _arrow(keys), numbers)

    def of_field(self, field: str) -> np.ndarray:
        """Return the indices of the tokens in a field."""
        return np.flatnonzero((self.fields == field).fill_null(False).to_numpy())


def _refuse_rows(rows: np.ndarray, reason: str, checks: RowChecks) -> None:
    is_bad = np.zeros(len(checks.rows), dtype=bool)
    is_bad[rows] = True
    checks.refuse(is_bad, lambda _: reason)


def _form(file: str) -> tuple[bool, list[str]]:
    """Return (whether the file is libffm, the fields in the first line of the most common form).

    Only the first lines are compared. Without field names, lines with different numbers of tokens have different forms.
    """
    by_form: dict[int, list[list[str]]] = {}
    rows = text_blocks.first_lines(file)
    for _, line in rows:
        words = line.split()
        tokens = words if ":" in words[0] else words[1:]
        colons = {token.count(":") for token in tokens}
        if tokens and (colons == {2} or max(colons) < 2):
            by_form.setdefault(_LIBFFM if colons == {2} else len(tokens), []).append(tokens)
    if not by_form:
        reason = "expected `id:value` or `field:id:value` after the label, but none of the first rows has that form"
        raise DataError(str(BadRow(file, rows[0][0], reason, rows[0][1][: text_blocks.LONGEST_QUOTE])))
    form = max(by_form, key=lambda form: len(by_form[form]))
    tokens = by_form[form][0]
    if form == _LIBFFM:
        return True, [token.split(":")[0] for token in tokens]
    return False, [str(i + 1) for i in range(len(tokens))]


def _lines(block: text_blocks.TextBlock) -> pl.Series:
    """Return the lines with single spaces between words and none at the ends."""
    if not block.text:
        return pl.Series([], dtype=pl.String)
    lines = pl.Series([block.text[:-1].decode("utf-8")]).str.split("\n").explode()
    if b"\t" in block.text or b"  " in block.text:
        lines = lines.str.replace_all(r"[ \t]+", " ")
    return lines.str.strip_chars(" ")


def _arrow(texts: pl.Series) -> pa.Array:
    return texts.to_arrow().cast(pa.string())


def _check_roles(roles: ColumnRoles, file: str, fields: list[str] | None) -> None:
    if roles.label != LabelRole():
        raise ValueError(f"{file}: in libsvm files the label comes first, as 0 and 1, or -1 and 1. Remove `label`.")
    if roles.tasks:
        raise ValueError(f"{file}: libsvm files have one label per row. Remove `tasks`.")
    if roles.row_weight is not None:
        raise ValueError(f"{file}: libsvm files have no weights of rows. Remove `row_weight`.")
    if roles.has_patterns:
        raise ValueError(f"{file}: libsvm files do not support patterns of columns. List the numbers of the fields.")
    for role in roles.sparse:
        others = (role.separator, role.characters, role.part, role.transform, role.bins)
        if role.weights not in (None, VALUE) or others != (None,) * 5:
            raise ValueError(
                f"{role.name!r}: libsvm files do not support separator, characters, parts, transform, bins, or weights "
                f"other than `weights: {VALUE}`. Correct the schema."
            )
    if fields is not None:
        plain = [SparseRole(role.source) for role in (*roles.dense, *roles.sparse)]
        by_number = ColumnRoles(sparse=tuple(dict.fromkeys(plain)), ignored=roles.ignored)
        by_number.check_columns(fields, file, is_label_required=False)
