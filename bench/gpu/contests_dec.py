# SPDX-License-Identifier: Apache-2.0
"""The contest of deep embedded clustering: our call, the plain forms, the error of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import clam_kernels as ck
from python_fallback import dec as truth

from .cases import Target, TimedContest
from .clock import Contestant
from .contests_am import DRAWS, STAND_IN_ROWS, compiled, sample_of
from .setting import Setting


def embeddings(n: int, d: int, k: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows around k Gaussian centroids."""
    generator = torch.Generator(device).manual_seed(seed)
    mu = 3 * torch.randn(k, d, generator=generator, device=device)
    near = torch.randint(k, (n,), generator=generator, device=device)
    z = torch.randn(n, d, generator=generator, device=device)
    for rows, which in zip(z.split(1 << 22), near.split(1 << 22), strict=True):
        rows += mu[which]
    return z, mu


def eager(z: Tensor, mu: Tensor, p: Tensor) -> Tensor:
    """The loss of each row with the target as an N x K array."""
    c = mu.detach().mean(0)
    x, m = z - c, mu - c
    far = (x.square().sum(1, keepdim=True) + m.square().sum(1) - 2 * x @ m.T).clamp(min=0)
    q = 1 / (1 + far)
    log_q = (q / q.sum(1, keepdim=True)).log()
    return (torch.xlogy(p, p) - p * log_q).sum(1)


def errors_of(
    z: Tensor, mu: Tensor, target: ck.DecTarget, grad: Tensor, seed: int
) -> Callable[[tuple[Tensor, ...]], dict[str, Any]]:
    """Largest error of the losses over the largest of them on samples of rows, and of dz row by
    row, against float64.
    """
    samples = [sample_of(len(z), seed, str(z.device), i) for i in range(DRAWS)]
    exact, slopes = [], []
    for at in samples:
        some = target.rows(at)
        leaf = z[at].double().requires_grad_()
        p = some.shares().double()
        out = truth.dec_losses(leaf, mu.double(), p=p)
        slopes.append(torch.autograd.grad(out, leaf, grad[at].double())[0])
        exact.append(out.detach())
    size = float(exact[0].abs().max())

    def errors(got: tuple[Tensor, ...]) -> dict[str, Any]:
        pairs = zip(samples, exact, strict=True)
        off = [float((got[0][at].double() - e).abs().max()) / size for at, e in pairs]
        rows = (got[1][samples[0]].double() - slopes[0]).norm(dim=1) / slopes[0].norm(dim=1)
        median = float(rows.median())
        return {"out": off[0], "out_draws": off, "grad_median": median}

    return errors


def trained(setting: Setting, case: Target) -> TimedContest:
    """Target 15: the losses of a frozen target and the gradients of z and mu."""
    n, d, k = (case.shape[name] for name in ("n", "d", "k"))
    n = STAND_IN_ROWS if setting.dry_run else n
    old, centroids = embeddings(n, d, k, setting.device, setting.seed)
    target = ck.dec_target(old, centroids, store="dense")
    generator = torch.Generator(setting.device).manual_seed(setting.seed + 1)
    moved = old + 0.3 * torch.randn(old.shape, generator=generator, device=setting.device)
    leaves = [x.requires_grad_() for x in (moved, centroids.clone())]
    grad = torch.randn(n, generator=generator, device=setting.device)
    shares = target.shares()
    frozen = (None, None, None, None, 1.0, None, shares)  # weight to p of the op
    fast = compiled(setting, eager)

    def ours() -> tuple[Tensor, ...]:
        out = torch.ops.clam.dec_losses(*leaves, 1.0, *frozen, case.mode)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    def plain(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = function(*leaves, shares)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return TimedContest(
        ours=ours,
        args=(*leaves, 1.0, *frozen),
        peers={
            "eager": Contestant(lambda: plain(eager)),
            "compile": Contestant(lambda: plain(fast)),
        },
        errors=errors_of(moved.detach(), centroids, target, grad, setting.seed),
        plain=Contestant(lambda: plain(eager)),
    )
