# SPDX-License-Identifier: Apache-2.0
"""Checks and fakes of the dec ops, argument for argument those of the schemas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.backend import PRECISIONS
from ._facts import compute_dtype


def _check_pair(z: Tensor, mu: Tensor, alpha: Any) -> None:
    """Check z [..., N, D], mu [..., K, D] and alpha; K and D are not 0."""
    for name, x in (("z", z), ("mu", mu)):
        checks.floating(name, x)
        checks.device(name, x)
    checks.same_dtype("mu", mu, "z", z)
    checks.same_device("mu", mu, "z", z)
    checks.shape("z", z, "[..., N, D]", z.ndim >= 2)
    checks.shape("mu", mu, "[..., K, D]", mu.ndim >= 2)
    checks.non_empty("z", z, -1, "D")
    pattern, ok = f"[..., K, {z.shape[-1]}]", mu.shape[-1] == z.shape[-1]
    checks.shape("mu", mu, pattern, ok, f"z {checks.spell(*z.shape)}")
    checks.non_empty("mu", mu, -2, "K")
    if isinstance(alpha, Tensor):
        checks.floating("alpha", alpha)
        checks.same_device("alpha", alpha, "z", z)
        ok = checks.fits(alpha.shape[-1:], [1])
        checks.shape("alpha", alpha, "[] or [..., 1] (one for all centroids)", ok)
    else:
        checks.number("alpha", alpha, 0.0, finite=False, strict=True)


def _check_core(name: str, x: Tensor | None, core: list[Any], z: Tensor, match: str) -> None:
    """Check that x is None, or has a float dtype and the last dims `core`."""
    if x is None:
        return
    checks.floating(name, x)
    checks.same_device(name, x, "z", z)
    last = list(x.shape[-len(core) :])
    ok = x.ndim >= len(core) and all(a == b for a, b in zip(last, core, strict=True))
    sizes = ", ".join([f"{size}" for size in core])
    checks.shape(name, x, f"[..., {sizes}]", ok, match)


def _stats_batch(z: Tensor, mu: Tensor, alpha: Any, weight: Tensor | None) -> list[Any]:
    options = [("alpha", alpha, 1), ("weight", weight, 1)]
    return checks.broadcast([("z", z, 2), ("mu", mu, 2), *options])


def check_stats(
    z: Tensor, mu: Tensor, alpha: Any, weight: Tensor | None, precision: str | None
) -> None:
    _check_pair(z, mu, alpha)
    _check_core("weight", weight, [z.shape[-2]], z, f"z {checks.spell(*z.shape)}")
    _stats_batch(z, mu, alpha, weight)
    checks.one_of("precision", precision, PRECISIONS)


def check_values(z: Tensor, mu: Tensor, alpha: Any, weight: Tensor | None, *_: Any) -> None:
    if isinstance(alpha, Tensor):
        checks.values("alpha", alpha, 0.0, finite=False, strict=True)
    if weight is not None:
        checks.values("weight", weight, 0.0, finite=True)


def fake_stats(
    z: Tensor, mu: Tensor, alpha: Any, weight: Tensor | None, precision: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows = _stats_batch(z, mu, alpha, weight), z.shape[-2]
    return (
        z.new_empty([*batch, rows], dtype=compute_dtype(z.dtype)),
        z.new_empty([*batch, rows], dtype=torch.int64),
        z.new_empty([*batch, mu.shape[-2]], dtype=torch.float64),
        z.new_empty(batch, dtype=torch.int64),
    )


def _losses_batch(
    z: Tensor,
    mu: Tensor,
    alpha: Any,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    log_norm: Tensor | None,
    p: Tensor | None,
) -> list[Any]:
    first = [("alpha", alpha, 1), ("weight", weight, 1), ("log_counts", log_counts, 1)]
    frozen = [("z0", z0, 2), ("mu0", mu0, 2), ("log_norm", log_norm, 1), ("p", p, 2)]
    return checks.broadcast([("z", z, 2), ("mu", mu, 2), *first, *frozen])


def check_losses(
    z: Tensor,
    mu: Tensor,
    alpha: Any,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    alpha0: Any,
    log_norm: Tensor | None,
    p: Tensor | None,
    precision: str | None,
) -> None:
    _check_pair(z, mu, alpha)
    checks.number("alpha0", alpha0, 0.0, finite=False, strict=True)
    (n, d), k = z.shape[-2:], mu.shape[-2]
    rows, centroids = f"z {checks.spell(*z.shape)}", f"mu {checks.spell(*mu.shape)}"
    _check_core("weight", weight, [n], z, rows)
    _check_core("log_counts", log_counts, [k], z, centroids)
    _check_core("z0", z0, [n, d], z, rows)
    _check_core("mu0", mu0, [k, d], z, centroids)
    _check_core("log_norm", log_norm, [n], z, rows)
    if p is not None:
        one = [1, k] if p.ndim >= 2 and p.shape[-2] == 1 else [n, k]
        _check_core("p", p, one, z, f"{rows} and {centroids}")
    if z0 is not None:
        _check_together("z0", z0, ("mu0", mu0), ("log_counts", log_counts))
    elif mu0 is not None:
        _check_together("mu0", mu0, ("z0", z0))
    elif log_norm is not None and p is None:
        _check_together("log_norm", log_norm, ("z0", z0))
    _losses_batch(z, mu, alpha, weight, log_counts, z0, mu0, log_norm, p)
    checks.one_of("precision", precision, PRECISIONS)


def _check_together(name: str, x: Tensor, *others: tuple[str, Tensor | None]) -> None:
    """Check that the other parts of a frozen target are tensors."""
    for other, value in others:
        match = f"{name} {checks.spell(*x.shape)}"
        text = checks.wording(other, "a Tensor", "None", match)
        checks.value_error(value is not None, lambda text=text: text)  # type: ignore[misc]


def fake_losses(
    z: Tensor,
    mu: Tensor,
    alpha: Any,
    weight: Tensor | None,
    log_counts: Tensor | None,
    z0: Tensor | None,
    mu0: Tensor | None,
    alpha0: Any,
    log_norm: Tensor | None,
    p: Tensor | None,
    precision: str | None,
) -> Tensor:
    batch = _losses_batch(z, mu, alpha, weight, log_counts, z0, mu0, log_norm, p)
    return z.new_empty([*batch, z.shape[-2]], dtype=compute_dtype(z.dtype))
