# SPDX-License-Identifier: Apache-2.0
"""The README is true: its examples print the lines that it shows, its tables are current, its
commands and files exist.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import clam_kernels

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(
    r"<!-- example:begin -->\n```python\n(.*?)```\n```\n(.*?)```\n<!-- example:end -->", TEXT, re.S
)


@pytest.mark.parametrize(
    ("code", "printed"), EXAMPLES, ids=["estimator", "gaps", "k-means", "op", "layer", "sela"]
)
def test_an_example_prints_what_it_says(code: str, printed: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stderr == ""
    assert run.stdout == printed


def test_tables_are_current() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_check_fails_for_changed_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_tables

    text = readme_tables.rendered(TEXT)
    assert text == TEXT
    monkeypatch.setattr(readme_tables, "results", list)
    assert readme_tables.rendered(TEXT) != TEXT


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {t for line in re.findall(r"make ([a-z -]+)", TEXT) for t in line.split()}
    assert {"demo", "test", "bench", "readme-bench"} <= named & targets


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_map_names_every_room() -> None:
    rooms = [
        p.name
        for p in (ROOT / "clam_kernels").iterdir()
        if p.name[0] not in "_." or p.name == "_core"
    ]
    rooms = [r for r in rooms if not r.endswith((".typed", ".so", ".json"))]
    table = TEXT.split("## Map")[1].split("##")[0]
    assert [r for r in rooms if f"{r}" not in table] == []


def test_every_op_and_estimator_is_named() -> None:
    for name in (*clam_kernels.list_ops(), *clam_kernels.list_estimators()):
        assert f"`{name}`" in TEXT
