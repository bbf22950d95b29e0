# SPDX-License-Identifier: Apache-2.0
"""Run ops forward and backward on every backend of the device, with tiny shapes, under
compute-sanitizer. `python3 -m bench.gpu.sanitize --seed N [--device cuda] [--ops OP ...]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings

import torch

from .cases import (
    Invocation,
    backends,
    differentiable,
    family_of,
    forced_backend,
    refusal,
    with_kernels,
)


def copied(call: Invocation, device: str) -> Invocation:
    """The call with its arguments on a device: the tools count a copy as a write."""
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in call.args)
    return dataclasses.replace(call, args=args)


def outcome(call: Invocation, backend: str, device: str) -> str | None:
    """None for a call that ran, else "refused: ..." or "failed: ..."."""
    reason = refusal(backend, call.op, *call.args)
    if reason is not None:
        return f"refused: {reason}"
    try:
        with forced_backend(backend)():
            call.forward()
            if differentiable(call.op):
                call.backward()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # the other calls still run
        return f"failed: {type(error).__name__}: {error}"
    return None


def main() -> int:
    ops = with_kernels()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    outcomes = []
    for op in arguments.ops:
        for backend in backends(op, arguments.device)[0]:
            for shape in family_of(op).tiny:
                call = copied(
                    family_of(op).make(op, shape, "cpu", arguments.seed), arguments.device
                )
                outcomes.append(outcome(call, backend, arguments.device))
                if outcomes[-1] is not None:
                    print(f"{op} {backend} {shape} {outcomes[-1]}"[:300])
    refused = sum(result is not None and result.startswith("refused") for result in outcomes)
    failed = sum(result is not None for result in outcomes) - refused
    print(f"sanitize: {outcomes.count(None)} calls done, {refused} refused, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
