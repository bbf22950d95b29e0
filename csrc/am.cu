// SPDX-License-Identifier: Apache-2.0
//
// clam_cuda::recursion_small: all steps of an associative memory's recursion over few features in
// one launch. One thread owns R rows from the first step to the last; the memories are in shared
// memory, in tiles where they do not fit. The contract stands in register.cpp; am.h has the
// arithmetic.

#include "am_problem.h"

namespace clam {
namespace {

constexpr int kThreads = 128;
constexpr int kSharedBytes = 47 * 1024;  // what a block may have without asking for more, less Side
constexpr int kBlocksPerProcessor = 2048 / kThreads;

struct Forward : Problem {
  void* out;
  int tile;  // memories in shared memory at a time, a multiple of am::kGroupMax
};

// Blocks a multiprocessor is promised: without a number ptxas spills on some targets to reach its
// own.
constexpr int min_blocks(int features, int rows) {
  return features <= 8 ? 4 : features <= 12 || rows == 1 ? 3 : 2;
}

// A row less the centre, 0 past the last row: such a thread has memories to stage for the others.
template <int D>
__device__ __forceinline__ unsigned load_state(const Problem& p, const Cell& cell, const Side& side,
                                               int64_t row, int d, float (&x)[D]) {
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] = 0.0f;
  if (row >= p.rows) return ~0u;
  load_row<D>(p.v, cell.v + row * p.v.row, p.v.packed, d, x);
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] -= side.centre[i];
  const bool bytes = p.mask.data != nullptr && p.mask.type == Type::kByte;
  return bytes ? mask_bits<D>(p, cell.mask + row * p.mask.row, d) : ~0u;
}

