// SPDX-License-Identifier: Apache-2.0
//
// The per-thread bodies compile with nvcc for the GPU, and with g++ for the tests of their
// arithmetic on a machine without one. This file hides the difference, and includes nothing of
// torch or of CUDA's run time.

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

// Stops the compiler from moving loads across it, which would take more registers.
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

// Sixteen aligned bytes: one 128-bit load; from shared memory a broadcast without bank conflicts.
struct alignas(16) Quad {
  float x, y, z, w;
};

// 2^x for the weights of a softmax, whose x is near or below 0. The hardware's instruction has an
// error of 2 ulp and flushes results below 2^-126 to 0.
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

// a * b with a rounding of its own. If the compiler fused it with the next addition, the same
// product could have two values, and a difference that must be exactly 0 would not be.
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
