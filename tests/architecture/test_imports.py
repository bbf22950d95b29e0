# SPDX-License-Identifier: Apache-2.0
"""Which file may import which, by reading the files; and one word for a family in every room."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clam_kernels

ROOT = Path(__file__).parents[2]
PACKAGES = ("clam_kernels", "python_fallback")

# room -> what it may import beside itself, torch and the standard library.
# A name without a dot and not in ROOMS is a distribution.
_OPS = {"clam_kernels.ops"}
_LEAVES = {"clam_kernels.serialize", "clam_kernels.exceptions", "clam_kernels.metrics"}
ALLOWED: dict[str, set[str]] = {
    "python_fallback": set(),
    "clam_kernels._core": set(),
    "clam_kernels.kernels": {"clam_kernels._core", "triton"},
    "clam_kernels.ops": {"clam_kernels._core", "python_fallback"},
    "clam_kernels.augment": {"clam_kernels._core"},
    "clam_kernels.distributed": _OPS,
    "clam_kernels.nn": {*_OPS, "clam_kernels.distributed"},
    "clam_kernels.metrics": {*_OPS, "numpy"},
    "clam_kernels.serialize": {*_OPS, "numpy", "safetensors", "pyarrow"},
    "clam_kernels.exceptions": {*_OPS, "numpy"},
    "clam_kernels.plots": {"numpy", "matplotlib"},
    "clam_kernels.estimators": {
        *_OPS, *_LEAVES, "clam_kernels.nn", "clam_kernels.distributed", "numpy", "sklearn", "tqdm",
    },
    "clam_kernels.testing": _OPS,
    "clam_kernels.info": {*_OPS, "clam_kernels._core"},
    "clam_kernels.transport": {
        *_OPS, "clam_kernels._core", "clam_kernels.distributed", "sklearn",
    },
    # the package itself registers the ops and re-exports; estimators only for type checkers
    "clam_kernels": {*_OPS, "clam_kernels._core", "clam_kernels.transport"},
}  # fmt: skip
# Further edges that point downwards, each with its reason.
ADDED: dict[str, dict[str, str]] = {
    "clam_kernels.testing": {"clam_kernels._core": "all_ops: samples follow the declarations"},
    "clam_kernels.serialize": {"clam_kernels.exceptions": "a bad file has an error of its own"},
    "clam_kernels.nn": {
        "clam_kernels._core": "the wording of errors",
        "clam_kernels.transport": "labels of equal shares come of its plans",
    },
    "clam_kernels.estimators": {
        "clam_kernels._core": "explain(), the names of the precisions, the wording of errors",
        "clam_kernels.tables": "data and labels from and to files",
        "PIL": "folders of images",
        "scipy": "sparse matrices as scikit-learn takes them, and the graph of nearest rows",
    },
    "clam_kernels.metrics": {
        "clam_kernels._core": "the checks of arguments",
        "scipy": "the best matching of clusters and classes",
    },
    "clam_kernels.plots": {
        "clam_kernels._core": "the checks of arguments",
        "clam_kernels.exceptions": "the wording where a package is missing",
    },
    "clam_kernels.info": {"clam_kernels.testing": "what an op reads and computes"},
    "clam_kernels.tables": {
        "numpy": "rows of a file as an array",
        "pyarrow": "CSV and Parquet files",
        "clam_kernels._core": "warnings that name the line of the caller",
        "clam_kernels.exceptions": "a bad file has an error of its own",
        "clam_kernels.serialize": "files appear whole or not at all",
    },
}
for _room, _edges in ADDED.items():
    ALLOWED[_room] = {*ALLOWED.get(_room, set()), *_edges}
# the command line may import everything above it
ALLOWED["clam_kernels.cli"] = {*ALLOWED, "numpy", "pyarrow"}
# python -m clam_kernels is the command
ALLOWED["clam_kernels.__main__"] = {"clam_kernels.cli"}
ROOMS = sorted(ALLOWED, key=len, reverse=True)
BY_NAME = ("importlib.import_module", "__import__")
# a module of constants that any room may import
FREE = {"clam_kernels._version"}


def room_of(module: str) -> str:
    """The longest room that holds a module, or the module's distribution."""
    for room in ROOMS:
        if module == room or module.startswith(f"{room}."):
            return room
    return module.partition(".")[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _for_type_checkers(tree: ast.AST) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, at any depth; `from . import x` names x."""
    tree = ast.parse(text)
    skipped = _for_type_checkers(tree)
    package = module_of(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base in PACKAGES:  # names of the package may be its rooms
                yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def faults(path: Path, text: str) -> list[str]:
    """A message for each import that the table does not list."""
    room = room_of(module_of(path))
    if room not in ALLOWED:
        return [f"{path.relative_to(ROOT)}: not a room of the house"]
    allowed = ALLOWED[room]
    messages = []
    for line, target in imports(path, text):
        there = room_of(target)
        if there in (room, "torch") or there in allowed or target in FREE:
            continue
        if there.partition(".")[0] in sys.stdlib_module_names:
            continue
        short = room.removeprefix("clam_kernels.")
        listed = ", ".join(sorted({"torch", *(a.removeprefix("clam_kernels.") for a in allowed)}))
        messages.append(
            f"{path.relative_to(ROOT)}:{line}: {short} may not import {target} (allowed: {listed})"
        )
    return messages


FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports(path):
    messages = faults(path, path.read_text(encoding="utf-8"))
    assert not messages, "\n".join(messages)


@pytest.mark.parametrize(
    ("where", "text", "line"),
    [
        ("clam_kernels/_core/checks.py", "import numpy", 1),
        ("clam_kernels/_core/checks.py", "def f():\n    from ..ops import am", 2),
        ("clam_kernels/_core/checks.py", "from .. import ops", 1),
        ("clam_kernels/ops/am.py", "from ..kernels.am import am_step", 1),
        ("clam_kernels/ops/am.py", "from clam_kernels.estimators import ClAM", 1),
        ("clam_kernels/ops/am.py", "import triton.language as tl", 1),
        ("python_fallback/am/__init__.py", "import clam_kernels", 1),
        ("python_fallback/am/__init__.py", "import numpy as np", 1),
        ("clam_kernels/__init__.py", "from .estimators import ClAM", 1),
        ("clam_kernels/__init__.py", "import importlib\nimportlib.import_module('triton')", 2),
        ("clam_kernels/estimators/clam/estimator.py", "from ...testing import samples", 1),
        ("clam_kernels/estimators/clam/estimator.py", "from ...cli import main", 1),
        ("clam_kernels/estimators/clam/estimator.py", "import matplotlib", 1),
        ("clam_kernels/testing/am.py", "import pytest", 1),
    ],
)
def test_a_forbidden_import_is_reported(where, text, line):
    (message,) = faults(ROOT / where, text)
    assert message.startswith(f"{where}:{line}: ")
    assert "may not import" in message


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("clam_kernels/_core/checks.py", "import math\nimport torch.nn\nfrom . import backend"),
        ("clam_kernels/ops/am.py", "import python_fallback\nfrom .._core import checks"),
        ("clam_kernels/serialize.py", "from ._version import __version__\nimport numpy.lib"),
        ("clam_kernels/__init__.py", "if TYPE_CHECKING:\n    from .estimators import ClAM"),
        ("clam_kernels/cli/fit.py", "from ..estimators import ClAM\nfrom .. import serialize"),
    ],
)
def test_an_allowed_import_is_not_reported(where, text):
    assert not faults(ROOT / where, text)


def test_the_table_has_no_cycle():
    """A lower line never imports a higher one: the rooms can be put in an order."""
    below = {
        room: {x for x in allowed if x in ALLOWED and x != room}
        for room, allowed in ALLOWED.items()
    }
    while below:
        free = [room for room, needs in below.items() if not needs & below.keys()]
        assert free, f"a cycle among {sorted(below)}"
        for room in free:
            del below[room]


def _edges() -> dict[str, set[str]]:
    """Which file of the packages imports which, at run time or for a type checker."""
    modules = {module_of(path): path for path in FILES}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        edges[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            named = {f"{base}.{alias.name}" for alias in node.names}
            edges[name] |= {target for target in named if target in modules} or {base} & {*modules}
    return edges


def test_no_two_files_import_each_other():
    """The files of a package can be put in an order; its __init__ collects them and is last."""
    edges = _edges()
    remaining = {name for name in edges if not (ROOT / name.replace(".", "/")).is_dir()}
    while remaining:
        free = {name for name in remaining if not edges[name] & remaining - {name}}
        assert free, f"a circle among {sorted(remaining)}"
        remaining -= free


# ---- one word per family in every room ----------------------------------------------------------


FAMILIES = sorted({spec.family for spec in clam_kernels.all_ops()})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_one_word_in_every_room(family):
    specs = [spec for spec in clam_kernels.all_ops() if spec.family == family]
    files = [
        f"python_fallback/{family}/__init__.py",
        f"clam_kernels/ops/{family}.py",
        f"clam_kernels/testing/{family}.py",
        f"tests/test_{family}.py",
        f"docs/ops/{family}.md",
    ]
    kernels = {where for spec in specs for where in _kernels(spec)}
    if any("::" not in where for where in kernels):
        files.append(f"clam_kernels/kernels/{family}/__init__.py")
    if any("::" in where for where in kernels):
        files.append(f"csrc/{family}.cu")
    missing = [file for file in files if not (ROOT / file).is_file()]
    assert not missing


def _kernels(spec: clam_kernels._core.spec.OpSpec) -> Iterator[str]:
    tables = [spec.kernels]
    if spec.gradient is not None:
        tables += [spec.gradient.kernels, spec.gradient.saved_kernels]
    for table in tables:
        yield from table.values()


@pytest.mark.parametrize(
    ("room", "pattern"),
    [
        ("clam_kernels/ops", "*.py"),
        ("clam_kernels/testing", "*.py"),
        ("csrc", "*.cu"),
        ("docs/ops", "*.md"),
    ],
)
def test_a_room_holds_families_and_shared_files_only(room, pattern):
    """Beside the families there are only files that begin with an underscore; a family's gradients
    may be a file of their own.
    """
    names = {p.stem for p in (ROOT / room).glob(pattern) if not p.stem.startswith("_")}
    allowed = {family + part for family in FAMILIES for part in ("", "_backward")}
    assert names <= allowed, sorted(names - allowed)


ESTIMATORS = {"clam", "dec", "kmeans", "sela"}


@pytest.mark.parametrize(
    ("room", "packages"),
    [
        ("python_fallback", {*FAMILIES, "common"}),
        (
            "clam_kernels/kernels",
            {*(s.family for s in clam_kernels.all_ops() if s.kernels), "common"},
        ),
        ("clam_kernels/estimators", {*ESTIMATORS, "common", "training"}),
    ],
)
def test_a_room_of_packages(room, packages):
    """One package for each family or estimator, and for what they share. Inside a package no file
    begins with an underscore: the __init__ says what is public.
    """
    names = {p.name for p in (ROOT / room).iterdir() if (p / "__init__.py").is_file()}
    assert names == packages
    assert [p.name for p in (ROOT / room).glob("*.py")] == ["__init__.py"]
    assert not [p for p in (ROOT / room).rglob("_*.py") if p.name != "__init__.py"]


def test_kernels_are_in_the_files_that_their_names_say():
    """`package.module:function` is the family's file and the op's word, as is `clam_cuda::op`."""
    for spec in clam_kernels.all_ops():
        for where in _kernels(spec):
            if "::" in where:
                assert where.startswith("clam_cuda::")
                assert where.partition("::")[2].lstrip("_").startswith(spec.name)
            else:
                module, _, function = where.partition(":")
                assert module.startswith(f"clam_kernels.kernels.{spec.family}.")
                assert function.lstrip("_").startswith(spec.name)