template <int D, int R, am::Form F>
__global__ void __launch_bounds__(kThreads, min_blocks(D, R))
    recursion_small_kernel(const Forward p) {
  extern __shared__ Quad table[];
  __shared__ Side side;
  const int d = D <= 8 ? D : p.features;  // a constant where the compiled size is exact
  const int64_t per_problem = (p.rows + R * kThreads - 1) / (R * kThreads);
  const int64_t items = p.problems * per_problem;
  const int64_t share = items / gridDim.x, rest = items % gridDim.x;
  const int64_t begin = blockIdx.x * share + min(static_cast<int64_t>(blockIdx.x), rest);
  const int64_t end = begin + share + (blockIdx.x < rest);
  const bool resident = p.memories <= p.tile;
  int64_t known = -1;  // the problem that `side` is of, and the table where it holds all memories
  bool staged = false;
  int count = 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t problem = item / per_problem;
    const int64_t first = (item - problem * per_problem) * (R * kThreads) + threadIdx.x;
    const Cell cell = cell_of(p, problem);
    if (problem != known) {
      __syncthreads();  // the problem before may still be read
      find_centre(p, cell, side);
      known = problem;
      staged = false;
    }
    const float scale = F == am::Form::kShared ? am::scale_of(beta_of(p, cell, 0)) : 0.0f;

    float x[R][D];
    unsigned bits[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      bits[r] = load_state<D>(p, cell, side, first + r * kThreads, d, x[r]);
    }
    // Where no memory takes part nothing moves.
    for (int64_t t = 0; t < p.steps && side.alive > 0; ++t) {
      float lift[R];
      am::Recall<D> recall[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        am::begin<D>(recall[r]);
        lift[r] = p.per_memory ? am::lift_of<D>(x[r]) : 0.0f;
      }
      for (int64_t at = 0; at < p.memories; at += p.tile) {
        if (!staged || !resident) {
          const int64_t left = p.memories - at;
          __syncthreads();  // the tile before may still be read
          count = stage<D, F>(p, cell, side, at, static_cast<int>(left < p.tile ? left : p.tile),
                              table);
          __syncthreads();
          staged = true;
        }
        am::fold<D, R, F>(table, count, x, lift, scale, recall);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = first + r * kThreads;
        const int64_t mask = cell.mask + row * p.mask.row;
        const float inverse = 1.0f / recall[r].mass;
        float gain[D];
        load_gain<D>(p, bits[r], mask, row < p.rows, d, gain);
#pragma unroll
        for (int i = 0; i < D; ++i) {
          x[r][i] = am::advance(x[r][i], recall[r].sum[i] * inverse, gain[i]);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r * kThreads;
      if (row >= p.rows) continue;
      float given[D];
      load_row<D>(p.v, cell.v + row * p.v.row, p.v.packed, d, given);
#pragma unroll
      for (int i = 0; i < D; ++i) x[r][i] = am::restore(x[r][i], given[i], side.centre[i]);
      store_row<D>(p.out, p.v.type, (problem * p.rows + row) * d, d, x[r]);
    }
  }
}

template <int D, int R, am::Form F>
void launch(Forward& p, int processors, cudaStream_t stream) {
  constexpr int64_t kSlotBytes = am::Slot<D, F>::kQuads * sizeof(Quad);
  constexpr int64_t kFits = kSharedBytes / kSlotBytes / am::kGroupMax * am::kGroupMax;
  p.tile = static_cast<int>(std::min(am::table_size(p.memories), kFits));
  p.v.packed = Checked::packed(p.v, p.features, D);
  const int64_t items = p.problems * ((p.rows + R * kThreads - 1) / (R * kThreads));
  const int64_t most = static_cast<int64_t>(processors) * kBlocksPerProcessor;
  recursion_small_kernel<D, R, F><<<static_cast<unsigned>(std::min(items, most)), kThreads,
                                    static_cast<size_t>(p.tile * kSlotBytes), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int D>
void launch(Forward& p, int processors, cudaStream_t stream) {
  constexpr int R = am::rows_per_thread(D);
  constexpr auto kShared = am::Form::kShared, kPerMemory = am::Form::kPerMemory;
  // With few rows one row a thread fills the machine better than reuse of the memories pays. A
  // row's bits do not depend on it, nor on the grid.
  const bool wide = p.problems * (p.rows / (R * kThreads)) >= 2 * processors;
  if (!wide) {
    // A lift of 0 makes the form with a beta per memory that with one for all, bit for bit.
    launch<D, 1, kPerMemory>(p, processors, stream);
  } else if (p.per_memory) {
    launch<D, R, kPerMemory>(p, processors, stream);
  } else {
    launch<D, R, kShared>(p, processors, stream);
  }
}

}  // namespace

Tensor recursion_small(const Tensor& v, const Tensor& rho, std::optional<Tensor> beta,
                       double beta_value, std::optional<Tensor> log_weights,
                       std::optional<Tensor> update_mask, int64_t steps, double step) {
  Forward p{};
  static_cast<Problem&>(p) = problem_of({"recursion_small", v}, rho, beta, beta_value, log_weights,
                                        update_mask, steps, step);
  torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  const int64_t sizes[] = {v.size(0), v.size(1), v.size(2), v.size(3)};
  Tensor out = torch::stable::new_empty(v, {sizes, 4});
  if (out.numel() == 0) return out;
  p.out = out.mutable_data_ptr();
  int processors = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, v.get_device_index()));
  const cudaStream_t stream = current_stream(v);
  switch (am::padded_features(p.features)) {
    case 1: launch<1>(p, processors, stream); break;
    case 2: launch<2>(p, processors, stream); break;
    case 3: launch<3>(p, processors, stream); break;
    case 4: launch<4>(p, processors, stream); break;
    case 5: launch<5>(p, processors, stream); break;
    case 6: launch<6>(p, processors, stream); break;
    case 7: launch<7>(p, processors, stream); break;
    case 8: launch<8>(p, processors, stream); break;
    case 12: launch<12>(p, processors, stream); break;
    default: launch<16>(p, processors, stream); break;
  }
  return out;
}

}  // namespace clam
