// SPDX-License-Identifier: Apache-2.0
//
// What both launchers of the small recursion share: the operands as the caller has them, and how a
// block finds the centre of its memories and fills its table.

#pragma once

#include <algorithm>

#include "am.h"
#include "common.h"

namespace clam {

struct Problem {
  Rows v, rho, mask;        // mask.data is null where all entries evolve
  Rows beta, weights;       // a "row" is a memory; null: beta is `beta_value`, all weights are 1
  int64_t problems, inner;  // problems = O * I
  int64_t rows, memories, steps;
  float beta_value, step;
  int features;
  bool per_memory;
};

// Where a problem's operands start.
struct Cell {
  int64_t v, rho, mask, beta, weights, outer, inner;
};

// What a block knows of a problem's memories as a whole.
struct Side {
  float centre[am::kMaxFeatures];
  int alive;
};

__device__ __forceinline__ Cell cell_of(const Problem& p, int64_t problem) {
  const int64_t o = problem / p.inner, i = problem - o * p.inner;
  return {p.v.start(o, i),
          p.rho.start(o, i),
          p.mask.start(o, i),
          p.beta.start(o, i),
          p.weights.start(o, i),
          o,
          i};
}

__device__ __forceinline__ float beta_of(const Problem& p, const Cell& cell, int64_t k) {
  return p.beta.data == nullptr ? p.beta_value : number(p.beta, cell.beta + k * p.beta.row);
}

// The mean of the memories that take part: a warp a feature, in an order that depends on K alone.
// The caller has a barrier before, where `side` may still be read.
__device__ __forceinline__ void find_centre(const Problem& p, const Cell& cell, Side& side) {
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < am::kMaxFeatures; i += blockDim.x / kWarp) {
    float sum = 0.0f;
    int alive = 0;
    if (i < p.features) {
      am::add_alive(p.rho, cell.rho, p.weights, cell.weights, p.memories, i, lane, sum, alive);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
      alive += __shfl_xor_sync(~0u, alive, offset);
    }
    if (lane == 0) {
      side.centre[i] = alive > 0 ? sum / static_cast<float>(alive) : 0.0f;
      if (i == 0) side.alive = alive;
    }
  }
  __syncthreads();
}

// Fills the table with memories [first, first + real), up to a whole group. No barrier of its own.
template <int D, am::Form F>
__device__ __forceinline__ int stage(const Problem& p, const Cell& cell, const Side& side,
                                     int64_t first, int real, Quad* table) {
  using S = am::Slot<D, F>;
  const int count = static_cast<int>(am::table_size(real));
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    if (k >= real) {
      am::pack_padding<D, F>(table + k * S::kQuads);
      continue;
    }
    float memory[D];
    load_row<D>(p.rho, cell.rho + (first + k) * p.rho.row, false, p.features, memory);
    const float weight = p.weights.data == nullptr
                             ? 0.0f
                             : number(p.weights, cell.weights + (first + k) * p.weights.row);
    am::pack<D, F>(memory, side.centre, beta_of(p, cell, first + k), weight, table + k * S::kQuads);
  }
  return count;
}

// Which features of a row evolve, one bit each; a float mask is read where it is used.
template <int D>
__device__ __forceinline__ unsigned mask_bits(const Problem& p, int64_t start, int d) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    const auto* mask = static_cast<const unsigned char*>(p.mask.data);
    if (i < d && mask[start + i * p.mask.feature] != 0) bits |= 1u << i;
  }
  return bits;
}

// step * update_mask of one row. A float mask is read again in every step: registers are scarcer
// than cache hits. For the same reason the compiler is kept from holding D addresses all the time.
template <int D>
__device__ __forceinline__ void load_gain(const Problem& p, unsigned bits, int64_t start, bool real,
                                          int d, float (&gain)[D]) {
  if (p.mask.data == nullptr || p.mask.type != Type::kFloat) {
#pragma unroll
    for (int i = 0; i < D; ++i) gain[i] = bits >> i & 1u ? p.step : 0.0f;
    return;
  }
  int64_t feature = p.mask.feature;
  asm volatile("" : "+l"(feature), "+l"(start));
#pragma unroll
  for (int i = 0; i < D; ++i) {
    const bool given = real && i < d;
    gain[i] = given ? p.step * number(p.mask, start + i * feature) : 0.0f;
  }
}

// ---- the host's side ----------------------------------------------------------------------------

// How the library names an op in its messages.
struct Checked {
  const char* op;
  const Tensor& v;

