// SPDX-License-Identifier: Apache-2.0
//
// The recursion of an associative memory over few features (D <= 16): what one thread does for its
// R rows. Equations: docs/ops/am.md. Operands are centred; weights are taken in base 2:
//
//   z_k = log2(e) * (bias_k + scale * <rho_k, x>)                    one beta for all memories
//   z_k = log2(e) * (bias_k + scale_k * (<rho_k, x> - |x|^2 / 2))    one beta per memory
//   x  <- (1 - gain) * x + gain * sum_k 2^z_k rho_k / sum_k 2^z_k
//
// with scale = 2 beta and bias = log w - beta |rho|^2. The term |x|^2 is the same for all memories
// in the first form and drops out. A table holds the memories, each in whole Quads; its length is a
// multiple of kGroupMax, filled up with memories of bias -inf.
//
// Weights are relative to 2^shift, a number of the row that is known before the first memory: -beta
// |rho_k - x|^2 is never above 0, so the largest log w bounds all logits. If the mass is afterwards
// outside its range, the largest logit becomes the shift, and the memories are folded again. The
// loop over memories keeps the largest logit, which doubt.h needs, and scales nothing by it: it has
// no branch.
//
// The centre is the mean of the active memories. One far memory moves it away from the others, and
// then all rows near those are in doubt: the result is right, and slow.

#pragma once

#include "doubt.h"
#include "portable.h"
#include "rows.h"

namespace clam {
namespace am {

constexpr int kMaxFeatures = 16;
constexpr int kGroupMax = 4;

// A mass between these is as exact as one relative to the largest weight: the weights that hardware
// flushes to 0 are below 2^-78 of it, and a logit minus the shift loses no digits.
constexpr float kFaint = 1.0f / (int64_t{1} << 48), kLoud = int64_t{1} << 48;

// The numbers of a memory in the table after its features: its bias; with a beta per memory also
// its scale; for the backward, one kernel for both forms, its scale and its norm.
enum class Form { kShared, kPerMemory, kBackward };

// Compiled sizes: every number of features up to 8, then 12 and 16; rows are padded with 0.
CLAM_HD constexpr int padded_features(int d) { return d <= 8 ? d : d <= 12 ? 12 : 16; }

// Rows of one thread: one read of a memory from shared memory serves all of them.
CLAM_HD constexpr int rows_per_thread(int features) { return features <= 8 ? 4 : 3; }

// Lanes that share a row where rows are few.
CLAM_HD constexpr int lanes_of(int features) { return features <= 4 ? 4 : features <= 8 ? 8 : 16; }

// Memories in flight at a time: more hide latency, and cost registers.
CLAM_HD constexpr int group_size(int features, int rows) {
  return features <= 4 ? (rows == 1 ? 4 : 2) : rows == 1 ? 2 : 1;
}

CLAM_HD constexpr int64_t table_size(int64_t memories) {
  return (memories + kGroupMax - 1) / kGroupMax * kGroupMax;
}

// One memory in the table, as floats: features, bias, scale, norm.
template <int D, Form F>
struct Slot {
  static constexpr int kExtra = F == Form::kShared ? 1 : F == Form::kPerMemory ? 2 : 3;
  static constexpr int kQuads = (D + kExtra + 3) / 4;
  static constexpr int kFloats = 4 * kQuads;
  static constexpr bool kScaled = F != Form::kShared;
};

// One lane's share of the sum of a feature over the active memories, and how many those are. In
// float64 finite memories do not overflow: the centre is finite if they are.
template <class T>
CLAM_HD void add_active(const T* rho, const Rows& rows, const float* weights, int64_t weights_row,
                        int64_t memories, int lane, double& sum, int& active) {
  for (int64_t k = lane; k < memories; k += kWarp) {
    if (weights != nullptr && weights[k * weights_row] == -kInfinity)
      continue;  // masked memories may be NaN
    sum += widen(rho[k * rows.row], rows.type);
    ++active;
  }
}

CLAM_HD void add_active(const Rows& rho, int64_t rho_start, const Rows& weights,
                        int64_t weights_start, int64_t memories, int feature, int lane, double& sum,
                        int& active) {
  const auto* numbers = static_cast<const float*>(weights.data);
  if (numbers != nullptr) numbers += weights_start;
  const int64_t at = rho_start + feature * rho.feature;
  if (rho.type == Type::kFloat) {
    add_active(static_cast<const float*>(rho.data) + at, rho, numbers, weights.row, memories, lane,
               sum, active);
  } else {
    add_active(static_cast<const Short*>(rho.data) + at, rho, numbers, weights.row, memories, lane,
               sum, active);
  }
}

// The largest log-weight (peak), the largest (sharp) and the least beta of some active memories.
// `bad` is NaN where one of these is not finite, else 0.
struct Extremes {
  float peak, sharp, least, bad;
};

CLAM_HD Extremes no_memory() { return {-kInfinity, 0.0f, kInfinity, 0.0f}; }

CLAM_HD void add_memory(float beta, float log_weight, Extremes& e) {
  if (log_weight == -kInfinity) return;
  e.peak = fmaxf(e.peak, log_weight);
  e.sharp = fmaxf(e.sharp, beta);
  e.least = fminf(e.least, beta);
  e.bad += product(beta, 0.0f) + product(log_weight, 0.0f);
}

CLAM_HD void add_share(const Extremes& share, Extremes& e) {
  e.peak = fmaxf(e.peak, share.peak);
  e.sharp = fmaxf(e.sharp, share.sharp);
  e.least = fminf(e.least, share.least);
  e.bad += share.bad;
}

CLAM_HD Betas betas_of(const Extremes& e, bool per_memory) {
  return {e.sharp + e.bad, e.sharp / e.least, per_memory ? kNearLimitOfMany : kNearLimit};
}

// 2 beta log2(e), the factor of all inner products. NaN for an infinite beta.
CLAM_HD float scale_of(float beta) {
  const float scale = product(kLog2e, 2.0f * beta);
  return scale > kMost ? kMost + (beta - beta) : scale;
}

// Writes one memory to the table: rho - centre, bias = log2(e) log w - scale |rho|^2 / 2, scale,
// |rho|^2. `load(i)` returns the caller's feature i; it is not called for a masked memory. Errors
// of the table are the same for every row and step, and move fixed points: the bias is rounded
// once, and computed from the rounded scale, so that the logit is a squared distance. It works on
// one Quad at a time: rows are in registers when a table is filled.
template <int D, Form F, class Load>
CLAM_HD void pack(const Load& load, const float* centre, float beta, float log_weight, Quad* slot) {
  using S = Slot<D, F>;
  const bool active = log_weight != -kInfinity;
  const float scale = scale_of(beta);
  double norm = 0.0;
  CLAM_UNROLL
  for (int q = 0; q < S::kQuads; ++q) {
    float f[4];
    CLAM_APART();
    CLAM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * q + j;
      f[j] = i < D && active ? clamped(load(i < D ? i : 0) - centre[i < D ? i : 0]) : 0.0f;
      norm += static_cast<double>(f[j]) * f[j];
    }
    CLAM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * q + j;
      const double bias = 1.4426950408889634 * log_weight - 0.5 * scale * norm;
      if (i == D) f[j] = active ? static_cast<float>(bias) : -kInfinity;
      if (i == D + 1 && S::kExtra > 1) f[j] = active ? scale : 0.0f;
      if (i == D + 2 && S::kExtra > 2) f[j] = clamped(static_cast<float>(norm));
    }
    slot[q] = Quad{f[0], f[1], f[2], f[3]};
  }
}

