# SPDX-License-Identifier: Apache-2.0
"""The per-thread bodies of csrc/, compiled by g++, against the reference and its autograd in
float64.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from _watch import rows_in_doubt
from torch import Tensor

from clam_kernels import testing
from python_fallback import am

pytest.importorskip("triton", reason="triton is missing")
from clam_kernels.kernels.am import cuda

CSRC = Path(__file__).parents[2] / "csrc"
GXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(GXX is None, reason="g++ is missing")

# What the kernels do around the bodies, in sequence instead of in parallel: rows in packs of R,
# memories in tiles, the lanes of a warp one after the other, the update, the way back to the
# caller's coordinates.
HARNESS = r"""
#include <algorithm>
#include <vector>
#include "am_backward.h"
using namespace clam;
using am::Form;

struct Call {
  Rows v, rho, weights;
  const float *betas, *gain, *grad;  // betas [K], gain and grad [N, D]
  int rows, memories, d, steps, tile;
  bool per_memory;
};

// Centre and table as a block makes them: lanes' shares added as the shuffles add them.
struct Side {
  float centre[am::kMaxFeatures] = {};
  float peak = 0.0f;
  am::Betas betas{};
  int active = 0;
};

static Side find_centre(const Call& c) {
  Side side;
  for (int i = 0; i < c.d; ++i) {
    double sum[kWarp] = {};
    int active[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane)
      am::add_active(c.rho, 0, c.weights, 0, c.memories, i, lane, sum[lane], active[lane]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      for (int lane = 0; lane < offset; ++lane) {
        sum[lane] += sum[lane + offset];
        active[lane] += active[lane + offset];
      }
    side.centre[i] = active[0] > 0 ? static_cast<float>(sum[0] / active[0]) : 0.0f;
    side.active = active[0];
  }
  am::Extremes lanes[kWarp];
  std::fill(lanes, lanes + kWarp, am::no_memory());
  for (int k = 0; k < c.memories; ++k) {
    const float weight = c.weights.data ? number(c.weights, k * c.weights.row) : 0.0f;
    am::add_memory(c.betas ? c.betas[k] : 1.0f, weight, lanes[k % kWarp]);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    for (int lane = 0; lane < offset; ++lane) am::add_share(lanes[lane + offset], lanes[lane]);
  side.peak = kLog2e * lanes[0].peak;
  side.betas = am::betas_of(lanes[0], c.per_memory);
  return side;
}

template <int D, Form F>
std::vector<Quad> stage(const Call& c, const Side& side, int first, int real) {
  const int count = static_cast<int>(am::table_size(real));
  std::vector<Quad> table(count * am::Slot<D, F>::kQuads);
  for (int k = 0; k < count; ++k) {
    Quad* slot = &table[k * am::Slot<D, F>::kQuads];
    if (k >= real) { am::pack_padding<D, F>(slot); continue; }
    const float weight = c.weights.data ? number(c.weights, (first + k) * c.weights.row) : 0.0f;
    const auto feature = [&](int i) {
      return i < c.d ? load_entry(c.rho, (first + k) * c.rho.row + i * c.rho.feature) : 0.0f;
    };
    am::pack<D, F>(feature, side.centre, c.betas[first + k], weight, slot);
  }
  return table;
}

template <int D>
void load(const Call& c, const Side& side, int row, float (&x)[D]) {
  for (int i = 0; i < D; ++i) x[i] = 0.0f;
  if (row >= c.rows) return;
  load_row<D>(c.v, row * c.v.row, c.v.packed && c.d == D, c.d, x);
  for (int i = 0; i < D; ++i) x[i] -= side.centre[i];
}

static float scale_of(const Call& c) { return c.per_memory ? 0.0f : am::scale_of(c.betas[0]); }

template <int D, int R, Form F>
void forward(const Call& c, float* out, unsigned char* flag) {
  constexpr int kQuads = am::Slot<D, F>::kQuads;
  const Side side = find_centre(c);
  std::vector<std::vector<Quad>> tables;
  for (int at = 0; at < c.memories; at += c.tile)
    tables.push_back(stage<D, F>(c, side, at, std::min(c.tile, c.memories - at)));
  for (int first = 0; first < c.rows; first += R) {
    float x[R][D], height[R];
    bool doubt[R] = {};
    for (int r = 0; r < R; ++r) load<D>(c, side, first + r, x[r]);
    for (int r = 0; r < R; ++r) height[r] = side.peak;
    for (int t = 0; t < c.steps && side.active; ++t) {
      float lift[R], shift[R];
      am::Recall<D> recall[R];
      for (int r = 0; r < R; ++r) {
        const am::Stand stand = am::stand_of<D>(x[r], scale_of(c), c.per_memory);
        lift[r] = stand.lift;
        shift[r] = height[r] + stand.reach;
      }
      for (bool again = true; again;) {
        again = false;
        for (int r = 0; r < R; ++r) am::begin<D>(recall[r]);
        for (const auto& table : tables)
          am::fold<D, R, F>(table.data(), static_cast<int>(table.size()) / kQuads, x, lift, shift,
                            scale_of(c), recall);
        for (int r = 0; r < R; ++r) {
          const bool more = am::turn(recall[r].mass, recall[r].top, height[r], shift[r]);
          again = again || more;
        }
      }
      for (int r = 0; r < R && first + r < c.rows; ++r) {
        float recalled[D];
        const bool more = am::recalled_of<D>(recall[r], x[r], shift[r], side.betas, recalled);
        doubt[r] = doubt[r] || more;
        for (int i = 0; i < c.d; ++i)
          x[r][i] = am::advance(x[r][i], recalled[i], c.gain[(first + r) * c.d + i]);
      }
    }
    for (int r = 0; r < R && first + r < c.rows; ++r) {
      float raw[D];
      load_row<D>(c.v, (first + r) * c.v.row, false, c.d, raw);
      flag[first + r] =
          am::left_over<D>(doubt[r], x[r], raw, side.centre, side.betas.sharp);
      for (int i = 0; i < c.d; ++i)
        out[(first + r) * c.d + i] = am::restore(x[r][i], raw[i], side.centre[i]);
    }
  }
}

template <int D>
void pick(const Call& c, bool wide, float* out, unsigned char* flag) {
  constexpr int R = am::rows_per_thread(D);
  const auto f = !wide ? forward<D, 1, Form::kPerMemory>
                       : c.per_memory ? forward<D, R, Form::kPerMemory>
                                      : forward<D, R, Form::kShared>;
  f(c, out, flag);
}

// One product of matrix units as PTX's manual lays mma.m16n8k8 out over the lanes of a warp.
static void multiply(float (&c)[kWarp][4], const float (&a)[kWarp][4], const float (&b)[kWarp][2]) {
  float left[16][8], right[8][8];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = a[lane][i];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 2; ++i) right[lane % 4 + i * 4][lane / 4] = b[lane][i];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k)
        c[lane][i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
}

template <int D>
void collect(int kind, const float* rows, const float* weights, int first, int memories,
             float* sums) {
  for (int column = 0; column < D + 2 * kind; column += am::kColumns) {
    float c[kWarp][4] = {}, a[kWarp][4], b[kWarp][2];
    for (int group = 0; group < kWarp / am::kGroup; ++group) {
      for (int lane = 0; lane < kWarp; ++lane) {
        am::load_left(weights, kind, group, lane, a[lane]);
        am::load_right<D>(rows, (kind ? am::cross_column(D) : 0) + column, group, lane, b[lane]);
      }
      multiply(c, a, b);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      am::add_sums<D>(c[lane], kind, column, first, memories, lane, sums);
  }
}

// A block of two warps that take the groups of 32 rows in turn.
template <int D>
void backward(const Call& c, float* grad_v, float* partial, float* grad_mask,
              unsigned char* flag) {
  constexpr int kQuads = am::Slot<D, Form::kBackward>::kQuads, kWarps = 2;
  const Side side = find_centre(c);
  const auto table = stage<D, Form::kBackward>(c, side, 0, c.memories);
  const int64_t stride = am::sum_floats(D, c.memories);
  std::vector<float> sums(kWarps * stride);
  std::vector<Quad> rows(kWarp * am::row_stride(D) / 4);
  std::vector<float> weights(am::kWeightFloats);
  float* tile = &rows[0].x;
  double beta_sum = 0.0;
  for (int group = 0; group * kWarp < c.rows; ++group) {
    std::vector<am::Walk<D>> walks(kWarp);
    struct Way { float x[D], recalled[D], top, inverse; };
    std::vector<std::vector<Way>> ways(kWarp, std::vector<Way>(c.steps));
    const auto gain_of = [&](int lane, float (&gain)[D]) {
      const int row = group * kWarp + lane;
      for (int i = 0; i < D; ++i)
        gain[i] = row < c.rows && i < c.d ? c.gain[row * c.d + i] : 0.0f;
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = group * kWarp + lane;
      float x[1][D], gain[D];
      load<D>(c, side, row, x[0]);
      gain_of(lane, gain);
      float height = side.peak;
      bool doubt = false;
      for (auto& way : ways[lane]) {
        const am::Stand stand = am::stand_of<D>(x[0], scale_of(c), c.per_memory);
        const float lift[1] = {stand.lift};
        float shift[1] = {height + stand.reach};
        am::Recall<D> recall[1];
        do {
          am::begin<D>(recall[0]);
          am::fold<D, 1, Form::kBackward>(table.data(), static_cast<int>(table.size()) / kQuads, x,
                                          lift, shift, 0.0f, recall);
        } while (am::turn(recall[0].mass, recall[0].top, height, shift[0]));
        am::weigh_back<D>(recall[0], shift[0], way.top, way.inverse);
        const bool more =
            am::recalled_of<D>(recall[0], x[0], shift[0], side.betas, way.recalled);
        doubt = side.active && (doubt || more);
        for (int i = 0; i < D; ++i) {
          way.x[i] = x[0][i];
          x[0][i] = am::advance(x[0][i], way.recalled[i], gain[i]);
        }
      }
      if (doubt && row < c.rows) {
        float raw[D];
        load_row<D>(c.v, row * c.v.row, false, c.d, raw);
        doubt = am::are_finite<D>(raw, side.centre, side.betas.sharp);
      }
      am::Walk<D> none;
      for (auto& way : ways[lane])
        if (doubt) {
          am::take_out<D>(none, way.recalled);
          std::copy(none.x, none.x + D, way.x);
          way.top = none.top;
          way.inverse = none.inverse;
        }
      if (row < c.rows) flag[row] = doubt;
      for (int i = 0; i < D; ++i)
        walks[lane].g[i] = row < c.rows && i < c.d && !doubt ? c.grad[row * c.d + i] : 0.0f;
    }
    for (int t = c.steps - 1; t >= 0 && side.active; --t) {
      for (int lane = 0; lane < kWarp; ++lane) {
        const Way& way = ways[lane][t];
        am::Walk<D>& w = walks[lane];
        const int row = group * kWarp + lane;
        float gain[D];
        gain_of(lane, gain);
        std::copy(way.x, way.x + D, w.x);
        w.top = way.top;
        w.inverse = way.inverse;
        for (int i = 0; i < c.d && row < c.rows; ++i)
          grad_mask[row * c.d + i] += w.g[i] * (way.recalled[i] - way.x[i]);
        am::begin_back<D>(w, way.recalled, gain, c.per_memory);
        am::write_row<D>(w, tile, lane);
      }
      for (auto& w : walks)
        if (w.inverse == 0.0f) am::survey<D>(w, table.data(), c.memories);
      for (int first = 0; first < c.memories; first += am::kChunk) {
        std::fill(weights.begin(), weights.end(), NAN);  // of memories that are not there
        for (int lane = 0; lane < kWarp; ++lane)
          for (int j = 0; j < std::min(am::kChunk, c.memories - first); ++j) {
            float p, gz;
            am::visit<D>(walks[lane], &table[(first + j) * kQuads], p, gz);
            weights[am::weight_at(j, 0, lane)] = p;
            weights[am::weight_at(j, 1, lane)] = gz;
          }
        for (int kind = 0; kind < 2; ++kind)
          collect<D>(kind, tile, weights.data(), first, c.memories,
                     sums.data() + group % kWarps * stride);
      }
      for (auto& w : walks) {
        am::end_back<D>(w);
        beta_sum += w.beta_sum;
      }
    }
    for (int lane = 0; lane < kWarp && group * kWarp + lane < c.rows; ++lane)
      std::copy(walks[lane].g, walks[lane].g + c.d, grad_v + (group * kWarp + lane) * c.d);
  }
  for (int k = 0; k < c.memories; ++k)
    am::combine<D>(sums.data(), stride, kWarps, k, &table[k * kQuads], c.betas[k], c.per_memory,
                   beta_sum, c.d, partial + k * (c.d + 2));
}

static Call call_of(int type, int packed, const void* v, const void* rho, const float* betas,
                    const float* weights, const float* gain, const float* grad, int rows,
                    int memories, int d, int steps, int tile, int per_memory) {
  const Type kind = type == 0 ? Type::kFloat : type == 1 ? Type::kBFloat16 : Type::kHalf;
  return {{v, 0, 0, d, 1, kind, packed != 0}, {rho, 0, 0, d, 1, kind, false},
          {weights, 0, 0, 1, 0, Type::kFloat, false}, betas, gain, grad, rows, memories, d, steps,
          tile, per_memory != 0};
}

#define FORWARD(D) case D: pick<D>(c, wide, out, flag); return 0
#define BACKWARD(D) case D: backward<D>(c, grad_v, partial, grad_mask, flag); return 0

extern "C" int recursion(int type, int wide, const void* v, const void* rho, const float* betas,
                         const float* weights, const float* gain, float* out,
                         unsigned char* flag, int rows, int memories, int d, int steps, int tile,
                         int per_memory) {
  const Call c = call_of(type, wide, v, rho, betas, weights, gain, nullptr, rows, memories, d,
                         steps, tile, per_memory);
  switch (am::padded_features(d)) {
    FORWARD(1); FORWARD(2); FORWARD(3); FORWARD(4); FORWARD(5);
    FORWARD(6); FORWARD(7); FORWARD(8); FORWARD(12); FORWARD(16);
  }
  return 1;
}

extern "C" int recursion_backward(const float* v, const float* rho, const float* betas,
                                  const float* weights, const float* gain, const float* grad,
                                  float* grad_v, float* partial, float* grad_mask,
                                  unsigned char* flag, int rows, int memories, int d, int steps,
                                  int per_memory) {
  const Call c = call_of(0, 1, v, rho, betas, weights, gain, grad, rows, memories, d, steps, 0,
                         per_memory);
  switch (am::padded_backward(d)) {
    BACKWARD(1); BACKWARD(2); BACKWARD(3); BACKWARD(4);
    BACKWARD(6); BACKWARD(8); BACKWARD(12); BACKWARD(16);
  }
  return 1;
}

extern "C" void numbers(float* out) {
  const float all[] = {am::kNearFactor, am::kNearLimit,    am::kNearLimitOfMany, am::kFarLimit,
                       am::kLogitError, am::kLongest, am::kSharpest,   am::kMost};
  std::copy(all, all + 8, out);
}

extern "C" void doubts(const float* x, const float* recalled, const float* largest,
                       unsigned char* out, float sharp, int rows) {
  for (int row = 0; row < rows; ++row) {
    float a[4], b[4];
    std::copy(x + 4 * row, x + 4 * row + 4, a);
    std::copy(recalled + 4 * row, recalled + 4 * row + 4, b);
    out[row] = am::is_in_doubt<4>(a, b, 1.0f, largest[row], {sharp, 1.0f, am::kNearLimit});
  }
}

extern "C" int backward_memories(int d) {
  int k = 0;
  while (am::backward_warps(am::padded_backward(d), k + 1) > 0) ++k;
  return k;
}

extern "C" void centre(const float* rho, const float* weights, float* out, int memories, int d) {
  const Call c = call_of(0, 0, nullptr, rho, nullptr, weights, nullptr, nullptr, 0, memories, d, 0,
                         0, 0);
  const Side side = find_centre(c);
  std::copy(side.centre, side.centre + d, out);
  out[d] = static_cast<float>(side.active);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("csrc")
    source, target = folder / "host.cpp", folder / "host.so"
    source.write_text(HARNESS, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared"]
    command = [str(GXX), *flags, "-fPIC", f"-I{CSRC}", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target))


def pointers(*operands: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in operands]


def memory_side(rho: Tensor, beta: float | Tensor) -> tuple[Tensor, int]:
    """(a beta for each memory, whether they differ)."""
    betas = torch.as_tensor(beta, dtype=torch.float32).reshape(-1)
    return betas.expand(len(rho)).contiguous(), int(len(betas) > 1)


def gain_of(v: Tensor, step: float, update_mask: Tensor | None) -> Tensor:
    if update_mask is None:
        return torch.full(v.shape, step)
    return (step * update_mask.float()).contiguous()


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
    flag: Tensor | None = None,
) -> Tensor:
    """Pass raw operands as a launcher does; `flag` gets which rows are in doubt."""
    v, rho = v.contiguous(), rho.contiguous()
    (rows, d), memories = v.shape, len(rho)
    betas, per_memory = memory_side(rho, beta)
    out = torch.full(v.shape, torch.nan)
    gain = gain_of(v, step, update_mask)
    type_of = [torch.float32, torch.bfloat16, torch.float16].index(v.dtype)
    flag = torch.empty(rows, dtype=torch.uint8) if flag is None else flag
    operands = pointers(v, rho, betas, log_weights, gain, out, flag)
    sizes = (rows, memories, d, steps, tile, per_memory)
    assert library.recursion(type_of, int(wide), *operands, *sizes) == 0
    return out


def recursion_backward(
    library: Any,
    grad: Tensor,
    v: Tensor,
    rho: Tensor,
    beta: float | Tensor,
    steps: int,
    step: float = 1.0,
    update_mask: Tensor | None = None,
    log_weights: Tensor | None = None,
    flag: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, rho, beta [K], update_mask and log_weights [K], without the rows in doubt;
    `flag` gets which rows these are.
    """
    (rows, d), memories = v.shape, len(rho)
    betas, per_memory = memory_side(rho, beta)
    grad_v, grad_mask = torch.full((rows, d), torch.nan), torch.zeros(rows, d)
    partial = torch.full((memories, d + 2), torch.nan)
    gain = gain_of(v, step, update_mask)
    flag = torch.empty(rows, dtype=torch.uint8) if flag is None else flag
    operands = (v, rho, betas, log_weights, gain, grad, grad_v, partial, grad_mask, flag)
    sizes = (rows, memories, d, steps, per_memory)
    assert library.recursion_backward(*pointers(*operands), *sizes) == 0
    return grad_v, partial[:, :d], partial[:, d + 1], step * grad_mask, partial[:, d]


def assert_agrees(result: Tensor, args: tuple[Any, ...], scale: float) -> None:
    """As accurate as centred eager float32 of the same call, within a factor of 2 and 4 roundings.
    The test compares a quantile over rows: at the border of two basins every step multiplies the
    rounding errors of a row, and chance decides which float32 result is nearer to the truth.
    """
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    truth = am.am_recursion(*wide)
    plain = testing.eager("am_recursion")(*args)
    eager, error = ((x - truth).abs().amax(-1) for x in (plain, result))
    rounding = 4 * torch.finfo(torch.float32).eps * scale
    assert error.quantile(0.9) <= 2 * eager.quantile(0.9) + rounding
    assert error.max() <= 1e-3 * scale


def gradients(grad: Tensor, args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor | None]:
    """Autograd's gradients of v, rho, beta, update_mask, log_weights: of the truth in float64, of
    plain torch in float32.
    """
    function = am.am_recursion if dtype == torch.float64 else testing.eager("am_recursion")
    v, rho, beta, steps, step, mask, weights = args
    leaves = [
        x.to(dtype).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in (v, rho, beta, mask, weights)
    ]
    v, rho, beta, mask, weights = leaves
    out = function(v, rho, beta, steps, step, mask, weights)
    tracked = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    result = iter(torch.autograd.grad(out, tracked, grad.to(dtype), allow_unused=True))
    return [
        next(result) if isinstance(x, Tensor) and x.is_floating_point() else None for x in leaves
    ]


def assert_gradients_agree(library: Any, grad: Tensor, args: tuple[Any, ...]) -> None:
    """Each gradient is as accurate as eager float32's, within a factor of 2 and some roundings. For
    gradients with rows the test compares a quantile, as in `assert_agrees`. Those of the memories'
    side are sums over rows, in which the large errors of a few rows at the borders of basins would
    hide all others, so the upstream gradient of such rows is 0. It is 0 for rows in doubt too,
    which the second launch computes.
    """
    nudge = 1e-6 * torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0))
    nudged = (args[0].double() + nudge, *args[1:])
    there, here = (gradients(grad, a, torch.float64)[0] for a in (nudged, args))
    assert there is not None
    assert here is not None
    strain = (there - here).abs().amax(-1)
    grad = torch.where(strain[:, None] <= 4 * strain.median(), grad, 0.0)
    flag = torch.empty(len(grad), dtype=torch.uint8)
    recursion_backward(library, grad, *args, flag=flag)
    grad[flag > 0] = 0.0
    truth, eager = (gradients(grad, args, dtype) for dtype in (torch.float64, torch.float32))
    result = recursion_backward(library, grad, *args)
    names = ("v", "rho", "beta", "update_mask", "log_weights")
    for name, outcome, exact, plain in zip(names, result, truth, eager, strict=True):
        if exact is None or plain is None:
            continue
        if name == "beta" and len(exact) == 1:
            outcome = outcome.double().sum().reshape(1)
        assert outcome.isfinite().all(), name
        errors = [(x - exact).abs().reshape(len(exact), -1).amax(-1) for x in (outcome, plain)]
        of_rows = name in ("v", "update_mask")
        error, allowed = (e.quantile(0.9 if of_rows else 1.0) for e in errors)
        # eager's error of a single number may be almost 0 by chance
        rounding = (8 if of_rows else 32) * torch.finfo(torch.float32).eps
        size = exact.abs().max().clamp(min=1.0)
        assert error <= 2 * allowed + rounding * size, (name, error, allowed)


MASKS = (None, "bool", "float")
WEIGHTS = (None, "finite", "some masked", "one active")
BETAS = (0.0, 0.3, 4.0, "per memory")
STEPS = ((0, 1.0), (1, 1.0), (2, 0.5), (5, 0.3), (5, 1.0))


def draw_mask(kind: str | None, v: Tensor, generator: torch.Generator) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(v.shape, generator=generator)
    return mask > 0.4 if kind == "bool" else mask


def draw_log_weights(kind: str | None, k: int, generator: torch.Generator) -> Tensor | None:
    """Log weights of k memories, -inf for the masked ones."""
    if kind is None:
        return None
    weights = torch.randn(k, generator=generator)
    if kind == "some masked":
        weights[torch.rand(k, generator=generator) > 0.5] = -torch.inf
    elif kind == "one active":
        weights = torch.where(torch.arange(k) == k // 2, weights, -torch.inf)
    return weights


@pytest.mark.parametrize("d", range(1, 17))
def test_equals_the_reference(library: Any, d: int) -> None:
    """Every K from 1 to 100 for every D; the combinations of options rotate over the sizes."""
    combinations = list(itertools.product(MASKS, WEIGHTS, BETAS, STEPS))
    turn = itertools.islice(itertools.cycle(combinations), 100 * d, None)
    for k in range(1, 101):
        mask_kind, weight_kind, beta, (steps, step) = next(turn)
        g = torch.Generator().manual_seed(1000 * d + k)
        v = torch.randn(64, d, generator=g)
        rho = torch.randn(k, d, generator=g)
        mask, weights = draw_mask(mask_kind, v, g), draw_log_weights(weight_kind, k, g)
        if beta == "per memory":
            beta = torch.rand(k, generator=g) * 2
        args = (v, rho, beta, steps, step, mask, weights)
        for wide, tile in ((True, 4096), (False, 4096), (True, 8)):
            assert_agrees(recursion(library, *args, wide=wide, tile=tile), args, 4.0)


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
    """Centring keeps the digits of the expanded distance; a late maximum runs the rescaling
    branch.
    """
    g = torch.Generator().manual_seed(d)
    rho = torch.randn(40, d, generator=g)
    v = rho[:8] + 0.1 * torch.randn(8, d, generator=g)
    for beta in (1.0, 300.0, torch.full((40,), 300.0)):
        args = (v + 1000.0, rho + 1000.0, beta, 3)
        assert_agrees(recursion(library, *args), args, 1000.0)
        args = (v, rho, beta, 3)
        assert_agrees(recursion(library, *args), args, 4.0)
        worst_first = rho[(rho - v[0]).square().sum(-1).argsort(descending=True)]
        args = (v[:1], worst_first, beta, 1)
        assert_agrees(recursion(library, *args), args, 4.0)


def eager(v: Tensor, rho: Tensor, beta: float, steps: int) -> Tensor:
    """The plain torch form: two products and a softmax, the bias folded into the first."""
    bias, keys = -beta * rho.square().sum(-1), (2 * beta * rho).T
    for _ in range(steps):
        v = torch.softmax(torch.addmm(bias, v, keys), -1) @ rho
    return v


@pytest.mark.parametrize(("d", "k", "first"), [(16, 64, 300), (2, 8, 200)])
def test_largest_errors_are_those_of_eager(library: Any, d: int, k: int, first: int) -> None:
    """Over draws of memories, since all rows of one draw share the errors of its table. Some draws
    have a fixed point that barely attracts, where only such errors remain.
    """
    ratios = []
    for seed in range(first, first + 12):
        g = torch.Generator().manual_seed(seed)
        rho = torch.randn(k, d, generator=g)
        near = torch.randint(k, (4096,), generator=g)
        v = 0.5 * torch.randn(4096, d, generator=g) + rho[near]
        args = (v, rho, 3.0 / d, 10)
        truth = am.am_recursion(v.double(), rho.double(), *args[2:])
        errors = [(x - truth).abs().max() for x in (recursion(library, *args), eager(*args))]
        ratios.append(errors[0] / errors[1])
    assert torch.stack(ratios).log().mean().exp() <= 1.5


def test_masked_entries_keep_their_bits(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho = torch.randn(50, 5, generator=g) * 1e3, torch.randn(6, 5, generator=g) + 0.1
    mask = torch.rand(50, 5, generator=g) > 0.5
    out = recursion(library, v, rho, 0.5, 4, update_mask=mask)
    assert torch.equal(out[~mask], v[~mask])
    assert (out[mask] != v[mask]).all()
    assert torch.equal(recursion(library, v, rho, 0.5, 0), v)
    assert torch.equal(recursion(library, v, rho, 0.5, 3, step=0.0), v)


def test_without_active_memories_rows_stay(library: Any) -> None:
    v, rho = torch.randn(5, 3), torch.randn(4, 3)
    masked = torch.full((4,), -torch.inf)
    assert torch.equal(recursion(library, v, rho, 1.0, 3, log_weights=masked), v)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_memory_makes_every_row_nan(library: Any, bad: float) -> None:
    v, rho = torch.randn(9, 3), torch.randn(4, 3)
    rho[2, 1] = bad
    mask = torch.rand(9, 3) > 0.5
    for beta in (0.7, torch.rand(4)):
        out = recursion(library, v, rho, beta, 2, update_mask=mask)
        assert out.isnan().all()
        weights = torch.tensor([0.0, 0.0, -torch.inf, 0.0])
        assert recursion(library, v, rho, beta, 2, log_weights=weights).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("beta", [0.7, "per memory"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_nan_row_does_not_change_others(
    library: Any, bad: float, beta: Any, weighted: bool
) -> None:
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


def test_the_centre_is_the_mean_of_active_memories(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    for k, d in ((1, 1), (7, 3), (32, 16), (33, 5), (200, 8)):
        rho = torch.randn(k, d, generator=g) + 100.0
        weights = torch.randn(k, generator=g)
        result = torch.zeros(d + 1)
        for log_weights in (None, weights):
            active = torch.ones(k, dtype=torch.bool)
            if log_weights is not None:
                log_weights[::2] = -torch.inf
                rho[::2] = torch.nan
                active = log_weights > -torch.inf
            library.centre(*pointers(rho, log_weights, result), k, d)
            assert result[d] == active.sum()
            if active.any():
                mean = rho[active].double().mean(0)
                assert (result[:d] - mean).abs().max() <= 4e-7 * 100
            else:
                assert torch.equal(result[:d], torch.zeros(d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [1, 2, 4, 7, 16])
def test_loads_half_precision(library: Any, dtype: torch.dtype, d: int) -> None:
    """Each pattern of 16 bits is loaded as its value; a recursion computes in float32."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = bits[: len(bits) // d * d].reshape(-1, d)
    rho = torch.zeros(1, d, dtype=dtype)
    for wide in (True, False):
        out = recursion(library, bits, rho, 1.0, 0, wide=wide)
        assert torch.equal(out.nan_to_num(nan=-7.0), bits.float().nan_to_num(nan=-7.0))
    g = torch.Generator().manual_seed(d)
    v, rho = (torch.randn(n, d, generator=g).to(dtype) for n in (40, 9))
    assert torch.equal(
        recursion(library, v, rho, 2.0, 3), recursion(library, v.float(), rho.float(), 2.0, 3)
    )


def test_a_masked_memory_may_have_any_values(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho, grad = (torch.randn(n, 3, generator=g) for n in (40, 20, 40))
    weights = torch.randn(20, generator=g)
    weights[[0, 5, 19]] = -torch.inf
    fine = recursion(library, v, rho, 1.0, 3, log_weights=weights)
    args = (1.0, 3, 0.7, None, weights)
    slopes = recursion_backward(library, grad, v, rho, *args)
    for bad in (torch.nan, torch.inf, 1e30):
        rho[[0, 5, 19]] = bad
        assert torch.equal(recursion(library, v, rho, 1.0, 3, log_weights=weights), fine)
        for a, b in zip(recursion_backward(library, grad, v, rho, *args), slopes, strict=True):
            assert torch.equal(a, b)
    assert (slopes[1][[0, 5, 19]] == 0).all()


@pytest.mark.parametrize("d", range(1, 17))
def test_gradients_equal_autograd(library: Any, d: int) -> None:
    betas = (0.3, torch.tensor([0.0]), torch.tensor([0.7]), torch.tensor([4.0]), "per memory")
    steps = ((1, 1.0), (1, 0.5), (2, 0.7), (5, 0.3), (5, 1.0), (3, 1.4))
    combinations = list(itertools.product(MASKS, WEIGHTS, betas, steps))
    turn = itertools.islice(itertools.cycle(combinations), 23 * d, None, 7)
    for k in (1, 2, 3, 5, 8, 13, 15, 16, 17, 20, 31, 32, 33, 48, 64, 90):
        mask_kind, weight_kind, beta, (count, step) = next(turn)
        g = torch.Generator().manual_seed(1000 * d + k)
        v, grad = torch.randn(75, d, generator=g), torch.randn(75, d, generator=g)
        rho = torch.randn(k, d, generator=g)
        mask, weights = draw_mask(mask_kind, v, g), draw_log_weights(weight_kind, k, g)
        if weights is not None and weight_kind == "some masked":
            weights[k // 2] = 0.0
        if isinstance(beta, str):
            beta = torch.rand(k, generator=g) * 2
        assert_gradients_agree(library, grad, (v, rho, beta, count, step, mask, weights))


@pytest.mark.parametrize("d", [1, 3, 8, 16])
def test_gradients_far_from_the_origin_and_sharp(library: Any, d: int) -> None:
    g = torch.Generator().manual_seed(d)
    rho = torch.randn(40, d, generator=g)
    v, grad = rho[:36] + 0.1 * torch.randn(36, d, generator=g), torch.randn(36, d, generator=g)
    for beta in (torch.tensor([1.0]), torch.tensor([300.0]), torch.full((40,), 300.0)):
        for shift in (0.0, 1000.0):
            assert_gradients_agree(
                library, grad, (v + shift, rho + shift, beta, 3, 1.0, None, None)
            )


def test_gradients_that_vanish_are_zero(library: Any) -> None:
    """With one active memory p = 1 to the last bit; with none the gradient passes through."""
    g = torch.Generator().manual_seed(0)
    for d in range(1, 17):
        v, grad, rho = (torch.randn(n, d, generator=g) for n in (40, 40, 9))
        for beta in (5.0, torch.rand(9, generator=g)):
            one = torch.where(torch.arange(9) == 4, 0.3, -torch.inf)
            grad_v, _, beta_gradient, _, weights = recursion_backward(
                library, grad, v, rho, beta, 3, 1.0, None, one
            )
            assert not grad_v.any()
            assert not beta_gradient.any()
            assert not weights.any()
            none = torch.full((9,), -torch.inf)
            gradients = recursion_backward(library, grad, v, rho, beta, 3, 1.0, None, none)
            assert torch.equal(gradients[0], grad)
            assert not any(x.any() for x in gradients[1:])


def test_a_nan_row_does_not_change_other_gradients(library: Any) -> None:
    g = torch.Generator().manual_seed(0)
    v, grad, rho = (torch.randn(n, 4, generator=g) for n in (70, 70, 20))
    fine = recursion_backward(library, grad, v, rho, 0.7, 2)
    v[40, 1] = torch.nan
    gradients = recursion_backward(library, grad, v, rho, 0.7, 2)
    others = torch.arange(70) != 40
    assert gradients[0][40].isnan().all()
    assert torch.equal(gradients[0][others], fine[0][others])
    assert gradients[1].isnan().all()


# ---- rows in doubt -------------------------------------------------------------------------------


def scene(name: str, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, memories and betas far from their centre."""
    g = torch.Generator().manual_seed(seed)

    def n(*size: int) -> Tensor:
        return torch.randn(size, generator=g)

    place = torch.zeros(d)
    place[0] = 1.0
    if name.startswith("sentinel"):
        far = torch.full((1, d), 1e4 if name == "sentinel" else 1e3)
        return n(60, d), torch.cat([n(5, d), far]), torch.tensor([1.0])
    if name == "groups":
        far = 1e6 * place
        v, rho = torch.cat([n(30, d), far + n(30, d)]), torch.cat([n(5, d), far + n(5, d)])
        return v, rho, torch.tensor([0.7])
    if name == "offset":
        return 1e6 + n(60, d), 1e6 + n(8, d), torch.tensor([0.7])
    if name == "pair":
        v, rho = (
            torch.cat([n(40, d), 1e4 + 10 * n(20, d)]),
            torch.cat([n(5, d), 1e4 + 10 * n(2, d)]),
        )
        return v, rho, torch.tensor([0.01])
    if name == "betas":  # rows beside a sharp memory; it and a broad one are far from the rest
        rho = torch.cat([n(4, d), 300 * place + n(4, d)])
        v = rho.repeat(8, 1)[:60] + 0.3 * n(60, d)
        return v, rho, 10.0 ** torch.tensor([-4.0, 0, 4, 1, -4, 0, 4, 1])
    size, beta = {"large": (1e19, 1e-38), "tiny": (1e-30, 1e38), "sharp": (1.0, 3e38)}[name]
    return size * n(60, d), size * n(6, d), torch.tensor([beta])


SCENES = (
    "sentinel",
    "sentinel nearer",
    "groups",
    "offset",
    "pair",
    "betas",
    "large",
    "tiny",
    "sharp",
)


def differences(v: Tensor, rho: Tensor, beta: Tensor, steps: int) -> Tensor:
    """The recursion from differences, in the dtype of its operands."""
    for _ in range(steps):
        gaps = rho - v[:, None]
        p = torch.softmax(-beta * gaps.square().sum(-1), -1)
        v = v + (p[..., None] * gaps).sum(1)
    return v


def errors_of(result: Tensor, v: Tensor, rho: Tensor, beta: Tensor, steps: int) -> tuple[Any, ...]:
    """(error of each row, allowed error): twice the error of differences in float32 and 4 eps; 4
    eps alone where those differences overflow.
    """
    truth = differences(v.double(), rho.double(), beta.double(), steps)
    plain = differences(v, rho, beta, steps)
    error, allowed = ((x - truth).abs().amax(-1) for x in (result, plain))
    allowed = allowed.nan_to_num(nan=0.0)
    return error, 2 * allowed + 4 * torch.finfo(torch.float32).eps * truth.abs().amax()


@pytest.mark.parametrize("d", [2, 4, 8, 16])
@pytest.mark.parametrize("name", SCENES)
def test_a_wrong_row_has_its_flag(library: Any, name: str, d: int) -> None:
    wrong = 0
    for seed, steps in itertools.product(range(4), (1, 2)):
        v, rho, beta = scene(name, d, seed)
        flag, again = torch.full((2, len(v)), 7, dtype=torch.uint8)
        out = recursion(library, v, rho, beta, steps, flag=flag)
        assert set(flag.tolist()) <= {0, 1}
        error, allowed = errors_of(out, v, rho, beta, steps)
        over = ~(error <= allowed)
        assert flag[over].all(), (seed, steps, error[over & (flag == 0)])
        wrong += int(over.sum())
        recursion(library, v, rho, beta, steps, wide=False, tile=4, flag=again)
        assert torch.equal(again, flag)
    assert wrong > 0 or name in ("offset", "large", "tiny")


@pytest.mark.parametrize("d", [2, 3, 8, 11, 16])
@pytest.mark.parametrize("name", SCENES)
def test_a_flagged_row_adds_nothing_to_the_sums(library: Any, name: str, d: int) -> None:
    """Its gradients are 0 for any upstream gradient; other rows do not change."""
    flagged = 0
    for seed, steps in itertools.product(range(3), (1, 3)):
        v, rho, beta = scene(name, d, seed)
        v, flag = v[:45], torch.full((45,), 7, dtype=torch.uint8)
        grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
        gradients = recursion_backward(library, grad, v, rho, beta, steps, flag=flag)
        flagged_rows = flag == 1
        assert set(flag.tolist()) <= {0, 1}
        for x in (gradients[0], gradients[3]):
            assert not x[flagged_rows].any()
        for x in gradients:
            assert x.isfinite().all()
        grad[flagged_rows] = torch.nan
        for a, b in zip(
            recursion_backward(library, grad, v, rho, beta, steps), gradients, strict=True
        ):
            assert torch.equal(a, b)
        if flagged_rows.all():
            assert not any(x.any() for x in gradients)
        flagged += int(flagged_rows.sum())
    assert flagged > 0 or name == "offset"


@pytest.mark.parametrize("k", [6, 64])
@pytest.mark.parametrize(("d", "beta"), [(4, 0.2), (8, 0.2), (8, 20.0), (16, 0.2), (16, 20.0)])
def test_normal_data_have_no_flag(library: Any, d: int, k: int, beta: float) -> None:
    g = torch.Generator().manual_seed(k)
    rho = torch.randn(k, d, generator=g)
    v = rho[torch.arange(200) % k] + 0.6 * torch.randn(200, d, generator=g)
    flags = torch.full((3, 200), 7, dtype=torch.uint8)
    recursion(library, v, rho, beta, 5, flag=flags[0])
    recursion(library, v, rho, beta, 5, wide=False, flag=flags[1])
    recursion_backward(library, torch.ones_like(v), v, rho, beta, 5, flag=flags[2])
    assert not flags.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_operands_set_no_flag(library: Any, bad: float) -> None:
    """A row alone, or a memory, a beta or a log-weight with all rows: the result is NaN."""
    v, rho, beta = scene("sentinel", 4, 0)
    weights, betas = torch.zeros(6), torch.ones(6)
    flag, back = torch.full((2, 60), 7, dtype=torch.uint8)
    for where, index in ((v, (7, 1)), (rho, (2, 3)), (betas, (4,)), (weights, (1,))):
        row = where[index].item()
        where[index] = bad
        out = recursion(library, v, rho, betas, 2, log_weights=weights, flag=flag)
        recursion_backward(
            library, torch.ones_like(v), v, rho, betas, 2, 1.0, None, weights, flag=back
        )
        for result in (flag, back):
            assert not result[out.isnan().any(-1)].any()
            assert int(result.sum()) == (59 if where is v else 0)
        where[index] = row
    weights[2] = -torch.inf
    rho[2] = bad
    recursion(library, v, rho, beta, 2, log_weights=weights, flag=flag)
    assert flag.all()


def test_rows_that_cannot_be_wrong_have_no_flag(library: Any) -> None:
    v, rho, beta = scene("sentinel", 4, 0)
    flag, back = torch.full((2, 60), 7, dtype=torch.uint8)
    none = torch.full((6,), -torch.inf)
    recursion(library, v, rho, beta, 2, log_weights=none, flag=flag)
    recursion_backward(library, v, v, rho, beta, 2, 1.0, None, none, flag=back)
    assert not flag.any()
    assert not back.any()


def test_a_row_whose_weights_underflow_is_in_doubt(library: Any) -> None:
    """Logits underflow float32: the sum of the weights is 0 or NaN."""
    v, rho = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1e30], [-1e30]])
    flag, back = torch.full((2, 2), 7, dtype=torch.uint8)
    recursion(library, v, rho, 1.0, 1, flag=flag)
    gradients = recursion_backward(library, torch.ones(2, 1), v, rho, 1.0, 1, flag=back)
    assert flag.all()
    assert back.all()
    assert not any(x.any() for x in gradients)


def test_memories_near_the_end_of_float32_have_a_finite_centre(library: Any) -> None:
    """Their sum overflows, their mean does not."""
    v, rho = torch.tensor([[1e38], [3e38]]), torch.tensor([[3e38], [3.2e38], [1e38]])
    flag = torch.full((2,), 7, dtype=torch.uint8)
    recursion(library, v, rho, 1.0, 1, flag=flag)
    assert flag.all()


def test_the_rule_is_that_of_the_kernels_in_triton(library: Any) -> None:
    rule = importlib.import_module("clam_kernels.kernels.am.doubt")
    names = (
        "NEAR_FACTOR", "NEAR_LIMIT", "NEAR_LIMIT_OF_MANY", "FAR_LIMIT", "LOGIT_ERROR", "LONGEST",
        "SHARPEST", "MOST",
    )  # fmt: skip
    values = torch.zeros(len(names))
    library.numbers(*pointers(values))
    for name, number in zip(names, values.tolist(), strict=True):
        assert number == torch.tensor(getattr(rule, name).value).item(), name


def test_the_rule_chooses_the_rows_of_the_rule_in_torch(library: Any) -> None:
    """Norms, distances, weights and betas on both sides of every limit."""
    g = torch.Generator().manual_seed(0)
    x = 10.0 ** (4 * torch.rand(512, 1, generator=g) - 1) * torch.randn(512, 4, generator=g)
    reach = 10.0 ** (-2 * torch.rand(512, 1, generator=g))
    recalled = x + reach * x.norm(dim=-1, keepdim=True) * torch.randn(512, 4, generator=g)
    weights = (12 * torch.rand(512, 3, generator=g)).softmax(-1)
    largest = weights.amax(-1)
    size, along = x.square().sum(-1) + recalled.square().sum(-1), (x * recalled).sum(-1)
    both = set()
    for sharp in (1e-4, 0.1, 1.0, 100.0):
        rows = rows_in_doubt(size, along, weights, sharp)
        flags = torch.zeros(512, dtype=torch.uint8)
        library.doubts(*pointers(x, recalled, largest, flags), ctypes.c_float(sharp), 512)
        assert torch.equal(flags.bool(), rows), sharp
        both.update(rows.tolist())
    assert both == {True, False}


def test_python_knows_the_limit_of_the_backward(library: Any) -> None:
    for d in range(1, 17):
        assert cuda.backward_memories(d) == library.backward_memories(d)


# ---- the Python side, with the bodies above in place of the compiled library ---------------------


class HostOps:
    """A stand-in for `torch.ops.clam_cuda` as in csrc/register.cpp, with float32 bodies."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.calls: list[tuple[Any, ...]] = []

    def problem(self, cell: tuple[int, int], operands: Sequence[Tensor | None]) -> list[Any]:
        return [None if x is None else x[cell].float().contiguous() for x in operands]

    def recursion_small(self, *a: Any) -> Tensor:
        self.calls.append(a)
        v, rho, beta, number, weights, mask, steps, step, flag = a
        out = v.new_empty(v.shape)
        for cell in itertools.product(*map(range, v.shape[:2])):
            x, y, b, w, u = self.problem(cell, (v, rho, beta, weights, mask))
            w = None if w is None else w.expand(len(y)).contiguous()
            b = number if b is None else b
            out[cell] = recursion(self.library, x, y, b, steps, step, u, w, flag=flag[cell])
        return out

    def recursion_small_backward(self, *a: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(a)
        grad, v, rho, beta, number, weights, mask, steps, step, wide, memory, of_mask, flag = a
        grad_v = torch.empty(v.shape, dtype=torch.float32 if wide else v.dtype)
        grad_mask = torch.empty(v.shape)
        partials = torch.zeros(*v.shape[:2], 2, rho.shape[2], rho.shape[3] + 2)
        for cell in itertools.product(*map(range, v.shape[:2])):
            g, x, y, b, w, u = self.problem(cell, (grad, v, rho, beta, weights, mask))
            w = None if w is None else w.expand(len(y)).contiguous()
            b = number if b is None else b
            for i in range(2):  # two slices of rows
                part = slice(i, None, 2)
                left = torch.empty(len(x[part]), dtype=torch.uint8)
                gradients = recursion_backward(
                    self.library, g[part].contiguous(), x[part].contiguous(), y, b, steps, step,
                    None if u is None else u[part], w, left,
                )  # fmt: skip
                flag[cell][part] = left
                grad_v[cell][part], grad_mask[cell][part] = gradients[0], gradients[3]
                partials[cell][i] = torch.cat(
                    [gradients[1], gradients[4][:, None], gradients[2][:, None]], -1
                )
        empty = torch.empty(0)
        return grad_v, partials if memory else empty, grad_mask if of_mask else empty


@pytest.fixture
def host_ops(library: Any, monkeypatch: pytest.MonkeyPatch) -> HostOps:
    """The first launch runs on the CPU; Triton's interpreter runs the second."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1 in this process")
    ops = HostOps(library)
    monkeypatch.setattr(torch.ops, "clam_cuda", ops, raising=False)
    return ops


# v, rho, beta, update_mask, log_weights
SHAPES: list[tuple[Any, ...]] = [
    ((7, 3), (5, 3), (), None, None),
    ((7, 3), (5, 3), (5,), (7, 3), (5,)),
    ((7, 1), (1, 1), (1,), (1, 1), (1,)),
    ((7, 3), (4, 5, 3), (4, 1), (7, 1), None),
    ((4, 7, 3), (5, 3), (5,), (3,), (4, 1)),
    ((2, 1, 7, 3), (4, 5, 3), (2, 1, 5), (4, 1, 3), (4, 5)),
    ((3, 1, 2, 7, 3), (4, 1, 5, 3), (1,), None, (2, 5)),
    ((7, 3), (5, 3), None, (7, 3), (4, 5)),
    ((0, 3), (5, 3), (5,), None, None),
    ((0, 7, 3), (5, 3), (5,), (7, 3), None),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "step"), [(2, 0.7), (1, 1.0), (0, 1.0), (2, 0.0)])
def test_the_python_side(
    host_ops: HostOps, shapes: tuple[Any, ...], dtype: torch.dtype, steps: int, step: float
) -> None:
    g = torch.Generator().manual_seed(0)
    v, rho, beta, mask, weights = (
        None if shape is None else torch.rand(shape, generator=g).to(dtype).requires_grad_()
        for shape in shapes
    )
    assert v is not None
    assert rho is not None
    beta = 2.0 if beta is None else beta
    args = (v, rho, beta, steps, step, mask, weights)
    wide = [x.detach().double() if isinstance(x, Tensor) else x for x in args]
    leaves = [x.requires_grad_() if isinstance(x, Tensor) else x for x in wide]
    truth = am.am_recursion(*leaves)
    close = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    out = cuda.am_recursion(*[x.detach() if isinstance(x, Tensor) else x for x in args], "high")
    assert out.is_contiguous()
    torch.testing.assert_close(out, truth.to(dtype), **close)

    grad = torch.rand(1, generator=g).to(dtype).expand(out.shape)  # strides of 0
    places = (0, 1, 2, 5, 6)
    needs = [isinstance(args[i], Tensor) for i in places]
    tracked = [leaves[i] for i, need in zip(places, needs, strict=True) if need]
    exact = iter(torch.autograd.grad(truth, tracked, grad.double(), materialize_grads=True))
    gradients = cuda.am_recursion_backward(grad, *[
        x.detach() if isinstance(x, Tensor) else x for x in args
    ], needs, "high")  # fmt: skip
    for i, need, value in zip(places, needs, gradients, strict=True):
        if not need:
            assert value.shape == (0,)
            continue
        like = args[i]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        assert value.is_contiguous()
        torch.testing.assert_close(value, next(exact).to(dtype), **close)
    none = cuda.am_recursion_backward(
        grad, *[x.detach() if isinstance(x, Tensor) else x for x in args], [False] * 5, "high"
    )
    assert all(x.shape == (0,) for x in none)


def test_one_step_and_its_gradient(host_ops: HostOps) -> None:
    v, rho, grad = torch.randn(6, 2), torch.randn(3, 2), torch.randn(6, 2)
    out, lse = cuda.am_step_saved(v, rho, 2.0, 0.5, None, None, "highest")
    assert torch.equal(out, cuda.am_recursion(v, rho, 2.0, 1, 0.5, None, None, "highest"))
    assert (lse.shape, lse.dtype) == ((6,), torch.float32)
    needs = [True, True, False, False, False]
    a = cuda.am_step_backward(grad, v, rho, 2.0, 0.5, None, None, lse, needs, "highest")
    b = cuda.am_recursion_backward(grad, v, rho, 2.0, 1, 0.5, None, None, needs, "highest")
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_a_shared_operand_is_not_copied(host_ops: HostOps) -> None:
    v, rho = torch.randn(7, 3), torch.randn(4, 5, 3)
    cuda.am_recursion(v, rho, 2.0, 1, 1.0, torch.ones(7, 1) > 0, None, "highest")
    call = host_ops.calls[-1]
    assert call[0].data_ptr() == v.data_ptr()
    assert call[0].stride()[:2] == (0, 0)
    assert call[1].data_ptr() == rho.data_ptr()
    assert call[5].stride() == (0, 0, 1, 0)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", [name for name in SCENES if name != "sharp"])
def test_far_rows_are_computed_again(host_ops: HostOps, name: str, batched: bool) -> None:
    """Both launches together: no row and no gradient is worse than differences in float32."""
    v, rho, beta = scene(name, 4, 1)
    v = v[::4]
    operands = (v, rho[None], beta) if batched else (v, rho, beta)
    out = cuda.am_recursion(*operands, 2, 1.0, None, None, "highest").view_as(v)
    error, allowed = errors_of(out, v, rho, beta, 2)
    assert (error <= allowed).all(), (error, allowed)

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    needs = [True, True, True, False, False]
    grad = upstream[None] if batched else upstream
    gradients = cuda.am_recursion_backward(grad, *operands, 2, 1.0, None, None, needs, "highest")
    exact, plain = (_slopes(upstream, v, rho, beta, dtype) for dtype in (torch.double, torch.float))
    for name, result, expected, near in zip(
        ("v", "rho", "beta"), gradients, exact, plain, strict=False
    ):
        result = result.view_as(expected)
        assert torch.equal(result.isfinite(), expected.float().isfinite())
        if not result.isfinite().all():  # beyond float32
            continue
        error, allowed = ((x - expected).abs().max() for x in (result, near))
        allowed = allowed.nan_to_num(nan=0.0)  # float32 differences may overflow
        size = (
            expected.abs().max().clamp(min=float(upstream.abs().max()) if name != "beta" else 0.0)
        )
        assert error <= 2 * allowed + 32 * torch.finfo(torch.float32).eps * size, name


def _slopes(
    upstream: Tensor, v: Tensor, rho: Tensor, beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Autograd's gradients of two steps from differences."""
    leaves = [x.to(dtype).requires_grad_() for x in (v, rho, beta)]
    return torch.autograd.grad(differences(*leaves, 2), leaves, upstream.to(dtype))


def test_rows_in_doubt_with_every_argument(host_ops: HostOps) -> None:
    """A mask, log-weights and a crossed batch; all rows are in doubt."""
    v, rho, beta = scene("sentinel", 3, 0)
    g = torch.Generator().manual_seed(0)
    v, rho = v[:14].view(2, 1, 7, 3), torch.stack([rho, rho + 0.1, rho - 0.1])
    mask, weights = torch.rand(7, 3, generator=g), torch.randn(3, 6, generator=g)
    weights[1, 2] = -torch.inf
    args = (v, rho, beta, 2, 0.7, mask, weights)
    wide = [x.double().requires_grad_() if isinstance(x, Tensor) else x for x in args]
    truth = am.am_recursion(*wide)
    grad = torch.randn(truth.shape, generator=g)
    leaves = [x for x in wide if isinstance(x, Tensor)]
    exact = torch.autograd.grad(truth, leaves, grad.double())
    out = cuda.am_recursion(*args, "highest")
    assert host_ops.calls[-1][-1].all()
    gradients = cuda.am_recursion_backward(grad, *args, [True] * 5, "highest")
    assert host_ops.calls[-1][-1].all()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, truth.detach().float(), **close)
    for result, expected in zip(gradients, exact, strict=True):
        torch.testing.assert_close(result, expected.float(), **close)
    none = cuda.am_recursion_backward(grad, *args, [True, False, False, True, False], "highest")
    assert torch.equal(none[0], gradients[0])
    assert torch.equal(none[3], gradients[3])


def test_reasons_of_refusals() -> None:
    v, rho = torch.randn(7, 16), torch.randn(5, 16)
    assert cuda.why_not(v, rho, 1.0, 3, 1.0, None, None, "high") is None
    assert cuda.why_not(v, rho, torch.tensor(torch.inf)) is None
    assert cuda.why_not(v, rho, torch.inf) == "beta = inf"
    reason = "float64 is computed by the reference"
    assert cuda.why_not(v.double(), rho.double(), 1.0) == reason
    assert cuda.why_not(torch.randn(7, 17), torch.randn(5, 17), 1.0) == "D = 17 > 16"
    most = cuda.backward_memories(16)
    assert cuda.why_not(v, torch.randn(most, 16), 1.0) is None
    reason = f"K = {most + 1} > {most} for D = 16"
    assert cuda.why_not(v, torch.randn(most + 1, 16), 1.0) == reason
