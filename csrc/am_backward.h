// SPDX-License-Identifier: Apache-2.0
//
// The recursion of am.h walked back: equations (8) of docs/ops/am.md, for one row in a lane. A warp
// takes 32 rows through all steps. What sums over rows goes through shared memory: lanes first fill
// a tile with the weights p and the logits' gradients gz of their rows for kChunk memories, then
// each lane takes one memory and one of the two, and sums over the 32 rows:
//
//   kind 0   pull_k  = sum_n p_nk H_n
//   kind 1   cross_k = sum_n gz_nk x_n    mass_k = sum_n gz_nk    spread_k = sum_n gz_nk |x_n|^2
//
// These go into sums that belong to this lane of this warp alone, in an order that never changes.

#pragma once

#include "am.h"

namespace clam {
namespace am {

constexpr int kChunk = kWarp / 2;
constexpr int kWeightStride = kWarp + 1;  // a column for each row, so that banks differ
constexpr int kWeightFloats = kWarp * kWeightStride;
constexpr int kWarpsMax = 4;

// Shared memory a block may have on every GPU from sm_80 on.
constexpr int64_t kBackwardBytes = 96 * 1024;

// Fewer sizes than forward: a kernel here is three times the code.
CLAM_HD constexpr int padded_backward(int d) {
  return d <= 4 ? d : d <= 6 ? 6 : d <= 8 ? 8 : d <= 12 ? 12 : 16;
}

// One row of a warp: [H, x, |x|^2], both filled up to whole Quads. An odd number of Quads: lanes
// that write a Quad each then meet no bank twice.
template <int D>
struct RowTile {
  static constexpr int kWide = (D + 3) / 4 * 4;
  static constexpr int kStride = 2 * kWide + 4;
  static constexpr int kFloats = kWarp * kStride;
};

// Sums of a warp: for each value, memory and kind one float.
CLAM_HD constexpr int64_t sum_floats(int features, int64_t memories) {
  return (2 * (features + 2) * memories + 3) / 4 * 4;
}

// Bytes of shared memory of a block, for `features` as padded_backward gives them.
CLAM_HD constexpr int64_t backward_bytes(int features, int64_t memories, int warps) {
  const int64_t table = table_size(memories) * ((features + 6) / 4 * 4);
  const int64_t rows = kWarp * (2 * ((features + 3) / 4 * 4) + 4);
  return 4 * (table + warps * (rows + kWeightFloats + sum_floats(features, memories)));
}

// Warps of a block; 0: too many memories.
CLAM_HD constexpr int backward_warps(int features, int64_t memories) {
  if (backward_bytes(features, memories, kWarpsMax) <= kBackwardBytes) return kWarpsMax;
  return backward_bytes(features, memories, 2) <= kBackwardBytes ? 2 : 0;
}

// The state of one row in one step of the walk back.
template <int D>
struct Walk {
  float x[D];     // the state that the step started from
  float h[D];     // gain * gradient of the step's result
  float g[D];     // gradient of the step's result, then what of it passes by the recall
  float pull[D];  // sum_k gz_k scale_k rho_k
  float drift;    // sum_k gz_k scale_k
  float heat;     // sum_k gz_k |rho_k - x|^2
  float excess;   // sum_k p_k (<H, rho_k> - level)
  float level;    // sum_k p_k <H, rho_k>
  float norm;     // |x|^2
  float top, inverse, lift;
};

// From the step's result to H; w.x, w.top and w.inverse are set, `recalled` is what the memories
// gave.
template <int D>
CLAM_HD void begin_back(Walk<D>& w, const float (&recalled)[D], const float (&gain)[D],
                        bool per_memory) {
  const float lift = lift_of<D>(w.x);
  w.lift = per_memory ? lift : 0.0f;
  w.norm = -2.0f * lift;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    w.h[i] = gain[i] * w.g[i];
    w.g[i] = fused(-gain[i], w.g[i], w.g[i]);
    w.pull[i] = 0.0f;
  }
  w.drift = 0.0f;
  w.heat = 0.0f;
  w.excess = 0.0f;
  w.level = inner_product<D>(recalled, w.h);
}

template <int D>
CLAM_HD void write_row(const Walk<D>& w, float* tile, int lane) {
  using T = RowTile<D>;
  float f[T::kStride] = {};
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    f[i] = w.h[i];
    f[T::kWide + i] = w.x[i];
  }
  f[2 * T::kWide] = w.norm;
  Quad* row = reinterpret_cast<Quad*>(tile + lane * T::kStride);
  CLAM_UNROLL
  for (int i = 0; i < T::kStride / 4; ++i) {
    row[i] = Quad{f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3]};
  }
}

// The weight of one memory, in bits that are the same wherever it is computed.
template <int D>
CLAM_HD float weight_of(const Walk<D>& w, const float* memory, float inner) {
  const float z = logit<D, Form::kBackward>(memory, inner, w.lift, 0.0f);
  return exp2_weight(z - w.top) * w.inverse;
}