// Writes padding to the table: its weight is 0 for every row, and NaN for a row that is not finite.
template <int D, Form F>
CLAM_HD void pack_padding(Quad* slot) {
  pack<D, F>([](int) { return 0.0f; }, nullptr, 0.0f, -kInfinity, slot);
}

template <int D, Form F>
CLAM_HD void unpack(const Quad* slot, float (&memory)[Slot<D, F>::kFloats]) {
  CLAM_UNROLL
  for (int i = 0; i < Slot<D, F>::kQuads; ++i) {
    const Quad q = slot[i];
    memory[4 * i] = q.x;
    memory[4 * i + 1] = q.y;
    memory[4 * i + 2] = q.z;
    memory[4 * i + 3] = q.w;
  }
}

// The state of the fold of one row in one step: top = max_k z_k, mass = sum_k 2^(z_k - shift), sum
// = sum_k 2^(z_k - shift) rho_k; the recall is sum / mass.
template <int D>
struct Recall {
  float top;
  float mass;
  float sum[D];
};

// The state before the first memory of a step.
template <int D>
CLAM_HD void begin(Recall<D>& recall) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) recall.sum[i] = 0.0f;
  recall.mass = 0.0f;
  // Not -inf: a row whose logits are all -inf would then have NaNs in other places.
  recall.top = kLowest;
}

// Numbers of a row in a step. With a beta per memory, lift = -|x|^2 / 2 is added to each inner
// product. With one beta for all, the logits lack the term |x|^2, and reach = scale |x|^2 / 2 is
// its size.
struct Stand {
  float lift, reach;
};

template <int D>
CLAM_HD float norm_of(const float (&x)[D]) {
  float norm = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) norm = fused(x[i], x[i], norm);
  return norm;
}

