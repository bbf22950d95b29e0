# SPDX-License-Identifier: Apache-2.0
"""Every committed measurement says where and with what it was made, and how right the result was
whose time it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
FILES = sorted(RESULTS.rglob("*.json"))
# What a figure's record calls its error: one number, or several by name.
ERRORS = ("error_vs_float64", "err_vs_f64", "err", "errors")
# A goal is no measurement, and the error of a rival on a CPU stands in the record that has it.
NO_RECORDS = ("target", "rivals")


def timed(value: Any) -> Iterator[dict[str, Any]]:
    """Every record in a file that has the milliseconds of a call."""
    if isinstance(value, list):
        for item in value:
            yield from timed(item)
    elif isinstance(value, dict):
        if any(value.get(name) is not None for name in ("ms", "ms_median")):
            yield value
        for name, item in value.items():
            if name not in NO_RECORDS:
                yield from timed(item)


def lacks_error(record: dict[str, Any]) -> bool:
    """Neither an error, nor a plain word that none was measured."""
    if any(record.get(name) not in (None, {}) for name in ERRORS):
        return False
    return not (any(name in record for name in ERRORS) and record.get("error_note"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RESULTS)))
def test_a_file_names_machine_and_versions_and_every_error(file):
    report = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(report, dict), "expected an object with machine and versions at its top"
    assert report.get("machine")
    assert report.get("versions")
    bare = [record for record in timed(report) if lacks_error(record)]
    assert not bare, f"{len(bare)} timed records without an error, the first: {bare[0]}"


def test_a_record_without_an_error_is_found():
    rows = [
        {"ms_median": 1.5},
        {"ms_median": 1.5, "err_vs_f64": None, "errors": {}},
        {"ms": {"median": 2.0}, "error_vs_float64": None},
        {"ms_median": 1.5, "err_vs_f64": 0.0},
        {"ms_median": 1.5, "err_vs_f64": None, "errors": {"curve": 0.0}},
        {"ms_median": 1.5, "err_vs_f64": None, "error_note": "not measured"},
        {"ms_median": None, "target": {"ms": 3.0}},
    ]
    assert [lacks_error(record) for record in timed(rows)] == [True, True, True] + [False] * 3
