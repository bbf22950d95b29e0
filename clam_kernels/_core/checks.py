# SPDX-License-Identifier: Apache-2.0
"""The wording of all argument errors, and the checks that families share.

`<arg>: expected <what> [to match <other> <its value>], got <value>`. All checks use torch's check
functions, so that errors have the same text with eager, fake, dynamic and unbacked shapes. Only
`values` reads the values of a tensor, on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from . import transforms

# A tuple: isinstance with a union would build the union at every call.
_INTS = (int, torch.SymInt)
_NUMBERS = (*_INTS, float, torch.SymFloat)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_NAMES = "float16, bfloat16, float32 or float64"
DEVICES = ("cpu", "cuda", "meta")
Sizes = Sequence[Any]


def wording(name: str, expected: str, got: object, match: str = "") -> str:
    """The text of an argument error."""
    return f"{name}: expected {expected}{f' to match {match}' if match else ''}, got {got}"


def spell(*sizes: object) -> str:
    """A shape as text, also with symbolic sizes."""
    # dynamo traces an f-string of a symbolic size, but not str() of it
    return f"[{', '.join([f'{size}' for size in sizes])}]"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def type_error(ok: bool, text: Callable[[], str]) -> None:
    """Raise a TypeError with `text()` unless ok, which is never symbolic; dynamo traces this."""
    if not ok:
        raise TypeError(text())


def value_error(ok: bool, text: Callable[[], str]) -> None:
    """Raise a ValueError with `text()` unless ok, which may be symbolic. Only `text` may format a
    size: formatting fixes a symbolic size, and torch.compile would compile again for each size.
    """
    if ok is True:  # torch's function takes microseconds also where ok is True
        return
    if not torch.compiler.is_dynamo_compiling():
        torch._check_value(ok, text)
        return
    # dynamo cannot give torch's function a text with sizes: check a size that has a hint here, and
    # a size without a hint when the graph runs
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if not guard_or_true(ok):
        raise ValueError(text())
    torch._check_value(ok)


def expect(ok: bool, name: str, expected: str, got: object) -> None:
    """Raise a ValueError in the wording of argument errors unless ok."""
    value_error(ok, lambda: wording(name, expected, got))


def boolean(name: str, value: object) -> None:
    """The argument is a bool."""
    type_error(isinstance(value, bool), lambda: wording(name, "a bool", type(value).__name__))


def float_dtype(name: str, value: object) -> None:
    """The argument is one of the four float dtypes."""
    type_error(value in FLOATS, lambda: wording(name, FLOAT_NAMES, _dtype(value)))


def has_values(name: str, value: Tensor) -> None:
    """The argument has values to read; a tensor on meta has none."""
    value_error(not value.is_meta, lambda: wording(name, "values", "device meta"))


def tensor(name: str, value: object, optional: bool = False) -> None:
    """The argument is a Tensor (or None)."""
    if not (isinstance(value, Tensor) or (optional and value is None)):
        what = "a Tensor or None" if optional else "a Tensor"
        raise TypeError(wording(name, what, type(value).__name__))


def floating(name: str, value: Tensor) -> None:
    """The argument has one of the four float dtypes."""
    type_error(
        value.dtype in FLOATS, lambda: wording(name, f"dtype {FLOAT_NAMES}", _dtype(value.dtype))
    )


def same_dtype(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """The argument has the dtype of another."""
    type_error(
        value.dtype == reference.dtype,
        lambda: wording(name, f"dtype {_dtype(reference.dtype)}", _dtype(value.dtype), other),
    )


def device(name: str, value: Tensor) -> None:
    """The argument is on a device that runs the ops."""
    value_error(
        value.device.type in DEVICES, lambda: wording(name, "device cpu or cuda", value.device)
    )


def same_device(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """The argument is on the device of another."""
    value_error(
        value.device == reference.device,
        lambda: wording(name, f"device {reference.device}", value.device, other),
    )


def shape(name: str, value: Tensor, pattern: str | Sizes, ok: bool, match: str = "") -> None:
    """`ok` says whether the shape fits `pattern`; a pattern with sizes is a list."""

    def message() -> str:
        spelled = pattern if isinstance(pattern, str) else spell(*pattern)
        return wording(name, f"shape {spelled}", spell(*value.shape), match)

    value_error(ok, message)


def non_empty(name: str, value: Tensor, dim: int, letter: str) -> None:
    """The argument has at least one entry along a dim."""
    value_error(value.shape[dim] != 0, lambda: wording(name, f"{letter} >= 1", spell(*value.shape)))


def fits(sizes: Sizes, target: Sizes) -> bool:
    """Whether `sizes` broadcast to `target` without changing it."""
    missing = len(target) - len(sizes)
    pairs = zip(sizes, target[missing:], strict=False)
    return missing >= 0 and all(a == b or a == 1 for a, b in pairs)


def core_fits(name: str, value: Tensor, core: Sizes, letters: str, match: str) -> None:
    """The last dims broadcast to `core`; a tensor with fewer dims broadcasts as usual."""
    ok = fits(value.shape[-len(core) :], core)
    spelled = ", ".join(str(size) for size in core)
    text = f"shape broadcastable to [..., {spelled}] ({letters})"
    value_error(ok, lambda: wording(name, text, spell(*value.shape), match))


def broadcast(operands: Sequence[tuple[str, Any, int]]) -> list[Any]:
    """The broadcast of the leading dims of operands `(name, tensor, core dims)`. An error names the
    first operand that does not fit those before it. None and numbers have no dims.
    """
    batch: list[Any] = []
    first, shape_of_first = operands[0][0], operands[0][1].shape
    for name, value, core in operands:
        if not isinstance(value, Tensor):
            continue
        lead = list(value.shape[: max(value.ndim - core, 0)])
        wide = [1] * (len(lead) - len(batch)) + batch
        merged = list(wide)
        for i in range(1, len(lead) + 1):
            a, b = lead[-i], wide[-i]
            if a == b or a == 1:
                continue
            value_error(
                b == 1,
                lambda name=name, value=value: wording(  # type: ignore[misc]
                    name,
                    "leading dims that broadcast",
                    spell(*value.shape),
                    f"{first} {spell(*shape_of_first)}",
                ),
            )
            merged[-i] = a
        batch = merged
    return batch


def number(name: str, value: Any, low: float, *, finite: bool, strict: bool = False) -> Any:
    """A Python number >= low (> low if strict); NaN raises, and with `finite` inf too."""
    value = real(name, value)
    bound = f"a {'finite ' if finite else ''}number {'>' if strict else '>='} {low:g}"
    if isinstance(value, torch.SymFloat | torch.SymInt):
        value_error(value > low if strict else value >= low, lambda: wording(name, bound, value))
        return value
    ok = (value > low if strict else value >= low) and not (finite and value == math.inf)
    value_error(ok, lambda: wording(name, bound, value))
    return value


def is_whole(value: object) -> bool:
    """Whether the value is an int of any library (numpy's), and no bool."""
    return isinstance(value, (*_INTS, Integral)) and not isinstance(value, bool)


def whole(name: str, value: Any, low: int) -> Any:
    """A Python int, from an int of any library (numpy's); TypeError for other types and bool. The
    op checks the value by `at_least`, because dynamo cannot trace that for a symbolic int.
    """
    type_error(is_whole(value), lambda: wording(name, f"an int >= {low}", repr(value)))
    return value if isinstance(value, _INTS) else int(value)


def real(name: str, value: Any, expected: str = "a number") -> Any:
    """A Python number, from a number of any library (numpy's); TypeError for other types, bool and
    Tensor.
    """
    ok = isinstance(value, (*_NUMBERS, Real)) and not isinstance(value, bool)
    type_error(ok, lambda: wording(name, expected, type(value).__name__))
    return value if type(value) in _NUMBERS else float(value)


def at_least(name: str, value: Any, low: int) -> None:
    """An int >= low."""
    value_error(value >= low, lambda: wording(name, f"an int >= {low}", value))


def readable(value: Tensor) -> bool:
    """Whether a check may read the values of a tensor: on a CPU, but not while torch.compile traces
    or torch.func.vmap maps, where a tensor has no values.
    """
    return not torch.compiler.is_compiling() and value.is_cpu and not transforms.maps(value)


def values(name: str, value: Tensor, low: float, *, finite: bool, strict: bool = False) -> None:
    """Every entry >= low (> low if strict), if values are readable."""
    if not readable(value) or value.numel() == 0:
        return
    if value.numel() == 1:  # .item() is faster than the reductions below
        one = value.item()
        if (one > low if strict else one >= low) and not (finite and math.isinf(one)):
            return
    good = value > low if strict else value >= low
    if finite:
        good &= value.isfinite()
    if not bool(good.all()):
        worst = value.detach().reshape(-1)[int((~good).reshape(-1).int().argmax())].item()
        bound = f"{'finite ' if finite else ''}values {'>' if strict else '>='} {low:g}"
        raise ValueError(wording(name, bound, worst))


def text(name: str, value: object) -> None:
    """TypeError unless the argument is a str or None."""
    ok = value is None or isinstance(value, str)
    type_error(ok, lambda: wording(name, "a str or None", type(value).__name__))


def one_of(name: str, value: str | None, allowed: Sequence[str]) -> None:
    """One of a list of strings, or None."""
    if value is not None and value not in allowed:
        listed = ", ".join(f"'{word}'" for word in allowed)
        raise ValueError(wording(name, f"{listed} or None", repr(value)))
