# SPDX-License-Identifier: Apache-2.0
"""Each op is declared, documented, sampled and timed; the schemas are the documented ones."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clam_kernels
import python_fallback
from clam_kernels import testing

ROOT = Path(__file__).parents[2]
SECTIONS = (
    "Parameters", "Returns", "Yields", "Raises", "Warns", "Notes", "References", "Examples",
    "Attributes", "See Also",
)  # fmt: skip


def public_functions() -> list[Any]:
    """The ops' functions, and the other functions that the package exports."""
    functions = [spec.function for spec in clam_kernels.all_ops()]
    exported = [vars(clam_kernels).get(name) for name in clam_kernels.__all__]
    functions += [f for f in exported if inspect.isfunction(f) and f not in functions]
    return functions


def sections(text: str) -> dict[str, list[str]]:
    """Numpydoc: heading, line of dashes, body up to the next heading; "" is the summary."""
    lines = inspect.cleandoc(text).splitlines()
    parts: dict[str, list[str]] = {"": []}
    now = ""
    for i, line in enumerate(lines):
        below = lines[i + 1] if i + 1 < len(lines) else ""
        if line in SECTIONS and re.fullmatch("-{3,}", below):
            now = line
            assert len(below) == len(line), f"{line}: underline of another length"
            assert now not in parts, f"{now} twice"
            parts[now] = []
        elif not (re.fullmatch("-{3,}", line) and lines[i - 1] in SECTIONS):
            parts[now].append(line)
    return parts


def entries(body: list[str]) -> dict[str, str]:
    """`name : type` lines of a section (or bare names), with their descriptions."""
    texts: dict[str, str] = {}
    name = ""
    for line in body:
        if line and not line.startswith(" "):
            name = line.partition(" : ")[0].strip()
            texts[name] = ""
        else:
            texts[name] = f"{texts.get(name, '')} {line.strip()}".strip()
    return texts


BRIEF = {"list_ops", "list_estimators", "all_ops"}  # without parameters the summary is enough


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__name__)
def test_docstring_follows_the_signature(function):
    text = inspect.getdoc(function)
    assert text, "no docstring"
    parts = sections(text)
    summary = parts[""][0]
    assert summary.endswith((".", ",")), summary
    assert 10 < len(summary) <= 100
    parameters = list(inspect.signature(function).parameters)
    if function.__name__ in BRIEF:
        assert not parameters
        return
    assert list(entries(parts["Parameters"])) == parameters
    # numpydoc: every entry has a type after " : ", star-arguments excepted, and a description
    for name, entry in entries(parts["Parameters"]).items():
        line = next(x for x in parts["Parameters"] if x.partition(" : ")[0].strip() == name)
        assert " : " in line or name == "arguments", line
        assert entry, f"{name} has no description"
    generator = inspect.isgeneratorfunction(inspect.unwrap(function))
    assert generator or "Returns" in parts
    assert "Raises" in parts
    assert ">>>" in "\n".join(parts["Examples"])
    order = [s for s in SECTIONS if s in parts]
    assert [s for s in parts if s] == order, f"sections in the order {order}"


def test_signature_follows_the_schema(spec):
    """The function has the schema's arguments in the schema's order with the schema's defaults."""
    names = testing.argument_names(spec.name)
    parameters = inspect.signature(spec.function).parameters
    assert tuple(parameters) == names
    op = getattr(spec.packet, [*spec.overloads][-1] or "default")
    for argument in op._schema.arguments:
        default = parameters[argument.name].default
        if argument.has_default_value():
            assert default == argument.default_value, argument.name
        else:
            assert default is inspect.Parameter.empty, argument.name


def test_reference_and_truth_follow_the_schema(spec):
    names = testing.argument_names(spec.name)
    family = getattr(python_fallback, spec.family)
    assert spec.truth is getattr(family, spec.name)
    assert spec.reference is getattr(family, f"{spec.name}_forward")
    for function in (spec.truth, spec.reference, spec.check, spec.fake):
        parameters = list(inspect.signature(function).parameters.values())
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            parameters = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
            assert [p.name for p in parameters] == list(names[: len(parameters)]), function
        else:
            assert [p.name for p in parameters] == list(names), function
    if spec.gradient is not None:
        assert spec.gradient.reference is getattr(family, f"{spec.name}_backward")
        assert next(iter(inspect.signature(spec.gradient.reference).parameters)).startswith("grad")


