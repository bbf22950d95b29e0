# SPDX-License-Identifier: Apache-2.0
"""Every op forward and backward on every backend of the device, with tiny shapes: what
compute-sanitizer is given to watch. `python3 -m bench.gpu.sanitize --seed N [--device cuda]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings

import torch

import clam_kernels

from .cases import Invocation, backends, differentiable, family_of, forced


def moved(call: Invocation, device: str) -> Invocation:
    """Drawn on the CPU and copied: the tools know a copy as a write."""
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in call.args)
    return dataclasses.replace(call, args=args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    calls = refused = 0
    for spec in clam_kernels.all_ops():
        family = family_of(spec.name)
        for backend in backends(spec.name, given.device)[0]:
            for shape in family.tiny:
                call = moved(family.make(spec.name, shape, "cpu", given.seed), given.device)
                try:
                    with forced(backend)():
                        call.forward()
                        if differentiable(spec.name):
                            call.backward()
                except (RuntimeError, NotImplementedError) as error:
                    # a kernel for few dims says so; a fault of memory ends all calls after it
                    refused += 1
                    print(f"refused: {spec.name} {backend} {shape}: {str(error)[:200]}")
                    continue
                calls += 1
    if given.device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitize: {calls} calls done, {refused} refused")


if __name__ == "__main__":
    main()
