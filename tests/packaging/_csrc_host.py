# SPDX-License-Identifier: Apache-2.0
"""The bodies of csrc/, compiled by g++ for the CPU, and the calls and checks of their tests."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clam_kernels import testing
from python_fallback import am

CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = Path(__file__).with_name("_csrc_host.cpp")
GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="g++ is missing")


@functools.cache
def compiled_library() -> ctypes.CDLL:
    """The bodies as a library, compiled once in each process."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "host.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared"]
        command = [str(GXX), *flags, "-fPIC", f"-I{CSRC}", str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))


def pointers(*operands: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in operands]


def memory_side(rho: Tensor, beta: float | Tensor) -> tuple[Tensor, int]:
    """(a beta for each memory, whether they differ)."""
    betas = torch.as_tensor(beta, dtype=torch.float32).reshape(-1)
    return betas.expand(len(rho)).contiguous(), int(len(betas) > 1)


def gain_of(v: Tensor, step: float, update_mask: Tensor | None) -> Tensor:
    if update_mask is None:
        return torch.full(v.shape, step)
    return (step * update_mask.float()).contiguous()


def recursion(
    library: Any,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    wide: bool = True,
    tile: int = 4096,
    flag: Tensor | None = None,
) -> Tensor:
    """Pass raw operands as a launcher does; `flag` gets which rows are in doubt."""
    v, rho = v.contiguous(), rho.contiguous()
    (rows, d), memories = v.shape, len(rho)
    betas, per_memory = memory_side(rho, beta)
    out = torch.full(v.shape, torch.nan)
    gain = gain_of(v, step, update_mask)
    type_of = [torch.float32, torch.bfloat16, torch.float16].index(v.dtype)
    flag = torch.empty(rows, dtype=torch.uint8) if flag is None else flag
    operands = pointers(v, rho, betas, log_weights, gain, out, flag)
    sizes = (rows, memories, d, steps, tile, per_memory)
    assert library.recursion(type_of, int(wide), *operands, *sizes) == 0
    return out


