# SPDX-License-Identifier: Apache-2.0
"""The Sinkhorn contests: our calls, the forms that others run, the error of the codes of each."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import clam_kernels

from .cases import Target, TimedContest
from .clock import Contestant, launches
from .contests_am import STAND_IN_ROWS, compiled, sample_of, torch_mode
from .setting import Setting

CHUNK = 1 << 16
EPSILON = 0.05


def unit_rows(n: int, k: int, d: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows, each near one of k unit prototypes; and the prototypes divided by epsilon."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = torch.nn.functional.normalize
    c = normal(torch.randn(k, d, generator=generator, device=device), dim=1)
    near = torch.randint(k, (n,), generator=generator, device=device)
    z = torch.randn(n, d, generator=generator, device=device).mul_(1.5 / math.sqrt(d))
    for rows, which in zip(z.split(CHUNK), near.split(CHUNK), strict=True):
        rows += c[which]
        rows /= rows.norm(dim=1, keepdim=True)
    return z, c / EPSILON


def products(z: Tensor, c: Tensor) -> Tensor:
    """z c^T in float32, chunk by chunk."""
    out = torch.empty(len(z), len(c), device=z.device)
    for part, rows in zip(out.split(CHUNK), z.split(CHUNK), strict=True):
        part.copy_(rows.float() @ c.float().T)
    return out


def operands_of(setting: Setting, target: Target) -> tuple[Tensor, Tensor, int]:
    """(z, prototypes, iterations) of a target; few rows and prototypes in a dry run."""
    n, d, k, steps = (target.shape[name] for name in ("n", "d", "k", "steps"))
    if setting.dry_run:
        n, k, steps = STAND_IN_ROWS, min(k, 16), min(steps, 3)
    z, c = unit_rows(n, k, d, setting.device, setting.seed)
    return (*((x.bfloat16() for x in (z, c)) if target.dtype == "bfloat16" else (z, c)), steps)


# ---- errors ---------------------------------------------------------------------------------


def exact_potential(tile: Callable[[slice], Tensor], n: int, k: int, steps: int) -> Tensor:
    """Potential g of the columns in float64; `tile` computes a chunk of the logits."""
    parts = [slice(first, min(first + CHUNK // 4, n)) for first in range(0, n, CHUNK // 4)]
    f: list[Tensor] = []
    g = torch.zeros(0)
    for _ in range(steps):
        sums = [
            torch.logsumexp(tile(part) + (f[i][:, None] if f else 0.0), 0)
            for i, part in enumerate(parts)
        ]
        g = -math.log(k) - torch.logsumexp(torch.stack(sums), 0)
        f = [-math.log(n) - torch.logsumexp(tile(part) + g, 1) for part in parts]
    return g


def code_errors(
    tile: Callable[[slice], Tensor], n: int, k: int, steps: int, setting: Setting
) -> Callable[[Any], dict[str, Any]]:
    """max |codes - exact| on a sample of rows; the result is potentials (f, g, ...) or a plan."""
    g = exact_potential(tile, n, k, steps)
    at = sample_of(n, setting.seed, setting.device)
    x = torch.cat([tile(slice(int(i), int(i) + 1)) for i in at[:256]])
    exact = torch.softmax(x + g, 1)

    def errors(out: Any) -> dict[str, Any]:
        if isinstance(out, tuple):
            result = torch.softmax(x + out[1].double(), 1)
        elif out.ndim < 2:  # a loss alone
            return {}
        else:
            result = out[at[:256]].double()
            result = result / result.sum(1, keepdim=True)
        return {"out": float((result - exact).abs().max())}

    return errors


# ---- peers ----------------------------------------------------------------------------------


def scaling(x: Tensor, steps: int) -> Tensor:
    """The linear domain, in place: divide columns, then rows, by their sums."""
    (n, k), q = x.shape, x.exp()
    for _ in range(steps):
        q /= q.sum(0) * k
        q /= q.sum(1, keepdim=True) * n
    return q


def swav_form(x: Tensor, steps: int) -> Tensor:
    """The loop of public SwAV code: [K, N] arrays, divided by the sum of all first; each code sums
    to 1.
    """
    q = x.exp().mT
    k, n = q.shape[-2:]
    q = q / q.sum((-2, -1), keepdim=True)
    for _ in range(steps):
        q = q / q.sum(-1, keepdim=True) / k
        q = q / q.sum(-2, keepdim=True) / n
    return (q * n).mT


def by_products(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Two products of the stored exp(x) with a vector per iteration; returns (f, g)."""
    n, k = x.shape
    p, u = x.exp(), torch.ones(n, device=x.device)
    for _ in range(steps):
        v = 1.0 / (k * (p.T @ u))
        u = 1.0 / (n * (p @ v))
    return u.log(), v.log()


