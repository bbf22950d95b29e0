# SPDX-License-Identifier: Apache-2.0
"""The declaration of an op, and the list of all ops."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend

NAMESPACE = "clam"
SPECS: dict[str, OpSpec] = {}


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    `reference(*grads, *arguments without precision, *saved, needs, precision)` returns one
    gradient for each tensor argument, empty where `needs` is False. `saved` is None if backward
    needs only the arguments; else it is the `(reference, fake)` of `_<name>_forward`, which returns
    `(output, *saved)`. If `saved_for_needs` is True, both get `needs` as their last argument, so
    that forward can compute the gradients that backward scales. `output_dims` and `saved_dims` are
    the dims of outputs and saved tensors without their batch dims. Of several outputs the first
    `len(output_dims)` have a gradient.
    """

    reference: Callable[..., tuple[Tensor, ...]]
    kernels: Mapping[str, str] = field(default_factory=dict)
    saved: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    output_dims: int | tuple[int, ...] = 2
    saved_dims: int | tuple[int, ...] = 1
    saved_for_needs: bool = False
    saved_kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Number of dims, without batch dims, of each output that has a gradient."""
        return self.output_dims if isinstance(self.output_dims, tuple) else (self.output_dims,)

    @property
    def saved_tensors(self) -> tuple[int, ...]:
        """Number of dims, without batch dims, of each tensor that forward saves."""
        if self.saved is None:
            return ()
        return self.saved_dims if isinstance(self.saved_dims, tuple) else (self.saved_dims,)


@dataclass(frozen=True)
class OpSpec:
    """One op.

    `arguments` is the argument list of the schema; it ends with `str? precision=None` if the op has
    matrix products. Each entry of `overloads` replaces the `{name}` in it; overloads with Tensors
    come first, or the dispatcher turns a tensor into a number and drops its gradient. `limits` name
    functions "module:function" that return a reason or None: for a backend, why its kernels cannot
    run these arguments; for "auto-<backend>", why the automatic choice skips it.
    """

    name: str
    arguments: str
    returns: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    truth: Callable[..., Any]
    reference: Callable[..., Any]
    function: Callable[..., Any]
    overloads: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"": {}})
    check_values: Callable[..., None] | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    gradient: Gradient | None = None
    same_dtype: tuple[str, ...] = ()
    core: Mapping[str, int] | None = None  # dims of each tensor argument, without batch dims

    @property
    def family(self) -> str:
        """The family: the name of the op's files and folders in every room."""
        return self.function.__module__.rpartition(".")[2]

    @property
    def precise(self) -> bool:
        """Whether the op has matrix products, and so an argument `precision`."""
        return self.arguments.endswith("str? precision=None")

    @property
    def packet(self) -> Any:
        """`torch.ops.clam.<name>`."""
        return getattr(torch.ops.clam, self.name)

    @property
    def schemas(self) -> dict[str, str]:
        """Overload name -> schema."""
        return {
            overload: f"{qualified(self.name, overload)}({self.arguments.format(**words)})"
            f" -> {self.returns}"
            for overload, words in self.overloads.items()
        }


def qualified(name: str, overload: str) -> str:
    """The name of one overload."""
    return f"{name}.{overload}" if overload else name


def tensor_names(spec: OpSpec) -> list[str]:
    """Arguments that are tensors in some overload, in order. Backward returns a gradient for
    each.
    """
    text = spec.arguments.format(**next(iter(spec.overloads.values())))
    return re.findall(r"Tensor\?? (\w+)", text)


def all_ops() -> tuple[OpSpec, ...]:
    """Every public op, in the order of registration."""
    return tuple(SPECS.values())


class Choice(NamedTuple):
    """Which backend computes a call of an op, at which precision, and why."""

    op: str
    backend: str
    precision: str
    reason: str


def choice(op: object, *arguments: object) -> Choice:
    """Which backend computes an op with these arguments, at which precision, and why.

    Parameters
    ----------
    op : str, `torch.ops.clam.<name>` or the public function
        The op.
    arguments
        Its arguments; the first tensor decides the device. Without a tensor, the device is a CPU.

    Returns
    -------
    Choice
        A named tuple (op, backend, precision, reason) of strings. `explain` makes one line of it.

    Raises
    ------
    ValueError
        The op does not exist.
    RuntimeError
        The backend that the caller forces cannot compute it.

    Examples
    --------
    >>> import clam_kernels
    >>> clam_kernels.choice("am_step").backend
    'reference'
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    spec = SPECS.get(name.removeprefix(f"{NAMESPACE}::").partition(".")[0])
    if spec is None:
        raise ValueError(f"op: expected one of {', '.join(SPECS)}, got {name}")
    device = _device_of(arguments)
    place = device or "cpu"
    named = arguments[-1] if arguments and isinstance(arguments[-1], str) else None
    precision = backend.resolve_precision(named)
    values = arguments
    if arguments and spec.precise:
        values = (*arguments[: -1 if named else None], precision)
    chosen, reason = backend.choose(spec, place, values)
    if device is None and backend.requested() == "auto":
        reason = "no tensors: the choice for a CPU"
    return Choice(f"{NAMESPACE}::{spec.name}", chosen, precision, reason)


def _device_of(arguments: Sequence[object]) -> str | None:
    """The device type of the first tensor; None without a tensor."""
    return next((a.device.type for a in arguments if isinstance(a, Tensor)), None)


def explain(op: object, *arguments: object) -> str:
    """The `choice` for a call of an op as one line of text.

    Parameters
    ----------
    op : str, `torch.ops.clam.<name>` or the public function
        As for `choice`.
    arguments
        As for `choice`.

    Returns
    -------
    str
        The op, the backend, the precision and the reason.

    Raises
    ------
    ValueError, RuntimeError
        As for `choice`.

    Examples
    --------
    >>> import clam_kernels
    >>> clam_kernels.explain("am_step")
    'clam::am_step: reference at highest precision (no tensors: the choice for a CPU)'
    """
    name, chosen, precision, reason = choice(op, *arguments)
    if chosen == "reference" and precision != "highest" and _device_of(arguments) in ("cpu", None):
        precision = f"{precision} (float32 on a CPU)"
    return f"{name}: {chosen} at {precision} precision ({reason})"
