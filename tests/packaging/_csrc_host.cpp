// SPDX-License-Identifier: Apache-2.0
// What the kernels do around the bodies of csrc/, in sequence instead of in parallel: rows in packs of R,
// memories in tiles, the lanes of a warp one after the other, the update, the way back to the
// caller's coordinates.

#include <algorithm>
#include <vector>
#include "am_backward.h"
using namespace clam;
using am::Form;

struct Call {
  Rows v, rho, weights;
  const float *betas, *gain, *grad;  // betas [K], gain and grad [N, D]
  int rows, memories, d, steps, tile;
  bool per_memory;
};

// Centre and table as a block makes them: lanes' shares added as the shuffles add them.
struct Side {
  float centre[am::kMaxFeatures] = {};
  float peak = 0.0f;
  am::Betas betas{};
  int active = 0;
};

static Side find_centre(const Call& c) {
  Side side;
  for (int i = 0; i < c.d; ++i) {
    double sum[kWarp] = {};
    int active[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane)
      am::add_active(c.rho, 0, c.weights, 0, c.memories, i, lane, sum[lane], active[lane]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      for (int lane = 0; lane < offset; ++lane) {
        sum[lane] += sum[lane + offset];
        active[lane] += active[lane + offset];
      }
    side.centre[i] = active[0] > 0 ? static_cast<float>(sum[0] / active[0]) : 0.0f;
    side.active = active[0];
  }
  am::Extremes lanes[kWarp];
  std::fill(lanes, lanes + kWarp, am::no_memory());
  for (int k = 0; k < c.memories; ++k) {
    const float weight = c.weights.data ? number(c.weights, k * c.weights.row) : 0.0f;
    am::add_memory(c.betas ? c.betas[k] : 1.0f, weight, lanes[k % kWarp]);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    for (int lane = 0; lane < offset; ++lane) am::add_share(lanes[lane + offset], lanes[lane]);
  side.peak = kLog2e * lanes[0].peak;
  side.betas = am::betas_of(lanes[0], c.per_memory);
  return side;
}

template <int D, Form F>
std::vector<Quad> stage(const Call& c, const Side& side, int first, int real) {
  const int count = static_cast<int>(am::table_size(real));
  std::vector<Quad> table(count * am::Slot<D, F>::kQuads);
  for (int k = 0; k < count; ++k) {
    Quad* slot = &table[k * am::Slot<D, F>::kQuads];
    if (k >= real) { am::pack_padding<D, F>(slot); continue; }
    const float weight = c.weights.data ? number(c.weights, (first + k) * c.weights.row) : 0.0f;
    const auto feature = [&](int i) {
      return i < c.d ? load_entry(c.rho, (first + k) * c.rho.row + i * c.rho.feature) : 0.0f;
    };
    am::pack<D, F>(feature, side.centre, c.betas[first + k], weight, slot);
  }
  return table;
}

template <int D>
void load(const Call& c, const Side& side, int row, float (&x)[D]) {
  for (int i = 0; i < D; ++i) x[i] = 0.0f;
  if (row >= c.rows) return;
  load_row<D>(c.v, row * c.v.row, c.v.packed && c.d == D, c.d, x);
  for (int i = 0; i < D; ++i) x[i] -= side.centre[i];
}

static float scale_of(const Call& c) { return c.per_memory ? 0.0f : am::scale_of(c.betas[0]); }

template <int D, int R, Form F>
void forward(const Call& c, float* out, unsigned char* flag) {
  constexpr int kQuads = am::Slot<D, F>::kQuads;
  const Side side = find_centre(c);
  std::vector<std::vector<Quad>> tables;
  for (int at = 0; at < c.memories; at += c.tile)
    tables.push_back(stage<D, F>(c, side, at, std::min(c.tile, c.memories - at)));
  for (int first = 0; first < c.rows; first += R) {
    float x[R][D], height[R];
    bool doubt[R] = {};
    for (int r = 0; r < R; ++r) load<D>(c, side, first + r, x[r]);
    for (int r = 0; r < R; ++r) height[r] = side.peak;
    for (int t = 0; t < c.steps && side.active; ++t) {
      float lift[R], shift[R];
      am::Recall<D> recall[R];
      for (int r = 0; r < R; ++r) {
        const am::Stand stand = am::stand_of<D>(x[r], scale_of(c), c.per_memory);
        lift[r] = stand.lift;
        shift[r] = height[r] + stand.reach;
      }
      for (bool again = true; again;) {
        again = false;
        for (int r = 0; r < R; ++r) am::begin<D>(recall[r]);
        for (const auto& table : tables)
          am::fold<D, R, F>(table.data(), static_cast<int>(table.size()) / kQuads, x, lift, shift,
                            scale_of(c), recall);
        for (int r = 0; r < R; ++r) {
          const bool more = am::turn(recall[r].mass, recall[r].top, height[r], shift[r]);
          again = again || more;
        }
      }
      for (int r = 0; r < R && first + r < c.rows; ++r) {
        float recalled[D];
        const bool more = am::recalled_of<D>(recall[r], x[r], shift[r], side.betas, recalled);
        doubt[r] = doubt[r] || more;
        for (int i = 0; i < c.d; ++i)
          x[r][i] = am::advance(x[r][i], recalled[i], c.gain[(first + r) * c.d + i]);
      }
    }
    for (int r = 0; r < R && first + r < c.rows; ++r) {
      float raw[D];
      load_row<D>(c.v, (first + r) * c.v.row, false, c.d, raw);
      flag[first + r] =
          am::left_over<D>(doubt[r], x[r], raw, side.centre, side.betas.sharp);
      for (int i = 0; i < c.d; ++i)
        out[(first + r) * c.d + i] = am::restore(x[r][i], raw[i], side.centre[i]);
    }
  }
}

template <int D>
void pick(const Call& c, bool wide, float* out, unsigned char* flag) {
  constexpr int R = am::rows_per_thread(D);
  const auto f = !wide ? forward<D, 1, Form::kPerMemory>
                       : c.per_memory ? forward<D, R, Form::kPerMemory>
                                      : forward<D, R, Form::kShared>;
  f(c, out, flag);
}

// One product of matrix units as PTX's manual lays mma.m16n8k8 out over the lanes of a warp.
static void multiply(float (&c)[kWarp][4], const float (&a)[kWarp][4], const float (&b)[kWarp][2]) {
  float left[16][8], right[8][8];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) left[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = a[lane][i];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 2; ++i) right[lane % 4 + i * 4][lane / 4] = b[lane][i];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k)
        c[lane][i] += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
}