// `scale` is that of one beta for all.
template <int D>
CLAM_HD Stand stand_of(const float (&x)[D], float scale, bool per_memory) {
  const float half = 0.5f * norm_of<D>(x);
  return {per_memory ? -half : 0.0f, per_memory ? 0.0f : product(scale, half)};
}

// Whether the mass is in its range; false for a row that is not finite.
CLAM_HD bool is_in_range(float mass) { return mass >= kFaint && mass <= kLoud; }

// After a fold: whether this row needs another one in this step, with its largest logit as the
// shift. `height` is the shift minus the reach, the first choice of the next step. A row whose
// mass is in its range keeps its shift; where other rows of the block need another fold, it gets
// the same bits again.
CLAM_HD bool turn(float mass, float top, float& height, float& shift) {
  if (is_in_range(mass) || shift == top) return false;
  height += top - shift;
  shift = top;
  return true;
}

// z = scale (inner + lift) + bias, with inner = <rho_k, x>. The bias is added last: it is large
// where beta is, and a sum that started from it would round D times at its size.
template <int D, Form F>
CLAM_HD float logit(const float* memory, float inner, float lift, float scale) {
  if (F == Form::kShared) return fused(scale, inner, memory[D]);
  return fused(memory[D + (F == Form::kShared ? 0 : 1)], inner + lift, memory[D]);
}

// Folds a table of `count` memories (a multiple of kGroupMax) into the states of R rows: top' =
// max(top, z_k), mass' = mass + 2^(z_k - shift), sum' = sum + 2^(z_k - shift) rho_k. `scale` is in
// base 2, as the table is.
template <int D, int R, Form F>
CLAM_HD void fold(const Quad* table, int count, const float (&x)[R][D], const float (&lift)[R],
                  const float (&shift)[R], float scale, Recall<D> (&recall)[R]) {
  using S = Slot<D, F>;
  constexpr int G = group_size(D, R);
  static_assert(kGroupMax % G == 0, "tables are filled up to kGroupMax");
  // A group is unrolled as far as registers allow; the compiler alone would unroll more, and spill.
  CLAM_ROLLED
  for (int k = 0; k < count; k += G) {
    float memory[G][S::kFloats];
    CLAM_UNROLL
    for (int j = 0; j < G; ++j) unpack<D, F>(table + (k + j) * S::kQuads, memory[j]);
    CLAM_UNROLL
    for (int j = 0; j < G; ++j) {
      CLAM_UNROLL
      for (int r = 0; r < R; ++r) {
        const float inner = inner_product<D>(memory[j], x[r]);
        const float z = logit<D, F>(memory[j], inner, lift[r], scale);
        const float weight = exp2_weight(z - shift[r]);
        recall[r].top = fmaxf(recall[r].top, z);  // drops NaN, the weight keeps it
        recall[r].mass += weight;
        CLAM_UNROLL
        for (int i = 0; i < D; ++i) {
          recall[r].sum[i] = fused(weight, memory[j][i], recall[r].sum[i]);
        }
      }
    }
  }
}

// Finishes the fold: recalled = sum / mass; returns whether the step may be wrong. `shift` is that
// of the last fold.
template <int D>
CLAM_HD bool recalled_of(const Recall<D>& recall, const float (&x)[D], float shift,
                         const Betas& betas, float (&recalled)[D]) {
  const float inverse = 1.0f / recall.mass;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) recalled[i] = product(recall.sum[i], inverse);
  return is_in_doubt<D>(x, recalled, recall.mass, exp2_weight(recall.top - shift), betas);
}

// One step of one entry, x + gain (recalled - x): exactly `recalled` at gain 1 and x at gain 0,
// unless the row is not finite.
CLAM_HD float advance(float x, float recalled, float gain) {
  return fused(gain, recalled, fused(-gain, x, x));
}

// The entry in the caller's coordinates: x + centre, or the caller's own entry if it did not
// change, because subtracting and adding the centre may round.
CLAM_HD float restore(float x, float raw, float centre) {
  return x == raw - centre ? raw : x + centre;
}

// Whether kernels/am/exact.py computes a row again: `doubt` says that one of its steps may be
// wrong, x is its last state, `raw` the caller's row.
template <int D>
CLAM_HD bool left_over(bool doubt, const float (&x)[D], const float (&raw)[D], const float* centre,
                       float sharp) {
  float centred = 0.0f, result = 0.0f, before = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    const float out = restore(x[i], raw[i], centre[i]);
    centred = fused(x[i], x[i], centred);
    result = fused(out, out, result);
    before = fused(raw[i], raw[i], before);
  }
  return (doubt || loses_digits(centred, result, before)) && are_finite<D>(raw, centre, sharp);
}

}  // namespace am
}  // namespace clam
