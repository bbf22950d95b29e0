// SPDX-License-Identifier: Apache-2.0
//
// clam_cuda::recursion_small: all steps of an associative memory's recursion over few features in
// one launch. Memories are in shared memory, in tiles where they do not fit. With many rows a
// thread owns R of them from the first step to the last; with few rows, several lanes share one.
// The bits of a row are the same either way. register.cpp has the contract, am.h the arithmetic.

#include "am_problem.h"

namespace clam {
namespace {

constexpr int kThreads = 128;
constexpr int kSharedBytes = 45 * 1024;  // the default limit of a block, minus its other arrays
constexpr int kChunks = 4;               // memories whose weights a lane computes at a time

struct Forward : Arguments {
  void* out;
  int tile;  // memories in shared memory at a time
};

// The least blocks of a multiprocessor, for the compiler: without a number ptxas spills on some
// targets to reach its own.
constexpr int min_blocks(int features, int rows) {
  return features <= 2 ? 6 : features <= 4 ? 5 : features <= 8 || rows == 1 ? 4 : 3;
}

// The rows that a block computes now; in shared memory, because registers are scarcer.
struct Turn {
  int64_t item, end;      // the block's items are neighbours, so that it fills few tables
  int64_t problem, part;  // part: the number of the item within the problem
  Place place;
  bool fresh;  // the block's first item of the problem
};

__device__ __forceinline__ void set(const Arguments& p, Turn& turn, int64_t item, int64_t parts) {
  turn.item = item;
  turn.problem = item / parts;
  turn.part = item - turn.problem * parts;
  turn.place = place_of(p, turn.problem);
}

// One thread's work, between barriers.
__device__ __forceinline__ void begin(const Arguments& p, Turn& turn, int64_t parts) {
  if (threadIdx.x > 0) return;
  const int64_t items = p.problems * parts, each = items / gridDim.x, rest = items % gridDim.x;
  const int64_t first = blockIdx.x * each + min(static_cast<int64_t>(blockIdx.x), rest);
  turn.end = first + each + (blockIdx.x < rest);
  turn.fresh = true;
  set(p, turn, first, parts);
}

__device__ __forceinline__ void advance(const Arguments& p, Turn& turn, int64_t parts) {
  if (threadIdx.x > 0) return;
  set(p, turn, turn.item + 1, parts);
  turn.fresh = turn.part == 0;
}

// The memories of a problem in shared memory: all of them, or tile by tile.
template <int D, am::Form F>
struct Table {
  const Arguments& p;
  Quad* slots;
  Side& side;
  int tile, whole;
  bool staged = false;  // whether the table contains memories of this problem

  __device__ __forceinline__ bool resident() const { return p.memories <= tile; }

  __device__ __forceinline__ void turn_to(const Turn& turn) {
    if (!turn.fresh) return;
    find_centre(p, turn.place, side);
    staged = false;
  }

  // Calls visit(slots, count) for every tile. All threads of the block must call it.
  template <class Visit>
  __device__ __forceinline__ void sweep(const Turn& turn, const Visit& visit) {
    for (int64_t at = 0; at < p.memories; at += tile) {
      if (!staged || !resident()) {
        const int64_t left = p.memories - at;
        __syncthreads();  // other threads may still read the tile before
        stage<D, F>(p, turn.place, side, at, static_cast<int>(left < tile ? left : tile), whole,
                    slots);
        __syncthreads();
        staged = true;
      }
      const int64_t count = min(p.memories - at, static_cast<int64_t>(tile));
      visit(slots, (static_cast<int>(count) + whole - 1) / whole * whole);
    }
  }
};

// A row minus the centre, 0 past the last row: such a thread still loads memories for the others.
template <int D>
__device__ __forceinline__ void load_state(const Arguments& p, const Place& place, const Side& side,
                                           int64_t row, int d, float (&x)[D]) {
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] = 0.0f;
  if (row >= p.rows) return;
  load_row<D>(p.v, start_of(p.v, place) + row * p.v.row, p.v.packed, d, x);
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] -= side.centre[i];
}