def test_truth_is_short(spec):
    """The equation has at most 20 lines, so that one can read it beside the documents."""
    source = inspect.getsource(spec.truth)
    body = source[source.index('"""', source.index('"""') + 3) + 3 :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


def test_samples(spec):
    rows = testing.samples(spec.name)
    assert len(rows) >= 15
    assert len({r.name for r in rows}) == len(rows)
    names = testing.argument_names(spec.name)
    for row in rows:
        assert row.op == spec.name
        assert len(row.args) == len(names) - spec.precise  # precision left out
        arguments = dict(zip(names, row.args, strict=False))
        assert all(isinstance(arguments[n], Tensor) for n in row.differentiable + row.kinks)
        assert all(arguments[n].is_floating_point() for n in row.differentiable + row.kinks)
        assert torch.float32 in row.dtypes
    # the same call twice: equal, and no shared tensors
    for a, b in zip(rows, testing.samples(spec.name), strict=True):
        for x, y in zip(a.args, b.args, strict=True):
            assert type(x) is type(y)
            if isinstance(x, Tensor):
                assert x is not y
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    other = testing.samples(spec.name, seed=1)
    assert not torch.equal(other[0].args[0], rows[0].args[0])
    assert [r.name for r in other] == [r.name for r in rows]


def test_workloads(spec):
    """README, CHANGELOG and the results quote the names: each name gives its own sizes."""
    rows = testing.workloads(spec.name)
    assert rows
    for row in rows:
        assert row.op == spec.name
        form = rf"{spec.name}/(\d+)([km])-(\d+)-(\d+)(?:-T(\d+))?-fp32"
        match = re.fullmatch(form, row.name)
        assert match, row.name
        count, unit, d, k, steps = match.groups()
        n, d, k = int(count) * {"k": 1000, "m": 10**6}[unit], int(d), int(k)
        args = row.make(0)
        assert args[0].shape[-1] == d
        assert args[0].shape[:-1].numel() == n
        assert args[0].dtype == torch.float32
        prototypes = [a for a in args[1:] if isinstance(a, Tensor) and a.shape == (k, d)]
        assert prototypes or k in [d, *(a for a in args[1:] if isinstance(a, int))]
        assert all(a.dtype == torch.float32 for a in prototypes)
        assert not steps or int(steps) in [a for a in args[1:] if isinstance(a, int)]
        assert torch.equal(args[0], row.make(0)[0])
        assert not torch.equal(args[0], row.make(1)[0])
        assert row.bytes >= 4 * (n * d + k * d + n)
        assert row.flops >= n * d


def test_workload_names_are_unique():
    rows = testing.workloads()
    assert len({r.name for r in rows}) == len(rows)


def test_family_page(spec):
    page = (ROOT / "docs" / "ops" / f"{spec.family}.md").read_text(encoding="utf-8")
    assert f"`{spec.name}" in page
    cited = re.findall(r"eqs?\.\s*([\d, -]+)", inspect.getdoc(spec.function) or "")
    numbers = {int(n) for text in cited for n in re.findall(r"\d+", text)}
    assert cited, "the docstring cites no equation"
    for number in numbers:
        assert f"({number})" in page, f"equation ({number}) is not on the page"


def test_schemas_are_the_documented_ones():
    """A schema is API: arguments are appended with defaults, never changed. After such a change
    write `clam_kernels.testing.schemas()` to docs/schemas.txt and add a line to the CHANGELOG.
    """
    assert (ROOT / "docs" / "schemas.txt").read_text(encoding="utf-8") == testing.schemas()


def test_schema_conventions(spec):
    for overload in spec.overloads:
        arguments = getattr(spec.packet, overload or "default")._schema.arguments
        assert (arguments[-1].name == "precision") == spec.precise
        assert not spec.precise or str(arguments[-1].type) == "Optional[str]"
        assert "precision" not in [a.name for a in arguments[:-1]]
        assert not any(a.kwarg_only for a in arguments)
        required = [not a.has_default_value() for a in arguments]
        assert required == sorted(required, reverse=True)
    first = next(iter(spec.overloads))
    assert len(spec.overloads) == 1 or first.endswith("_tensor")  # Tensor first: see spec.py


DOCUMENTED = [inspect.getmodule(f) for f in public_functions() if f.__name__ not in BRIEF]


@pytest.mark.parametrize(
    "module",
    sorted({m for m in DOCUMENTED if m}, key=lambda m: m.__name__),
    ids=lambda m: m.__name__,
)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert not result.failed
    assert result.attempted


def test_page_examples_run():
    """Python blocks of docs/ops run, each page from top to bottom."""
    pages = sorted((ROOT / "docs" / "ops").glob("*.md"))
    assert pages
    for page in pages:
        result = doctest.testfile(str(page), module_relative=False)
        assert not result.failed, page.name
        assert result.attempted, page.name


def test_parser_can_fail():
    """The parser reports a missing parameter, an empty description, and a wrong underline."""
    text = (
        "Do.\n\nParameters\n----------\nx : int\n    A number.\ny : int\n\nReturns\n-------\nint\n"
    )
    parts = sections(text)
    assert list(entries(parts["Parameters"])) == ["x", "y"]
    assert entries(parts["Parameters"])["y"] == ""
    with pytest.raises(AssertionError, match="another length"):
        sections("Do.\n\nReturns\n----\nint")
