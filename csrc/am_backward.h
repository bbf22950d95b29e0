// SPDX-License-Identifier: Apache-2.0
//
// The gradients of the recursion of am.h, from the last step to the first: equations (8) of
// docs/ops/am.md. A lane has one row; a warp takes 32 rows through all steps. Sums over rows go
// through shared memory: lanes fill a tile with the weights p and the gradients gz of the logits of
// their rows for kChunk memories, and the warp multiplies it by the tile of its rows:
//
//   pull_k  = sum_n p_nk H_n
//   cross_k = sum_n gz_nk x_n    spread_k = sum_n gz_nk |x_n|^2    mass_k = sum_n gz_nk
//
// on matrix units, whose operands are split in two so that products are as exact as float32's. The
// results go into sums of this warp alone, in an order that never changes.

#pragma once

#include "am.h"

namespace clam {
namespace am {

constexpr int kWarpsMax = 4;

// A product of matrix units: kChunk memories by kGroup rows of a warp, times these by kColumns.
constexpr int kChunk = 16;
constexpr int kGroup = 8;
constexpr int kColumns = 8;

// A column for each row; the lanes that load a part of a product read different banks.
constexpr int kWeightStride = kWarp + 4;
constexpr int kWeightFloats = 2 * kChunk * kWeightStride;

// Shared memory a block may have on every GPU from sm_80 on.
constexpr int64_t kBackwardBytes = 96 * 1024;

// Fewer sizes than forward: a kernel here is three times the code.
CLAM_HD constexpr int padded_backward(int d) {
  return d <= 4 ? d : d <= 6 ? 6 : d <= 8 ? 8 : d <= 12 ? 12 : 16;
}

CLAM_HD constexpr int rounded(int x, int to) { return (x + to - 1) / to * to; }

// One row of a warp: H, then [x, |x|^2, 1], both padded to whole products. The stride is 8 or 24
// more than a multiple of 32, so that lanes read different banks.
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

// The state of one row in one step of the backward, with p_k the weights and gz_k = p_k (<H, rho_k>
// - delta) the gradients of the logits.
template <int D>
struct Walk {
  float x[D];           // the state before the step
  float h[D];           // H = gain * gradient of the step's result
  float g[D];           // gradient of the step's result, then (1 - gain) times it
  float pull[D];        // sum_k gz_k scale_k rho_k
  float scale_sum;      // sum_k gz_k scale_k
  float beta_sum;       // sum_k gz_k |rho_k - x|^2, minus the gradient of one beta for all
  float mean_distance;  // sum_k p_k |rho_k - x|^2
  float gz_sum;         // sum_k gz_k: a rounding error, 0 in exact arithmetic
  float delta;          // sum_k p_k <H, rho_k>
  float norm;           // |x|^2
  float top, lift;
  float inverse;  // 1 / mass; 0: `survey` computes it
};

// The reference of the weights in the backward: they are 2^(z_k - top) * inverse. Where one memory
// has nearly all the weight, top is the largest logit, and `survey` computes the inverse.
template <int D>
CLAM_HD void weigh_back(const Recall<D>& recall, float shift, float& top, float& inverse) {
  inverse = 1.0f / recall.mass;
  const bool sharp = exp2_weight(recall.top - shift) * inverse > 1.0f - 1.0f / 32;
  top = sharp ? recall.top : shift;
  if (sharp) inverse = 0.0f;
}

// A row whose flag is set, or that lies past the last, adds 0 to every sum: its weights are 0, and
// its numbers finite. kernels/am/exact_backward.py computes the gradients of flagged rows.
template <int D>
CLAM_HD void take_out(Walk<D>& w, float (&recalled)[D]) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.x[i] = w.g[i] = recalled[i] = 0.0f;
  w.top = kInfinity;
  w.inverse = 1.0f;
}

// Computes H and (1 - gain) g from g; w.x, w.top and w.inverse are set, `recalled` is the recall.
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
  w.scale_sum = 0.0f;
  w.beta_sum = w.mean_distance = w.gz_sum = 0.0f;
  w.delta = inner_product<D>(recalled, w.h);
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

// A first loop over all memories, for a row that gives nearly all its weight to one: mass = sum_k
// 2^(z_k - top), delta += sum_k 2^(z_k - top) (<H, rho_k> - delta) / mass. The delta <H, recalled>
// has a rounding error, which all gz of the row share; here it is their largest error. A row's only
// memory has a weight of exactly 1, and delta is exactly its <H, rho>.
template <int D>
CLAM_HD void survey(Walk<D>& w, const Quad* table, int memories) {
  using S = Slot<D, Form::kBackward>;
  float mass = 0.0f, gap_sum = 0.0f;
  CLAM_ROLLED
  for (int k = 0; k < memories; ++k) {
    float memory[S::kFloats];
    unpack<D, Form::kBackward>(table + k * S::kQuads, memory);
    const float inner = inner_product<D>(memory, w.x);
    const float weight =
        exp2_weight(logit<D, Form::kBackward>(memory, inner, w.lift, 0.0f) - w.top);
    mass += weight;
    gap_sum = fused(weight, inner_product<D>(memory, w.h) - w.delta, gap_sum);
  }
  w.inverse = 1.0f / mass;
  w.delta = fused(gap_sum, w.inverse, w.delta);
}

// p and gz of one memory, and its terms of the sums of this row. A row's only memory has <H, rho> =
// delta to the last bit, and so a gz of exactly 0.
template <int D>
CLAM_HD void visit(Walk<D>& w, const Quad* slot, float& p, float& gz) {
  float memory[Slot<D, Form::kBackward>::kFloats];
  unpack<D, Form::kBackward>(slot, memory);
  const float inner = inner_product<D>(memory, w.x);
  const float z = logit<D, Form::kBackward>(memory, inner, w.lift, 0.0f);
  p = exp2_weight(z - w.top) * w.inverse;
  gz = p * (inner_product<D>(memory, w.h) - w.delta);
  const float weight = gz * memory[D + 1];
  w.scale_sum += weight;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.pull[i] = fused(weight, memory[i], w.pull[i]);
  // At most kMost: 0 * infinity would be NaN.
  const float distance = fminf(fused(-2.0f, inner, memory[D + 2] + w.norm), kMost);
  w.beta_sum = fused(gz, distance, w.beta_sum);
  w.mean_distance = fused(p, distance, w.mean_distance);
  w.gz_sum += gz;
}

// The gradient of the state before the step: g += ln(2) (pull - scale_sum x). With one beta for
// all, scale_sum is a rounding error only; subtracting its term leaves an error in proportion to x
// - recalled. The same error dominates beta_sum: beta_sum -= gz_sum * mean_distance.
template <int D>
CLAM_HD void end_back(Walk<D>& w) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) w.g[i] = fused(kLn2, fused(-w.scale_sum, w.x[i], w.pull[i]), w.g[i]);
  w.beta_sum = fused(-w.gz_sum, w.mean_distance, w.beta_sum);
}

