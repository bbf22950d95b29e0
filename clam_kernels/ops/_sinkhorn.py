# SPDX-License-Identifier: Apache-2.0
"""Checks and fakes of the sinkhorn ops. Each takes the arguments of its op, in the order of the
schema.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import checks
from .._core.backend import PRECISIONS
from ._facts import compute_dtype


def _check_vectors(
    first: str, x: Tensor, vectors: list[tuple[str, Tensor | None, Any, str]]
) -> None:
    """Vectors [..., size] of any float dtype, for rows or columns."""
    for name, value, size, match in vectors:
        if value is None:
            continue
        checks.floating(name, value)
        checks.same_device(name, value, first, x)
        ok = value.ndim >= 1 and value.shape[-1] == size
        checks.shape(name, value, ["...", size], ok, match)


def _check_scale(scale: Tensor | None, first: str, x: Tensor) -> None:
    if scale is not None:
        checks.floating("scale", scale)
        checks.same_device("scale", scale, first, x)


def check_scale_values(*arguments: Any) -> None:
    scale = arguments[-2]
    if scale is not None:
        checks.values("scale", scale, 0.0, finite=True, strict=True)


def _check_scores(
    logits: Tensor, scale: Tensor | None, precision: str | None, **vectors: Tensor | None
) -> None:
    checks.floating("logits", logits)
    checks.device("logits", logits)
    checks.shape("logits", logits, "[..., N, K]", logits.ndim >= 2)
    checks.non_empty("logits", logits, -1, "K")
    match = f"logits {checks.spell(*logits.shape)}"
    n, k = logits.shape[-2:]
    sized_vectors = [(name, v, n if name == "log_row" else k, match) for name, v in vectors.items()]
    _check_vectors("logits", logits, sized_vectors)
    _check_scale(scale, "logits", logits)
    _batch(logits, scale, **vectors)
    checks.one_of("precision", precision, PRECISIONS)


def check_sinkhorn(
    logits: Tensor,
    n_iter: Any,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    bias: Tensor | None,
    scale: Tensor | None,
    precision: str | None,
) -> None:
    vectors = {"log_row": log_row, "log_col": log_col, "init": init, "bias": bias}
    _check_scores(logits, scale, precision, **vectors)
    checks.at_least("n_iter", n_iter, 0)


def check_pass(
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    precision: str | None,
) -> None:
    _check_scores(logits, scale, precision, g=g, log_row=log_row, bias=bias)


def _batch(logits: Tensor, scale: Tensor | None, **vectors: Tensor | None) -> list[Any]:
    operands = [(name, v, 1) for name, v in vectors.items()]
    return checks.broadcast([("logits", logits, 2), *operands, ("scale", scale, 0)])


def _check_z_and_prototypes(
    z: Tensor,
    prototypes: Tensor,
    scale: Tensor | None,
    precision: str | None,
    **vectors: Tensor | None,
) -> None:
    for name, x in (("z", z), ("prototypes", prototypes)):
        checks.floating(name, x)
        checks.device(name, x)
    checks.same_dtype("prototypes", prototypes, "z", z)
    checks.same_device("prototypes", prototypes, "z", z)
    checks.shape("z", z, "[..., N, D]", z.ndim >= 2)
    checks.shape("prototypes", prototypes, "[..., K, D]", prototypes.ndim >= 2)
    checks.non_empty("z", z, -1, "D")
    rows, columns = (
        f"{n} {checks.spell(*x.shape)}" for n, x in (("z", z), ("prototypes", prototypes))
    )
    same = prototypes.shape[-1] == z.shape[-1]
    checks.shape("prototypes", prototypes, ["...", "K", z.shape[-1]], same, rows)
    checks.non_empty("prototypes", prototypes, -2, "K")
    n, k = z.shape[-2], prototypes.shape[-2]
    sized_vectors = [
        (name, v, n, rows) if name == "log_row" else (name, v, k, columns)
        for name, v in vectors.items()
    ]
    _check_vectors("z", z, sized_vectors)
    _check_scale(scale, "z", z)
    _batch_features(z, prototypes, scale, **vectors)
    checks.one_of("precision", precision, PRECISIONS)


def check_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: Any,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    scale: Tensor | None,
    precision: str | None,
) -> None:
    vectors = {"bias": bias, "log_row": log_row, "log_col": log_col, "init": init}
    _check_z_and_prototypes(z, prototypes, scale, precision, **vectors)
    checks.at_least("n_iter", n_iter, 0)


def check_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    scale: Tensor | None,
    precision: str | None,
) -> None:
    _check_z_and_prototypes(z, prototypes, scale, precision, g=g, bias=bias, log_row=log_row)


def _batch_features(
    z: Tensor, prototypes: Tensor, scale: Tensor | None, **vectors: Tensor | None
) -> list[Any]:
    operands = [(name, v, 1) for name, v in vectors.items()]
    matrices = [("z", z, 2), ("prototypes", prototypes, 2)]
    return checks.broadcast([*matrices, *operands, ("scale", scale, 0)])


def _results(like: Tensor, batch: list[Any], n: Any, k: Any) -> tuple[Tensor, ...]:
    wide = compute_dtype(like.dtype)
    f, g = (like.new_empty([*batch, size], dtype=wide) for size in (n, k))
    return f, g, like.new_empty(batch, dtype=wide), like.new_empty(batch, dtype=torch.int64)


def fake_sinkhorn(
    logits: Tensor,
    n_iter: Any,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    bias: Tensor | None,
    scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    batch = _batch(logits, scale, log_row=log_row, log_col=log_col, init=init, bias=bias)
    return _results(logits, batch, *logits.shape[-2:])


def fake_features(
    z: Tensor,
    prototypes: Tensor,
    n_iter: Any,
    bias: Tensor | None,
    log_row: Tensor | None,
    log_col: Tensor | None,
    init: Tensor | None,
    prototype_first: bool,
    scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    vectors = {"bias": bias, "log_row": log_row, "log_col": log_col, "init": init}
    batch = _batch_features(z, prototypes, scale, **vectors)
    return _results(z, batch, z.shape[-2], prototypes.shape[-2])


def _pass_results(like: Tensor, batch: list[Any], n: Any, k: Any) -> tuple[Tensor, ...]:
    f, log_mass, _, status = _results(like, batch, n, k)
    return f, log_mass, status


def fake_pass(
    logits: Tensor,
    g: Tensor,
    log_row: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    batch = _batch(logits, scale, g=g, log_row=log_row, bias=bias)
    return _pass_results(logits, batch, *logits.shape[-2:])


def fake_features_pass(
    z: Tensor,
    prototypes: Tensor,
    g: Tensor,
    bias: Tensor | None,
    log_row: Tensor | None,
    scale: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    batch = _batch_features(z, prototypes, scale, g=g, bias=bias, log_row=log_row)
    return _pass_results(z, batch, z.shape[-2], prototypes.shape[-2])
