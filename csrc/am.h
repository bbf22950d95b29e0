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

#pragma once

#include "portable.h"
#include "rows.h"

namespace clam {
namespace am {

constexpr int kMaxFeatures = 16;
constexpr int kGroupMax = 4;

// The running maximum may lag behind the true one by this much (in powers of 2): the sums stay far
// from overflow, and rescaling them becomes a branch that is hardly ever taken.
constexpr float kLag = 8.0f;

// What a memory's slot of the table holds beside its features: its bias; with a beta per memory its
// scale; for the backward, which serves both forms with one kernel, its scale and its norm.
enum class Form { kShared, kPerMemory, kBackward };

// Features are compiled exactly up to 8, then in two sizes; the rest of a row is padded with 0.
CLAM_HD constexpr int padded_features(int d) { return d <= 8 ? d : d <= 12 ? 12 : 16; }

// Rows of one thread: each memory that is read from shared memory serves all of them.
CLAM_HD constexpr int rows_per_thread(int features) { return features <= 4 ? 4 : 2; }

// Memories looked at before the maximum is compared: more hide latency, and cost registers.
CLAM_HD constexpr int group_size(int features) { return features <= 4 ? 4 : features <= 8 ? 2 : 1; }

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
template <class T>
CLAM_HD void add_alive(const T* rho, const Rows& rows, const float* weights, int64_t weights_row,
                       int64_t memories, int lane, float& sum, int& alive) {
  for (int64_t k = lane; k < memories; k += kWarp) {
    if (weights != nullptr && weights[k * weights_row] == -kInfinity) continue;  // may hold NaN
    sum += widen(rho[k * rows.row], rows.type);
    ++alive;
  }
}

CLAM_HD void add_alive(const Rows& rho, int64_t rho_start, const Rows& weights,
                       int64_t weights_start, int64_t memories, int feature, int lane, float& sum,
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

// 2 beta in base 2: what all inner products are multiplied by.
CLAM_HD float scale_of(float beta) { return product(kLog2e, 2.0f * beta); }

// One memory as the caller has it, into the table. Of one that takes no part nothing is looked at.
// Errors of the table are the same for every row and step, and move borders and fixed points: the
// bias is rounded once, and is of the scale as rounded, with which the logit is a squared distance.
template <int D, Form F>
CLAM_HD void pack(const float (&memory)[D], const float* centre, float beta, float log_weight,
                  Quad* slot) {
  using S = Slot<D, F>;
  const bool alive = log_weight != -kInfinity;
  const float scale = scale_of(beta);
  float f[S::kFloats];
  double norm = 0.0;
  CLAM_UNROLL
  for (int i = 0; i < S::kFloats; ++i) {
    f[i] = i < D && alive ? memory[i < D ? i : 0] - centre[i < D ? i : 0] : 0.0f;
    norm += static_cast<double>(f[i]) * f[i];
  }
  const double bias = 1.4426950408889634 * log_weight - 0.5 * scale * norm;
  f[D] = alive ? static_cast<float>(bias) : -kInfinity;
  if (F != Form::kShared && alive) f[D + (S::kExtra > 1 ? 1 : 0)] = scale;
  if (F == Form::kBackward) f[D + (S::kExtra > 2 ? 2 : 0)] = static_cast<float>(norm);
  CLAM_UNROLL
  for (int i = 0; i < S::kQuads; ++i) {
    slot[i] = Quad{f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3]};
  }
}

// Fills up a table: weight 0 for every row. A row that is not finite turns to NaN all the same.
template <int D, Form F>
CLAM_HD void pack_padding(Quad* slot) {
  const float nothing[D] = {};
  pack<D, F>(nothing, nothing, 0.0f, -kInfinity, slot);
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

// What a row has seen of the memories in this step: weights are relative to 2^top.
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
  // Not -inf: a memory of bias -inf that comes first must weigh 0 and not exp2(-inf + inf).
  recall.top = kLowest;
}

// What one beta per memory adds to each inner product.
template <int D>
CLAM_HD float lift_of(const float (&x)[D]) {
  float norm = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) norm = fused(x[i], x[i], norm);
  return -0.5f * norm;
}

// The bias comes last: it is large where beta is, and a sum that started from it would round D
// times at its size. `inner` is <rho_k, x>.
template <int D, Form F>
CLAM_HD float logit(const float* memory, float inner, float lift, float scale) {
  if (F == Form::kShared) return fused(scale, inner, memory[D]);
  return fused(memory[D + (F == Form::kShared ? 0 : 1)], inner + lift, memory[D]);
}

// Folds a table of `count` memories (a multiple of kGroupMax) into what R rows have seen; `scale`
// is in base 2, as the table is. NaN passes through: fmaxf drops it, the weight keeps it.
template <int D, int R, Form F>
CLAM_HD void fold(const Quad* table, int count, const float (&x)[R][D], const float (&lift)[R],
                  float scale, Recall<D> (&recall)[R]) {
  using S = Slot<D, F>;
  constexpr int G = group_size(D);
  static_assert(kGroupMax % G == 0, "tables are filled up to kGroupMax");
  // The backward wants the true maximum: only so is the weight of a row's only memory exactly 1.
  constexpr float lag = F == Form::kBackward ? 0.0f : kLag;
  // A group is unrolled as far as registers allow; the compiler would go on and spill.
  CLAM_ROLLED
  for (int k = 0; k < count; k += G) {
    float memory[G][S::kFloats];
    CLAM_UNROLL
    for (int j = 0; j < G; ++j) unpack<D, F>(table + (k + j) * S::kQuads, memory[j]);
    CLAM_UNROLL
    for (int r = 0; r < R; ++r) {
      Recall<D>& seen = recall[r];
      float z[G];
      float top = -kInfinity;
      CLAM_UNROLL
      for (int j = 0; j < G; ++j) {
        z[j] = logit<D, F>(memory[j], inner_product<D>(memory[j], x[r]), lift[r], scale);
        top = fmaxf(top, z[j]);
      }
      if (top > seen.top + lag) {
        const float shrink = exp2_weight(seen.top - top);
        seen.top = top;
        seen.mass *= shrink;
        CLAM_UNROLL
        for (int i = 0; i < D; ++i) seen.sum[i] *= shrink;
      }
      CLAM_UNROLL
      for (int j = 0; j < G; ++j) {
        const float weight = exp2_weight(z[j] - seen.top);
        seen.mass += weight;
        CLAM_UNROLL
        for (int i = 0; i < D; ++i) seen.sum[i] = fused(weight, memory[j][i], seen.sum[i]);
      }
    }
  }
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

}  // namespace am
}  // namespace clam