// Where lane `lane` stores p (kind 0) or gz (kind 1) of memory `j` of the chunk.
CLAM_HD int weight_at(int j, int kind, int lane) {
  return (kind * kChunk + j) * kWeightStride + lane;
}

// The part of a product that mma.m16n8k8 expects in a lane: of the left operand memories `four` and
// `four` + 8 by rows `one` and `one` + 4; of the right rows `one` and `one` + 4 by column `four`;
// of the result memories `four` and `four` + 8 by columns 2 `one` and 2 `one` + 1.
struct Part {
  int four, one;
};

CLAM_HD Part part_of(int lane) { return {lane / 4, lane % 4}; }

// The left operand: weights of one kind, from row group * kGroup on.
CLAM_HD void load_left(const float* weights, int kind, int group, int lane, float (&a)[4]) {
  const Part part = part_of(lane);
  CLAM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = group * kGroup + part.one + i / 2 * 4;
    a[i] = weights[weight_at(part.four + i % 2 * 8, kind, row)];
  }
}

// The right operand: the same rows, columns [column, column + kColumns) of their tile.
template <int D>
CLAM_HD void load_right(const float* rows, int column, int group, int lane, float (&b)[2]) {
  const Part part = part_of(lane);
  CLAM_UNROLL
  for (int i = 0; i < 2; ++i) {
    b[i] = rows[(group * kGroup + part.one + i * 4) * row_stride(D) + column + part.four];
  }
}

// Adds a result to the sums: memories from `first` on, columns of its kind from `column` on.
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

// The gradients of memory k from the sums of `warps` warps, `stride` floats apart: out = [rho (d),
// log-weight, beta] = [pull_k + 2 beta_k (cross_k - mass_k rho_k), mass_k, -sum_n gz_nk |rho_k -
// x_n|^2]. `beta_sum` is the block's sum over all k, for one beta for all.
template <int D>
CLAM_HD void combine(const float* sums, int64_t stride, int warps, int64_t k, const Quad* slot,
                     float beta, bool per_memory, double beta_sum, int d, float* out) {
  const auto* memory = reinterpret_cast<const float*>(slot);
  const bool masked = memory[D] == -kInfinity;
  const auto total = [=](int column) {
    double sum = 0.0;
    CLAM_ROLLED
    for (int w = 0; w < warps; ++w) sum += sums[w * stride + k * sum_stride(D) + column];
    return sum;
  };
  const double mass = total(sum_cross(D) + D + 1);
  double distances = total(sum_cross(D) + D) + mass * memory[D + 2];
  CLAM_ROLLED
  for (int i = 0; i < d; ++i) {
    const double cross = total(sum_cross(D) + i);
    const double through_logits = 2.0 * beta * (cross - mass * memory[i]);
    out[i] = masked ? 0.0f : static_cast<float>(total(i) + through_logits);
    distances -= 2.0 * memory[i] * cross;
  }
  if (!per_memory) distances = k == 0 ? beta_sum : 0.0;
  out[d] = masked ? 0.0f : static_cast<float>(mass);
  out[d + 1] = masked && per_memory ? 0.0f : static_cast<float>(-distances);
}

}  // namespace am
}  // namespace clam