// Many rows: a thread owns R of them.
template <int D, int R, am::Form F>
__global__ void __launch_bounds__(kThreads, min_blocks(D, R))
    recursion_small_kernel(const Forward p) {
  extern __shared__ Quad slots[];
  __shared__ Side side;
  __shared__ Turn turn;
  __shared__ float heights[R][kThreads];  // registers are scarcer
  const int d = D <= 8 ? D : p.features;  // a constant where the compiled size is exact
  const int64_t parts = (p.rows + R * kThreads - 1) / (R * kThreads);
  Table<D, F> table{p, slots, side, p.tile, am::kGroupMax};
  for (begin(p, turn, parts);; advance(p, turn, parts)) {
    __syncthreads();
    if (turn.item >= turn.end) break;
    table.turn_to(turn);
    const int64_t first = turn.part * (R * kThreads) + threadIdx.x;
    const float scale = p.per_memory ? 0.0f : am::scale_of(beta_of(p, turn.place, 0));

    float x[R][D];
    unsigned doubts = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r * kThreads;
      load_state<D>(p, turn.place, side, row, d, x[r]);
      heights[r][threadIdx.x] = side.peak;
    }
    // Where all memories are masked no row changes.
    for (int64_t t = 0; t < p.steps && side.active > 0; ++t) {
      float lift[R], shift[R];
      am::Recall<D> recall[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const am::Stand stand = am::stand_of<D>(x[r], scale, p.per_memory);
        lift[r] = stand.lift;
        shift[r] = heights[r][threadIdx.x] + stand.reach;
      }
      bool again;
      do {
#pragma unroll
        for (int r = 0; r < R; ++r) am::begin<D>(recall[r]);
        table.sweep(turn, [&](const Quad* memories, int count) {
          am::fold<D, R, F>(memories, count, x, lift, shift, scale, recall);
        });
        again = false;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          again |= am::turn(recall[r].mass, recall[r].top, heights[r][threadIdx.x], shift[r]);
        }
        if (!table.resident()) again = __syncthreads_or(again);
      } while (again);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = first + r * kThreads;
        float recalled[D];
        if (am::recalled_of<D>(recall[r], x[r], shift[r], side.betas, recalled)) doubts |= 1u << r;
        float gain[D];
        load_gain<D>(p, turn.place, row, d, gain);
#pragma unroll
        for (int i = 0; i < D; ++i) {
          x[r][i] = am::advance(x[r][i], recalled[i], gain[i]);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first + r * kThreads;
      if (row >= p.rows) continue;
      float raw[D];
      load_row<D>(p.v, start_of(p.v, turn.place) + row * p.v.row, p.v.packed, d, raw);
      p.flag[turn.problem * p.rows + row] =
          am::left_over<D>(doubts >> r & 1, x[r], raw, side.centre, side.betas.sharp);
#pragma unroll
      for (int i = 0; i < D; ++i) x[r][i] = am::restore(x[r][i], raw[i], side.centre[i]);
      store_row<D>(p.out, p.v.type, (turn.problem * p.rows + row) * d, d, x[r]);
    }
    __syncthreads();  // before the turn is another
  }
}

// The fold of the lanes that share a row, instead of am::fold: each lane computes the weights of
// some memories, and each sums one feature over all of them, in the same order. `weights` are the
// row's, in shared memory.
template <int D, am::Form F>
__device__ __forceinline__ void fold_together(const Quad* slots, int count, int lane,
                                              const float (&x)[D], float lift, float shift,
                                              float* weights, float& mass, float& top, float& sum) {
  using S = am::Slot<D, F>;
  constexpr int L = am::lanes_of(D);
  const float* value = reinterpret_cast<const float*>(slots) + lane;
  CLAM_ROLLED
  for (int first = 0; first < count; first += L * kChunks) {
#pragma unroll
    for (int k = 0; k < L * kChunks; k += L) {
      float memory[S::kFloats];
      am::unpack<D, F>(slots + (first + k + lane) * S::kQuads, memory);
      const float z = am::logit<D, F>(memory, inner_product<D>(memory, x), lift, 0.0f);
      weights[k + lane] = exp2_weight(z - shift);
      top = fmaxf(top, z);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < L * kChunks; k += 4, value += 4 * S::kFloats) {
      const Quad w = *reinterpret_cast<const Quad*>(weights + k);
      const float four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mass += four[j];
        sum = fused(four[j], value[j * S::kFloats], sum);
      }
    }
    __syncwarp();
  }
}

