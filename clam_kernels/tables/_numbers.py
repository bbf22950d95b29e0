# SPDX-License-Identifier: Apache-2.0
"""Columns of Arrow as float64: a missing entry is NaN; an integer that float64 rounds raises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..exceptions import DataFileError

# float64 holds every integer up to this one.
EXACT = 2**53
# Numbers with a mark between thousands.
THOUSANDS = {
    mark: re.compile(rf"[+-]?[1-9]\d{{0,2}}(?:{re.escape(mark)}\d{{3}})+(?:{re.escape(point)}\d*)?")
    for mark, point in (",.", ".,")
}
INTEGER = re.compile(r"([+-]?\d+)(?:[.,]0*)?")
LEAVE_OUT = "; --drop leaves a column out"
# Integers that are checked at once.
BLOCK = 1 << 20
# Words for a missing cell: those of pandas, and a question mark.
NULLS = (
    *("", "?", "NA", "N/A", "n/a", "na", "<NA>", "#N/A", "#N/A N/A", "#NA", "NULL", "null"),
    *("None", "none", "NaN", "nan", "NAN", "-NaN", "-nan", "1.#IND", "-1.#IND", "1.#QNAN"),
    *("-1.#QNAN", "Null"),
)


def of_typed(where: str, column: Any) -> np.ndarray | None:
    """A column of numbers, of truth values or of nulls as float64; None for another type."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_integer(kind):
        _check_exact(where, column)
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy())
    if pa.types.is_decimal(kind):
        return _of_decimals(where, column)
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return np.asarray(column.cast(pa.float64()).to_numpy())
    return None


def _of_decimals(where: str, column: Any) -> np.ndarray:
    """A column of decimals as float64; DataFileError for an integer that float64 cannot hold."""
    import pyarrow as pa

    # through text: Arrow's own cast is not the nearest float64 (3 becomes 3.0000000000000004)
    numbers = np.asarray(column.cast(pa.string()).cast(pa.float64()).to_numpy())
    for place in np.flatnonzero(np.abs(numbers) >= EXACT):
        value = column[int(place)].as_py()
        if value == value.to_integral_value() and int(value) != int(numbers[place]):
            raise _rounded(where, int(place), int(value))
    return numbers


def _check_exact(where: str, column: Any) -> None:
    """DataFileError for an integer that float64 cannot hold."""
    values = column.fill_null(0).to_numpy()
    row = first_rounded(values)
    if row is not None:
        raise _rounded(where, row, int(values[row]))


def first_rounded(values: np.ndarray) -> int | None:
    """The flat position of the first integer that float64 cannot hold; None if there is none."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8:
        return None
    values = np.atleast_1d(values)
    width = max(1, values[:1].size)
    step = max(1, BLOCK // width)
    for start in range(0, len(values), step):  # a memory map is read block by block
        block = np.asarray(values[start : start + step]).reshape(-1)
        size = np.abs(block).astype(np.uint64)
        large = size > EXACT
        if large.any():
            # without its last zero bits, an integer that float64 holds has at most 53 bits
            odd = size[large] // (size[large] & (~size[large] + np.uint64(1)))
            rounded = np.flatnonzero(large)[odd > EXACT]
            if len(rounded):
                return start * width + int(rounded[0])
    return None


def check_exact_array(source: str, values: np.ndarray, columns: Sequence[int] = ()) -> None:
    """DataFileError for an integer of an array that float64 cannot hold; `columns` are the numbers
    of its columns in the file.
    """
    place = first_rounded(values)
    if place is None:
        return
    index = np.unravel_index(place, values.shape)
    where = f"{source}: column {columns[int(index[1])]}" if columns else source
    raise _rounded(where, int(index[0]), int(values[index]), LEAVE_OUT if columns else "")


def _rounded(where: str, row: int, value: object, hint: str = LEAVE_OUT) -> DataFileError:
    return DataFileError(
        f"{where}, row {row + 1}: float64 cannot hold the integer {value}, which is beyond 2^53"
        f"{hint}"
    )


def has_large(numbers: np.ndarray) -> bool:
    """Whether a value is so large that float64 may have rounded an integer."""
    return bool((np.abs(numbers) >= EXACT).any())


def of_text(where: str, column: Any, decimal: str) -> np.ndarray:
    """A column of bytes as float64; DataFileError with the row and the value of a cell that is no
    number.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        column = column.cast(pa.string())
    except pa.ArrowInvalid:
        row = _first_bad(column, pa.string())
        value = column[row].as_py()
        raise DataFileError(
            f"{where}, row {row + 1}: expected text in UTF-8, got {value!r}"
        ) from None
    text = pc.utf8_trim_whitespace(column)
    text = pc.if_else(pc.is_in(text, value_set=pa.array(NULLS)), None, text)
    plain = text
    if decimal != ".":  # a cell with a point is no number then
        plain = pc.replace_substring(pc.replace_substring(text, ".", "?"), decimal, ".")
    try:
        numbers = np.asarray(plain.cast(pa.float64()).to_numpy())
    except pa.ArrowInvalid:
        row = _first_bad(plain, pa.float64())
        value = column[row].as_py()
        raise DataFileError(
            f"{where}, row {row + 1}: expected a number, got {value!r}{_hint(value, decimal)}"
        ) from None
    for place in np.flatnonzero(np.abs(numbers) >= EXACT):
        value, number = text[int(place)].as_py(), float(numbers[place])
        integer = INTEGER.fullmatch(value)
        if integer and not (abs(number) < np.inf and int(integer[1]) == int(number)):
            raise _rounded(where, int(place), value)
    return numbers


def _hint(value: str, decimal: str) -> str:
    """A hint for a cell that is no number: a mark between thousands, or another decimal point."""
    mark = "," if decimal == "." else "."
    if THOUSANDS[mark].fullmatch(value.strip()):
        return "; write thousands without a mark between them"
    if mark in value and _is_number(value.replace(mark, ".", 1)):
        name = "comma" if mark == "," else "point"
        return f"; --decimal {mark} reads a {name} as the decimal point"
    return ""


def _first_bad(values: Any, kind: Any) -> int:
    """Position of the first value that Arrow cannot cast to a type, by bisection."""
    import pyarrow as pa

    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values[low:middle].cast(kind)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def is_value(cell: str, decimal_comma: bool = False) -> bool:
    """Whether a cell is a number, a truth value or a word for a missing one."""
    cell = cell.strip()
    if cell in NULLS or cell.lower() in ("true", "false") or _is_number(cell):
        return True
    return decimal_comma and _is_number(cell.replace(",", ".", 1))


def is_observed(cell: str) -> bool:
    """Whether a cell is a number, and not a word for a missing one."""
    return cell.strip() not in NULLS and _is_number(cell.strip())
