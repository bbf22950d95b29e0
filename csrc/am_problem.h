// SPDX-License-Identifier: Apache-2.0
//
// Both launchers of the small recursion use this: the caller's operands, and how a block computes
// the centre of its memories and fills its table.

#pragma once

#include <algorithm>

#include "am.h"
#include "common.h"

namespace clam {

struct Arguments {
  Rows v, rho, mask;        // mask.data is null where all entries evolve
  Rows beta, weights;       // a "row" is a memory; null: beta is `beta_value`, all weights are 1
  int64_t problems, inner;  // problems = O * I
  int64_t rows, memories, steps;
  float beta_value, step;
  unsigned char* flag;  // [problems, rows]: 1 for rows that kernels/am/exact.py computes again
  int features;
  bool per_memory;
};

// The place of a problem in the batch. The kernels compute the start of an operand from it where
// they need one, because registers are scarce.
struct Place {
  int64_t outer, inner;
};

// Numbers of all memories of a problem.
struct Side {
  float centre[am::kMaxFeatures];
  float peak;  // the largest log-weight, in base 2
  am::Betas betas;
  int active;  // how many memories are
};

__device__ __forceinline__ Place place_of(const Arguments& p, int64_t problem) {
  const int64_t outer = problem / p.inner;
  return {outer, problem - outer * p.inner};
}

__device__ __forceinline__ int64_t start_of(const Rows& rows, const Place& place) {
  return rows.start(place.outer, place.inner);
}

__device__ __forceinline__ float beta_of(const Arguments& p, const Place& place, int64_t k) {
  return p.beta.data == nullptr ? p.beta_value
                                : number(p.beta, start_of(p.beta, place) + k * p.beta.row);
}

__device__ __forceinline__ float log_weight_of(const Arguments& p, const Place& place, int64_t k) {
  return p.weights.data == nullptr
             ? 0.0f
             : number(p.weights, start_of(p.weights, place) + k * p.weights.row);
}

// The mean of the active memories, a warp for each feature, in an order that depends on K alone;
// the last warp reads betas and log-weights. The caller needs a barrier before it where other
// threads may still read `side`.
__device__ __forceinline__ void find_centre(const Arguments& p, const Place& place, Side& side) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int i = warp; i < p.features; i += warps) {
    double sum = 0.0;
    int active = 0;
    am::add_active(p.rho, start_of(p.rho, place), p.weights, start_of(p.weights, place), p.memories,
                   i, lane, sum, active);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
      active += __shfl_xor_sync(~0u, active, offset);
    }
    if (lane == 0) {
      side.centre[i] = active > 0 ? static_cast<float>(sum / active) : 0.0f;
      if (i == 0) side.active = active;
    }
  }
  if (threadIdx.x < am::kMaxFeatures && threadIdx.x >= p.features) side.centre[threadIdx.x] = 0.0f;
  if (warp == warps - 1) {
    am::Extremes extremes = am::no_memory();
    const bool alike = p.weights.data == nullptr && !p.per_memory;
    for (int64_t k = lane; k < (alike ? 1 : p.memories); k += kWarp) {
      am::add_memory(beta_of(p, place, k), log_weight_of(p, place, k), extremes);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const am::Extremes share{
          __shfl_xor_sync(~0u, extremes.peak, offset), __shfl_xor_sync(~0u, extremes.sharp, offset),
          __shfl_xor_sync(~0u, extremes.least, offset), __shfl_xor_sync(~0u, extremes.bad, offset)};
      am::add_share(share, extremes);
    }
    if (lane == 0) {
      side.peak = kLog2e * extremes.peak;
      side.betas = am::betas_of(extremes, p.per_memory);
    }
  }
  __syncthreads();
}

// Fills the table with memories [first, first + real) and pads it to a multiple of `whole`. It has
// no barrier.
template <int D, am::Form F>
__device__ __forceinline__ int stage(const Arguments& p, const Place& place, const Side& side,
                                     int64_t first, int real, int whole, Quad* table) {
  using S = am::Slot<D, F>;
  const int count = (real + whole - 1) / whole * whole;
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    if (k >= real) {
      am::pack_padding<D, F>(table + k * S::kQuads);
      continue;
    }
    const int64_t memory = start_of(p.rho, place) + (first + k) * p.rho.row;
    const float weight = log_weight_of(p, place, first + k);
    const auto load = [&](int i) {
      return i < p.features ? load_entry(p.rho, memory + i * p.rho.feature) : 0.0f;
    };
    am::pack<D, F>(load, side.centre, beta_of(p, place, first + k), weight, table + k * S::kQuads);
  }
  return count;
}

// step * update_mask of one entry.
__device__ __forceinline__ float load_gain(const Arguments& p, int64_t at) {
  if (p.mask.data == nullptr) return p.step;
  if (p.mask.type == Type::kFloat) return p.step * number(p.mask, at);
  return static_cast<const unsigned char*>(p.mask.data)[at] != 0 ? p.step : 0.0f;
}

// step * update_mask of one row, 0 past the last. Every step reads the mask again: registers are
// scarcer than cache hits. For the same reason the asm statements stop the compiler from keeping D
// addresses in registers.
template <int D>
__device__ __forceinline__ void load_gain(const Arguments& p, const Place& place, int64_t row,
                                          int d, float (&gain)[D]) {
  if (p.mask.data == nullptr) {
#pragma unroll
    for (int i = 0; i < D; ++i) gain[i] = p.step;
    return;
  }
  asm volatile("" : "+l"(row));
  int64_t feature = p.mask.feature;
  asm volatile("" : "+l"(feature));
  const int64_t start = start_of(p.mask, place) + row * p.mask.row;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    gain[i] = row < p.rows && i < d ? load_gain(p, start + i * feature) : 0.0f;
  }
}

// ---- on the host --------------------------------------------------------------------------------

// Checks the operands of an op; messages begin with its name.
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
    Rows extremes = rows(name, x, size2, size3);
    CLAM_CHECK(extremes.type != Type::kByte, op, ": ", name,
               ": expected float32, bfloat16 or float16");
    return extremes;
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

inline Arguments arguments_of(const Checked& check, const Tensor& rho,
                              const std::optional<Tensor>& beta, double beta_value,
                              const std::optional<Tensor>& log_weights,
                              const std::optional<Tensor>& update_mask, int64_t steps, double step,
                              const Tensor& flag) {
  const Tensor& v = check.v;
  const char* op = check.op;
  CLAM_CHECK(v.is_cuda(), op, ": v: expected a CUDA tensor");
  CLAM_CHECK(v.dim() == 4 && rho.dim() == 4, op, ": v, rho: expected 4 dimensions");
  CLAM_CHECK(steps >= 0, op, ": steps: expected at least 0, got ", steps);
  Arguments p{};
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
  check.rows("flag", flag, p.rows, 0);
  CLAM_CHECK(flag.scalar_type() == ScalarType::Byte && flag.is_contiguous() &&
                 flag.numel() == p.problems * p.rows,
             op, ": flag: expected contiguous uint8, one for each row");
  p.flag = static_cast<unsigned char*>(flag.mutable_data_ptr());
  p.steps = steps;
  p.step = static_cast<float>(step);
  return p;
}

}  // namespace clam