def by_logarithms(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over rows and columns; returns (f, g)."""
    n, k = x.shape[-2:]
    f = torch.zeros(n, device=x.device)
    for _ in range(steps):
        g = -math.log(k) - torch.logsumexp(x + f[..., None], -2)
        f = -math.log(n) - torch.logsumexp(x + g[..., None, :], -1)
    return f, g


def features_in_chunks(z: Tensor, c: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """As `by_logarithms`, but each pass computes the products again, a chunk of rows at a time."""
    n, k = len(z), len(c)
    f = torch.zeros(n, device=z.device)
    for _ in range(steps):
        pairs = zip(z.split(CHUNK), f.split(CHUNK), strict=True)
        sums = [torch.logsumexp((rows @ c.T).float() + u[:, None], 0) for rows, u in pairs]
        g = -math.log(k) - torch.logsumexp(torch.stack(sums), 0)
        f = torch.cat(
            [-math.log(n) - torch.logsumexp((r @ c.T).float() + g, 1) for r in z.split(CHUNK)]
        )
    return f, g


def pot(x: Tensor, steps: int) -> Tensor:
    """POT's solver in the log domain on the device; its cost is -x, its regularisation 1."""
    package = importlib.import_module("ot")
    n, k = x.shape
    a, b = (torch.full((size,), 1.0 / size, device=x.device) for size in (n, k))
    plan: Tensor = package.bregman.sinkhorn_log(
        a, b, -x, 1.0, numItermax=steps, stopThr=0.0, warn=False
    )
    return plan


def samples_loss(package: str, z: Tensor, c: Tensor) -> Tensor:
    """The loss of a package for point clouds. Its cost and stopping rule differ: the time is for
    information.
    """
    kind = importlib.import_module(package).SamplesLoss
    loss: Tensor = kind(loss="sinkhorn", p=2, blur=math.sqrt(EPSILON), debias=False)(
        z.float(), EPSILON * c.float()
    )
    return loss


# ---- contests -----------------------------------------------------------------------------------


def iterations(setting: Setting, target: Target) -> TimedContest:
    """Target 9: an iteration on stored logits; a call runs `steps` of them after one pass."""
    z, c, steps = operands_of(setting, target)
    x = products(z, c)
    fast = compiled(setting, by_logarithms)
    peers = {
        "eager_scaling": Contestant(lambda: scaling(x, steps)),
        "products": Contestant(lambda: by_products(x, steps), torch_mode(target.mode)),
        "compile": Contestant(lambda: fast(x, steps)),
    }
    return TimedContest(
        ours=lambda: torch.ops.clam.sinkhorn_potentials(x, steps, precision=target.mode),
        args=(x, steps),
        peers=peers,
        errors=code_errors(lambda part: x[part].double(), *x.shape, steps, setting),
        plain=Contestant(lambda: scaling(x, steps)),
        scale=1.0 / steps,
    )


def features(setting: Setting, target: Target) -> TimedContest:
    """Target 10: an iteration on features; nothing stores the logits."""
    z, c, steps = operands_of(setting, target)

    def tile(part: slice) -> Tensor:
        return z[part].double() @ c.double().T

    def stored() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.ops.clam.sinkhorn_potentials(products(z, c), steps)
        return result

    peers = {
        "eager_chunks": Contestant(lambda: features_in_chunks(z, c, steps)),
        "stored": Contestant(stored),
        "flash": Contestant(lambda: samples_loss("flash_sinkhorn", z, c)),
        "geomloss": Contestant(lambda: samples_loss("geomloss", z, c)),
    }
    return TimedContest(
        ours=lambda: torch.ops.clam.sinkhorn_potentials_features(
            z, c, steps, precision=target.mode
        ),
        args=(z, c, steps),
        peers=peers,
        errors=code_errors(tile, len(z), len(c), steps, setting),
        plain=Contestant(lambda: features_in_chunks(z.float(), c.float(), steps)),
        scale=1.0 / steps,
    )


def relabelling(setting: Setting, target: Target) -> TimedContest:
    """Target 11: a relabelling of SeLa by `sela_labels`, to its stopping rule."""
    z, c, _ = operands_of(setting, target)
    log_p = products(z, c).mul_(EPSILON).log_softmax(1)
    tol = 1e-2 if setting.dry_run else 1e-3

    def ours() -> Tensor:
        return clam_kernels.sela_labels(log_p, lam=1 / EPSILON, tol=tol, warn=False)

    def errors(out: Any) -> dict[str, Any]:
        shares = torch.bincount(out, minlength=len(c)).double() / len(out)
        return {"out": 0.0, "share_error": float((shares - 1 / len(c)).abs().sum())}

    return TimedContest(
        ours=ours, args=(log_p, 1), peers={}, errors=errors, plain=Contestant(ours)
    )  # fmt: skip


def codes(setting: Setting, target: Target) -> TimedContest:
    """Target 12: SwAV's codes of two crops."""
    z, c, steps = operands_of(setting, target)
    x = products(z, c).view(2, -1, len(c))

    def ours() -> Tensor:
        g = torch.ops.clam.sinkhorn_potentials(x, steps, precision=target.mode)[1]
        return torch.softmax(x + g[:, None], -1)

    whole = compiled(setting, swav_form)
    peers = {
        "eager_swav": Contestant(lambda: swav_form(x, steps)),
        "eager_in_place": Contestant(lambda: torch.stack([scaling(crop, steps) for crop in x])),
        "compile": Contestant(lambda: whole(x, steps)),
        "pot": Contestant(lambda: torch.stack([pot(crop, steps) for crop in x])),
    }
    first = code_errors(lambda part: x[0, part].double(), *x.shape[1:], steps, setting)
    facts = None
    if not setting.dry_run:

        def facts() -> dict[str, Any]:
            return {
                "launches": launches(ours),
                "launches_eager": launches(lambda: swav_form(x, steps)),
            }

    return TimedContest(
        ours=ours,
        args=(x, steps),
        peers=peers,
        errors=lambda out: first(out[0]),
        plain=Contestant(lambda: swav_form(x, steps)),
        facts=facts,
    )
