// SPDX-License-Identifier: Apache-2.0
//
// The recursion of am.h walked back: equations (8) of docs/ops/am.md. A lane has one row; a warp
// takes 32 rows through all steps. What sums over rows goes through shared memory: lanes fill a
// tile with the weights p and the logits' gradients gz of their rows for kChunk memories, and the
// warp multiplies it with the tile of its rows:
//
//   pull_k  = sum_n p_nk H_n
//   cross_k = sum_n gz_nk x_n    spread_k = sum_n gz_nk |x_n|^2    mass_k = sum_n gz_nk
//
// on matrix units, whose operands are split in two so that products are as exact as float32's. The
// results go into sums that belong to this warp alone, in an order that never changes.

#pragma once

#include "am.h"

namespace clam {
namespace am {

constexpr int kWarpsMax = 4;

// A product of matrix units: kChunk memories by kGroup rows of a warp, times these by kColumns.
constexpr int kChunk = 16;
constexpr int kGroup = 8;
constexpr int kColumns = 8;

// A column for each row; each of the lanes that load a part of a product meets a bank of its own.
constexpr int kWeightStride = kWarp + 4;
constexpr int kWeightFloats = 2 * kChunk * kWeightStride;

// Shared memory a block may have on every GPU from sm_80 on.
constexpr int64_t kBackwardBytes = 96 * 1024;

// Fewer sizes than forward: a kernel here is three times the code.
CLAM_HD constexpr int padded_backward(int d) {
  return d <= 4 ? d : d <= 6 ? 6 : d <= 8 ? 8 : d <= 12 ? 12 : 16;
}

CLAM_HD constexpr int rounded(int x, int to) { return (x + to - 1) / to * to; }

// One row of a warp: H, then [x, |x|^2, 1], both filled up to whole products. The stride is 8 or 24
// more than a multiple of 32, for banks as above.
CLAM_HD constexpr int cross_column(int features) { return rounded(features, kColumns); }
CLAM_HD constexpr int row_width(int features) {
  return cross_column(features) + rounded(features + 2, kColumns);
}
CLAM_HD constexpr int row_stride(int features) {
  return row_width(features) % 16 == 0 ? row_width(features) + 8 : row_width(features);
}

// Sums of one memory in a warp: pull, then [cross, spread, mass], both filled up to pairs.
CLAM_HD constexpr int sum_cross(int features) { return rounded(features, 2); }
CLAM_HD constexpr int sum_stride(int features) {
  return features > 12 ? 40 : sum_cross(features) + rounded(features + 2, 2);
}
CLAM_HD constexpr int64_t sum_floats(int features, int64_t memories) {
  return (sum_stride(features) * memories + 3) / 4 * 4;
}

// Bytes of shared memory of a block, for `features` as padded_backward gives them.
CLAM_HD constexpr int64_t backward_bytes(int features, int64_t memories, int warps) {
  const int64_t table = table_size(memories) * ((features + 6) / 4 * 4);
  const int64_t rows = kWarp * row_stride(features);
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
  float warm;     // sum_k p_k |rho_k - x|^2
  float excess;   // sum_k gz_k, 0 but for rounding
  float level;    // sum_k p_k <H, rho_k>
  float norm;     // |x|^2
  float top, lift;
  float inverse;  // 1 / mass; 0: survey finds it
};

// How the way back will weigh the memories: relative to 2^top. Where one memory has nearly all the
// weight, top is the largest logit and the rest is left to survey.
template <int D>
CLAM_HD void weigh_back(const Recall<D>& recall, float shift, float& top, float& inverse) {
  inverse = 1.0f / recall.mass;
  const bool sharp = exp2_weight(recall.top - shift) * inverse > 1.0f - 1.0f / 32;
  top = sharp ? recall.top : shift;
  if (sharp) inverse = 0.0f;
}

// A row whose flag is set, or that is not there, gives nothing to any sum: no weight, and nothing
// that is not finite. am_exact_backward.py computes its gradients.
template <int D>
CLAM_HD void take_out(Walk<D>& w, float (&recalled)[D]) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.x[i] = w.g[i] = recalled[i] = 0.0f;
  w.top = kInfinity;
  w.inverse = 1.0f;
}

// From the step's result to H; w.x, w.top and w.inverse are set, `recalled` is what the memories
// gave.
template <int D>
CLAM_HD void begin_back(Walk<D>& w, const float (&recalled)[D], const float (&gain)[D],
                        bool per_memory) {
  w.norm = norm_of<D>(w.x);
  w.lift = per_memory ? -0.5f * w.norm : 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    w.h[i] = gain[i] * w.g[i];
    w.g[i] = fused(-gain[i], w.g[i], w.g[i]);
    w.pull[i] = 0.0f;
  }
  w.drift = 0.0f;
  w.heat = w.warm = w.excess = 0.0f;
  w.level = inner_product<D>(recalled, w.h);
}

