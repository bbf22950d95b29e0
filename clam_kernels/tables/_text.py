# SPDX-License-Identifier: Apache-2.0
"""CSV and TSV: delimiter, header and cells. Python's csv reads the first rows, pyarrow the rest."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._core.warn import warn
from ..exceptions import DataFileError
from . import _numbers
from ._choice import ColumnChoice, leading_unnamed
from ._source import Source
from ._table import KeptColumn, Table, column_name

SAMPLE = 1 << 16
MARKS = ",\t;"
# Rows that decide the delimiter.
MAX_ROWS = 32
# pyarrow's error for a row with another number of cells; on one thread it has the row's number.
RAGGED = re.compile(r"(?:Row #(\d+): )?Expected (\d+) columns, got (\d+): (.*)", re.DOTALL)
MAX_SHOWN = 60
BOM = "\ufeff"


@dataclass(frozen=True)
class TextRow:
    """Cells of a row, and the number of bytes of the file up to its end."""

    cells: list[str]
    end: int

    @property
    def is_blank(self) -> bool:
        return not self.cells


@dataclass(frozen=True)
class Layout:
    """The delimiter of a text, the cells and the end of its first row with content, its names."""

    delimiter: str
    first: list[str]
    end: int
    names: list[str] | None

    @property
    def start(self) -> int:
        """The number of bytes before the data."""
        return 0 if self.names is None else self.end


def read(source: Source, choice: ColumnChoice) -> Table:
    """The features of a text table, and the columns that a result repeats."""
    layout = _layout(source, choice)
    names = layout.names
    chosen = choice.of(source.name, names, len(layout.first))
    table = _table(source, layout, choice, chosen)
    where = [
        f"{source.name}: column {names[i]!r}" if names is not None else f"{source.name}: column {i}"
        for i in chosen
    ]
    columns = [
        _numbers.of_typed(place, column) for place, column in zip(where, table.columns, strict=True)
    ]
    doubtful = [j for j, x in enumerate(columns) if x is None or _numbers.has_large(x)]
    if doubtful:
        texts = _table(source, layout, choice, [chosen[j] for j in doubtful], as_text=True)
        for j, text in zip(doubtful, texts.columns, strict=True):
            columns[j] = _numbers.of_text(where[j], text, choice.decimal)
    numbers = [column for column in columns if column is not None]
    kept = _kept(source, layout, choice)
    return Table.of(np.column_stack(numbers), names, chosen, kept)


def _kept(source: Source, layout: Layout, choice: ColumnChoice) -> list[KeptColumn]:
    """The columns that a result repeats, with the text of their cells."""
    kept = choice.kept(source.name, layout.names, len(layout.first))
    if not kept:
        return []
    cells = _table(source, layout, choice, kept, as_text=True)
    return [
        KeptColumn(column_name(layout.names, i), _as_text(column))
        for i, column in zip(kept, cells.columns, strict=True)
    ]


def _as_text(column: Any) -> Any:
    """A column of bytes as text; the bytes themselves if they are no UTF-8."""
    import pyarrow as pa

    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        return column


def _table(
    source: Source,
    layout: Layout,
    choice: ColumnChoice,
    chosen: list[int],
    as_text: bool = False,
    numbered: bool = False,
) -> Any:
    """The chosen columns by pyarrow, with their numbers as names, as names may occur twice.

    `as_text` reads columns of bytes. `numbered` reads on one thread: an error has the number of its
    row then.
    """
    import pyarrow as pa
    from pyarrow import csv as reader

    kind = pa.binary()  # bytes, as text may be no UTF-8
    all_columns = [str(i) for i in range(len(layout.first))]
    columns = list(dict.fromkeys(str(i) for i in chosen))
    convert = reader.ConvertOptions(
        null_values=list(_numbers.NULLS),
        include_columns=columns,
        decimal_point=choice.decimal,
        column_types=dict.fromkeys(columns, kind) if as_text else None,
    )
    try:
        with source.stream() as stream:
            stream.read(layout.start)
            rest = stream.read(1)
            if not rest:
                empty = [pa.array([], kind if as_text else pa.float64())] * len(chosen)
                return pa.Table.from_arrays(empty, names=[str(i) for i in chosen])
        with source.stream() as stream:
            stream.read(layout.start)
            table = reader.read_csv(
                stream,
                read_options=reader.ReadOptions(
                    column_names=all_columns,
                    block_size=max(1 << 20, 4 * layout.end),
                    use_threads=not numbered,
                ),
                # in a table of one column an empty line is a row with a missing cell
                parse_options=reader.ParseOptions(
                    delimiter=layout.delimiter,
                    newlines_in_values=True,
                    ignore_empty_lines=len(all_columns) > 1,
                ),
                convert_options=convert,
            )
    except pa.ArrowException as error:
        ragged = RAGGED.search(str(error))
        if ragged is not None and not numbered:
            return _table(source, layout, choice, chosen, as_text, numbered=True)
        text = str(error) if ragged is None else _ragged_row(*ragged.groups())
        raise DataFileError(f"{source.name}: {text}") from error
    return table.select([str(i) for i in chosen])


def _ragged_row(row: str | None, expected: str, got: str, text: str) -> str:
    """The text of an error: a row has another number of cells than the first row."""
    place = "a row" if row is None else f"row {row}"
    text = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
    cells = "cell" if expected == "1" else "cells"
    return f"{place}: expected {expected} {cells}, as the first row has, got {got} in {text!r}"


def _layout(source: Source, choice: ColumnChoice) -> Layout:
    text, whole = _sample(source)
    delimiter = _delimiter(text, whole)
    row = next(
        (row for row in _rows(source.name, text, delimiter, whole) if not row.is_blank), None
    )
    if row is None:
        raise DataFileError(f"{source.name}: the file is empty")
    try:
        "".join(row.cells).encode()
    except UnicodeEncodeError:
        raise DataFileError(f"{source.name}: expected text in UTF-8 in the first row") from None
    is_header = choice.header
    if is_header is None:
        is_header = _is_header(
            source.name, row.cells, choice, delimiter != "," or choice.decimal == ","
        )
    return Layout(delimiter, row.cells, row.end, row.cells if is_header else None)


def _sample(source: Source) -> tuple[str, bool]:
    """(the beginning of the text, at least a whole first row; whether that is the whole text)."""
    size = SAMPLE
    while True:
        with source.stream() as stream:
            content = stream.read(size)
            whole = not stream.read(1)
        text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(content, whole)
        if whole or all(_has_row(source.name, text, mark) for mark in MARKS):
            return text, whole
        size *= 2


def _has_row(name: str, text: str, delimiter: str) -> bool:
    """Whether the text has a whole row, or a cell beyond the limit of csv."""
    try:
        return any(not row.is_blank for row in _rows(name, text, delimiter, whole=False))
    except DataFileError:
        return True


def _rows(name: str, text: str, delimiter: str, whole: bool) -> Iterator[TextRow]:
    """The first rows of a text; the last row only if `whole`, as it may not be complete."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for line in io.StringIO(text, newline=""):
            bare = line if count else line.removeprefix(BOM)
            count += len(line.encode("utf-8", "surrogateescape"))
            yield bare

    before: TextRow | None = None
    try:
        for i, cells in enumerate(csv.reader(lines(), delimiter=delimiter)):
            if before is not None:
                yield before
            if i == MAX_ROWS:
                return
            before = TextRow(cells, count)
    except csv.Error as error:
        raise DataFileError(f"{name}: {error}") from error
    if whole and before is not None:
        yield before