def recursion_backward(
    library: Any,
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, rho, beta [K], update_mask and log_weights [K], without the rows in doubt;
    `flag` gets which rows these are.
    """
    (rows, d), memories = v.shape, len(rho)
    betas, per_memory = memory_side(rho, beta)
    grad_v, grad_mask = torch.full((rows, d), torch.nan), torch.zeros(rows, d)
    partial = torch.full((memories, d + 2), torch.nan)
    gain = gain_of(v, step, update_mask)
    flag = torch.empty(rows, dtype=torch.uint8) if flag is None else flag
    operands = (v, rho, betas, log_weights, gain, grad, grad_v, partial, grad_mask, flag)
    sizes = (rows, memories, d, steps, per_memory)
    assert library.recursion_backward(*pointers(*operands), *sizes) == 0
    return grad_v, partial[:, :d], partial[:, d + 1], step * grad_mask, partial[:, d]


def assert_agrees(result: Tensor, args: tuple[Any, ...], scale: float) -> None:
    """As accurate as centred eager float32 of the same call, within a factor of 2 and 4 roundings.
    The test compares a quantile over rows: at the border of two basins every step multiplies the
    rounding errors of a row, and chance decides which float32 result is nearer to the truth.
    """
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    truth = am.am_recursion(*wide)
    plain = testing.eager("am_recursion")(*args)
    eager, error = ((x - truth).abs().amax(-1) for x in (plain, result))
    rounding = 4 * torch.finfo(torch.float32).eps * scale
    assert error.quantile(0.9) <= 2 * eager.quantile(0.9) + rounding
    assert error.max() <= 1e-3 * scale


def gradients(grad: Tensor, args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor | None]:
    """Autograd's gradients of v, rho, beta, update_mask, log_weights: of the truth in float64, of
    plain torch in float32.
    """
    function = am.am_recursion if dtype == torch.float64 else testing.eager("am_recursion")
    v, rho, beta, steps, step, mask, weights = args
    leaves = [
        x.to(dtype).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in (v, rho, beta, mask, weights)
    ]
    v, rho, beta, mask, weights = leaves
    out = function(v, rho, beta, steps, step, mask, weights)
    tracked = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    result = iter(torch.autograd.grad(out, tracked, grad.to(dtype), allow_unused=True))
    return [
        next(result) if isinstance(x, Tensor) and x.is_floating_point() else None for x in leaves
    ]


def assert_gradients_agree(library: Any, grad: Tensor, args: tuple[Any, ...]) -> None:
    """Each gradient is as accurate as eager float32's, within a factor of 2 and some roundings. For
    gradients with rows the test compares a quantile, as in `assert_agrees`. Those of the memories'
    side are sums over rows, in which the large errors of a few rows at the borders of basins would
    hide all others, so the upstream gradient of such rows is 0. It is 0 for rows in doubt too,
    which the second launch computes.
    """
    nudge = 1e-6 * torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
    nudged = (args[0].double() + nudge, *args[1:])
    there, here = (gradients(grad, a, torch.float64)[0] for a in (nudged, args))
    assert there is not None
    assert here is not None
    strain = (there - here).abs().amax(-1)
    grad = torch.where(strain[:, None] <= 4 * strain.median(), grad, 0.0)
    flag = torch.empty(len(grad), dtype=torch.uint8)
    recursion_backward(library, grad, *args, flag=flag)
    grad[flag > 0] = 0.0
    truth, eager = (gradients(grad, args, dtype) for dtype in (torch.float64, torch.float32))
    result = recursion_backward(library, grad, *args)
    names = ("v", "rho", "beta", "update_mask", "log_weights")
    for name, outcome, exact, plain in zip(names, result, truth, eager, strict=True):
        if exact is None or plain is None:
            continue
        if name == "beta" and len(exact) == 1:
            outcome = outcome.double().sum().reshape(1)
        assert outcome.isfinite().all(), name
        errors = [(x - exact).abs().reshape(len(exact), -1).amax(-1) for x in (outcome, plain)]
        of_rows = name in ("v", "update_mask")
        error, allowed = (e.quantile(0.9 if of_rows else 1.0) for e in errors)
        # eager's error of a single number may be almost 0 by chance
        rounding = (8 if of_rows else 32) * torch.finfo(torch.float32).eps
        size = exact.abs().max().clamp(min=1.0)
        assert error <= 2 * allowed + rounding * size, (name, error, allowed)


MASKS = (None, "bool", "float")


WEIGHTS = (None, "finite", "some masked", "one active")


BETAS = (0.0, 0.3, 4.0, "per memory")


STEPS = ((0, 1.0), (1, 1.0), (2, 0.5), (5, 0.3), (5, 1.0))


def draw_mask(kind: str | None, v: Tensor, generator: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(v.shape, generator=generator)
    return mask > 0.4 if kind == "bool" else mask


def draw_log_weights(kind: str | None, k: int, generator: torch.Generator) -> Tensor | None:
    """Log weights of k memories, -inf for the masked ones."""
    if kind is None:
        return None
    weights = torch.randn(k, generator=generator)
    if kind == "some masked":
        weights[torch.rand(k, generator=generator) > 0.5] = -torch.inf
    elif kind == "one active":
        weights = torch.where(torch.arange(k) == k // 2, weights, -torch.inf)
    return weights


def scene(name: str, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, memories and betas far from their centre."""
    g = torch.Generator().manual_seed(seed)

    def n(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    place = torch.zeros(d)
    place[0] = 1.0
    if name.startswith("sentinel"):
        far = torch.full((1, d), 1e4 if name == "sentinel" else 1e3)
        return n(60, d), torch.cat([n(5, d), far]), torch.tensor([1.0])
    if name == "groups":
        far = 1e6 * place
        v, rho = torch.cat([n(30, d), far + n(30, d)]), torch.cat([n(5, d), far + n(5, d)])
        return v, rho, torch.tensor([0.7])
    if name == "offset":
        return 1e6 + n(60, d), 1e6 + n(8, d), torch.tensor([0.7])
    if name == "pair":
        v, rho = (
            torch.cat([n(40, d), 1e4 + 10 * n(20, d)]),
            torch.cat([n(5, d), 1e4 + 10 * n(2, d)]),
        )
        return v, rho, torch.tensor([0.01])
    if name == "betas":  # rows beside a sharp memory; it and a broad one are far from the rest
        rho = torch.cat([n(4, d), 300 * place + n(4, d)])
        v = rho.repeat(8, 1)[:60] + 0.3 * n(60, d)
        return v, rho, 10.0 ** torch.tensor([-4.0, 0, 4, 1, -4, 0, 4, 1])
    size, beta = {"large": (1e19, 1e-38), "tiny": (1e-30, 1e38), "sharp": (1.0, 3e38)}[name]
    return size * n(60, d), size * n(6, d), torch.tensor([beta])


SCENES = (
    "sentinel",
    "sentinel nearer",
    "groups",
    "offset",
    "pair",
    "betas",
    "large",
    "tiny",
    "sharp",
)


def differences(v: Tensor, rho: Tensor, beta: Tensor, steps: int) -> Tensor:
    """The recursion from differences, in the dtype of its operands."""
    for _ in range(steps):
        gaps = rho - v[:, None]
        p = torch.softmax(-beta * gaps.square().sum(-1), -1)
        v = v + (p[..., None] * gaps).sum(1)
    return v


def errors_of(result: Tensor, v: Tensor, rho: Tensor, beta: Tensor, steps: int) -> tuple[Any, ...]:
    """(error of each row, allowed error): twice the error of differences in float32 and 4 eps; 4
    eps alone where those differences overflow.
    """
    truth = differences(v.double(), rho.double(), beta.double(), steps)
    plain = differences(v, rho, beta, steps)
    error, allowed = ((x - truth).abs().amax(-1) for x in (result, plain))
    allowed = allowed.nan_to_num(nan=0.0)
    return error, 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth.abs().amax()
