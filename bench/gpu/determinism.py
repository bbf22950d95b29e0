# SPDX-License-Identifier: Apache-2.0
"""Stage determinism: a call returns the same bits in every run, beside other work and on another
stream; and a row's bits do not depend on its batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from clam_kernels import testing

from .cases import (
    Invocation,
    backends,
    calls_by_backend,
    differentiable,
    family_of,
    forced_backend,
    poison,
    refusal,
    same_bits,
    with_kernels,
)
from .setting import Setting

RUNS = 5
Way = Callable[[], contextlib.AbstractContextManager[None]]
Check = Callable[[Invocation, str], list[str]]


@contextlib.contextmanager
def beside_other_work() -> Iterator[None]:
    """A second stream is busy with products while the block runs."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        a = torch.randn(2048, 2048, device="cuda")
        for _ in range(40):
            a = torch.mm(a, a).clamp_(-1, 1)
    yield
    side.synchronize()


@contextlib.contextmanager
def on_another_stream() -> Iterator[None]:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        yield
    torch.cuda.current_stream().wait_stream(other)
    other.synchronize()


def ways(device: str) -> list[tuple[str, Way]]:
    plain: list[tuple[str, Way]] = [
        (f"run {i + 1}", contextlib.nullcontext) for i in range(1, RUNS)
    ]
    if device != "cuda":
        return plain[:1]
    return [*plain, ("busy stream", beside_other_work), ("other stream", on_another_stream)]


def outcome(call: Invocation) -> tuple[Tensor, ...]:
    """All results of a call, in memory that was NaN before."""
    device = call.args[0].device.type
    poison(4 * call.args[0].numel(), device)
    result = call.backward() if call.wanted else call.forward()
    return result


def repeat_differences(call: Invocation, device: str) -> list[str]:
    """The results of a call that differ between runs."""
    first = outcome(call)
    differences = []
    for name, way in ways(device):
        with way():
            again = outcome(call)
        if device == "cuda":
            torch.cuda.synchronize()
        differences += [
            f"{name}, result {i}"
            for i, (a, b) in enumerate(zip(first, again, strict=True))
            if not same_bits(a, b)
        ]
    return differences


def differences_in_parts(call: Invocation, device: str) -> list[str]:
    """The results of a call that differ if its rows come in two batches."""
    whole = call.forward()
    differences = []
    for cut in (1, call.n // 3 + 1):
        parts = [call.part(slice(None, cut)).forward(), call.part(slice(cut, None)).forward()]
        for i, out in enumerate(whole):
            if call.n not in out.shape:  # a sum over the rows
                continue
            dim = list(out.shape).index(call.n)
            if not same_bits(out, torch.cat([p[i] for p in parts], dim)):
                differences.append(f"cut at {cut}, result {i}")
    return differences


def sample_calls(op: str, device: str, seed: int) -> Iterator[tuple[str, Invocation]]:
    """The samples of an op in float32."""
    names = testing.argument_names(op)
    for sample in testing.samples(op, seed):
        if torch.float32 in sample.dtypes:
            args = sample.cast(torch.float32, device).args
            wanted = (*sample.differentiable, *sample.kinks) if differentiable(op) else ()
            where = tuple(names.index(name) for name in wanted)
            yield sample.name, Invocation(op, args, (0,), where)


def cases(setting: Setting) -> Iterator[tuple[str, Callable[[], list[str]] | str]]:
    """(label, check or the reason of a refusal). The large calls of all ops come first, because an
    order of summation varies most easily in them.
    """
    device, ops = setting.device, with_kernels()
    for op in ops:
        for backend, call in calls_by_backend(op, family_of(op).large, setting):
            part_checks = [] if op in family_of(op).coupled else [("split", differences_in_parts)]
            for word, check in [("large", repeat_differences), *part_checks]:
                check_or_refusal = (
                    call if isinstance(call, str) else forced_check(backend, check, call, device)
                )
                yield f"{op} {backend} {word}", check_or_refusal
    for op in ops:
        for backend in backends(op, device)[0]:
            for name, call in sample_calls(op, device, setting.seed):
                check_or_refusal = refusal(backend, op, *call.args) or forced_check(
                    backend, repeat_differences, call, device
                )
                yield f"{op} {backend} {name}", check_or_refusal


def forced_check(
    backend: str, check: Check, call: Invocation, device: str
) -> Callable[[], list[str]]:
    def run() -> list[str]:
        with forced_backend(backend)():
            return check(call, device)

    return run


def run(setting: Setting) -> dict[str, Any]:
    done, differences, refused, complete = 0, [], [], True
    for label, check in cases(setting):
        if setting.left() < 2:
            complete = False
            break
        if isinstance(check, str):
            refused.append(f"{label}: {check}")
            continue
        try:
            differences += [f"{label}: {where}" for where in check()]
        except Exception as error:  # a call that raises has not repeated
            differences.append(f"{label}: {type(error).__name__}: {error}"[:300])
        done += 1
        if done % 20 == 0:
            setting.save({"status": "timeout", "cases": done, "bad": differences})
    result = {"cases": done, "bad": differences[:100], "refused": refused, "complete": complete}
    if differences:
        return {**result, "status": "fail", "reason": "; ".join(differences)[:1000]}
    if not complete:
        return {**result, "status": "fail", "reason": f"time ran out after {done} cases"}
    return {**result, "status": "pass", "reason": f"{done} cases repeat bit for bit"}
