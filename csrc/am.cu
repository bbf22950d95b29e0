// SPDX-License-Identifier: Apache-2.0
//
// clam_cuda::recursion_small: all steps of an associative memory's recursion over few features in
// one launch. One thread owns R rows from the first step to the last; the memories are in shared
// memory, in tiles where they do not fit. The contract stands in register.cpp; am.h has the
// arithmetic.

#include <algorithm>

#include "am.h"
#include "common.h"

namespace clam {
namespace {

constexpr int kThreads = 128;
constexpr int kSharedBytes = 48 * 1024;  // what a block may have without asking for more

struct Problem {
  const float* v;
  const float* rho;
  const float* scale;
  const float* bias;
  const float* centre;        // null: the origin
  const float* gain;          // null unless the gain is float32
  const unsigned char* mask;  // null unless the gain is uint8 or bool
  float* out;
  int64_t problems, rows, memories;
  // Distance between two problems, 0 for an operand that all share.
  int64_t v_batch, rho_batch, scale_batch, bias_batch, centre_batch;
  int64_t gain_batch, gain_row, gain_feature;
  int64_t steps;
  float step;
  int features;
  int tile;      // memories in shared memory at a time, a multiple of am::kGroupMax
  bool aligned;  // rows of v may be read as vectors
};

// Floats per vector access of a row; a row of D floats starts at a multiple of it.
template <int D>
constexpr int kWidth = D % 4 == 0   ? 4
                       : D % 2 == 0 ? 2
                                    : 1;

template <int D>
__device__ __forceinline__ void load_row(const float* row, int d, bool aligned, float (&x)[D]) {
  if (kWidth<D> > 1 && aligned) {
    if (kWidth<D> == 4) {
#pragma unroll
      for (int i = 0; i + 3 < D; i += 4) {
        const float4 q = *reinterpret_cast<const float4*>(row + i);
        x[i] = q.x, x[i + 1] = q.y, x[i + 2] = q.z, x[i + 3] = q.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i + 1 < D; i += 2) {
        const float2 q = *reinterpret_cast<const float2*>(row + i);
        x[i] = q.x, x[i + 1] = q.y;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] = i < d ? row[i] : 0.0f;
}

// Rows of the output start where the allocator put them: aligned, unless D is padded.
template <int D>
__device__ __forceinline__ void store_row(float* row, int d, const float (&x)[D]) {
  if (kWidth<D> > 1 && d == D) {
    if (kWidth<D> == 4) {
#pragma unroll
      for (int i = 0; i + 3 < D; i += 4) {
        *reinterpret_cast<float4*>(row + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
      }
    } else {
#pragma unroll
      for (int i = 0; i + 1 < D; i += 2) {
        *reinterpret_cast<float2*>(row + i) = make_float2(x[i], x[i + 1]);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < D; ++i) {
    if (i < d) row[i] = x[i];
  }
}

// Fills the table with memories [first, first + p.tile) and tells whether one of them takes part.
template <int D, bool kPerMemory>
__device__ int stage(const Problem& p, int64_t problem, int64_t first, Quad* table, int& count) {
  using S = am::Slot<D, kPerMemory>;
  const int64_t left = p.memories - first;
  const int real = static_cast<int>(left < p.tile ? left : p.tile);
  count = (real + am::kGroupMax - 1) / am::kGroupMax * am::kGroupMax;
  const float* rho = p.rho + problem * p.rho_batch + first * p.features;
  const float* scale = p.scale + problem * p.scale_batch + (kPerMemory ? first : 0);
  const float* bias = p.bias + problem * p.bias_batch + first;
  int alive = 0;
  for (int k = threadIdx.x; k < count; k += kThreads) {
    if (k < real) {
      alive |= bias[k] != -kInfinity;
      am::pack<D, kPerMemory>(rho + static_cast<int64_t>(k) * p.features, p.features,
                              scale[kPerMemory ? k : 0], bias[k], table + k * S::kQuads);
    } else {
      am::pack_padding<D, kPerMemory>(table + k * S::kQuads);
    }
  }
  return alive;
}

// Which features of a row evolve, one bit each.
template <int D>
__device__ unsigned mask_bits(const Problem& p, int64_t offset, int d) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    if (i < d && p.mask[offset + i * p.gain_feature] != 0) bits |= 1u << i;
  }
  return bits;
}

// Blocks a multiprocessor is promised: without a number ptxas spills on some targets to reach its
// own.
constexpr int min_blocks(int features, int rows) {
  return features <= 8 ? 4 : features <= 12 || rows == 1 ? 3 : 2;
}

template <int D, int R, bool kPerMemory>
__global__ void __launch_bounds__(kThreads, min_blocks(D, R))
    recursion_small_kernel(const Problem p) {
  extern __shared__ Quad table[];
  const int d = D <= 8 ? D : p.features;  // a constant where the compiled size is exact
  const int64_t per_problem = (p.rows + R * kThreads - 1) / (R * kThreads);
  const int64_t blocks = p.problems * per_problem;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t problem = block / per_problem;
    const int64_t first = (block - problem * per_problem) * (R * kThreads) + threadIdx.x;
    const float* v = p.v + problem * p.v_batch;
    const float* centre = p.centre == nullptr ? nullptr : p.centre + problem * p.centre_batch;
    const float scale = kPerMemory ? 0.0f : kLog2e * p.scale[problem * p.scale_batch];

    float x[R][D];
    unsigned bits[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r * kThreads;
      bits[r] = ~0u;
      // A thread past the last row computes on zeros: it has memories to stage for the others.
#pragma unroll
      for (int i = 0; i < D; ++i) x[r][i] = 0.0f;
      if (row >= p.rows) continue;
      load_row<D>(v + row * d, d, p.aligned, x[r]);
#pragma unroll
      for (int i = 0; i < D; ++i) {
        if (centre != nullptr && i < d) x[r][i] -= centre[i];
      }
      if (p.mask != nullptr) {
        bits[r] = mask_bits<D>(p, problem * p.gain_batch + row * p.gain_row, d);
      }
    }

    int alive = 0;
    int count = 0;
    const bool resident = p.memories <= p.tile;
    for (int64_t t = 0; t < p.steps; ++t) {
      float lift[R];
      am::Recall<D> recall[R];
#pragma unroll
      for (int r = 0; r < R; ++r) lift[r] = am::begin<D, kPerMemory>(x[r], recall[r]);
      for (int64_t at = 0; at < p.memories; at += p.tile) {
        if (t == 0 || !resident) {
          __syncthreads();  // the tile before may still be read
          alive |= __syncthreads_or(stage<D, kPerMemory>(p, problem, at, table, count));
        }
        am::fold<D, R, kPerMemory>(table, count, x, lift, scale, recall);
      }
      if (!alive) break;  // no memory takes part: nothing moves
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = first + r * kThreads;
        const float inverse = 1.0f / recall[r].mass;
#pragma unroll
        for (int i = 0; i < D; ++i) {
          // A float gain is read again in every step: registers are scarcer than cache hits.
          float gain = bits[r] >> i & 1u ? p.step : 0.0f;
          if (p.gain != nullptr && i < d && row < p.rows) {
            gain *= p.gain[problem * p.gain_batch + row * p.gain_row + i * p.gain_feature];
          }
          x[r][i] = am::advance(x[r][i], recall[r].sum[i] * inverse, gain);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r * kThreads;
      if (row >= p.rows) continue;
      float given[D];
      load_row<D>(v + row * d, d, p.aligned, given);
#pragma unroll
      for (int i = 0; i < D; ++i) {
        x[r][i] = am::restore(x[r][i], given[i], centre != nullptr && i < d ? centre[i] : 0.0f);
      }
      store_row<D>(p.out + (problem * p.rows + row) * d, d, x[r]);
    }
  }
}

template <int D, int R, bool kPerMemory>
void launch(Problem& p, cudaStream_t stream) {
  constexpr int64_t kSlotBytes = am::Slot<D, kPerMemory>::kQuads * sizeof(Quad);
  constexpr int64_t kFits = kSharedBytes / kSlotBytes / am::kGroupMax * am::kGroupMax;
  const int64_t full = (p.memories + am::kGroupMax - 1) / am::kGroupMax * am::kGroupMax;
  p.tile = static_cast<int>(std::min(full, kFits));
  p.aligned =
      p.features == D && reinterpret_cast<uintptr_t>(p.v) % (kWidth<D> * sizeof(float)) == 0;
  const int64_t blocks = p.problems * ((p.rows + R * kThreads - 1) / (R * kThreads));
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, 0x7fffffff));
  recursion_small_kernel<D, R, kPerMemory>
      <<<grid, kThreads, static_cast<size_t>(p.tile * kSlotBytes), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int D>
void launch(Problem& p, bool per_memory, bool wide, cudaStream_t stream) {
  constexpr int R = am::rows_per_thread(D);
  if (per_memory) {
    wide ? launch<D, R, true>(p, stream) : launch<D, 1, true>(p, stream);
  } else {
    wide ? launch<D, R, false>(p, stream) : launch<D, 1, false>(p, stream);
  }
}

// A float32 operand [B, ...] on v's device; returns the distance between two problems, 0 if B is 1.
int64_t operand(const char* name, const Tensor& x, const Tensor& v, int64_t dims) {
  CLAM_CHECK(x.scalar_type() == ScalarType::Float, "recursion_small: ", name, ": expected float32");
  CLAM_CHECK(x.is_cuda() && x.get_device_index() == v.get_device_index(), "recursion_small: ", name,
             ": expected a tensor on the CUDA device of v");
  CLAM_CHECK(x.is_contiguous(), "recursion_small: ", name, ": expected a contiguous tensor");
  CLAM_CHECK(x.dim() == dims, "recursion_small: ", name, ": expected ", dims, " dimensions, got ",
             x.dim());
  return x.size(0) == 1 ? 0 : x.numel() / std::max<int64_t>(x.size(0), 1);
}

void same_size(const char* name, const char* axis, int64_t got, int64_t expected) {
  CLAM_CHECK(got == expected, "recursion_small: ", name, ": expected ", axis, " = ", expected,
             ", got ", got);
}

void gain_operand(const Tensor& gain, const Tensor& v, Problem& p) {
  CLAM_CHECK(gain.is_cuda() && gain.get_device_index() == v.get_device_index(),
             "recursion_small: gain: expected a tensor on the CUDA device of v");
  CLAM_CHECK(gain.dim() == 3, "recursion_small: gain: expected 3 dimensions, got ", gain.dim());
  same_size("gain", "N", gain.size(1), p.rows);
  same_size("gain", "D", gain.size(2), p.features);
  if (gain.scalar_type() == ScalarType::Float) {
    p.gain = gain.const_data_ptr<float>();
  } else {
    CLAM_CHECK(gain.scalar_type() == ScalarType::Byte || gain.scalar_type() == ScalarType::Bool,
               "recursion_small: gain: expected float32, uint8 or bool");
    p.mask = static_cast<const unsigned char*>(gain.const_data_ptr());
  }
  p.gain_batch = gain.size(0) == 1 ? 0 : gain.stride(0);
  p.gain_row = gain.stride(1);
  p.gain_feature = gain.stride(2);
}

}  // namespace

Tensor recursion_small(const Tensor& v, const Tensor& rho, const Tensor& scale, const Tensor& bias,
                       int64_t steps, double step, std::optional<Tensor> gain,
                       std::optional<Tensor> centre) {
  CLAM_CHECK(v.is_cuda(), "recursion_small: v: expected a CUDA tensor");
  CLAM_CHECK(steps >= 0, "recursion_small: steps: expected at least 0, got ", steps);
  Problem p{};
  p.v_batch = operand("v", v, v, 3);
  p.rho_batch = operand("rho", rho, v, 3);
  p.scale_batch = operand("scale", scale, v, 2);
  p.bias_batch = operand("bias", bias, v, 2);
  p.rows = v.size(1);
  p.features = static_cast<int>(std::min<int64_t>(v.size(2), am::kMaxFeatures + 1));
  p.memories = rho.size(1);
  CLAM_CHECK(1 <= p.features && p.features <= am::kMaxFeatures,
             "recursion_small: v: expected 1 to ", am::kMaxFeatures, " features, got ", v.size(2));
  CLAM_CHECK(p.memories >= 1, "recursion_small: rho: expected at least one memory");
  same_size("rho", "D", rho.size(2), p.features);
  same_size("bias", "K", bias.size(1), p.memories);
  const bool per_memory = scale.size(1) != 1;
  if (per_memory) same_size("scale", "K", scale.size(1), p.memories);
  if (gain.has_value()) gain_operand(*gain, v, p);
  if (centre.has_value()) {
    p.centre_batch = operand("centre", *centre, v, 2);
    same_size("centre", "D", centre->size(1), p.features);
  }

  p.problems = 1;
  const auto join = [&p](const char* name, int64_t size) {
    if (size == 1) return;
    CLAM_CHECK(p.problems == 1 || p.problems == size, "recursion_small: ", name,
               ": expected B = 1 or ", p.problems, ", got ", size);
    p.problems = size;
  };
  join("v", v.size(0));
  join("rho", rho.size(0));
  join("scale", scale.size(0));
  join("bias", bias.size(0));
  if (gain.has_value()) join("gain", gain->size(0));
  if (centre.has_value()) join("centre", centre->size(0));

  const int64_t sizes[] = {p.problems, p.rows, v.size(2)};
  torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  Tensor out = torch::stable::new_empty(v, {sizes, 3});
  if (out.numel() == 0) return out;
  p.v = v.const_data_ptr<float>();
  p.rho = rho.const_data_ptr<float>();
  p.scale = scale.const_data_ptr<float>();
  p.bias = bias.const_data_ptr<float>();
  if (centre.has_value()) p.centre = centre->const_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>();
  p.steps = steps;
  p.step = static_cast<float>(step);

  int processors = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, v.get_device_index()));
  const int size = am::padded_features(p.features);
  const int64_t rows_per_block = am::rows_per_thread(size) * kThreads;
  // With few rows one row a thread fills the machine better than reuse of the memories pays.
  const bool wide = p.problems * (p.rows / rows_per_block) >= 2 * processors;
  const cudaStream_t stream = current_stream(v);
  switch (size) {
    case 1: launch<1>(p, per_memory, wide, stream); break;
    case 2: launch<2>(p, per_memory, wide, stream); break;
    case 3: launch<3>(p, per_memory, wide, stream); break;
    case 4: launch<4>(p, per_memory, wide, stream); break;
    case 5: launch<5>(p, per_memory, wide, stream); break;
    case 6: launch<6>(p, per_memory, wide, stream); break;
    case 7: launch<7>(p, per_memory, wide, stream); break;
    case 8: launch<8>(p, per_memory, wide, stream); break;
    case 12: launch<12>(p, per_memory, wide, stream); break;
    default: launch<16>(p, per_memory, wide, stream); break;
  }
  return out;
}

}  // namespace clam
