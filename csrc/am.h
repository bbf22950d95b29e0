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
// Weights are relative to 2^shift, a number of the row's that is known before the first memory is
// looked at: -beta |rho_k - x|^2 is never above 0, so that the largest log w bounds all logits. The
// mass tells afterwards whether that was near enough; if not, the largest logit becomes the shift
// and the memories are folded again. The loop over memories keeps the largest logit, which doubt.h
// asks for, and scales nothing by it: it has no branch.
//
// The centre is the mean of the memories that take part. One far memory draws it away from the
// others, and then all rows near those are in doubt: right, if slow.

#pragma once

#include "doubt.h"
#include "portable.h"
#include "rows.h"

namespace clam {
namespace am {

constexpr int kMaxFeatures = 16;
constexpr int kGroupMax = 4;

// A mass between these is as good as one relative to the largest weight: what hardware flushes to 0
// is under 2^-78 of it, and the shift is not so far off that taking it away would round.
constexpr float kFaint = 1.0f / (int64_t{1} << 48), kLoud = int64_t{1} << 48;

// What a memory's slot of the table holds beside its features: its bias; with a beta per memory its
// scale; for the backward, which serves both forms with one kernel, its scale and its norm.
enum class Form { kShared, kPerMemory, kBackward };

// Features are compiled exactly up to 8, then in two sizes; the rest of a row is padded with 0.
CLAM_HD constexpr int padded_features(int d) { return d <= 8 ? d : d <= 12 ? 12 : 16; }

// Rows of one thread: each memory that is read from shared memory serves all of them.
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

// One lane's share of a feature's sum over the memories that take part, and how many those are.
// In float64, which finite memories do not overflow: the centre is finite unless one of them is
// not.
template <class T>
CLAM_HD void add_alive(const T* rho, const Rows& rows, const float* weights, int64_t weights_row,
                       int64_t memories, int lane, double& sum, int& alive) {
  for (int64_t k = lane; k < memories; k += kWarp) {
    if (weights != nullptr && weights[k * weights_row] == -kInfinity) continue;  // may hold NaN
    sum += widen(rho[k * rows.row], rows.type);
    ++alive;
  }
}

CLAM_HD void add_alive(const Rows& rho, int64_t rho_start, const Rows& weights,
                       int64_t weights_start, int64_t memories, int feature, int lane, double& sum,
                       int& alive) {
  const auto* numbers = static_cast<const float*>(weights.data);
  if (numbers != nullptr) numbers += weights_start;
  const int64_t at = rho_start + feature * rho.feature;
  if (rho.type == Type::kFloat) {
    add_alive(static_cast<const float*>(rho.data) + at, rho, numbers, weights.row, memories, lane,
              sum, alive);
  } else {
    add_alive(static_cast<const Short*>(rho.data) + at, rho, numbers, weights.row, memories, lane,
              sum, alive);
  }
}

// A share of the largest and the least beta of the memories that take part, and of their largest
// log-weight. `bad` is NaN where one of them is not finite.
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
  return {e.sharp + e.bad, e.sharp / e.least, per_memory ? kCalmOfMany : kCalm};
}

// 2 beta in base 2: what all inner products are multiplied by. NaN for an infinite beta.
CLAM_HD float scale_of(float beta) {
  const float scale = product(kLog2e, 2.0f * beta);
  return scale > kMost ? kMost + (beta - beta) : scale;
}

// One memory into the table; `load(i)` gives a feature of it as the caller has it. Of one that
// takes no part nothing is looked at. Errors of the table are the same for every row and step, and
// move borders and fixed points: the bias is rounded once, and is of the scale as rounded, with
// which the logit is a squared distance. A Quad at a time: a table is filled while rows are in
// registers.
template <int D, Form F, class Load>
CLAM_HD void pack(const Load& load, const float* centre, float beta, float log_weight, Quad* slot) {
  using S = Slot<D, F>;
  const bool alive = log_weight != -kInfinity;
  const float scale = scale_of(beta);
  double norm = 0.0;
  CLAM_UNROLL
  for (int q = 0; q < S::kQuads; ++q) {
    float f[4];
    CLAM_APART();
    CLAM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * q + j;
      f[j] = i < D && alive ? clamped(load(i < D ? i : 0) - centre[i < D ? i : 0]) : 0.0f;
      norm += static_cast<double>(f[j]) * f[j];
    }
    CLAM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * q + j;
      const double bias = 1.4426950408889634 * log_weight - 0.5 * scale * norm;
      if (i == D) f[j] = alive ? static_cast<float>(bias) : -kInfinity;
      if (i == D + 1 && S::kExtra > 1) f[j] = alive ? scale : 0.0f;
      if (i == D + 2 && S::kExtra > 2) f[j] = clamped(static_cast<float>(norm));
    }
    slot[q] = Quad{f[0], f[1], f[2], f[3]};
  }
}

