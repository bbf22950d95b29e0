# SPDX-License-Identifier: Apache-2.0
"""Every committed measurement names its machine and versions, and each time has the error of its
result beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
FILES = sorted(RESULTS.rglob("*.json"))
# Keys under which a record stores its error: one number, or several by name.
ERRORS = ("error_vs_float64", "err_vs_f64", "err", "errors")
# A goal is no measurement, and a rival's error on a CPU is in the record around it.
NO_RECORDS = ("target", "rivals")


def timed_records(value: Any) -> Iterator[dict[str, Any]]:
    """Every record in a file that has the milliseconds of a call."""
    if isinstance(value, list):
        for item in value:
            yield from timed_records(item)
    elif isinstance(value, dict):
        if any(value.get(name) is not None for name in ("ms", "ms_median")):
            yield value
        for name, item in value.items():
            if name not in NO_RECORDS:
                yield from timed_records(item)


def lacks_error(record: dict[str, Any]) -> bool:
    """True for a record with neither an error nor a note that none was measured."""
    if any(record.get(name) not in (None, {}) for name in ERRORS):
        return False
    return not (any(name in record for name in ERRORS) and record.get("error_note"))


def test_file_names_need_no_quotes_in_a_shell():
    for file in FILES:
        assert re.fullmatch(r"[A-Za-z0-9._+-]+", file.name), file.name


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RESULTS)))
def test_a_file_names_machine_and_versions_and_every_error(file):
    report = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(report, dict), "expected an object with machine and versions at its top"
    assert report.get("machine")
    assert report.get("versions")
    bare = [record for record in timed_records(report) if lacks_error(record)]
    assert not bare, f"{len(bare)} timed records without an error, the first: {bare[0]}"


def test_lacks_error_is_true_for_records_without_an_error_only():
    rows = [
        {"ms_median": 1.5},
        {"ms_median": 1.5, "err_vs_f64": None, "errors": {}},
        {"ms": {"median": 2.0}, "error_vs_float64": None},
        {"ms_median": 1.5, "err_vs_f64": 0.0},
        {"ms_median": 1.5, "err_vs_f64": None, "errors": {"curve": 0.0}},
        {"ms_median": 1.5, "err_vs_f64": None, "error_note": "not measured"},
        {"ms_median": None, "target": {"ms": 3.0}},
    ]
    results = [lacks_error(record) for record in timed_records(rows)]
    assert results == [True, True, True] + [False] * 3
