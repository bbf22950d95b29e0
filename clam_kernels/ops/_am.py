# SPDX-License-Identifier: Apache-2.0
"""Checks and fakes of the am ops. Each takes the arguments of its op, in the order of the
schema.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.backend import PRECISIONS
from ._facts import compute_dtype


def _check_pair(v: Tensor, rho: Tensor) -> None:
    """Rows v [..., N, D] and memories rho [..., K, D] fit together; K and D are not 0."""
    for name, x in (("v", v), ("rho", rho)):
        checks.floating(name, x)
        checks.device(name, x)
    checks.same_dtype("rho", rho, "v", v)
    checks.same_device("rho", rho, "v", v)
    checks.shape("v", v, "[..., N, D]", v.ndim >= 2)
    checks.shape("rho", rho, "[..., K, D]", rho.ndim >= 2)
    checks.non_empty("v", v, -1, "D")
    pattern, size = f"[..., K, {v.shape[-1]}]", v.shape[-1]
    checks.shape("rho", rho, pattern, rho.shape[-1] == size, f"v {checks.spell(*v.shape)}")
    checks.non_empty("rho", rho, -2, "K")


def _check_memory_side(
    name: str, x: Tensor, v: Tensor, rho: Tensor, size: Any, letter: str
) -> None:
    """A float tensor that broadcasts to [..., size], for memories rho."""
    checks.floating(name, x)
    checks.same_device(name, x, "v", v)
    checks.core_fits(name, x, [size], letter, f"rho {checks.spell(*rho.shape)}")


def _batch(
    v: Tensor, rho: Tensor, beta: Any, update_mask: Tensor | None, log_weights: Tensor | None
) -> list[Any]:
    """The broadcast of all leading dims."""
    options = [("update_mask", update_mask, 2), ("log_weights", log_weights, 1)]
    return checks.broadcast([("v", v, 2), ("rho", rho, 2), ("beta", beta, 1), *options])


def check_recursion(
    v: Tensor,
    rho: Tensor,
    beta: Any,
    steps: Any,
    step: Any,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str | None,
) -> None:
    _check_pair(v, rho)
    if isinstance(beta, Tensor):
        _check_memory_side("beta", beta, v, rho, rho.shape[-2], "K")
    else:
        checks.number("beta", beta, 0.0, finite=False)
    checks.at_least("steps", steps, 0)
    checks.number("step", step, 0.0, finite=True)
    if update_mask is not None:
        if update_mask.dtype != torch.bool:
            checks.floating("update_mask", update_mask)
        checks.same_device("update_mask", update_mask, "v", v)
        match = f"v {checks.spell(*v.shape)}"
        checks.core_fits("update_mask", update_mask, v.shape[-2:], "N, D", match)
    if log_weights is not None:
        _check_memory_side("log_weights", log_weights, v, rho, rho.shape[-2], "K")
    _batch(v, rho, beta, update_mask, log_weights)
    checks.one_of("precision", precision, PRECISIONS)


def check_step(v: Tensor, rho: Tensor, beta: Any, step: Any, *rest: Any) -> None:
    check_recursion(v, rho, beta, 1, step, *rest)


def check_energy(
    v: Tensor, rho: Tensor, beta: Any, log_weights: Tensor | None, precision: str | None
) -> None:
    if not isinstance(beta, Tensor):
        checks.number("beta", beta, 0.0, finite=True, strict=True)
    check_recursion(v, rho, beta, 0, 1.0, None, log_weights, precision)
    if isinstance(beta, Tensor):
        checks.shape(
            "beta", beta, "[] or [..., 1] (one for all memories)", checks.fits(beta.shape[-1:], [1])
        )


def check_assign(v: Tensor, rho: Tensor, log_weights: Tensor | None, precision: str | None) -> None:
    check_recursion(v, rho, 1.0, 0, 1.0, None, log_weights, precision)


def check_beta_values(v: Tensor, rho: Tensor, beta: Any, *_: Any) -> None:
    if isinstance(beta, Tensor):
        checks.values("beta", beta, 0.0, finite=False)


def check_energy_values(v: Tensor, rho: Tensor, beta: Any, *_: Any) -> None:
    if isinstance(beta, Tensor):
        checks.values("beta", beta, 0.0, finite=True, strict=True)


def fake_recursion(
    v: Tensor,
    rho: Tensor,
    beta: Any,
    steps: Any,
    step: Any,
    update_mask: Tensor | None,
    log_weights: Tensor | None,
    precision: str | None,
) -> Tensor:
    return v.new_empty([*_batch(v, rho, beta, update_mask, log_weights), *v.shape[-2:]])


def fake_step(v: Tensor, rho: Tensor, beta: Any, step: Any, *rest: Any) -> Tensor:
    return fake_recursion(v, rho, beta, 1, step, *rest)


def fake_step_saved(v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = fake_step(v, *rest)
    return out, out.new_empty(out.shape[:-1], dtype=compute_dtype(v.dtype))


def fake_energy(
    v: Tensor, rho: Tensor, beta: Any, log_weights: Tensor | None, precision: str | None
) -> Tensor:
    return v.new_empty(
        [*_batch(v, rho, beta, None, log_weights), v.shape[-2]], dtype=compute_dtype(v.dtype)
    )


def fake_assign(
    v: Tensor, rho: Tensor, log_weights: Tensor | None, precision: str | None
) -> tuple[Tensor, Tensor]:
    sqdist = fake_energy(v, rho, 1.0, log_weights, precision)
    return torch.empty_like(sqdist, dtype=torch.int64), sqdist
