// SPDX-License-Identifier: Apache-2.0
//
// What the per-thread bodies need from either compiler: nvcc for the GPU, g++ for the tests that
// prove their mathematics where there is none. Nothing of torch or CUDA's run time may be included
// here.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define CLAM_HD __host__ __device__ __forceinline__
#define CLAM_UNROLL _Pragma("unroll")
#define CLAM_ROLLED _Pragma("unroll 1")
#else
#define CLAM_HD inline
#define CLAM_UNROLL
#define CLAM_ROLLED
#endif

// Keeps the compiler from having what follows in flight together with what was before.
#ifdef __CUDA_ARCH__
#define CLAM_APART() asm volatile("" ::: "memory")
#else
#define CLAM_APART() static_cast<void>(0)
#endif

namespace clam {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int kWarp = 32;

// Sixteen aligned bytes: one 128-bit load, of shared memory a broadcast without bank conflicts.
struct alignas(16) Quad {
  float x, y, z, w;
};

// 2^x. The hardware's own instruction is good to 2 ulp and flushes results under 2^-126, which is
// harmless for the weights of a softmax and for nothing else: arguments stay near or below 0.
CLAM_HD float exp2_weight(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// a * b + c with one rounding on both sides: g++ without -mfma would otherwise round twice.
CLAM_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }

// a * b rounded on its own: a compiler that fuses it with what follows gives one value two sets of
// bits, and differences that must be exactly 0 are not.
CLAM_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <int D>
CLAM_HD float inner_product(const float* a, const float (&b)[D]) {
  float inner = product(a[0], b[0]);
  CLAM_UNROLL
  for (int i = 1; i < D; ++i) inner = fused(a[i], b[i], inner);
  return inner;
}

}  // namespace clam
