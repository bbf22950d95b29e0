# SPDX-License-Identifier: Apache-2.0
"""README and pages are true: their examples print what the pages say, the tables of docs/results.md
are current, and commands, files and headings that they name exist.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import clam_kernels

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "NOTES.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TEXT = README.read_text(encoding="utf-8")
EXAMPLE = re.compile(
    r"<!-- example:begin -->\n```python\n(.*?)```\n```\n(.*?)```\n<!-- example:end -->", re.S
)
EXAMPLES = [
    pytest.param(*example, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, example in enumerate(EXAMPLE.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_an_example_prints_what_the_page_says(code: str, printed: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stderr == ""
    assert run.stdout == printed


def test_readme_has_an_estimator_and_an_op() -> None:
    assert len(EXAMPLE.findall(TEXT)) == 2
    assert len(EXAMPLES) == 8
    assert len(TEXT.splitlines()) <= 150


def test_tables_are_current() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme_tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_changed_results_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_tables

    page = RESULTS.read_text(encoding="utf-8")
    assert readme_tables.update_tables(page) == page
    monkeypatch.setattr(readme_tables, "results", list)
    assert readme_tables.update_tables(page) != page


def test_commands_are_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = re.findall(r"`make ([a-z -]+)`|^make ([a-z -]+)", text, re.M)
    named = {target for pair in commands for command in pair for target in command.split()}
    assert {"demo", "check", "test", "bench", "readme-bench"} <= named
    assert not named - targets


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_linked_files_and_headings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {slug(heading) for heading in headings}, link


ROOMS = ("clam_kernels", "python_fallback", "csrc", "tests", "tools", "bench", "docs", "examples")


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_named_files_exist(name: str) -> None:
    """A path begins at the root or inside a room; `<family>` is `am`."""
    files = [*ROOT.iterdir(), *(path for room in ROOMS for path in (ROOT / room).rglob("*"))]
    paths = [f"/{path.relative_to(ROOT)}" for path in files]
    text = (ROOT / name).read_text(encoding="utf-8").replace("<family>", "am")
    named = set(re.findall(r"`([\w./]+\.(?:py|md|txt|json|toml|cff|cu|cpp|h)|[\w./]+/)`", text))
    assert len(named) > 5
    ends = {word: f"/{word.rstrip('/')}" for word in named}
    assert not {w for w, end in ends.items() if not any(path.endswith(end) for path in paths)}


def test_every_page_is_linked() -> None:
    """Each page can be reached from the README."""
    reached, left = {README}, [README]
    while left:
        page = left.pop()
        for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if target not in reached:
                reached.add(target)
                left.append(target)
    assert not {*PAGES} - reached


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
