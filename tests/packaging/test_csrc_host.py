# SPDX-License-Identifier: Apache-2.0
"""The per-thread bodies of csrc/, compiled by g++, against the reference in float64."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from python_fallback import am

CSRC = Path(__file__).parents[2] / "csrc"
GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is missing")

# What recursion_small_kernel does around the bodies, in sequence instead of in parallel: rows in
# packs of R, memories in tiles, the update, the way back to the caller's coordinates.
HARNESS = r"""
#include <algorithm>
#include <vector>
#include "am.h"
using namespace clam;

template <int D, int R, bool P>
void run(const float* v, const float* rho, const float* scale, const float* bias, const float* gain,
         const float* centre, float* out, int rows, int memories, int d, int steps, int tile) {
  constexpr int Q = am::Slot<D, P>::kQuads, G = am::kGroupMax;
  std::vector<std::vector<Quad>> tables;
  bool alive = false;
  for (int at = 0; at < memories; at += tile) {
    const int real = std::min(tile, memories - at), full = (real + G - 1) / G * G;
    tables.emplace_back(full * Q);
    for (int k = 0; k < full; ++k) {
      Quad* slot = &tables.back()[k * Q];
      if (k >= real) { am::pack_padding<D, P>(slot); continue; }
      alive |= bias[at + k] != -kInfinity;
      am::pack<D, P>(rho + (at + k) * d, d, scale[P ? at + k : 0], bias[at + k], slot);
    }
  }
  for (int first = 0; first < rows; first += R) {
    float x[R][D] = {};
    for (int r = 0; r < R && first + r < rows; ++r)
      for (int i = 0; i < d; ++i) x[r][i] = v[(first + r) * d + i] - centre[i];
    for (int t = 0; t < steps && alive; ++t) {
      float lift[R];
      am::Recall<D> recall[R];
      for (int r = 0; r < R; ++r)
        lift[r] = am::begin<D, P>(x[r], recall[r]);
      for (const auto& table : tables)
        am::fold<D, R, P>(table.data(), static_cast<int>(table.size()) / Q, x, lift,
                          P ? 0.0f : kLog2e * scale[0], recall);
      for (int r = 0; r < R && first + r < rows; ++r) {
        const float inverse = 1.0f / recall[r].mass;
        for (int i = 0; i < d; ++i)
          x[r][i] = am::advance(x[r][i], recall[r].sum[i] * inverse, gain[(first + r) * d + i]);
      }
    }
    for (int r = 0; r < R && first + r < rows; ++r)
      for (int i = 0; i < d; ++i) {
        const int at = (first + r) * d + i;
        out[at] = am::restore(x[r][i], v[at], centre[i]);
      }
  }
}

template <int D>
void pick(bool per_memory, bool wide, const float* v, const float* rho, const float* scale,
          const float* bias, const float* gain, const float* centre, float* out, int rows,
          int memories, int d, int steps, int tile) {
  constexpr int R = am::rows_per_thread(D);
  const auto f = per_memory ? (wide ? run<D, R, true> : run<D, 1, true>)
                            : (wide ? run<D, R, false> : run<D, 1, false>);
  f(v, rho, scale, bias, gain, centre, out, rows, memories, d, steps, tile);
}

#define SIZE(D)                                                                               \
  case D:                                                                                     \
    pick<D>(per_memory, wide, v, rho, scale, bias, gain, centre, out, rows, memories, d, steps, \
            tile);                                                                            \
    return 0

extern "C" int recursion(int per_memory, int wide, const float* v, const float* rho,
                         const float* scale, const float* bias, const float* gain,
                         const float* centre, float* out, int rows, int memories, int d, int steps,
                         int tile) {
  switch (am::padded_features(d)) {
    SIZE(1); SIZE(2); SIZE(3); SIZE(4); SIZE(5); SIZE(6); SIZE(7); SIZE(8); SIZE(12); SIZE(16);
  }
  return 1;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("csrc")
    source, target = folder / "host.cpp", folder / "host.so"
    source.write_text(HARNESS, encoding="utf-8")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared"]
    command = [str(GXX), *flags, "-fPIC", f"-I{CSRC}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def recursion(
    library: Any,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    wide: bool = True,
    tile: int = 4096,
) -> Tensor:
    """The operands that csrc/register.cpp asks for, as a launcher makes them, and the call."""
    (rows, d), memories = v.shape, len(rho)
    alive = torch.ones(memories) if log_weights is None else (log_weights > -torch.inf).float()
    centre = (rho * alive[:, None]).sum(0) / alive.sum().clamp(min=1)
    inner = torch.where(alive[:, None] > 0, rho - centre, 0.0)
    betas = torch.as_tensor(beta, dtype=torch.float32).reshape(-1)
    bias = -betas * inner.square().sum(-1) + (0.0 if log_weights is None else log_weights)
    gain = torch.full_like(v, step) if update_mask is None else step * update_mask.to(v.dtype)
    operands = [v, inner, 2 * betas, bias, gain, centre, torch.full_like(v, torch.nan)]
    operands = [x.contiguous() for x in operands]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in operands]
    per_memory = int(len(betas) > 1)
    sizes = (rows, memories, d, steps, tile)
    assert library.recursion(per_memory, int(wide), *pointers, *sizes) == 0
    return operands[-1]


