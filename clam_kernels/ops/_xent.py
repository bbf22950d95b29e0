# SPDX-License-Identifier: Apache-2.0
"""Checks and fakes of the xent ops, argument for argument those of the schemas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import python_fallback

from .._core import checks
from .._core.backend import PRECISIONS
from ._facts import broadcast_shapes, compute_dtype


def _check_pair(z: Tensor, prototypes: Tensor, rows: str, dims: int) -> None:
    """Check z, of at least `dims` dims, and prototypes [..., K, D]; K and D are not 0."""
    for name, x in (("z", z), ("prototypes", prototypes)):
        checks.floating(name, x)
        checks.device(name, x)
    checks.same_dtype("prototypes", prototypes, "z", z)
    checks.same_device("prototypes", prototypes, "z", z)
    checks.shape("z", z, rows, z.ndim >= dims)
    checks.shape("prototypes", prototypes, "[..., K, D]", prototypes.ndim >= 2)
    checks.non_empty("z", z, -1, "D")
    pattern, ok = f"[..., K, {z.shape[-1]}]", prototypes.shape[-1] == z.shape[-1]
    checks.shape("prototypes", prototypes, pattern, ok, _spelled("z", z))
    checks.non_empty("prototypes", prototypes, -2, "K")


def _spelled(name: str, x: Tensor) -> str:
    return f"{name} {checks.spell(*x.shape)}"


def _check_core(name: str, x: Tensor | None, core: Sequence[Any], z: Tensor, match: str) -> None:
    """Check that x is None, or has a float dtype and the last dims `core`."""
    if x is None:
        return
    checks.floating(name, x)
    checks.same_device(name, x, "z", z)
    last = list(x.shape[-len(core) :])
    ok = x.ndim >= len(core) and all(a == b for a, b in zip(last, core, strict=True))
    sizes = ", ".join([f"{size}" for size in core])
    checks.shape(name, x, f"[..., {sizes}]", ok, match)


# ---- proto_nce_losses --------------------------------------------------------------------------


def _check_phi(phi: Any, z: Tensor, prototypes: Tensor) -> None:
    if not isinstance(phi, Tensor):
        checks.number("phi", phi, 0.0, finite=True, strict=True)
        return
    checks.floating("phi", phi)
    checks.same_device("phi", phi, "z", z)
    k = prototypes.shape[-2]
    ok = checks.fits(phi.shape[-1:], [k])
    checks.shape("phi", phi, f"[], [..., 1] or [..., {k}]", ok, _spelled("prototypes", prototypes))


def _check_labels(labels: Tensor, z: Tensor, clusterings: int) -> None:
    dtype = str(labels.dtype).removeprefix("torch.")
    checks.type_error(
        labels.dtype == torch.int64, lambda: checks.wording("labels", "dtype int64", dtype)
    )
    checks.same_device("labels", labels, "z", z)
    core = [clusterings, z.shape[-2]]
    last = labels.shape[-2:]
    ok = labels.ndim >= 2 and all(a == b for a, b in zip(last, core, strict=True))
    checks.shape("labels", labels, f"[..., {core[0]}, {core[1]}]", ok, _spelled("z", z))


def _check_offsets(offsets: Any, prototypes: Tensor) -> int:
    """Check the ends of the clusterings; return the number of clusterings."""
    if offsets is None:
        return 1
    ends = list(offsets)
    ok = len(ends) >= 2 and ends[0] == 0 and all(a < b for a, b in pairwise(ends))
    match = _spelled("prototypes", prototypes)
    text = f"increasing ints from 0 to {prototypes.shape[-2]}"
    checks.value_error(
        ok and ends[-1] == prototypes.shape[-2],
        lambda: checks.wording("offsets", text, checks.spell(*ends), match),
    )
    return len(ends) - 1


def _nce_batch(
    z: Tensor, prototypes: Tensor, phi: Any, labels: Tensor, bias: Tensor | None
) -> list[Any]:
    options = [("phi", phi, 1), ("labels", labels, 2), ("bias", bias, 1)]
    return checks.broadcast([("z", z, 2), ("prototypes", prototypes, 2), *options])


def check_nce(
    z: Tensor,
    prototypes: Tensor,
    phi: Any,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Any,
    precision: str | None,
) -> None:
    _check_pair(z, prototypes, "[..., N, D]", 2)
    _check_phi(phi, z, prototypes)
    _check_labels(labels, z, _check_offsets(offsets, prototypes))
    _check_core("bias", bias, [prototypes.shape[-2]], z, _spelled("prototypes", prototypes))
    _nce_batch(z, prototypes, phi, labels, bias)
    checks.one_of("precision", precision, PRECISIONS)


def check_nce_values(
    z: Tensor,
    prototypes: Tensor,
    phi: Any,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Any,
    precision: str | None,
) -> None:
    """Temperatures are positive, and each label is -1 or a prototype that is not masked."""
    if isinstance(phi, Tensor):
        checks.values("phi", phi, 0.0, finite=True, strict=True)
    if not checks.readable(labels) or labels.numel() == 0:
        return
    masked = None if bias is None or not checks.readable(bias) else bias == -torch.inf
    ends = (0, prototypes.shape[-2]) if offsets is None else offsets
    for m, (start, stop) in enumerate(pairwise(ends)):
        label = labels[..., m, :]
        wrong = (label < -1) | (label >= stop - start)
        if bool(wrong.any()):
            text = f"values in [-1, {stop - start})"
            raise ValueError(checks.wording("labels", text, int(label[wrong][0])))
        if masked is not None and bool(masked.any()):
            _refuse_masked_labels(label, masked[..., start:stop])


def _refuse_masked_labels(label: Tensor, masked: Tensor) -> None:
    """Raise a ValueError if a row has the label of a masked prototype."""
    batch = broadcast_shapes(label.shape[:-1], masked.shape[:-1])
    label, masked = label.expand(*batch, label.shape[-1]), masked.expand(*batch, masked.shape[-1])
    is_masked = masked.gather(-1, label.clamp(min=0)) & (label >= 0)
    if bool(is_masked.any()):
        text = "labels of prototypes with bias > -inf"
        raise ValueError(checks.wording("labels", text, int(label[is_masked][0])))


def fake_nce(
    z: Tensor,
    prototypes: Tensor,
    phi: Any,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Any,
    precision: str | None,
) -> Tensor:
    batch = _nce_batch(z, prototypes, phi, labels, bias)
    return z.new_empty([*batch, *labels.shape[-2:]], dtype=compute_dtype(z.dtype))


def fake_nce_saved(
    z: Tensor,
    prototypes: Tensor,
    phi: Any,
    labels: Tensor,
    bias: Tensor | None,
    offsets: Any,
    precision: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    losses = fake_nce(z, prototypes, phi, labels, bias, offsets, precision)
    k, m = prototypes.shape[-2], labels.shape[-2]
    shapes = (
        [*z.shape[:-2], m, *z.shape[-2:]],
        prototypes.shape,
        [*phi.shape[:-1], k] if isinstance(phi, Tensor) else [0],
        [0] if bias is None else bias.shape,
    )
    wanted = (needs[0], needs[1], needs[2], needs[4])
    is_saved = z.device.type == "cpu"
    saved = [
        losses.new_empty(shape if need and is_saved else [0])
        for shape, need in zip(shapes, wanted, strict=True)
    ]
    return losses, *saved


# ---- swapped_prediction ------------------------------------------------------------------------


def _check_weight(weight: Tensor | None, z: Tensor) -> None:
    if weight is None:
        return
    checks.floating("weight", weight)
    checks.same_device("weight", weight, "z", z)
    views, rows = z.shape[-3], z.shape[-2]
    ok = weight.ndim >= 1 and weight.shape[-1] == rows
    if weight.ndim > 1:
        ok = ok and (weight.shape[-2] == 1 or weight.shape[-2] == views)
    pattern = f"[{rows}], [..., 1, {rows}] or [..., {views}, {rows}]"
    checks.shape("weight", weight, pattern, ok, _spelled("z", z))


def _check_teacher(
    z: Tensor,
    prototypes: Tensor,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    assigned: Any,
) -> None:
    """Check the operands of the teacher, which have the features of z unless it has prototypes."""
    points = prototypes if target_prototypes is None else target_prototypes
    if target_prototypes is not None:
        checks.floating("target_prototypes", target_prototypes)
        checks.same_device("target_prototypes", target_prototypes, "z", z)
        k, d = prototypes.shape[-2], z.shape[-1]
        ok = points.ndim >= 2 and points.shape[-2] == k
        if target_z is None:
            ok = ok and points.shape[-1] == d
        pattern = f"[..., {k}, {d if target_z is None else 'D'}]"
        match = _spelled("prototypes", prototypes)
        checks.shape("target_prototypes", points, pattern, ok, match)
    features = points.shape[-1]
    match = f"z {checks.spell(*z.shape)} and f"
    _check_core("target_z", target_z, [assigned, z.shape[-2], features], z, match)
    k = prototypes.shape[-2]
    _check_core("target_bias", target_bias, [k], z, _spelled("prototypes", prototypes))


def _check_views(z: Tensor, f: Tensor, target_z: Tensor | None, pairs: Tensor | None) -> None:
    """Check the number of views against that of the codes."""
    views, assigned = z.shape[-3], f.shape[-2]
    if target_z is None or pairs is None:
        ok = assigned <= views
        checks.shape("f", f, f"[..., A <= {views}, {z.shape[-2]}]", ok, _spelled("z", z))
    if pairs is not None:
        _check_core("pairs", pairs, [assigned, views], z, f"{_spelled('f', f)} and z")
        return
    match = _spelled("z", z)
    text = checks.wording("pairs", "a Tensor: there is no other view", "None", match)
    checks.value_error(views >= 2, lambda: text)


def _swapped_batch(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
) -> list[Any]:
    first = [("z", z, 3), ("prototypes", prototypes, 2), ("f", f, 2), ("g", g, 2)]
    target = [("target_z", target_z, 3), ("target_prototypes", target_prototypes, 2)]
    last = [("target_bias", target_bias, 1), ("pairs", pairs, 2), ("weight", weight, 2)]
    return checks.broadcast([*first, ("bias", bias, 1), *target, *last])


def check_swapped(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: Any,
    epsilon: Any,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
    precision: str | None,
) -> None:
    _check_pair(z, prototypes, "[..., V, N, D]", 3)
    checks.non_empty("z", z, -3, "V")
    checks.floating("f", f)
    checks.same_device("f", f, "z", z)
    ok = f.ndim >= 2 and f.shape[-1] == z.shape[-2]
    checks.shape("f", f, f"[..., A, {z.shape[-2]}]", ok, _spelled("z", z))
    checks.non_empty("f", f, -2, "A")
    assigned, k = f.shape[-2], prototypes.shape[-2]
    match = _spelled("prototypes", prototypes)
    _check_core("g", g, [assigned, k], z, f"{_spelled('f', f)} and {match}")
    _check_core("bias", bias, [k], z, match)
    _check_teacher(z, prototypes, target_z, target_prototypes, target_bias, assigned)
    _check_views(z, f, target_z, pairs)
    _check_weight(weight, z)
    checks.number("temperature", temperature, 0.0, finite=True, strict=True)
    checks.number("epsilon", epsilon, 0.0, finite=True, strict=True)
    target = (target_z, target_prototypes, target_bias)
    _swapped_batch(z, prototypes, f, g, bias, *target, pairs, weight)
    checks.one_of("precision", precision, PRECISIONS)


def check_weight_values(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: Any,
    epsilon: Any,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
    precision: str | None,
) -> None:
    """Weights of rows are finite and at least 0."""
    if weight is not None:
        checks.values("weight", weight, 0.0, finite=True)


def fake_swapped(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: Any,
    epsilon: Any,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
    precision: str | None,
) -> Tensor:
    target = (target_z, target_prototypes, target_bias)
    batch = _swapped_batch(z, prototypes, f, g, bias, *target, pairs, weight)
    return z.new_empty(batch, dtype=compute_dtype(z.dtype))


def fake_swapped_saved(
    z: Tensor,
    prototypes: Tensor,
    f: Tensor,
    g: Tensor,
    temperature: Any,
    epsilon: Any,
    bias: Tensor | None,
    target_z: Tensor | None,
    target_prototypes: Tensor | None,
    target_bias: Tensor | None,
    pairs: Tensor | None,
    weight: Tensor | None,
    precision: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    target = (target_z, target_prototypes, target_bias)
    last = (bias, *target, pairs, weight, precision)
    out = fake_swapped(z, prototypes, f, g, temperature, epsilon, *last)
    lse = out.new_empty([*out.shape, *z.shape[-3:-1]])
    mass = out.new_empty([*out.shape, *f.shape[-2:]])
    is_early = z.device.type == "cpu" and python_fallback.xent.fits_one_tile(
        z.shape[-3], prototypes.shape[-2]
    )
    operands = ((z, needs[0]), (prototypes, needs[1]), (bias, needs[4]))
    saved = [
        out.new_empty(x.shape if need and is_early and x is not None else [0])
        for x, need in operands
    ]
    return out, lse, mass, *saved
