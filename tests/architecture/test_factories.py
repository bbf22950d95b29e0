# SPDX-License-Identifier: Apache-2.0
"""Every tensor that the package makes has a device and a dtype of its own: torch's defaults are
settings of the user and of the process.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    path.relative_to(ROOT)
    for package in ("clam_kernels", "python_fallback")
    for path in sorted((ROOT / package).rglob("*.py"))
    # tests on "meta" make their samples there
    if "testing" not in path.parts
]
# Functions of torch that make a tensor on the default device, and of the default dtype where
# their arguments have none.
BOTH = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones",
    "rand", "randn", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
DEVICE_ALONE = {"as_tensor", "asarray", "randint", "randperm", "tril_indices", "triu_indices"}
CASTS = {"double", "float", "to"}


def _is_of_torch(call: ast.AST, names: set[str]) -> bool:
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in names
    )


def _is_number(node: ast.AST) -> bool:
    """A literal, or the name of an infinity or a NaN."""
    node = node.operand if isinstance(node, ast.UnaryOp) else node
    named = isinstance(node, ast.Attribute) and node.attr in ("inf", "nan", "pi")
    return named or isinstance(node, ast.Constant)


def faults(source: str) -> Iterator[str]:
    """Line and call of each tensor whose device or dtype torch's settings would choose."""
    tree = ast.parse(source)
    cast = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in CASTS
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        required = {"device", "dtype"} if _is_of_torch(node, BOTH) else set()
        required |= {"device"} if _is_of_torch(node, DEVICE_ALONE) else set()
        spread = None in keywords  # the code that builds **options sets device and dtype
        if not spread and not required <= keywords:
            lacking = " and ".join(sorted(required - keywords))
            yield f"line {node.lineno}: {ast.unparse(node)} has no {lacking}"
        two = _is_of_torch(node, {"where"}) and all(map(_is_number, node.args[1:]))
        if two and id(node) not in cast:
            yield f"line {node.lineno}: {ast.unparse(node)} has the default dtype"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_tensors_have_a_device_and_a_dtype(path):
    assert list(faults((ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torch.zeros(3)", "torch.zeros(3) has no device and dtype"),
        ("torch.full((3,), -1, device=x.device)", "has no dtype"),
        ("torch.randperm(3, generator=g)", "torch.randperm(3, generator=g) has no device"),
        ("torch.where(x, 0.0, -torch.inf)", "torch.where(x, 0.0, -torch.inf) has the default"),
    ],
)
def test_a_call_without_device_or_dtype_is_reported(source, words):
    (line,) = faults(source)
    assert words in line


@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(3, **like)",
        "torch.full((3,), -1, device=x.device, dtype=x.dtype)",
        "torch.where(x, 0.0, -torch.inf).to(y.dtype)",
        "torch.where(x, y, 0.0)",
        "x.new_zeros(3)",
        "torch.from_numpy(a)",
    ],
)
def test_a_call_with_device_and_dtype_is_not_reported(source):
    assert list(faults(source)) == []