def agrees(got: Tensor, args: tuple[Any, ...], scale: float) -> None:
    """As exact as centred eager float32 of the same call, within a factor of 2 and 4 roundings.

    By a quantile over rows: at the border of two basins a row multiplies its rounding errors in
    every step, and which of two float32 results is nearer the truth there is luck.
    """
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    truth = am.am_recursion(*wide)
    eager, error = ((x - truth).abs().amax(-1) for x in (am.am_recursion(*args), got))
    rounding = 4 * torch.finfo(torch.float32).eps * scale
    assert error.quantile(0.9) <= 2 * eager.quantile(0.9) + rounding
    assert error.max() <= 1e-3 * scale


MASKS = (None, "bool", "float")
WEIGHTS = (None, "finite", "some dead", "one alive")
BETAS = (0.0, 0.3, 4.0, "per memory")
STEPS = ((0, 1.0), (1, 1.0), (2, 0.5), (5, 0.3), (5, 1.0))


@pytest.mark.parametrize("d", range(1, 17))
def test_equals_the_reference(library: Any, d: int) -> None:
    """Every K from 1 to 100 for every D; the sizes share the combinations among them."""
    combinations = list(itertools.product(MASKS, WEIGHTS, BETAS, STEPS))
    turn = itertools.islice(itertools.cycle(combinations), 100 * d, None)
    for k in range(1, 101):
        mask_kind, weight_kind, beta, (steps, step) = next(turn)
        g = torch.Generator().manual_seed(1000 * d + k)
        v = torch.randn(64, d, generator=g)
        rho = torch.randn(k, d, generator=g)
        mask = None
        if mask_kind is not None:
            mask = torch.rand(64, d, generator=g)
            mask = mask > 0.4 if mask_kind == "bool" else mask
        weights = None
        if weight_kind is not None:
            weights = torch.randn(k, generator=g)
            if weight_kind == "some dead":
                weights[torch.rand(k, generator=g) > 0.5] = -torch.inf
            elif weight_kind == "one alive":
                weights = torch.where(torch.arange(k) == k // 2, weights, -torch.inf)
        if beta == "per memory":
            beta = torch.rand(k, generator=g) * 2
        args = (v, rho, beta, steps, step, mask, weights)
        for wide, tile in ((True, 4096), (False, 4096), (True, 8)):
            agrees(recursion(library, *args, wide=wide, tile=tile), args, 4.0)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 11, 16])
def test_rows_and_tiles_change_nothing_but_rounding(library: Any, d: int) -> None:
    """A row's bits do not depend on the rows beside it."""
    g = torch.Generator().manual_seed(d)
    v, rho = torch.randn(9, d, generator=g), torch.randn(30, d, generator=g)
    whole = recursion(library, v, rho, 1.5, 4)
    for r in range(9):
        assert torch.equal(recursion(library, v[r : r + 1], rho, 1.5, 4), whole[r : r + 1])
    assert torch.equal(recursion(library, v, rho, 1.5, 4, wide=False), whole)


@pytest.mark.parametrize("d", [1, 3, 8, 16])
def test_far_from_the_origin_and_sharp(library: Any, d: int) -> None:
    """Centring holds the expanded distance together; a late maximum takes the rescaling branch."""
    g = torch.Generator().manual_seed(d)
    rho = torch.randn(40, d, generator=g)
    v = rho[:8] + 0.1 * torch.randn(8, d, generator=g)
    for beta in (1.0, 300.0, torch.full((40,), 300.0)):
        args = (v + 1000.0, rho + 1000.0, beta, 3)
        agrees(recursion(library, *args), args, 1000.0)
        args = (v, rho, beta, 3)
        agrees(recursion(library, *args), args, 4.0)
        worst_first = rho[(rho - v[0]).square().sum(-1).argsort(descending=True)]
        args = (v[:1], worst_first, beta, 1)
        agrees(recursion(library, *args), args, 4.0)


def test_held_entries_keep_their_bits(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho = torch.randn(50, 5, generator=g) * 1e3, torch.randn(6, 5, generator=g) + 0.1
    mask = torch.rand(50, 5, generator=g) > 0.5
    out = recursion(library, v, rho, 0.5, 4, update_mask=mask)
    assert torch.equal(out[~mask], v[~mask])
    assert (out[mask] != v[mask]).all()
    assert torch.equal(recursion(library, v, rho, 0.5, 0), v)
    assert torch.equal(recursion(library, v, rho, 0.5, 3, step=0.0), v)


def test_no_memory_alive_moves_nothing(library: Any) -> None:
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    dead = torch.full((4,), -torch.inf)
    assert torch.equal(recursion(library, v, rho, 1.0, 3, log_weights=dead), v)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("beta", [0.7, "per memory"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_bad_row_turns_to_nan_alone(library: Any, bad: float, beta: Any, weighted: bool) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho = torch.randn(9, 4, generator=g), torch.randn(7, 4, generator=g)
    beta = torch.rand(7, generator=g) if beta == "per memory" else beta
    weights = torch.randn(7, generator=g) if weighted else None
    if weights is not None:
        weights[:2] = -torch.inf
    broken = v.clone()
    broken[4, 2] = bad
    fine = recursion(library, v, rho, beta, 2, log_weights=weights)
    out = recursion(library, broken, rho, beta, 2, log_weights=weights)
    assert out[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(out[others], fine[others])
