// SPDX-License-Identifier: Apache-2.0
//
// clam_cuda::recursion_small_backward: the gradients of the recursion over few features. A warp
// owns 32 rows at a time: it computes all steps, stores them in a strip of global memory that only
// this block writes, and goes back through them; am_backward.h has the arithmetic. Between the
// barriers around a block's share of a problem its warps never wait for each other.

#include <tuple>

#include "am_backward.h"
#include "am_problem.h"

namespace clam {
namespace {

// Blocks that share the rows, and floats of all strips together: functions of the shapes alone, as
// the order of every sum is, so that results repeat on another GPU. At least 64 blocks run,
// whatever the number of steps.
constexpr int64_t kBlocks = 1056;
constexpr int64_t kLeastBlocks = 64;
constexpr int64_t kStripFloats = int64_t{1} << 26;

struct Backward : Arguments {
  Rows grad;
  void* grad_v;
  Type grad_type;
  float* grad_mask;  // null: the caller does not need it
  float* partials;   // [problems, slices, K, D + 2]; null: the caller does not need them
  float* strips;     // [warps of all blocks, steps - 1, 2 D + 2, kWarp]
  int64_t slices, groups;
};

// The least blocks of a multiprocessor for the compiler: shared memory allows no more.
constexpr int min_blocks(int features) { return features <= 4 ? 4 : features <= 12 ? 3 : 2; }

// A warp's part of shared memory.
struct Tiles {
  float *rows, *weights, *sums;
};

// Stores one step of a row: its state and its recall, entry by entry, so that the lanes of a warp
// access neighbours. The same lane reads it.
template <int D>
__device__ __forceinline__ void keep(float* strip, const float (&x)[D], const float (&recalled)[D],
                                     float top, float inverse) {
#pragma unroll
  for (int i = 0; i < D; ++i) {
    strip[i * kWarp] = x[i];
    strip[(D + i) * kWarp] = recalled[i];
  }
  strip[2 * D * kWarp] = top;
  strip[(2 * D + 1) * kWarp] = inverse;
}

template <int D>
__device__ __forceinline__ void fetch(const float* strip, am::Walk<D>& w, float (&recalled)[D]) {
#pragma unroll
  for (int i = 0; i < D; ++i) {
    w.x[i] = strip[i * kWarp];
    recalled[i] = strip[(D + i) * kWarp];
  }
  w.top = strip[2 * D * kWarp];
  w.inverse = strip[(2 * D + 1) * kWarp];
}

// Adds a step to the mask's gradient of one row. A few entries at a time: more in flight spill.
template <int D>
__device__ __forceinline__ void mask_back(float* row, bool first, float step, int d,
                                          const am::Walk<D>& w, const float (&recalled)[D]) {
#pragma unroll
  for (int i = 0; i < D; ++i) {
    if (i % 4 == 0) asm volatile("" ::: "memory");
    if (i >= d) continue;
    const float more = step * w.g[i] * (recalled[i] - w.x[i]);
    row[i] = first ? more : row[i] + more;
  }
}

// c += a * b on matrix units with operands in two parts: `high` has the 11 bits of a tf32, `low`
// the rest. The small products have a sum of their own.
struct Split {
  float high, low;
};

// Rounds with integer instructions: on sm_90 the instruction for it truncates as the units do. NaN
// may become 0 in `high`, and stays in `low`.
__device__ __forceinline__ Split split(float x) {
  const float high = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
  return {high, x - high};
}

__device__ __forceinline__ void multiply(float (&c)[4], float a0, float a1, float a2, float a3,
                                         float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Sums over the rows of a warp for one kind and the memories of a chunk.
template <int D, int Kind>
__device__ __forceinline__ void collect(const Tiles& tiles, int first, int memories) {
  constexpr int kFirstColumn = Kind == 0 ? 0 : am::cross_column(D);
  constexpr int kProducts = (D + 2 * Kind + am::kColumns - 1) / am::kColumns;
  const int lane = threadIdx.x % kWarp;
  float high[kProducts][4] = {}, low[kProducts][4] = {};
#pragma unroll
  for (int group = 0; group < kWarp / am::kGroup; ++group) {
    float left[4];
    am::load_left(tiles.weights, Kind, group, lane, left);
    const Split a[4] = {split(left[0]), split(left[1]), split(left[2]), split(left[3])};
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      float right[2];
      am::load_right<D>(tiles.rows, kFirstColumn + i * am::kColumns, group, lane, right);
      const Split b[2] = {split(right[0]), split(right[1])};
      multiply(low[i], a[0].low, a[1].low, a[2].low, a[3].low, b[0].high, b[1].high);
      multiply(low[i], a[0].high, a[1].high, a[2].high, a[3].high, b[0].low, b[1].low);
      multiply(high[i], a[0].high, a[1].high, a[2].high, a[3].high, b[0].high, b[1].high);
    }
  }
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) high[i][j] += low[i][j];
    am::add_sums<D>(high[i], Kind, i * am::kColumns, first, memories, lane, tiles.sums);
  }
}

