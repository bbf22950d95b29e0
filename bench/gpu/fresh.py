# SPDX-License-Identifier: Apache-2.0
"""Check every sample of every op on every backend of the device, with the random numbers of a new
seed: `python3 -m bench.gpu.fresh --seed N [--device cuda] [--ops OP ...]`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from clam_kernels import testing

from .cases import backends, forced_backend, refusal, with_kernels
from .setting import ROOT

sys.path.append(str(ROOT / "tests"))
from _accuracy import assert_accurate

DRAWS = 6


def draw_sample(op: str, name: str, dtype: torch.dtype, device: str, seed: int) -> testing.Sample:
    sample = next(s for s in testing.samples(op, seed) if s.name == name)
    return sample.cast(dtype, device)


def judge(spec: Any, samples: list[testing.Sample], wanted: tuple[str, ...]) -> None:
    """AssertionError if an output or a gradient is worse than twice plain torch, on the average of
    draws.
    """
    draws = []
    for sample in samples:
        exact = sample.cast(torch.float64, sample.args[0].device.type)
        ours = testing.evaluate(spec.packet, sample)
        grads = testing.upstream(ours.outputs)
        ways = ((spec.packet, sample), (spec.truth, exact), (spec.truth, sample))
        draws.append(tuple(testing.evaluate(f, s, wanted, grads) for f, s in ways))
    assert_accurate(draws)


def cases(ops: Sequence[str], device: str, seed: int) -> Iterator[tuple[str, Any]]:
    """(label, check under the forced backend, or the reason of its refusal)."""
    for spec in map(testing.spec_of, ops):
        for backend in backends(spec.name, device)[0]:
            for sample in testing.samples(spec.name, seed):
                if torch.float32 not in sample.dtypes:
                    continue
                draws = [
                    draw_sample(spec.name, sample.name, torch.float32, device, seed + i)
                    for i in range(DRAWS)
                ]
                wanted = (*sample.differentiable, *sample.kinks) if spec.gradient else ()

                def call(
                    spec: Any = spec,
                    backend: str = backend,
                    draws: Any = draws,
                    wanted: Any = wanted,
                ) -> None:
                    with forced_backend(backend)():
                        judge(spec, draws, wanted)

                why = refusal(backend, spec.name, *draws[0].args)
                yield f"{spec.name} {backend} {sample.name}", why or call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="stop after so many")
    ops = with_kernels()
    parser.add_argument("--ops", nargs="+", choices=ops, help="all by default")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    print(f"fresh seed {arguments.seed}", flush=True)
    failed = done = 0
    for label, call in cases(arguments.ops or ops, arguments.device, arguments.seed):
        if done >= arguments.most:
            break
        if isinstance(call, str):
            print(f"refused {label}: {call}", flush=True)
            continue
        try:
            call()
        except Exception as error:  # the other cases still run
            failed += 1
            print(f"FAILED {label}: {type(error).__name__}: {error}"[:400], flush=True)
        done += 1
    print(f"{done} cases, {failed} failed")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