// What the first look at a memory is for: <H, recalled> is the level but for rounding, which is an
// error of all gz of the row together and, where p is nearly one-hot, the largest one.
template <int D>
CLAM_HD void survey(Walk<D>& w, const Quad* slot) {
  float memory[Slot<D, Form::kBackward>::kFloats];
  unpack<D, Form::kBackward>(slot, memory);
  const float p = weight_of<D>(w, memory, inner_product<D>(memory, w.x));
  w.excess = fused(p, inner_product<D>(memory, w.h) - w.level, w.excess);
}

// The second look: p and gz, and what they do to this row. A row's only memory has <H, rho> = level
// to the last bit, and so a gz of exactly 0.
template <int D>
CLAM_HD void visit(Walk<D>& w, const Quad* slot, float& p, float& gz) {
  float memory[Slot<D, Form::kBackward>::kFloats];
  unpack<D, Form::kBackward>(slot, memory);
  const float inner = inner_product<D>(memory, w.x);
  p = weight_of<D>(w, memory, inner);
  gz = p * (inner_product<D>(memory, w.h) - w.level);
  const float weight = gz * memory[D + 1];
  w.drift += weight;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.pull[i] = fused(weight, memory[i], w.pull[i]);
  w.heat = fused(gz, fused(-2.0f, inner, memory[D + 2] + w.norm), w.heat);
}

// The gradient of the state that the step started from, in w.g. With one beta for all the drift is
// 0 but for rounding: taken along, it leaves of that what is in proportion to x - recalled.
template <int D>
CLAM_HD void end_back(Walk<D>& w) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.g[i] = fused(kLn2, fused(-w.drift, w.x[i], w.pull[i]), w.g[i]);
}

// Sums over the rows of a warp what lane `lane` answers for: memory first + lane % kChunk, kind
// lane / kChunk. `sums` are the warp's.
template <int D>
CLAM_HD void collect(const float* rows, const float* weights, int lane, int first, int memories,
                     float* sums) {
  using T = RowTile<D>;
  const int kind = lane / kChunk;
  const int k = first + lane % kChunk;
  if (k >= memories) return;
  float sum[D + 2] = {};
  const float* weight = weights + lane * kWeightStride;
  CLAM_ROLLED
  for (int n = 0; n < kWarp; n += 2) {
    CLAM_UNROLL
    for (int m = n; m < n + 2; ++m) {
      const float* row = rows + m * T::kStride;
      const float q = weight[m];
      CLAM_UNROLL
      for (int i = 0; i < D; i += 4) {
        const Quad f = *reinterpret_cast<const Quad*>(row + kind * T::kWide + i);
        sum[i] = fused(q, f.x, sum[i]);
        if (i + 1 < D) sum[i + 1] = fused(q, f.y, sum[i + 1]);
        if (i + 2 < D) sum[i + 2] = fused(q, f.z, sum[i + 2]);
        if (i + 3 < D) sum[i + 3] = fused(q, f.w, sum[i + 3]);
      }
      sum[D] += q;
      sum[D + 1] = fused(q, row[2 * T::kWide], sum[D + 1]);
    }
  }
  float* mine = sums + 2 * k + kind;
  CLAM_UNROLL
  for (int i = 0; i < D + 2; ++i) mine[2 * i * memories] += sum[i];
}

// Where lane `lane` puts p (kind 0) or gz (kind 1) of memory `j` of the chunk.
CLAM_HD int weight_at(int j, int kind, int lane) {
  return (kind * kChunk + j) * kWeightStride + lane;
}

// The gradients of memory k from the sums of `warps` warps, `stride` floats apart:
// out = [rho (d), log-weight, beta]. `heat` is the block's, for one beta for all.
template <int D>
CLAM_HD void combine(const float* sums, int64_t stride, int warps, int64_t k, int64_t memories,
                     const Quad* slot, float beta, bool per_memory, double heat, int d,
                     float* out) {
  const auto* memory = reinterpret_cast<const float*>(slot);
  const bool dead = memory[D] == -kInfinity;
  const auto total = [=](int value, int kind) {
    double sum = 0.0;
    CLAM_ROLLED
    for (int w = 0; w < warps; ++w) sum += sums[w * stride + 2 * (value * memories + k) + kind];
    return sum;
  };
  const double mass = total(D, 1);
  double warmth = total(D + 1, 1) + mass * memory[D + 2];
  CLAM_ROLLED
  for (int i = 0; i < d; ++i) {
    const double cross = total(i, 1);
    const double lean = 2.0 * beta * (cross - mass * memory[i]);
    out[i] = dead ? 0.0f : static_cast<float>(total(i, 0) + lean);
    warmth -= 2.0 * memory[i] * cross;
  }
  if (!per_memory) warmth = k == 0 ? heat : 0.0;
  out[d] = dead ? 0.0f : static_cast<float>(mass);
  out[d + 1] = dead && per_memory ? 0.0f : static_cast<float>(-warmth);
}

}  // namespace am
}  // namespace clam
