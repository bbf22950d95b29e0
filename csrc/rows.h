// SPDX-License-Identifier: Apache-2.0
//
// The caller's operands: any strides, float32, bfloat16, float16 or bytes, read as float32 one row
// at a time.

#pragma once

#include <cstring>

#include "portable.h"

namespace clam {

enum class Type { kFloat, kBFloat16, kHalf, kByte };

// The bits of a bfloat16 or float16. One type serves both, and a test at run time tells them apart
// for each entry: the code is half as long.
struct Short {
  uint16_t bits;
};

CLAM_HD float widen(float x, Type) { return x; }

CLAM_HD float widen(Short x, Type type) {
  float y;
  if (type == Type::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    memcpy(&y, &bits, sizeof(y));
    return y;
  }
#ifdef __CUDA_ARCH__
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  y = exponent == 0 ? std::ldexp(static_cast<float>(digits), -24)
                    : std::ldexp(static_cast<float>(1024 + digits), exponent - 25);
  if (exponent == 31) y = digits == 0 ? kInfinity : std::numeric_limits<float>::quiet_NaN();
  return x.bits >> 15 ? -y : y;
#endif
}

// One operand [O, I, rows, features]: its strides in elements, 0 along dims that share it.
// `packed`: rows may be read as vectors.
struct Rows {
  const void* data;  // null: the call has no such operand
  int64_t outer, inner, row, feature;
  Type type;
  bool packed;

  CLAM_HD int64_t start(int64_t o, int64_t i) const { return o * outer + i * inner; }
};

// Elements per vector access of a row; a row of D starts at a multiple of it.
CLAM_HD constexpr int width_of(int features) {
  return features % 4 == 0 ? 4 : features % 2 == 0 ? 2 : 1;
}

template <class T, int W>
struct alignas(sizeof(T) * W) Pack {
  T entry[W];
};

template <int D, class T>
CLAM_HD void load_as(const T* row, const Rows& rows, bool packed, int d, float (&x)[D]) {
  constexpr int W = width_of(D);
  if (W > 1 && packed) {
    CLAM_UNROLL
    for (int i = 0; i < D; i += W) {
      const Pack<T, W> pack = *reinterpret_cast<const Pack<T, W>*>(row + i);
      CLAM_UNROLL
      for (int j = 0; j < W; ++j) x[i + j] = widen(pack.entry[j], rows.type);
    }
    return;
  }
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) x[i] = i < d ? widen(row[i * rows.feature], rows.type) : 0.0f;
}

// The row that starts `at` elements in; features from d to D are 0.
template <int D>
CLAM_HD void load_row(const Rows& rows, int64_t at, bool packed, int d, float (&x)[D]) {
  if (rows.type == Type::kFloat) {
    load_as<D>(static_cast<const float*>(rows.data) + at, rows, packed, d, x);
  } else {
    load_as<D>(static_cast<const Short*>(rows.data) + at, rows, packed, d, x);
  }
}

CLAM_HD float load_entry(const Rows& rows, int64_t at) {
  if (rows.type == Type::kFloat) return static_cast<const float*>(rows.data)[at];
  return widen(static_cast<const Short*>(rows.data)[at], rows.type);
}

// One entry of an operand that has a number for each memory, always float32.
CLAM_HD float number(const Rows& rows, int64_t at) {
  return static_cast<const float*>(rows.data)[at];
}

#ifdef __CUDACC__

__device__ __forceinline__ void narrow(float x, Type, float& y) { y = x; }

__device__ __forceinline__ void narrow(float x, Type type, Short& y) {
  if (type == Type::kBFloat16) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  }
}

// The allocator aligns results: their rows are aligned unless D is padded.
template <int D, class T>
__device__ __forceinline__ void store_as(T* row, Type type, int d, const float (&x)[D]) {
  constexpr int W = width_of(D);
  if (W > 1 && d == D) {
#pragma unroll
    for (int i = 0; i < D; i += W) {
      Pack<T, W> pack;
#pragma unroll
      for (int j = 0; j < W; ++j) narrow(x[i + j], type, pack.entry[j]);
      *reinterpret_cast<Pack<T, W>*>(row + i) = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < D; ++i) {
    if (i < d) narrow(x[i], type, row[i]);
  }
}

__device__ __forceinline__ void store_entry(void* data, Type type, int64_t at, float x) {
  if (type == Type::kFloat) {
    static_cast<float*>(data)[at] = x;
  } else {
    narrow(x, type, static_cast<Short*>(data)[at]);
  }
}

template <int D>
__device__ __forceinline__ void store_row(void* data, Type type, int64_t at, int d,
                                          const float (&x)[D]) {
  if (type == Type::kFloat) {
    store_as<D>(static_cast<float*>(data) + at, type, d, x);
  } else {
    store_as<D>(static_cast<Short*>(data) + at, type, d, x);
  }
}

#endif

}  // namespace clam
