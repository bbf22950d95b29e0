# SPDX-License-Identifier: Apache-2.0
"""What a family brings to the stages in its file rows_<family>.py, and how its calls are run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clam_kernels

from .clock import Contestant
from .setting import Setting

GPU_BACKENDS = ("triton", "cuda")
# Rows of a large call of a coupled op, which are the same again after so many.
PERIOD = 256


@dataclass(frozen=True)
class Invocation:
    """One call of an op: positions of the arguments with rows in dim -2, of those to differentiate,
    and of those with rows in dim -1.
    """

    op: str
    args: tuple[Any, ...]
    rows: tuple[int, ...]
    wanted: tuple[int, ...] = ()
    lines: tuple[int, ...] = ()

    def part(self, rows: slice | Tensor) -> Invocation:
        """The same call on some of its rows."""
        args = list(self.args)
        for i in self.rows:
            args[i] = args[i][..., rows, :].contiguous()
        for i in self.lines:
            args[i] = args[i][..., rows].contiguous()
        return Invocation(self.op, tuple(args), self.rows, self.wanted, self.lines)

    @property
    def n(self) -> int:
        return int(self.args[self.rows[0]].shape[-2])

    def forward(self) -> tuple[Tensor, ...]:
        out = getattr(torch.ops.clam, self.op)(*self.args)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, upstream: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """Outputs, then the gradients of the arguments wanted."""
        leaves = [self.args[i].detach().requires_grad_() for i in self.wanted]
        args = list(self.args)
        for i, leaf in zip(self.wanted, leaves, strict=True):
            args[i] = leaf
        out = Invocation(self.op, tuple(args), self.rows).forward()
        some = [o for o in out if o.requires_grad]
        grads = torch.autograd.grad(some, leaves, upstream or [torch.ones_like(o) for o in some])
        return (*(o.detach() for o in out), *grads)


@dataclass(frozen=True)
class Work:
    """The least a row must do: bytes, matrix products of a unit, exponentials, float32 lane
    operations beside them.
    """

    bytes: float
    flops: float = 0.0
    unit: str = "fp32"
    exps: float = 0.0
    lanes: float = 0.0


@dataclass(frozen=True)
class Target:
    """When a row passes. `ratios`: over the fastest peer whose name begins so; absent is fine."""

    ms: float
    ratios: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: float | None = None
    launches: int | None = None
    # "exact" and "accurate" are measured by eager float32, "like" by eager of the same mode,
    # "labels" are float64's, all of them
    error: str = "accurate"


@dataclass
class Bout:
    """A row, ready to run. `args` are the operands of ours, by which a backend may refuse it;
    `plain` is the eager call by whose error ours is judged; `scale` is the whole workload over what
    one call does; `errors` maps a result to figures, and may give several draws of a figure as
    `<name>_draws`; `facts` are measured once for each backend.
    """

    ours: Callable[[], Any]
    args: tuple[Any, ...]
    peers: dict[str, Contestant]
    errors: Callable[[Any], dict[str, Any]]
    plain: Contestant
    scale: float = 1.0
    facts: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table of targets."""

    id: str
    name: str
    op: str
    mode: str
    shape: dict[str, int]
    work: Work
    target: Target
    build: Callable[[Setting, Row], Bout]
    kind: str = "device"
    note: str = ""
    dtype: str = "float32"


@dataclass(frozen=True)
class Family:
    """Everything about a family that the stages do not know themselves.

    `make(op, shape, device, seed)` draws a call. Shapes: `tiny` for the sanitizer, `large` for
    determinism and memory, `wide` with over 2^31 entries, the later ones for backends that refuse
    the first; `small` in place of both on a CPU.
    Of `coupled` ops a row's results depend on the other rows; large calls of them repeat PERIOD
    rows. `allowance(call, backward)` is the most bytes a call may hold beside its arguments.
    """

    name: str
    rows: tuple[Row, ...]
    make: Callable[[str, tuple[int, ...], str, int], Invocation]
    tiny: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    large: tuple[tuple[int, ...], ...]
    wide: tuple[tuple[int, ...], ...]
    allowance: Callable[[Invocation, bool], int]
    captured: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    coupled: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()  # ops among whose results are sums over the rows


@functools.cache
def families() -> tuple[Family, ...]:
    """Of every rows_<family>.py beside this file."""
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [
        importlib.import_module(f".{n}", __package__) for n in names if n.startswith("rows_")
    ]
    return tuple(module.FAMILY for module in modules)


def with_kernels() -> list[str]:
    """Ops that have something of their own to run on a GPU."""
    return [spec.name for spec in clam_kernels.all_ops() if spec.kernels]


def family_of(op: str) -> Family:
    """The family of an op; an op that no file here knows is an error, not a gap."""
    spec = next(s for s in clam_kernels.all_ops() if s.name == op)
    for family in families():
        if family.name == spec.family:
            return family
    raise LookupError(f"bench/gpu/rows_{spec.family}.py is missing: {op} would go unchecked")


def backends(op: str, device: str) -> tuple[list[str], dict[str, str]]:
    """(those to check, reasons of the others); the reference where no GPU backend can run."""
    probe = torch.empty(1, device=device)
    refusals = {name: refusal(name, op, probe) for name in GPU_BACKENDS if device == "cuda"}
    able = [name for name, reason in refusals.items() if reason is None]
    return able or ["reference"], {n: reason for n, reason in refusals.items() if reason}


def refusal(name: str, op: str, *args: Any) -> str | None:
    """Why a backend cannot run an op on these arguments, None if it can. Nothing is run: what a
    kernel dies of is no refusal.
    """
    try:
        with clam_kernels.backend(name):
            clam_kernels.explain(op, *args)
    except RuntimeError as error:
        return str(error)
    return None


def fitted(
    op: str, shapes: tuple[tuple[int, ...], ...], setting: Setting
) -> Iterator[tuple[str, Invocation | str]]:
    """Each backend with a call of the first shape that it takes, or why it takes none."""
    family, waiting = family_of(op), dict.fromkeys(backends(op, setting.device)[0], "")
    for shape in (family.small,) if setting.dry_run else shapes:
        if not waiting:
            return
        call = family.make(op, shape, setting.device, setting.seed)
        why = {name: refusal(name, op, *call.args) for name in waiting}
        yield from ((name, call) for name, reason in why.items() if reason is None)
        waiting = {name: reason for name, reason in why.items() if reason is not None}
        del call
    yield from waiting.items()


def forced(name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The context in which a backend runs everything."""
    return lambda: clam_kernels.backend(name)


def differentiable(op: str) -> bool:
    return next(s for s in clam_kernels.all_ops() if s.name == op).gradient is not None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN with NaN, 0 not with -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    """Of a copy: a tensor of one entry counts as contiguous whatever its stride, and cannot be
    viewed as bytes.
    """
    return x.new_empty(x.shape).copy_(x).view(-1).view(torch.uint8)


def poison(nbytes: int, device: str) -> None:
    """Leave NaN where the next call will find its memory: what it does not write shows."""
    if device == "cuda":
        filled = torch.full((max(nbytes // 4, 1),), torch.nan, device=device)
        del filled