// The largest of the lanes that share a row.
template <int L>
__device__ __forceinline__ float largest_of(float x) {
#pragma unroll
  for (int offset = L / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}

// Few rows: lanes share one. Each has the whole state, and advances one feature.
template <int D>
__global__ void __launch_bounds__(kThreads, 5) recursion_shared_kernel(const Forward p) {
  constexpr auto F = am::Form::kPerMemory;
  constexpr int L = am::lanes_of(D), kBlockRows = kThreads / L;
  extern __shared__ Quad slots[];
  __shared__ Side side;
  __shared__ Turn turn;
  __shared__ Quad exchange[kThreads * kChunks / 4];  // numbers for the other lanes of a row
  const int lane = threadIdx.x % L, d = p.features;
  float* const mine = &exchange[0].x + threadIdx.x / L * (L * kChunks);
  const int64_t parts = (p.rows + kBlockRows - 1) / kBlockRows;
  Table<D, F> table{p, slots, side, p.tile, L * kChunks};
  for (begin(p, turn, parts);; advance(p, turn, parts)) {
    __syncthreads();
    if (turn.item >= turn.end) break;
    table.turn_to(turn);
    const int64_t row = turn.part * kBlockRows + threadIdx.x / L;
    const float scale = p.per_memory ? 0.0f : am::scale_of(beta_of(p, turn.place, 0));
    const bool real = row < p.rows && lane < d;
    float x[1][D], state = 0.0f, height = side.peak;
    bool doubt = false;
    load_state<D>(p, turn.place, side, row, d, x[0]);
#pragma unroll
    for (int i = 0; i < D; ++i) state = i == lane ? x[0][i] : state;
    const float gain =
        real ? load_gain(p, start_of(p.mask, turn.place) + row * p.mask.row + lane * p.mask.feature)
             : 0.0f;

    for (int64_t t = 0; t < p.steps && side.active > 0; ++t) {
      const am::Stand stand = am::stand_of<D>(x[0], scale, p.per_memory);
      float shift = height + stand.reach, mass, top, sum;
      bool again;
      do {
        mass = sum = 0.0f;
        top = kLowest;
        table.sweep(turn, [&](const Quad* memories, int count) {
          fold_together<D, F>(memories, count, lane, x[0], stand.lift, shift, mine, mass, top, sum);
        });
        top = largest_of<L>(top);
        again = am::turn(mass, top, height, shift);
        again = table.resident() ? __any_sync(~0u, again) : __syncthreads_or(again);
      } while (again);
      const float pull = product(sum, 1.0f / mass);
      state = am::advance(state, pull, gain);
      mine[lane] = state;
      mine[L + lane] = pull;
      __syncwarp();
      float recalled[D];
#pragma unroll
      for (int i = 0; i < D; ++i) recalled[i] = mine[L + i];
      doubt |= am::is_in_doubt<D>(x[0], recalled, mass, exp2_weight(top - shift), side.betas);
#pragma unroll
      for (int i = 0; i < D; ++i) x[0][i] = mine[i];
      __syncwarp();
    }

    if (lane == 0 && row < p.rows) {
      float raw[D];
      load_row<D>(p.v, start_of(p.v, turn.place) + row * p.v.row, p.v.packed, d, raw);
      p.flag[turn.problem * p.rows + row] =
          am::left_over<D>(doubt, x[0], raw, side.centre, side.betas.sharp);
    }
    if (real) {
      const int64_t at = start_of(p.v, turn.place) + row * p.v.row + lane * p.v.feature;
      store_entry(p.out, p.v.type, (turn.problem * p.rows + row) * d + lane,
                  am::restore(state, load_entry(p.v, at), side.centre[lane]));
    }
    __syncthreads();  // before the turn is another
  }
}

template <int D, am::Form F>
int tile_of(const Forward& p, int whole) {
  constexpr int64_t kSlotBytes = am::Slot<D, F>::kQuads * sizeof(Quad);
  const int64_t fits = kSharedBytes / kSlotBytes / whole * whole;
  return static_cast<int>(std::min((p.memories + whole - 1) / whole * whole, fits));
}

template <int D, int R, am::Form F>
void launch(Forward& p, int processors, cudaStream_t stream) {
  p.tile = tile_of<D, F>(p, am::kGroupMax);
  const int64_t items = p.problems * ((p.rows + R * kThreads - 1) / (R * kThreads));
  // As many blocks as are resident, so that each fills its table once.
  static const int resident = [] {
    int blocks = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, recursion_small_kernel<D, R, F>, kThreads, 0));
    return std::max(1, blocks);
  }();
  const int64_t most = static_cast<int64_t>(processors) * resident;
  recursion_small_kernel<D, R, F><<<static_cast<unsigned>(std::min(items, most)), kThreads,
                                    p.tile * am::Slot<D, F>::kQuads * sizeof(Quad), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int D>
void launch_shared(Forward& p, cudaStream_t stream) {
  constexpr auto F = am::Form::kPerMemory;
  constexpr int kBlockRows = kThreads / am::lanes_of(D);
  p.tile = tile_of<D, F>(p, am::lanes_of(D) * kChunks);
  const int64_t items = p.problems * ((p.rows + kBlockRows - 1) / kBlockRows);
  const int64_t blocks = std::min<int64_t>(items, 0x7fffffff);
  recursion_shared_kernel<D><<<static_cast<unsigned>(blocks), kThreads,
                               p.tile * am::Slot<D, F>::kQuads * sizeof(Quad), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int D>
void launch(Forward& p, int processors, cudaStream_t stream) {
  constexpr int R = am::rows_per_thread(D);
  constexpr auto kShared = am::Form::kShared, kPerMemory = am::Form::kPerMemory;
  p.v.packed = Checked::packed(p.v, p.features, D);
  // With few rows, or few of each problem, only the latency of a row counts. With some more, one
  // row a thread fills the GPU, which is worth more than the reuse of the memories. The bits of a
  // row do not depend on the choice.
  const bool few = p.problems * p.rows * am::lanes_of(D) <= processors * 1024;
  if (few || p.rows <= kThreads / 4) {
    launch_shared<D>(p, stream);
  } else if (p.problems * (p.rows / (R * kThreads)) < 2 * processors) {
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
                       std::optional<Tensor> update_mask, int64_t steps, double step,
                       const Tensor& flag) {
  Forward p{};
  static_cast<Arguments&>(p) = arguments_of({"recursion_small", v}, rho, beta, beta_value,
                                            log_weights, update_mask, steps, step, flag);
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