// All memories for the rows of a warp in one step of the backward. The barriers stand because lanes
// read tiles that other lanes wrote, and write them again for the next chunk.
template <int D>
__device__ __forceinline__ void memories_back(const Backward& p, const Quad* table,
                                              const Tiles& tiles, am::Walk<D>& w) {
  constexpr int kQuads = am::Slot<D, am::Form::kBackward>::kQuads;
  // Memories in flight at a time, as far as registers allow.
  constexpr int kUnroll = D <= 4 ? 4 : 2;
  const int lane = threadIdx.x % kWarp;
  const bool sums = p.partials != nullptr;
  const int memories = static_cast<int>(p.memories);
  if (sums) am::write_row<D>(w, tiles.rows, lane);
  if (w.inverse == 0.0f) am::survey<D>(w, table, memories);
  CLAM_ROLLED
  for (int first = 0; first < memories; first += am::kChunk) {
    const int count = min(memories - first, am::kChunk);
#pragma unroll(kUnroll)
    for (int j = 0; j < count; ++j) {
      float weight, gz;
      am::visit<D>(w, table + (first + j) * kQuads, weight, gz);
      if (sums) {
        tiles.weights[am::weight_at(j, 0, lane)] = weight;
        tiles.weights[am::weight_at(j, 1, lane)] = gz;
      }
    }
    if (sums) {
      __syncwarp();
      collect<D, 0>(tiles, first, memories);
      __syncwarp();  // a product needs all lanes at once
      collect<D, 1>(tiles, first, memories);
      __syncwarp();
    }
  }
}

// Computes one step, and the reference of its weights for the backward; returns whether the step
// may be wrong.
template <int D>
__device__ __forceinline__ bool recall_back(const Quad* table, int count, const float (&x)[1][D],
                                            float scale, bool per_memory, const am::Betas& betas,
                                            float& height, float (&recalled)[D], float& top,
                                            float& inverse) {
  const am::Stand stand = am::stand_of<D>(x[0], scale, per_memory);
  const float lift[1] = {stand.lift};
  float shift[1] = {height + stand.reach};
  am::Recall<D> recall[1];
  do {
    am::begin<D>(recall[0]);
    am::fold<D, 1, am::Form::kBackward>(table, count, x, lift, shift, 0.0f, recall);
  } while (am::turn(recall[0].mass, recall[0].top, height, shift[0]));
  am::weigh_back<D>(recall[0], shift[0], top, inverse);
  return am::recalled_of<D>(recall[0], x[0], shift[0], betas, recalled);
}

// Whether kernels/am/exact_backward.py computes the row again; also true for a lane past the last
// row that is in doubt. The stored steps of such a row then have no weight in the backward.
template <int D>
__device__ __forceinline__ bool settle(const Backward& p, const Place& place, const Side& side,
                                       int64_t problem, int64_t row, int d, bool doubt,
                                       float* strip, am::Walk<D>& w, float (&recalled)[D]) {
  const bool real = row < p.rows;
  if (doubt && real) {
    float raw[D];
    load_row<D>(p.v, start_of(p.v, place) + row * p.v.row, p.v.packed, d, raw);
    doubt = am::are_finite<D>(raw, side.centre, side.betas.sharp);
  }
  if (doubt) {
    am::take_out<D>(w, recalled);
    for (int64_t t = 0; t + 1 < p.steps; ++t) {
      keep<D>(strip + t * (2 * D + 2) * kWarp, w.x, recalled, w.top, w.inverse);
    }
  }
  if (real) p.flag[problem * p.rows + row] = doubt;
  return doubt;
}

