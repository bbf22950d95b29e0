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

namespace clam {
namespace am {

constexpr int kMaxFeatures = 16;
constexpr int kGroupMax = 4;

// The running maximum may lag behind the true one by this much (in powers of 2): the sums stay far
// from overflow, and rescaling them becomes a branch that is hardly ever taken.
constexpr float kLag = 8.0f;

// Features are compiled exactly up to 8, then in two sizes; the rest of a row is padded with 0.
CLAM_HD constexpr int padded_features(int d) { return d <= 8 ? d : d <= 12 ? 12 : 16; }

// Rows of one thread: each memory that is read from shared memory serves all of them.
CLAM_HD constexpr int rows_per_thread(int features) { return features <= 4 ? 4 : 2; }

// Memories looked at before the maximum is compared: more hide latency, and cost registers.
CLAM_HD constexpr int group_size(int features) { return features <= 4 ? 4 : features <= 8 ? 2 : 1; }

// One memory in the table: its features, its bias, with a beta per memory its scale.
template <int D, bool kPerMemory>
struct Slot {
  static constexpr int kQuads = (D + (kPerMemory ? 2 : 1) + 3) / 4;
  static constexpr int kFloats = 4 * kQuads;
};

template <int D, bool kPerMemory>
CLAM_HD void pack(const float* rho, int d, float scale, float bias, Quad* slot) {
  using S = Slot<D, kPerMemory>;
  float f[S::kFloats];
  CLAM_UNROLL
  for (int i = 0; i < S::kFloats; ++i) f[i] = i < D && i < d ? rho[i] : 0.0f;
  f[D] = bias * kLog2e;
  if (kPerMemory) f[D + (kPerMemory ? 1 : 0)] = scale * kLog2e;
  CLAM_UNROLL
  for (int i = 0; i < S::kQuads; ++i) {
    slot[i] = Quad{f[4 * i], f[4 * i + 1], f[4 * i + 2], f[4 * i + 3]};
  }
}

// Fills up a table: weight 0 for every row. A row that is not finite turns to NaN all the same.
template <int D, bool kPerMemory>
CLAM_HD void pack_padding(Quad* slot) {
  pack<D, kPerMemory>(nullptr, 0, 0.0f, -kInfinity, slot);
}

// What a row has seen of the memories in this step: weights are relative to 2^top.
template <int D>
struct Recall {
  float top;
  float mass;
  float sum[D];
};

// Before the first memory of a step. `lift` is what one beta per memory adds to each inner product.
template <int D, bool kPerMemory>
CLAM_HD float begin(const float (&x)[D], Recall<D>& recall) {
  float norm = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    if (kPerMemory) norm = fused(x[i], x[i], norm);
    recall.sum[i] = 0.0f;
  }
  recall.mass = 0.0f;
  // Not -inf: a memory of bias -inf that comes first must weigh 0 and not exp2(-inf + inf).
  recall.top = kLowest;
  return -0.5f * norm;
}

// The bias comes last: it is large where beta is, and a sum that started from it would round D
// times at its size.
template <int D, bool kPerMemory>
CLAM_HD float logit(const float* memory, const float (&x)[D], float lift, float scale) {
  float inner = memory[0] * x[0];
  CLAM_UNROLL
  for (int i = 1; i < D; ++i) inner = fused(memory[i], x[i], inner);
  if (kPerMemory) return fused(memory[D + (kPerMemory ? 1 : 0)], inner + lift, memory[D]);
  return fused(scale, inner, memory[D]);
}

// Folds a table of `count` memories (a multiple of kGroupMax) into what R rows have seen; `scale`
// is in base 2, as the table is. NaN passes through: fmaxf drops it, the weight keeps it.
template <int D, int R, bool kPerMemory>
CLAM_HD void fold(const Quad* table, int count, const float (&x)[R][D], const float (&lift)[R],
                  float scale, Recall<D> (&recall)[R]) {
  using S = Slot<D, kPerMemory>;
  constexpr int G = group_size(D);
  static_assert(kGroupMax % G == 0, "tables are filled up to kGroupMax");
  // A group is unrolled as far as registers allow; the compiler would go on and spill.
  CLAM_ROLLED
  for (int k = 0; k < count; k += G) {
    float memory[G][S::kFloats];
    CLAM_UNROLL
    for (int j = 0; j < G; ++j) {
      CLAM_UNROLL
      for (int i = 0; i < S::kQuads; ++i) {
        const Quad q = table[(k + j) * S::kQuads + i];
        memory[j][4 * i] = q.x;
        memory[j][4 * i + 1] = q.y;
        memory[j][4 * i + 2] = q.z;
        memory[j][4 * i + 3] = q.w;
      }
    }
    CLAM_UNROLL
    for (int r = 0; r < R; ++r) {
      Recall<D>& seen = recall[r];
      float z[G];
      float top = -kInfinity;
      CLAM_UNROLL
      for (int j = 0; j < G; ++j) {
        z[j] = logit<D, kPerMemory>(memory[j], x[r], lift[r], scale);
        top = fmaxf(top, z[j]);
      }
      if (top > seen.top + kLag) {
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
