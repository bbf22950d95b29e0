# SPDX-License-Identifier: Apache-2.0
"""Stage graphs: ops inside CUDA graphs and under torch.compile return what plain calls return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Family, Invocation, backends, differentiable, families, forced_backend, same_bits
from .clock import graph_replay
from .setting import Setting

Results = tuple[Tensor, ...]


def draw_call(
    family: Family, op: str, shape: tuple[int, ...], setting: Setting, seed: int
) -> Invocation:
    return family.make(op, shape, setting.device, setting.seed + seed)


def overwrite(target: Invocation, source: Invocation) -> None:
    """Copy other values into the same memory, as a graph's inputs change."""
    for a, b in zip(target.args, source.args, strict=True):
        if isinstance(a, Tensor):
            a.copy_(b)


def replay_check(
    setting: Setting, family: Family, op: str, backward: bool
) -> Callable[[], tuple[bool, str]]:
    """Capture a graph on some inputs and replay it on others: it returns the bits of a
    plain call.
    """

    def check() -> tuple[bool, str]:
        first, second = (draw_call(family, op, family.small, setting, i) for i in range(2))
        call = first.backward if backward else first.forward
        stale = [x.clone() for x in call()]
        expected = second.backward() if backward else second.forward()
        replay: Callable[[], Results] = graph_replay(call) if setting.device == "cuda" else call
        for _ in range(2):
            overwrite(first, second)
            result = replay()
        if setting.device == "cuda":
            torch.cuda.synchronize()
        same = all(same_bits(a, b) for a, b in zip(result, expected, strict=True))
        moved = not all(same_bits(a, b) for a, b in zip(result, stale, strict=True))
        return same and moved, f"same bits: {same}, changed with the inputs: {moved}"

    return check


class Module(nn.Module):
    """An op between two trivial ones."""

    def __init__(self, call: Invocation) -> None:
        super().__init__()
        self.op = call.op
        self.rest = [a for i, a in enumerate(call.args) if i]

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(torch.ops.clam, self.op)(2.0 * x, *self.rest)
        floats = [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point()]
        return floats[-1] + 1.0


def compile_check(setting: Setting, family: Family, op: str) -> Callable[[], tuple[bool, str]]:
    """torch.compile makes one graph for every N: the second and third size compile nothing."""

    def check() -> tuple[bool, str]:
        import torch._dynamo as dynamo

        dynamo.reset()
        compiled = 0

        def counting(module: Any, inputs: Any) -> Any:
            nonlocal compiled
            compiled += 1
            if setting.dry_run:
                return module.forward
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(module, inputs)

        _, *others = family.small
        n = 2048  # `make` gives smaller calls masks of N rows, which are not marked dynamic
        call = draw_call(family, op, (n, *others), setting, 0)
        plain = Module(call)
        fast = torch.compile(plain, backend=counting, fullgraph=True)
        good = True
        for size in (n, n - 37, n - 101):
            x = call.args[0][:size].clone()
            dynamo.mark_dynamic(x, 0)
            good &= bool(torch.allclose(fast(x), plain(x), rtol=1e-5, atol=1e-5))
        return good and compiled == 1, f"results agree: {good}, {compiled} compilations"

    return check


def cases(setting: Setting) -> Iterator[tuple[str, str, Callable[[], tuple[bool, str]]]]:
    """(label, backend, check)."""
    for family in families():
        for op in family.captured:
            for backend in backends(op, setting.device)[0]:
                for backward in (False, True) if differentiable(op) else (False,):
                    label = f"{op} {'forward + backward' if backward else 'forward'} replayed"
                    yield label, backend, replay_check(setting, family, op, backward)
        for op in family.compiled:
            for backend in backends(op, setting.device)[0]:
                yield f"{op} compiled", backend, compile_check(setting, family, op)


def run(setting: Setting) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    for label, backend, check in cases(setting):
        try:
            with forced_backend(backend)():
                passed, detail = check()
        except Exception as error:  # the other cases still run
            passed, detail = False, f"{type(error).__name__}: {error}"[:300]
        results.append({"what": f"{label} {backend}", "ok": passed, "said": detail})
        setting.save({"status": "timeout", "cases": results})
    failures = [f"{c['what']}: {c['said']}" for c in results if not c["ok"]]
    status = "fail" if failures else "pass"
    reason = "; ".join(failures)[:1000] if failures else f"{len(results)} cases"
    return {"status": status, "reason": reason, "cases": results, "stand_in": setting.dry_run}
