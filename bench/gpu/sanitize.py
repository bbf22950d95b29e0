# SPDX-License-Identifier: Apache-2.0
"""Ops forward and backward on every backend of the device, with tiny shapes: what
compute-sanitizer is given to watch. `python3 -m bench.gpu.sanitize --seed N [--device cuda]
[--ops OP ...]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings

import torch

from .cases import Invocation, backends, differentiable, family_of, forced, refusal, with_kernels


def moved(call: Invocation, device: str) -> Invocation:
    """Drawn on the CPU and copied: the tools know a copy as a write."""
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in call.args)
    return dataclasses.replace(call, args=args)


def outcome(call: Invocation, backend: str, device: str) -> str | None:
    """None for a call that was done, else what is against it."""
    why = refusal(backend, call.op, *call.args)
    if why is not None:
        return f"refused: {why}"
    try:
        with forced(backend)():
            call.forward()
            if differentiable(call.op):
                call.backward()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # the others are still worth watching, if memory is whole
        return f"failed: {type(error).__name__}: {error}"
    return None


def main() -> int:
    ops = with_kernels()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops)
    given = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    found = []
    for op in given.ops:
        for backend in backends(op, given.device)[0]:
            for shape in family_of(op).tiny:
                call = moved(family_of(op).make(op, shape, "cpu", given.seed), given.device)
                found.append(outcome(call, backend, given.device))
                if found[-1] is not None:
                    print(f"{op} {backend} {shape} {found[-1]}"[:300])
    refused = sum(said is not None and said.startswith("refused") for said in found)
    failed = sum(said is not None for said in found) - refused
    print(f"sanitize: {found.count(None)} calls done, {refused} refused, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