  // A tensor [O, I, size2 or 1, size3 or 1] on v's device. A size that is 1 gets stride 0.
  Rows rows(const char* name, const Tensor& x, int64_t size2, int64_t size3) const {
    CLAM_CHECK(x.is_cuda() && x.get_device_index() == v.get_device_index(), op, ": ", name,
               ": expected a tensor on the CUDA device of v");
    const int64_t dims = size3 == 0 ? 3 : 4;
    CLAM_CHECK(x.dim() == dims, op, ": ", name, ": expected ", dims, " dimensions, got ", x.dim());
    const int64_t sizes[] = {v.size(0), v.size(1), size2, size3};
    int64_t strides[4] = {};
    for (int64_t i = 0; i < dims; ++i) {
      CLAM_CHECK(x.size(i) == sizes[i] || (i == 2 && size3 == 0 && x.size(i) == 1), op, ": ", name,
                 ": expected size ", sizes[i], " in dimension ", i, ", got ", x.size(i));
      strides[i] = x.size(i) == 1 ? 0 : x.stride(i);
    }
    Rows rows{};
    rows.data = x.const_data_ptr();
    rows.outer = strides[0], rows.inner = strides[1];
    rows.row = strides[2], rows.feature = strides[3];
    switch (x.scalar_type()) {
      case ScalarType::Float: rows.type = Type::kFloat; break;
      case ScalarType::BFloat16: rows.type = Type::kBFloat16; break;
      case ScalarType::Half: rows.type = Type::kHalf; break;
      case ScalarType::Bool:
      case ScalarType::Byte: rows.type = Type::kByte; break;
      default: fail("clam_cuda::", op, ": ", name, ": unexpected dtype");
    }
    return rows;
  }

  Rows states(const char* name, const Tensor& x, int64_t size2, int64_t size3) const {
    CLAM_CHECK(x.scalar_type() == v.scalar_type(), op, ": ", name, ": expected the dtype of v");
    Rows found = rows(name, x, size2, size3);
    CLAM_CHECK(found.type != Type::kByte, op, ": ", name,
               ": expected float32, bfloat16 or float16");
    return found;
  }

  Rows memory_side(const char* name, const std::optional<Tensor>& x, int64_t memories) const {
    if (!x.has_value()) return {};
    CLAM_CHECK(x->scalar_type() == ScalarType::Float, op, ": ", name, ": expected float32");
    return rows(name, *x, memories, 0);
  }

  // Whether rows may be read as vectors of `width`; true of padded features never.
  static bool packed(const Rows& rows, int features, int size) {
    const int64_t width = width_of(size);
    const int64_t bytes = width * (rows.type == Type::kFloat ? 4 : 2);
    return features == size && (features == 1 || rows.feature == 1) && rows.row % width == 0 &&
           rows.outer % width == 0 && rows.inner % width == 0 &&
           reinterpret_cast<uintptr_t>(rows.data) % bytes == 0;
  }
};

inline Problem problem_of(const Checked& check, const Tensor& rho,
                          const std::optional<Tensor>& beta, double beta_value,
                          const std::optional<Tensor>& log_weights,
                          const std::optional<Tensor>& update_mask, int64_t steps, double step) {
  const Tensor& v = check.v;
  const char* op = check.op;
  CLAM_CHECK(v.is_cuda(), op, ": v: expected a CUDA tensor");
  CLAM_CHECK(v.dim() == 4 && rho.dim() == 4, op, ": v, rho: expected 4 dimensions");
  CLAM_CHECK(steps >= 0, op, ": steps: expected at least 0, got ", steps);
  Problem p{};
  p.inner = v.size(1);
  p.problems = v.size(0) * v.size(1);
  p.rows = v.size(2);
  p.memories = rho.size(2);
  CLAM_CHECK(1 <= v.size(3) && v.size(3) <= am::kMaxFeatures, op, ": v: expected 1 to ",
             am::kMaxFeatures, " features, got ", v.size(3));
  CLAM_CHECK(1 <= p.memories && p.memories <= 0x7fffffff, op, ": rho: expected 1 to 2^31 memories");
  p.features = static_cast<int>(v.size(3));
  p.v = check.states("v", v, p.rows, p.features);
  p.rho = check.states("rho", rho, p.memories, p.features);
  p.beta = check.memory_side("beta", beta, p.memories);
  p.weights = check.memory_side("log_weights", log_weights, p.memories);
  p.per_memory = beta.has_value() && beta->size(2) > 1;
  p.beta_value = static_cast<float>(beta_value);
  if (update_mask.has_value()) {
    p.mask = check.rows("update_mask", *update_mask, p.rows, p.features);
    CLAM_CHECK(p.mask.type == Type::kFloat || p.mask.type == Type::kByte, op,
               ": update_mask: expected float32, uint8 or bool");
  }
  p.steps = steps;
  p.step = static_cast<float>(step);
  return p;
}

}  // namespace clam
