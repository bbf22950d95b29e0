# SPDX-License-Identifier: Apache-2.0
"""What a reader needs: functions that fit on a screen, files of one subject, one class a name."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("clam_kernels", "python_fallback", "bench", "tools", "examples")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _is_kernel(function: Function) -> bool:
    return any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list
    )


def _has_too_many_lines(function: Function) -> bool:
    """Whether a function is too long without its docstring. The signature of a kernel does not
    count: it has an argument for each pointer, size and stride.
    """
    assert function.end_lineno is not None
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    first = statements[0].lineno if statements else function.end_lineno
    lines = function.end_lineno - first + 1
    if not _is_kernel(function):
        lines += function.body[0].lineno - function.lineno
    return lines > MOST_LINES_OF_A_FUNCTION


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES_OF_A_FILE
    nodes = ast.walk(ast.parse(text))
    functions = (node for node in nodes if isinstance(node, Function))
    assert not [function.name for function in functions if _has_too_many_lines(function)]


def test_a_class_name_occurs_once() -> None:
    names = Counter(
        node.name
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]