template <int D>
void collect(int kind, const float* rows, const float* weights, int first, int memories,
             float* sums) {
  for (int column = 0; column < D + 2 * kind; column += am::kColumns) {
    float c[kWarp][4] = {}, a[kWarp][4], b[kWarp][2];
    for (int group = 0; group < kWarp / am::kGroup; ++group) {
      for (int lane = 0; lane < kWarp; ++lane) {
        am::load_left(weights, kind, group, lane, a[lane]);
        am::load_right<D>(rows, (kind ? am::cross_column(D) : 0) + column, group, lane, b[lane]);
      }
      multiply(c, a, b);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      am::add_sums<D>(c[lane], kind, column, first, memories, lane, sums);
  }
}

// A block of two warps that take the groups of 32 rows in turn.
template <int D>
void backward(const Call& c, float* grad_v, float* partial, float* grad_mask,
              unsigned char* flag) {
  constexpr int kQuads = am::Slot<D, Form::kBackward>::kQuads, kWarps = 2;
  const Side side = find_centre(c);
  const auto table = stage<D, Form::kBackward>(c, side, 0, c.memories);
  const int64_t stride = am::sum_floats(D, c.memories);
  std::vector<float> sums(kWarps * stride);
  std::vector<Quad> rows(kWarp * am::row_stride(D) / 4);
  std::vector<float> weights(am::kWeightFloats);
  float* tile = &rows[0].x;
  double beta_sum = 0.0;
  for (int group = 0; group * kWarp < c.rows; ++group) {
    std::vector<am::Walk<D>> walks(kWarp);
    struct Way { float x[D], recalled[D], top, inverse; };
    std::vector<std::vector<Way>> ways(kWarp, std::vector<Way>(c.steps));
    const auto gain_of = [&](int lane, float (&gain)[D]) {
      const int row = group * kWarp + lane;
      for (int i = 0; i < D; ++i)
        gain[i] = row < c.rows && i < c.d ? c.gain[row * c.d + i] : 0.0f;
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = group * kWarp + lane;
      float x[1][D], gain[D];
      load<D>(c, side, row, x[0]);
      gain_of(lane, gain);
      float height = side.peak;
      bool doubt = false;
      for (auto& way : ways[lane]) {
        const am::Stand stand = am::stand_of<D>(x[0], scale_of(c), c.per_memory);
        const float lift[1] = {stand.lift};
        float shift[1] = {height + stand.reach};
        am::Recall<D> recall[1];
        do {
          am::begin<D>(recall[0]);
          am::fold<D, 1, Form::kBackward>(table.data(), static_cast<int>(table.size()) / kQuads, x,
                                          lift, shift, 0.0f, recall);
        } while (am::turn(recall[0].mass, recall[0].top, height, shift[0]));
        am::weigh_back<D>(recall[0], shift[0], way.top, way.inverse);
        const bool more =
            am::recalled_of<D>(recall[0], x[0], shift[0], side.betas, way.recalled);
        doubt = side.active && (doubt || more);
        for (int i = 0; i < D; ++i) {
          way.x[i] = x[0][i];
          x[0][i] = am::advance(x[0][i], way.recalled[i], gain[i]);
        }
      }
      if (doubt && row < c.rows) {
        float raw[D];
        load_row<D>(c.v, row * c.v.row, false, c.d, raw);
        doubt = am::are_finite<D>(raw, side.centre, side.betas.sharp);
      }
      am::Walk<D> none;
      for (auto& way : ways[lane])
        if (doubt) {
          am::take_out<D>(none, way.recalled);
          std::copy(none.x, none.x + D, way.x);
          way.top = none.top;
          way.inverse = none.inverse;
        }
      if (row < c.rows) flag[row] = doubt;
      for (int i = 0; i < D; ++i)
        walks[lane].g[i] = row < c.rows && i < c.d && !doubt ? c.grad[row * c.d + i] : 0.0f;
    }
    for (int t = c.steps - 1; t >= 0 && side.active; --t) {
      for (int lane = 0; lane < kWarp; ++lane) {
        const Way& way = ways[lane][t];
        am::Walk<D>& w = walks[lane];
        const int row = group * kWarp + lane;
        float gain[D];
        gain_of(lane, gain);
        std::copy(way.x, way.x + D, w.x);
        w.top = way.top;
        w.inverse = way.inverse;
        for (int i = 0; i < c.d && row < c.rows; ++i)
          grad_mask[row * c.d + i] += w.g[i] * (way.recalled[i] - way.x[i]);
        am::begin_back<D>(w, way.recalled, gain, c.per_memory);
        am::write_row<D>(w, tile, lane);
      }
      for (auto& w : walks)
        if (w.inverse == 0.0f) am::survey<D>(w, table.data(), c.memories);
      for (int first = 0; first < c.memories; first += am::kChunk) {
        std::fill(weights.begin(), weights.end(), NAN);  // of memories that are not there
        for (int lane = 0; lane < kWarp; ++lane)
          for (int j = 0; j < std::min(am::kChunk, c.memories - first); ++j) {
            float p, gz;
            am::visit<D>(walks[lane], &table[(first + j) * kQuads], p, gz);
            weights[am::weight_at(j, 0, lane)] = p;
            weights[am::weight_at(j, 1, lane)] = gz;
          }
        for (int kind = 0; kind < 2; ++kind)
          collect<D>(kind, tile, weights.data(), first, c.memories,
                     sums.data() + group % kWarps * stride);
      }
      for (auto& w : walks) {
        am::end_back<D>(w);
        beta_sum += w.beta_sum;
      }
    }
    for (int lane = 0; lane < kWarp && group * kWarp + lane < c.rows; ++lane)
      std::copy(walks[lane].g, walks[lane].g + c.d, grad_v + (group * kWarp + lane) * c.d);
  }
  for (int k = 0; k < c.memories; ++k)
    am::combine<D>(sums.data(), stride, kWarps, k, &table[k * kQuads], c.betas[k], c.per_memory,
                   beta_sum, c.d, partial + k * (c.d + 2));
}

static Call call_of(int type, int packed, const void* v, const void* rho, const float* betas,
                    const float* weights, const float* gain, const float* grad, int rows,
                    int memories, int d, int steps, int tile, int per_memory) {
  const Type kind = type == 0 ? Type::kFloat : type == 1 ? Type::kBFloat16 : Type::kHalf;
  return {{v, 0, 0, d, 1, kind, packed != 0}, {rho, 0, 0, d, 1, kind, false},
          {weights, 0, 0, 1, 0, Type::kFloat, false}, betas, gain, grad, rows, memories, d, steps,
          tile, per_memory != 0};
}

#define FORWARD(D) case D: pick<D>(c, wide, out, flag); return 0
#define BACKWARD(D) case D: backward<D>(c, grad_v, partial, grad_mask, flag); return 0

extern "C" int recursion(int type, int wide, const void* v, const void* rho, const float* betas,
                         const float* weights, const float* gain, float* out,
                         unsigned char* flag, int rows, int memories, int d, int steps, int tile,
                         int per_memory) {
  const Call c = call_of(type, wide, v, rho, betas, weights, gain, nullptr, rows, memories, d,
                         steps, tile, per_memory);
  switch (am::padded_features(d)) {
    FORWARD(1); FORWARD(2); FORWARD(3); FORWARD(4); FORWARD(5);
    FORWARD(6); FORWARD(7); FORWARD(8); FORWARD(12); FORWARD(16);
  }
  return 1;
}

extern "C" int recursion_backward(const float* v, const float* rho, const float* betas,
                                  const float* weights, const float* gain, const float* grad,
                                  float* grad_v, float* partial, float* grad_mask,
                                  unsigned char* flag, int rows, int memories, int d, int steps,
                                  int per_memory) {
  const Call c = call_of(0, 1, v, rho, betas, weights, gain, grad, rows, memories, d, steps, 0,
                         per_memory);
  switch (am::padded_backward(d)) {
    BACKWARD(1); BACKWARD(2); BACKWARD(3); BACKWARD(4);
    BACKWARD(6); BACKWARD(8); BACKWARD(12); BACKWARD(16);
  }
  return 1;
}

extern "C" void numbers(float* out) {
  const float all[] = {am::kNearFactor, am::kNearLimit,    am::kNearLimitOfMany, am::kFarLimit,
                       am::kLogitError, am::kLongest, am::kSharpest,   am::kMost};
  std::copy(all, all + 8, out);
}

extern "C" void doubts(const float* x, const float* recalled, const float* largest,
                       unsigned char* out, float sharp, int rows) {
  for (int row = 0; row < rows; ++row) {
    float a[4], b[4];
    std::copy(x + 4 * row, x + 4 * row + 4, a);
    std::copy(recalled + 4 * row, recalled + 4 * row + 4, b);
    out[row] = am::is_in_doubt<4>(a, b, 1.0f, largest[row], {sharp, 1.0f, am::kNearLimit});
  }
}

extern "C" int backward_memories(int d) {
  int k = 0;
  while (am::backward_warps(am::padded_backward(d), k + 1) > 0) ++k;
  return k;
}

extern "C" void centre(const float* rho, const float* weights, float* out, int memories, int d) {
  const Call c = call_of(0, 0, nullptr, rho, nullptr, weights, nullptr, nullptr, 0, memories, d, 0,
                         0, 0);
  const Side side = find_centre(c);
  std::copy(side.centre, side.centre + d, out);
  out[d] = static_cast<float>(side.active);
}
