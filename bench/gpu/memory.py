# SPDX-License-Identifier: Apache-2.0
"""Stage memory: the peak memory of a call beside its arguments, and rows beyond entry 2^31."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .cases import (
    PERIOD,
    Invocation,
    calls_by_backend,
    differentiable,
    family_of,
    forced_backend,
    same_bits,
    with_kernels,
)
from .clock import Clock, Contestant, free_memory, peak_bytes
from .setting import Setting

SPOT = 256
CLOSE = 1e-4


def peaks(setting: Setting, clock: Clock, op: str) -> Iterator[dict[str, Any]]:
    """Peak bytes of an op, at a size where an N x K array would exceed what is allowed."""
    family = family_of(op)
    for backend, call in calls_by_backend(op, family.large, setting):
        if isinstance(call, str):
            yield {"what": f"{op} {backend} peak", "ok": True, "refused": call}
            continue
        for backward in (False, True) if differentiable(op) else (False,):
            method = call.backward if backward else call.forward
            with forced_backend(backend)():
                method()
            peak = peak_bytes(clock, Contestant(method, forced_backend(backend)))
            allowed = family.allowance(call, backward)
            label = f"{op} {backend} {'backward' if backward else 'forward'}"
            yield {
                "what": label, "shape": sizes(call), "peak_bytes": peak, "allowed_bytes": allowed,
                "ok": peak is not None and peak <= allowed,
            }  # fmt: skip


def sizes(call: Invocation) -> list[list[int]]:
    return [list(a.shape) for a in call.args if isinstance(a, Tensor)]


def probe_rows(n: int, d: int) -> Tensor:
    """Indices of rows at both ends and on both sides of entry 2^31, where 32-bit offsets
    overflow.
    """
    turn = min(max((1 << 31) // d, SPOT), n - SPOT)
    pieces = [(0, SPOT), (turn - SPOT, turn + SPOT), (n - SPOT, n)]
    return torch.cat([torch.arange(a, b) for a, b in pieces])


def compare(call: Invocation, at: Tensor) -> tuple[bool, bool]:
    """(close, equal bit for bit): the results of some rows in a large call beside those of the same
    rows in a small call; outputs, and the gradients that have rows.
    """
    close = exact = True
    if call.op in family_of(call.op).sums:
        return sums_agree(call, at)
    if call.op in family_of(call.op).coupled:
        return repeats(call, at)
    small = call.part(at)
    pairs = list(zip(call.forward(), small.forward(), strict=True))
    if call.wanted:
        count = len(pairs)
        whole, alone = call.backward()[count:], small.backward()[count:]
        pairs += [
            (a, b) for i, a, b in zip(call.wanted, whole, alone, strict=True) if i in call.rows
        ]
        del whole
    for large, few in pairs:
        rows = large.index_select(list(large.shape).index(call.n), at)
        exact &= same_bits(rows, few)
        scale = max(float(few.double().abs().max()), 1.0)
        close &= float((rows.double() - few.double()).abs().max()) <= CLOSE * scale
    return close, exact


def repeats(call: Invocation, at: Tensor) -> tuple[bool, bool]:
    """As `compare`, for ops whose row results depend on all rows: equal rows have equal results."""
    outputs = list(call.backward()) if call.wanted else list(call.forward())
    close = exact = True
    for out in outputs:
        if call.n not in out.shape:
            continue
        dim = list(out.shape).index(call.n)
        rows, first = out.index_select(dim, at), out.index_select(dim, at % PERIOD)
        exact &= same_bits(rows, first)
        scale = max(float(first.double().abs().max()), 1.0)
        close &= float((rows.double() - first.double()).abs().max()) <= CLOSE * scale
    return close, exact


def sums_agree(call: Invocation, at: Tensor) -> tuple[bool, bool]:
    """As `compare`, for ops that return sums over rows: the sums of two parts add up to the sum of
    the whole. Results with an entry for each row equal those of the parts.
    """
    cut = int(at[len(at) // 2])
    parts = [call.part(slice(None, cut)).forward(), call.part(slice(cut, None)).forward()]
    close = exact = True
    for whole, one, two in zip(call.forward(), *parts, strict=True):
        if call.n in whole.shape:
            both = torch.cat([one, two], list(whole.shape).index(call.n)).double()
        else:
            both = one.double() + two.double()
        scale = max(float(both.abs().max()), 1.0)
        close &= float((whole.double() - both).abs().max()) <= CLOSE * scale
        exact &= torch.equal(whole.double(), both)
    return close, exact


def wide(setting: Setting, clock: Clock, op: str) -> Iterator[dict[str, Any]]:
    """Calls with over 2^31 entries."""
    for backend, call in calls_by_backend(op, family_of(op).wide, setting):
        label = f"{op} {backend} wide"
        if isinstance(call, str):
            yield {"what": label, "ok": True, "refused": call}
            continue
        free_memory(clock)
        at = probe_rows(call.n, call.args[0].shape[-1]).to(setting.device)
        with forced_backend(backend)():
            close, exact = compare(call, at)
        yield {"what": label, "shape": sizes(call), "ok": close, "bitwise": exact}


def run(setting: Setting) -> dict[str, Any]:
    clock = Clock(setting.device)
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    plan = [(part, op) for part in ("peak", "wide") for op in with_kernels()]
    for part, op in plan:
        if setting.left() < 3:
            left_out.append(f"{op} {part}")
            continue
        try:
            for entry in (peaks if part == "peak" else wide)(setting, clock, op):
                results.append(entry)
                setting.save({"status": "timeout", "cases": results})
        except Exception as error:  # also out of memory, which this stage tests
            reason = f"{type(error).__name__}: {error}"[:300]
            results.append({"what": f"{op} {part}", "ok": False, "reason": reason})
    failures = [entry["what"] for entry in results if not entry["ok"]]
    result = {"cases": results, "left_out": left_out, "stand_in": setting.dry_run}
    if failures or left_out:
        reasons = [f"over or wrong: {', '.join(failures)}"] if failures else []
        reasons += [f"no time for {', '.join(left_out)}"] if left_out else []
        return {**result, "status": "fail", "reason": "; ".join(reasons)[:1000]}
    return {**result, "status": "pass", "reason": f"{len(results)} cases"}