// Fills up a table: weight 0 for every row. A row that is not finite turns to NaN all the same.
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

// What a row has seen of the memories in this step: weights are relative to 2^shift, `top` is the
// largest logit.
template <int D>
struct Recall {
  float top;
  float mass;
  float sum[D];
};

// Before the first memory of a step.
template <int D>
CLAM_HD void begin(Recall<D>& recall) {
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) recall.sum[i] = 0.0f;
  recall.mass = 0.0f;
  // Not -inf, with which a row of which all logits are -inf would have other NaNs.
  recall.top = kLowest;
}

// Where a row stands in a step: `lift` is what one beta per memory adds to each inner product,
// `reach` how far the logits of one beta for all, which lack |x|^2, are above those that have it.
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

// Whether the shift was near enough; of a row that is not finite never.
CLAM_HD bool settled(float mass) { return mass >= kFaint && mass <= kLoud; }

// After the memories were folded: whether this row wants them folded again, with its largest logit
// for a shift, once in a step. `height` is the shift less its reach, which is the next step's
// guess. A row that is settled keeps its shift, and where others of the block want it is folded
// again to the same bits.
CLAM_HD bool turn(float mass, float top, float& height, float& shift) {
  if (settled(mass) || shift == top) return false;
  height += top - shift;
  shift = top;
  return true;
}

// The bias comes last: it is large where beta is, and a sum that started from it would round D
// times at its size. `inner` is <rho_k, x>.
template <int D, Form F>
CLAM_HD float logit(const float* memory, float inner, float lift, float scale) {
  if (F == Form::kShared) return fused(scale, inner, memory[D]);
  return fused(memory[D + (F == Form::kShared ? 0 : 1)], inner + lift, memory[D]);
}

// Folds a table of `count` memories (a multiple of kGroupMax) into what R rows have seen; `scale`
// is in base 2, as the table is.
template <int D, int R, Form F>
CLAM_HD void fold(const Quad* table, int count, const float (&x)[R][D], const float (&lift)[R],
                  const float (&shift)[R], float scale, Recall<D> (&recall)[R]) {
  using S = Slot<D, F>;
  constexpr int G = group_size(D, R);
  static_assert(kGroupMax % G == 0, "tables are filled up to kGroupMax");
  // A group is unrolled as far as registers allow; the compiler would go on and spill.
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

// What the memories recall, and whether the step may be wrong. `shift` is that of the last fold.
template <int D>
CLAM_HD bool recalled_of(const Recall<D>& recall, const float (&x)[D], float shift,
                         const Betas& betas, float (&recalled)[D]) {
  const float inverse = 1.0f / recall.mass;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) recalled[i] = product(recall.sum[i], inverse);
  return doubted<D>(x, recalled, recall.mass, exp2_weight(recall.top - shift), betas);
}

// One step of one entry. Written so that gain 1 gives the recalled value and gain 0 the entry
// itself, to the last bit, unless the row is not finite.
CLAM_HD float advance(float x, float recalled, float gain) {
  return fused(gain, recalled, fused(-gain, x, x));
}

// The entry in the caller's coordinates. One that did not move is returned as it was given: taking
// the centre off and putting it back may round.
CLAM_HD float restore(float x, float given, float centre) {
  return x == given - centre ? given : x + centre;
}

// Whether a row is computed again: `doubt` says that one of its steps may be wrong, x is its last
// state, `given` the row as the caller has it.
template <int D>
CLAM_HD bool left_over(bool doubt, const float (&x)[D], const float (&given)[D],
                       const float* centre, float sharp) {
  float centred = 0.0f, result = 0.0f, before = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    const float out = restore(x[i], given[i], centre[i]);
    centred = fused(x[i], x[i], centred);
    result = fused(out, out, result);
    before = fused(given[i], given[i], before);
  }
  return (doubt || lost(centred, result, before)) && are_finite<D>(given, centre, sharp);
}

}  // namespace am
}  // namespace clam
