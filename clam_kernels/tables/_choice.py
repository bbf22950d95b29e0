# SPDX-License-Identifier: Apache-2.0
"""Which columns of a table are features."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .._core.warn import warn
from ..exceptions import DataFileError

# The names that pandas gives to columns without a name when it reads its own CSV.
UNNAMED = re.compile(r"Unnamed: \d+(_level_\d+)?(\.\d+)?")
INDEX_LEVEL = re.compile(r"__index_level_\d+__")
MAX_LISTED = 12


@dataclass(frozen=True)
class ColumnChoice:
    """The arguments of `read` about the columns, the header and the numbers of a table."""

    columns: Sequence[str] | None = None
    drop: Sequence[str] | None = None
    index_col: str | Sequence[str] | bool | None = None
    header: bool | None = None
    decimal: str = "."
    expected: Sequence[str] | None = None
    keep: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.index_col is True:
            raise TypeError("index_col: expected column names, False or None, got True")
        if self.decimal not in (".", ","):
            raise ValueError(f"decimal: expected '.' or ',', got {self.decimal!r}")

    def of(
        self, source: str, names: Sequence[str] | None, count: int, index: Sequence[str] = ()
    ) -> list[int]:
        """Positions of the features among `count` columns; `index` names the columns that are the
        index of a data frame.
        """
        if not count:
            raise DataFileError(f"{source}: expected at least one column, got none")
        dropped = set() if self.columns is not None else self._index(names, index)
        levels: Sequence[str] = ()
        if not isinstance(self.index_col, bool | None):
            levels = [self.index_col] if isinstance(self.index_col, str) else self.index_col
        for name in (*levels, *(self.drop or ()), *self.keep):
            dropped |= set(_positions(source, names, count, name))
        if self.columns is None and self.expected is not None and names is not None:
            return self._expected(source, names, dropped)
        chosen = list(range(count))
        if self.columns is not None:
            chosen = [i for name in self.columns for i in _positions(source, names, count, name)]
            _check_once(source, names, chosen)
        chosen = [i for i in chosen if i not in dropped]
        if not chosen:
            raise DataFileError(f"{source}: no column is left")
        self._check_unnamed(source, names, chosen)
        return chosen

    def kept(self, source: str, names: Sequence[str] | None, count: int) -> list[int]:
        """Positions of the columns that are no features and that a result repeats, in order."""
        return sorted({i for name in self.keep for i in _positions(source, names, count, name)})

    def _expected(self, source: str, names: Sequence[str], dropped: set[int]) -> list[int]:
        """Positions of the expected columns; a warning names the other columns."""
        expected = list(self.expected or ())
        places: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if i not in dropped:
                places.setdefault(name if name in expected else name.strip(), []).append(i)
        for name, positions in places.items():
            count = expected.count(name)
            if 0 < count < len(positions):
                raise DataFileError(
                    f"{source}: expected {count} {_columns(count)} with the name {name!r}, got"
                    f" {len(positions)}; --drop leaves a column out by its number"
                )
        if any(expected.count(name) > len(places.get(name, ())) for name in expected):
            raise DataFileError(
                f"{source}: expected the columns {listed(expected)} that the model was fitted on,"
                f" got {listed([name for i, name in enumerate(names) if i not in dropped])}"
            )
        others = [name for name in places if name not in expected]
        if others:
            warn(
                f"{source}: the model was not fitted on {_columns(len(others))}"
                f" {listed(others)}, which {'is' if len(others) == 1 else 'are'}"
                " left out"
            )
        return [places[name].pop(0) for name in expected]

    def _index(self, names: Sequence[str] | None, index: Sequence[str]) -> set[int]:
        """Positions of the columns that are the index of a data frame, by their names."""
        if self.index_col is False or names is None:
            return set()
        known = set(self.expected or ())
        return {
            i
            for i, name in enumerate(names)
            if (name in index or INDEX_LEVEL.fullmatch(name)) and name not in known
        }

    def _check_unnamed(
        self, source: str, names: Sequence[str] | None, chosen: Sequence[int]
    ) -> None:
        """DataFileError for features without a name, which are most likely an index."""
        is_explicit = self.index_col is False or self.columns is not None
        if is_explicit or names is None or len(names) < 2:
            return
        first = leading_unnamed(names)
        nameless = [i for i, name in enumerate(names) if i < first or UNNAMED.fullmatch(name)]
        known = self.expected or ()
        levels = list(dict.fromkeys(names[i] for i in nameless if names[i] not in known))
        if any(names[i] in levels for i in nameless if i in chosen):
            has, it = ("has the name", "it") if len(levels) == 1 else ("have the names", "them")
            raise DataFileError(
                f"{source}: the {_columns(len(levels))} {listed(levels)} {has}"
                f" that pandas gives to the index of a frame: --index-col"
                f" {shlex.quote(','.join(levels))} leaves {it} out, --index-col none keeps {it}"
            )


def leading_unnamed(names: Sequence[str]) -> int:
    """The number of names at the beginning that pandas gives to an index."""
    for i, name in enumerate(names):
        if name.strip() and not UNNAMED.fullmatch(name.strip()):
            return i
    return len(names)


def _check_once(source: str, names: Sequence[str] | None, chosen: Sequence[int]) -> None:
    """DataFileError for a feature that occurs twice."""
    twice = [i for i, count in Counter(chosen).items() if count > 1]
    if twice:
        name = twice[0] if names is None else repr(names[twice[0]])
        raise DataFileError(f"{source}: --columns: expected every column once, got {name} twice")


def _columns(count: int) -> str:
    return "column" if count == 1 else "columns"


def listed(names: Sequence[str]) -> str:
    """Names in quotes with commas between them; the first ones of many."""
    shown = ", ".join(map(repr, names[:MAX_LISTED]))
    return shown if len(names) <= MAX_LISTED else f"{shown} and {len(names) - MAX_LISTED} more"


def _positions(source: str, names: Sequence[str] | None, count: int, column: str) -> list[int]:
    """Positions of a column by its name, else by its number from 0."""
    positions = [i for i, name in enumerate(names or ()) if name == column]
    positions = positions or [i for i, name in enumerate(names or ()) if name.strip() == column]
    if not positions and column.isascii() and column.isdigit() and int(column) < count:
        positions = [int(column)]
    if not positions:
        there = f"{count} columns without names: expected 0 to {count - 1}"
        if names is not None:
            there = f"the columns {listed(names)}"
        raise DataFileError(f"{source}: no column {column!r}; the table has {there}")
    return positions
