# SPDX-License-Identifier: Apache-2.0
"""Stage ceilings: measure the highest rates of this GPU; all shares are relative to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .clock import Clock, graph_replay, products
from .setting import Setting

SIDE = 8192
COPY_BYTES = 4 << 30
H2D_BYTES = 256 << 20
LAUNCHES = 200


def rate(clock: Clock, amount: float, call: Callable[[], Any], rounds: int = 7) -> float:
    """Amount per second, from the median of a few rounds after warm-up."""
    for _ in range(3):
        call()
    return 1e3 * amount / statistics.median(clock.device(call) for _ in range(rounds))


def copy(clock: Clock, device: str, nbytes: int) -> float:
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return rate(clock, 2.0 * nbytes, lambda: target.copy_(source))


def matmul(clock: Clock, device: str, side: int, dtype: torch.dtype, mode: str) -> float:
    """FLOPs per second of products of random data: products of zeros run faster."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with products(mode):
        return rate(clock, 2.0 * side**3, lambda: torch.mm(a, b, out=out))


def exponentials(clock: Clock, device: str) -> float:
    """2^x per second, with operands in registers."""
    if not clock.cuda:
        x = torch.rand(1 << 16)
        return rate(clock, float(x.numel()), lambda: torch.exp2(x))
    from .ex2 import BLOCK, UNROLL, ex2_kernel

    programs, rounds = 16 * torch.cuda.get_device_properties(0).multi_processor_count, 64
    out = torch.empty(programs * BLOCK, device=device)
    result = rate(
        clock, float(out.numel()) * rounds * UNROLL,
        lambda: ex2_kernel[(programs,)](out, rounds, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=4),
    )  # fmt: skip
    assert abs(float(out.mean()) - 0.6412) < 1e-3, "ex2_kernel is wrong, so is its rate"
    return result


def latencies(clock: Clock, device: str) -> dict[str, float]:
    """Microseconds of a launch with almost no work: in a stream, in a graph, and of a whole
    replay.
    """
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            x.add_(1.0)

    many()
    result = {"launch_us": 1e3 * clock.device(many) / LAUNCHES}
    if clock.cuda:
        replay = graph_replay(many)
        result["launch_in_graph_us"] = 1e3 * clock.device(replay) / LAUNCHES
        single = graph_replay(lambda: x.add_(1.0))
        result["graph_replay_us"] = 1e6 * statistics.median(clock.host(single) for _ in range(50))
        result["synchronize_us"] = 1e6 * statistics.median(
            clock.host(lambda: None) for _ in range(50)
        )
    return result


def host_to_device(clock: Clock, device: str, nbytes: int) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=clock.cuda)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return rate(clock, float(nbytes), lambda: target.copy_(source, non_blocking=True))


def kernel_compiles() -> str:
    """Whether the Triton kernel of this stage compiles for sm_90; this needs no GPU."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        return f"not checked: {error}"
    from .ex2 import BLOCK, UNROLL, ex2_kernel

    signature = {"OUT": "*fp32", "rounds": "i32", "BLOCK": "constexpr", "UNROLL": "constexpr"}
    source = ASTSource(
        fn=ex2_kernel, signature=signature, constexprs={(2,): BLOCK, (3,): UNROLL}, attrs={}
    )
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return f"compiles, {done.asm['ptx'].count('ex2.approx.ftz')} ex2 in its PTX"


def run(setting: Setting) -> dict[str, Any]:
    device, dry = setting.device, setting.dry_run
    torch.manual_seed(setting.seed)
    clock, side = Clock(device), 64 if dry else SIDE
    rates: dict[str, float] = {}
    result: dict[str, Any] = {"status": "timeout", "rates": rates, "stand_in": dry}
    started = time.monotonic()
    parts: dict[str, Callable[[], float]] = {
        "copy": lambda: copy(clock, device, 1 << 20 if dry else COPY_BYTES),
        "bf16": lambda: matmul(clock, device, side, torch.bfloat16, "highest"),
        "tf32": lambda: matmul(clock, device, side, torch.float32, "high"),
        "fp32": lambda: matmul(clock, device, side, torch.float32, "highest"),
        "ex2": lambda: exponentials(clock, device),
        "h2d": lambda: host_to_device(clock, device, 1 << 20 if dry else H2D_BYTES),
    }
    failed = {}
    for name, part in parts.items():
        try:
            rates[name] = part()
        except Exception as error:  # one ceiling that fails must not hide the others
            failed[name] = f"{type(error).__name__}: {error}"[:300]
        setting.save(result)
    result["latencies"] = latencies(clock, device)
    if dry:
        result["kernel"] = kernel_compiles()
    result["seconds_measuring"] = time.monotonic() - started
    reason = "; ".join(f"{k}: {v}" for k, v in failed.items()) or None
    return {**result, "status": "fail" if failed else "pass", "reason": reason}
