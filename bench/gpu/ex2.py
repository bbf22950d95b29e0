# SPDX-License-Identifier: Apache-2.0
"""A kernel that computes exponentials only: it measures the unit that limits small D."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, UNROLL = 1024, 32


@triton.jit
def ex2_kernel(OUT, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """x <- 2^-x, `rounds * UNROLL` times for each entry; x converges to the fixed point 0.64."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 97).to(tl.float32) * 0.01
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            x = tl.inline_asm_elementwise(
                "{.reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t;}", "=f,f", [x],
                dtype=tl.float32, is_pure=True, pack=1,
            )  # fmt: skip
    tl.store(OUT + at, x)