// All steps of the rows of one warp, and their gradients; returns the rows' share of minus the
// gradient of one beta for all. A lane past the last row computes on zeros, whose gradients are 0.
template <int D>
__device__ __forceinline__ double walk(const Backward& p, const Place& place, const Side& side,
                                       const Quad* table, const Tiles& tiles, int64_t problem,
                                       int64_t row, int d, float* strip) {
  const bool real = row < p.rows;
  constexpr int kStepFloats = (2 * D + 2) * kWarp;
  const int count = static_cast<int>(am::table_size(p.memories));
  const float scale = p.per_memory ? 0.0f : am::scale_of(beta_of(p, place, 0));
  am::Walk<D> w;
  float recalled[D], gain[D];
  float x[1][D] = {};
  float height = side.peak;
  bool doubt = false;
  if (real) {
    load_row<D>(p.v, start_of(p.v, place) + row * p.v.row, p.v.packed, d, x[0]);
#pragma unroll
    for (int i = 0; i < D; ++i) x[0][i] -= side.centre[i];
  }
  for (int64_t t = 0;; ++t) {
    doubt |= recall_back<D>(table, count, x, scale, p.per_memory, side.betas, height, recalled,
                            w.top, w.inverse);
#pragma unroll
    for (int i = 0; i < D; ++i) w.x[i] = x[0][i];
    if (t + 1 == p.steps) break;
    keep<D>(strip + t * kStepFloats, x[0], recalled, w.top, w.inverse);
    load_gain<D>(p, place, row, d, gain);
#pragma unroll
    for (int i = 0; i < D; ++i) x[0][i] = am::advance(x[0][i], recalled[i], gain[i]);
  }

  doubt = settle<D>(p, place, side, problem, row, d, doubt, strip, w, recalled);
#pragma unroll
  for (int i = 0; i < D; ++i) w.g[i] = 0.0f;
  if (real && !doubt) {
    load_row<D>(p.grad, start_of(p.grad, place) + row * p.grad.row, p.grad.packed, d, w.g);
  }
  const int64_t out = (problem * p.rows + row) * d;
  double beta_sum = 0.0;
  for (int64_t t = p.steps - 1; t >= 0; --t) {
    if (t + 1 < p.steps) fetch<D>(strip + t * kStepFloats, w, recalled);
    if (p.grad_mask != nullptr && real) {
      mask_back<D>(p.grad_mask + out, t + 1 == p.steps, p.step, d, w, recalled);
    }
    load_gain<D>(p, place, row, d, gain);
    am::begin_back<D>(w, recalled, gain, p.per_memory);
    memories_back<D>(p, table, tiles, w);
    am::end_back<D>(w);
    beta_sum += w.beta_sum;
  }
  if (real) store_row<D>(p.grad_v, p.grad_type, out, d, w.g);
  return beta_sum;
}

// Where all memories are masked a step changes nothing: the gradient of v is that of the result.
template <int D>
__device__ __forceinline__ void pass(const Backward& p, const Place& place, int64_t problem,
                                     int64_t row, int d) {
  if (row >= p.rows) return;
  p.flag[problem * p.rows + row] = 0;
  float g[D];
  load_row<D>(p.grad, start_of(p.grad, place) + row * p.grad.row, p.grad.packed, d, g);
  const int64_t out = (problem * p.rows + row) * d;
  store_row<D>(p.grad_v, p.grad_type, out, d, g);
  for (int i = 0; p.grad_mask != nullptr && i < d; ++i) p.grad_mask[out + i] = 0.0f;
}

template <int D>
__global__ void __launch_bounds__(am::kWarpsMax* kWarp, min_blocks(D))
    recursion_small_backward_kernel(const Backward p) {
  extern __shared__ Quad table[];
  __shared__ Side side;
  __shared__ double beta_sums[am::kWarpsMax];
  constexpr int kQuads = am::Slot<D, am::Form::kBackward>::kQuads;
  constexpr int kRowFloats = kWarp * am::row_stride(D);
  const int d = D <= 4 ? D : p.features;  // a constant where the compiled size is exact
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t stride = am::sum_floats(D, p.memories);
  float* const tiles = reinterpret_cast<float*>(table + am::table_size(p.memories) * kQuads);
  float* const sums = tiles + warps * (kRowFloats + am::kWeightFloats);
  const Tiles mine{tiles + warp * kRowFloats, tiles + warps * kRowFloats + warp * am::kWeightFloats,
                   sums + warp * stride};
  float* strip =
      p.strips + lane + (int64_t{blockIdx.x} * warps + warp) * (p.steps - 1) * (2 * D + 2) * kWarp;

  for (int64_t item = blockIdx.x; item < p.problems * p.slices; item += gridDim.x) {
    const int64_t problem = item / p.slices, slice = item - problem * p.slices;
    const Place place = place_of(p, problem);
    __syncthreads();  // other warps may still read the item before
    find_centre(p, place, side);
    stage<D, am::Form::kBackward>(p, place, side, 0, static_cast<int>(p.memories), am::kGroupMax,
                                  table);
    for (int64_t i = threadIdx.x; p.partials != nullptr && i < warps * stride; i += blockDim.x) {
      sums[i] = 0.0f;
    }
    __syncthreads();

    double beta_sum = 0.0;
    const int64_t last = (slice + 1) * p.groups / p.slices;
    for (int64_t group = slice * p.groups / p.slices + warp; group < last; group += warps) {
      const int64_t row = group * kWarp + lane;
      if (side.active > 0) {
        beta_sum += walk<D>(p, place, side, table, mine, problem, row, d, strip);
      } else {
        pass<D>(p, place, problem, row, d);
      }
    }
    if (p.partials == nullptr) continue;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      beta_sum += __shfl_xor_sync(~0u, beta_sum, offset);
    }
    if (lane == 0) beta_sums[warp] = beta_sum;
    __syncthreads();
    beta_sum = 0.0;
    for (int i = 0; i < warps; ++i) beta_sum += beta_sums[i];
    for (int64_t k = threadIdx.x; k < p.memories; k += blockDim.x) {
      am::combine<D>(sums, stride, warps, k, table + k * kQuads, beta_of(p, place, k), p.per_memory,
                     beta_sum, d, p.partials + (item * p.memories + k) * (d + 2));
    }
  }
}