def _delimiter(text: str, whole: bool) -> str:
    """The mark that splits all rows into the same number of cells, with the most values."""

    def quality(mark: str) -> tuple[bool, bool, float, int]:
        try:
            rows = [row.cells for row in _rows("", text, mark, whole) if not row.is_blank]
        except DataFileError:  # the whole line may be one cell, beyond the limit of csv
            rows = []
        if not rows:
            return False, False, 0.0, 0
        width = len(rows[0])
        if width == 1 or any(len(row) != width for row in rows):
            return False, False, 0.0, width
        values = [_numbers.is_value(c, mark != ",") for row in rows[1:] or rows for c in row]
        # a single row may have names: it counts only if all its cells are values
        share = sum(values) / len(values) if len(rows) > 1 else float(all(values))
        return True, _quotes_whole_cells(text, mark), share, width

    return max(MARKS, key=quality)


def _quotes_whole_cells(text: str, mark: str) -> bool:
    """Whether quotes in the first row begin and end cells, as with the right delimiter."""
    cell = rf'(?:"(?:[^"]|"")*"|[^"\r\n{mark}]*)'
    return re.match(rf"[{BOM}\s]*?{cell}(?:{mark}{cell})*(?:[\r\n]|$)", text) is not None


def _is_header(source: str, cells: list[str], choice: ColumnChoice, decimal_comma: bool) -> bool:
    """Whether the first row has names; a warning where it may not."""
    names = [cell.strip() for cell in cells]
    if choice.expected and set(choice.expected) <= set(cells):
        return True
    shown = " ".join(",".join(names[:4]).split()) + (",..." if len(names) > 4 else "")
    as_names = (
        f"{source}: the first row ({shown}) became column names; --no-header reads it as data"
    )
    as_data = f"{source}: the first row ({shown}) became data; --header reads it as column names"
    if not all(_numbers.is_value(name, decimal_comma) for name in names):
        if any(map(_numbers.is_observed, names)):
            warn(as_names)
        return True
    # empty names before numbers are the names of an index
    counted = names[leading_unnamed(names) :]
    if len(names) > 1 and counted and counted == [str(i) for i in range(len(counted))]:
        warn(as_names)
        return True
    if _are_consecutive(names):
        warn(as_data)
    return False


def _are_consecutive(names: list[str]) -> bool:
    """Whether the cells are i, i + 1, ..., as column names often are."""
    if names == ["0"]:
        return True
    if len(names) < 2 or not all(name.isascii() and name.isdigit() for name in names):
        return False
    return names == [str(int(names[0]) + i) for i in range(len(names))]
