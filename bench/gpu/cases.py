# SPDX-License-Identifier: Apache-2.0
"""What the file targets_<family>.py of a family declares, and how the stages run its calls."""

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
# A large call of a coupled op repeats the same so many rows.
PERIOD = 256


@dataclass(frozen=True)
class Invocation:
    """One call of an op. `rows` has the positions of the arguments with rows in dim -2, `lines` of
    the arguments with rows in dim -1, `wanted` of the arguments to differentiate.
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
        """Outputs, then the gradients of the arguments in `wanted`."""
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
    """The least work of a target: bytes, FLOPs of matrix products on one unit, exponentials, and
    float32 lane operations beside them.
    """

    bytes: float
    flops: float = 0.0
    unit: str = "fp32"
    exps: float = 0.0
    lanes: float = 0.0


@dataclass(frozen=True)
class Goal:
    """When a target passes. `ratios`: least speed over the fastest peer whose name begins so; an
    absent peer is no miss.
    """

    ms: float
    ratios: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: float | None = None
    launches: int | None = None
    # "exact" and "accurate" compare with eager float32, "like" with eager of the same mode;
    # "labels" must equal those of float64
    error: str = "accurate"


@dataclass
class TimedContest:
    """A target, ready to run. A backend accepts or refuses it by `args`, the operands of `ours`.
    `plain` is the eager call whose error bounds ours. `scale` is the whole workload over the work
    of one call. `errors` maps a result to figures; it may return several draws of a figure as
    `<name>_draws`. `facts` is called once for each backend.
    """

    ours: Callable[[], Any]
    args: tuple[Any, ...]
    peers: dict[str, Contestant]
    errors: Callable[[Any], dict[str, Any]]
    plain: Contestant
    scale: float = 1.0
    facts: Callable[[], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Target:
    """One line of the table of targets."""

    id: str
    name: str
    op: str
    mode: str
    shape: dict[str, int]
    work: Work
    goal: Goal
    build: Callable[[Setting, Target], TimedContest]
    kind: str = "device"
    note: str = ""
    dtype: str = "float32"


@dataclass(frozen=True)
class Family:
    """What the stages need to know of a family.

    `make(op, shape, device, seed)` draws a call. Shapes: `tiny` for the sanitizer, `large` for
    determinism and memory, `wide` with over 2^31 entries; a backend that refuses the first shape
    gets the next. On a CPU `small` replaces `large` and `wide`.
    A row's results of a `coupled` op depend on the other rows; large calls of such an op repeat
    PERIOD rows. `allowance(call, backward)` is the most bytes that a call may hold beside its
    arguments.
    """

    name: str
    targets: tuple[Target, ...]
    make: Callable[[str, tuple[int, ...], str, int], Invocation]
    tiny: tuple[tuple[int, ...], ...]
    small: tuple[int, ...]
    large: tuple[tuple[int, ...], ...]
    wide: tuple[tuple[int, ...], ...]
    allowance: Callable[[Invocation, bool], int]
    captured: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    coupled: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()  # ops that return sums over the rows


@functools.cache
def families() -> tuple[Family, ...]:
    """FAMILY of every targets_<family>.py beside this file."""
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [
        importlib.import_module(f".{n}", __package__) for n in names if n.startswith("targets_")
    ]
    return tuple(module.FAMILY for module in modules)


def with_kernels() -> list[str]:
    """Names of the ops that have a kernel."""
    return [spec.name for spec in clam_kernels.all_ops() if spec.kernels]


def family_of(op: str) -> Family:
    """The family of an op; LookupError if no file here has it."""
    spec = next(s for s in clam_kernels.all_ops() if s.name == op)
    for family in families():
        if family.name == spec.family:
            return family
    raise LookupError(f"bench/gpu/targets_{spec.family}.py is missing: nothing would check {op}")


def backends(op: str, device: str) -> tuple[list[str], dict[str, str]]:
    """(backends to check, reasons of the others); the reference if no GPU backend can run."""
    probe = torch.empty(1, device=device)
    refusals = {name: refusal(name, op, probe) for name in GPU_BACKENDS if device == "cuda"}
    able = [name for name, reason in refusals.items() if reason is None]
    return able or ["reference"], {n: reason for n, reason in refusals.items() if reason}


def refusal(name: str, op: str, *args: Any) -> str | None:
    """Why a backend cannot run an op on these arguments, None if it can. This runs no kernel: an
    error inside one is no refusal.
    """
    try:
        with clam_kernels.backend(name):
            clam_kernels.choice(op, *args)
    except RuntimeError as error:
        return str(error)
    return None


def calls_by_backend(
    op: str, shapes: tuple[tuple[int, ...], ...], setting: Setting
) -> Iterator[tuple[str, Invocation | str]]:
    """Each backend with a call of the first shape that it accepts, or the reason of its last
    refusal.
    """
    family, waiting = family_of(op), dict.fromkeys(backends(op, setting.device)[0], "")
    for shape in (family.small,) if setting.dry_run else shapes:
        if not waiting:
            return
        call = family.make(op, shape, setting.device, setting.seed)
        reasons = {name: refusal(name, op, *call.args) for name in waiting}
        yield from ((name, call) for name, reason in reasons.items() if reason is None)
        waiting = {name: reason for name, reason in reasons.items() if reason is not None}
        del call
    yield from waiting.items()


def forced_backend(name: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context that forces a backend."""
    return lambda: clam_kernels.backend(name)


def differentiable(op: str) -> bool:
    return next(s for s in clam_kernels.all_ops() if s.name == op).gradient is not None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN with NaN, 0 not with -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    """The bytes of a copy: torch calls a tensor of one entry contiguous whatever its stride, and
    does not view it as bytes.
    """
    return x.new_empty(x.shape).copy_(x).view(-1).view(torch.uint8)


def poison(nbytes: int, device: str) -> None:
    """Fill the memory that the next call gets with NaN: an entry that it does not write shows."""
    if device == "cuda":
        filled = torch.full((max(nbytes // 4, 1),), torch.nan, device=device)
        del filled