// Items that share the rows of a problem.
int64_t slices_of(const Arguments& p, int64_t groups) {
  const int64_t most = (groups + am::kWarpsMax - 1) / am::kWarpsMax;
  return std::max<int64_t>(1, std::min(most, (kBlocks + p.problems - 1) / p.problems));
}

template <int D>
void launch(Backward& p, const Tensor& v, cudaStream_t stream) {
  const int threads = kWarp * am::backward_warps(D, p.memories);
  const int64_t floats = (p.steps - 1) * (2 * D + 2) * threads;
  const int64_t fit = kStripFloats / std::max<int64_t>(1, floats);
  const int64_t blocks =
      std::min(p.problems * p.slices, std::min(kBlocks, std::max(kLeastBlocks, fit)));
  const int64_t strips[] = {blocks * floats};
  Tensor scratch = torch::stable::new_empty(v, {strips, 1}, ScalarType::Float);
  p.strips = scratch.mutable_data_ptr<float>();
  p.v.packed = Checked::packed(p.v, p.features, D);
  p.grad.packed = Checked::packed(p.grad, p.features, D);
  const int64_t bytes = am::backward_bytes(D, p.memories, threads / kWarp);
  auto* kernel = recursion_small_backward_kernel<D>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(am::kBackwardBytes)));
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(bytes), stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor floats(const Tensor& v, bool wanted, int64_t a, int64_t b, int64_t c, int64_t d, int64_t e) {
  const int64_t sizes[] = {a, b, c, d, e}, nothing[] = {0};
  return wanted ? torch::stable::new_empty(v, {sizes, e == 0 ? 4u : 5u}, ScalarType::Float)
                : torch::stable::new_empty(v, {nothing, 1}, ScalarType::Float);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> recursion_small_backward(
    const Tensor& grad, const Tensor& v, const Tensor& rho, std::optional<Tensor> beta,
    double beta_value, std::optional<Tensor> log_weights, std::optional<Tensor> update_mask,
    int64_t steps, double step, bool wide, bool memory_side, bool mask_side, const Tensor& flag) {
  const Checked check{"recursion_small_backward", v};
  Backward p{};
  static_cast<Arguments&>(p) =
      arguments_of(check, rho, beta, beta_value, log_weights, update_mask, steps, step, flag);
  CLAM_CHECK(steps >= 1, check.op, ": steps: expected at least 1, got ", steps);
  const int size = am::padded_backward(p.features);
  CLAM_CHECK(am::backward_warps(size, p.memories) > 0, check.op,
             ": rho: too many memories for shared memory: ", p.memories);
  p.grad = check.states("grad", grad, p.rows, p.features);
  torch::stable::accelerator::DeviceGuard guard(v.get_device_index());

  p.groups = (p.rows + kWarp - 1) / kWarp;
  p.slices = p.problems > 0 ? slices_of(p, p.groups) : 1;
  const int64_t o = v.size(0), i = v.size(1), n = p.rows, d = p.features;
  const int64_t sizes[] = {o, i, n, d};
  Tensor grad_v =
      torch::stable::new_empty(v, {sizes, 4}, wide ? ScalarType::Float : v.scalar_type());
  Tensor grad_mask = floats(v, mask_side, o, i, n, d, 0);
  Tensor partials = floats(v, memory_side, o, i, p.slices, p.memories, d + 2);
  // Without rows the one slice of a problem still writes its zeros.
  if (p.problems == 0 || (n == 0 && !memory_side)) return {grad_v, partials, grad_mask};
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_type = wide ? Type::kFloat : p.v.type;
  if (mask_side) p.grad_mask = grad_mask.mutable_data_ptr<float>();
  if (memory_side) p.partials = partials.mutable_data_ptr<float>();
  const cudaStream_t stream = current_stream(v);
  switch (size) {
    case 1: launch<1>(p, v, stream); break;
    case 2: launch<2>(p, v, stream); break;
    case 3: launch<3>(p, v, stream); break;
    case 4: launch<4>(p, v, stream); break;
    case 6: launch<6>(p, v, stream); break;
    case 8: launch<8>(p, v, stream); break;
    case 12: launch<12>(p, v, stream); break;
    default: launch<16>(p, v, stream); break;
  }
  return {grad_v, partials, grad_mask};
}

}  // namespace clam