template <int D>
CLAM_HD void write_row(const Walk<D>& w, float* tile, int lane) {
  constexpr int kCross = cross_column(D), kStride = row_stride(D);
  float f[kStride] = {};
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    f[i] = w.h[i];
    f[kCross + i] = w.x[i];
  }
  f[kCross + D] = w.norm;
  f[kCross + D + 1] = 1.0f;
  Quad* row = reinterpret_cast<Quad*>(tile + lane * kStride);
  CLAM_UNROLL
  for (int i = 0; i < kStride / 4; ++i) {
    row[i] = Quad{f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3]};
  }
}

// A look at all memories before the others, for a row of which one has nearly all the weight.
// <H, recalled> is the level but for rounding, which is an error of all gz of the row together, and
// here the largest one. Where there is one memory its weight is exactly 1, and the level exactly
// its <H, rho>.
template <int D>
CLAM_HD void survey(Walk<D>& w, const Quad* table, int memories) {
  using S = Slot<D, Form::kBackward>;
  float mass = 0.0f, excess = 0.0f;
  CLAM_ROLLED
  for (int k = 0; k < memories; ++k) {
    float memory[S::kFloats];
    unpack<D, Form::kBackward>(table + k * S::kQuads, memory);
    const float inner = inner_product<D>(memory, w.x);
    const float weight =
        exp2_weight(logit<D, Form::kBackward>(memory, inner, w.lift, 0.0f) - w.top);
    mass += weight;
    excess = fused(weight, inner_product<D>(memory, w.h) - w.level, excess);
  }
  w.inverse = 1.0f / mass;
  w.level = fused(excess, w.inverse, w.level);
}

// p and gz of one memory, and what they do to this row. A row's only memory has <H, rho> = level to
// the last bit, and so a gz of exactly 0.
template <int D>
CLAM_HD void visit(Walk<D>& w, const Quad* slot, float& p, float& gz) {
  float memory[Slot<D, Form::kBackward>::kFloats];
  unpack<D, Form::kBackward>(slot, memory);
  const float inner = inner_product<D>(memory, w.x);
  const float z = logit<D, Form::kBackward>(memory, inner, w.lift, 0.0f);
  p = exp2_weight(z - w.top) * w.inverse;
  gz = p * (inner_product<D>(memory, w.h) - w.level);
  const float weight = gz * memory[D + 1];
  w.drift += weight;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.pull[i] = fused(weight, memory[i], w.pull[i]);
  // Not infinite: 0 times it stays 0.
  const float distance = fminf(fused(-2.0f, inner, memory[D + 2] + w.norm), kMost);
  w.heat = fused(gz, distance, w.heat);
  w.warm = fused(p, distance, w.warm);
  w.excess += gz;
}

// The gradient of the state that the step started from, in w.g. With one beta for all the drift is
// 0 but for rounding: taken along, it leaves of that what is in proportion to x - recalled. The
// same rounding is the largest of the heat, and is taken from it.
template <int D>
CLAM_HD void end_back(Walk<D>& w) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.g[i] = fused(kLn2, fused(-w.drift, w.x[i], w.pull[i]), w.g[i]);
  w.heat = fused(-w.excess, w.warm, w.heat);
}

// Where lane `lane` puts p (kind 0) or gz (kind 1) of memory `j` of the chunk.
CLAM_HD int weight_at(int j, int kind, int lane) {
  return (kind * kChunk + j) * kWeightStride + lane;
}

// What a lane holds of a product, as mma.m16n8k8 wants it: of the left operand memories `four` and
// `four` + 8 by rows `one` and `one` + 4, of the right rows `one` and `one` + 4 by column `four`,
// of the result memories `four` and `four` + 8 by columns 2 `one` and 2 `one` + 1.
struct Part {
  int four, one;
};

CLAM_HD Part part_of(int lane) { return {lane / 4, lane % 4}; }

// Of weights of one kind by rows group * kGroup and on.
CLAM_HD void load_left(const float* weights, int kind, int group, int lane, float (&a)[4]) {
  const Part part = part_of(lane);
  CLAM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = group * kGroup + part.one + i / 2 * 4;
    a[i] = weights[weight_at(part.four + i % 2 * 8, kind, row)];
  }
}

// Of the same rows by columns [column, column + kColumns) of their tile.
template <int D>
CLAM_HD void load_right(const float* rows, int column, int group, int lane, float (&b)[2]) {
  const Part part = part_of(lane);
  CLAM_UNROLL
  for (int i = 0; i < 2; ++i) {
    b[i] = rows[(group * kGroup + part.one + i * 4) * row_stride(D) + column + part.four];
  }
}

// Adds a result, of memories from `first` on by columns of its kind from `column` on, to the sums.
template <int D>
CLAM_HD void add_sums(const float (&c)[4], int kind, int column, int first, int memories, int lane,
                      float* sums) {
  const Part part = part_of(lane);
  const int at = column + 2 * part.one;
  if (at >= rounded(D + 2 * kind, 2)) return;
  CLAM_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int k = first + part.four + i * 8;
    if (k >= memories) continue;
    struct alignas(8) Pair {
      float x, y;
    };
    auto* pair =
        reinterpret_cast<Pair*>(sums + k * sum_stride(D) + (kind == 0 ? 0 : sum_cross(D)) + at);
    const Pair sum = *pair;
    *pair = {sum.x + c[2 * i], sum.y + c[2 * i + 1]};
  }
}

// The gradients of memory k from the sums of `warps` warps, `stride` floats apart:
// out = [rho (d), log-weight, beta]. `heat` is the block's, for one beta for all.
template <int D>
CLAM_HD void combine(const float* sums, int64_t stride, int warps, int64_t k, const Quad* slot,
                     float beta, bool per_memory, double heat, int d, float* out) {
  const auto* memory = reinterpret_cast<const float*>(slot);
  const bool dead = memory[D] == -kInfinity;
  const auto total = [=](int column) {
    double sum = 0.0;
    CLAM_ROLLED
    for (int w = 0; w < warps; ++w) sum += sums[w * stride + k * sum_stride(D) + column];
    return sum;
  };
  const double mass = total(sum_cross(D) + D + 1);
  double warmth = total(sum_cross(D) + D) + mass * memory[D + 2];
  CLAM_ROLLED
  for (int i = 0; i < d; ++i) {
    const double cross = total(sum_cross(D) + i);
    const double lean = 2.0 * beta * (cross - mass * memory[i]);
    out[i] = dead ? 0.0f : static_cast<float>(total(i) + lean);
    warmth -= 2.0 * memory[i] * cross;
  }
  if (!per_memory) warmth = k == 0 ? heat : 0.0;
  out[d] = dead ? 0.0f : static_cast<float>(mass);
  out[d + 1] = dead && per_memory ? 0.0f : static_cast<float>(-warmth);
}

}  // namespace am
}  // namespace clam
