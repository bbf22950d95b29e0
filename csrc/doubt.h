// SPDX-License-Identifier: Apache-2.0
//
// Which rows the kernels here may get wrong. They expand distances of rows and memories less a
// centre, |x|^2 + |rho|^2 - 2 <x, rho>, and the expansion loses digits where a row and what it
// recalls lie far from the centre and near each other. A kernel writes a flag for such a row, and
// am_exact.py computes the row again from differences in float64. The rule is that of _doubt.py in
// clam_kernels/kernels, which says why; a test compares the numbers that both have.

#pragma once

#include "portable.h"

namespace clam {
namespace am {

constexpr float kCancel = 16.0f;
constexpr float kCalm = 32.0f, kCalmOfMany = 4.0f, kWarm = 1024.0f;
constexpr float kGrowth = 8.0f / (1 << 24);
constexpr float kLongest = 0x1p76f;
constexpr float kSharpest = 0x1p90f;
// 2^4 in a norm is too many digits before those of the result. Less than in _doubt.py: one far
// memory moves a mean, and not the centre there.
constexpr float kCentred = 0x1p8f;
// The largest number in a table, in the place of what is infinite: 0 times it stays 0.
constexpr float kMost = 3.0e38f;

// Keeps NaN.
CLAM_HD float clamped(float x) { return x > kMost ? kMost : x < -kMost ? -kMost : x; }

// What the rule needs of all memories that take part: the largest beta, not finite where a beta or
// a log-weight is not; how many times the least beta it is; and kCalm, or with a beta for each
// memory kCalmOfMany.
struct Betas {
  float sharp, ratio, calm;
};

// Whether one step of a row may be wrong: a row at x recalls `recalled`; the sum of its weights is
// `mass` and the largest of them `largest`. Comparisons with NaN are false: such a row is in doubt.
// Every product is rounded, so that all kernels decide alike.
template <int D>
CLAM_HD bool doubted(const float (&x)[D], const float (&recalled)[D], float mass, float largest,
                     const Betas& betas) {
  float size = 0.0f, far = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    const float gap = recalled[i] - x[i];
    size = fused(x[i], x[i], size);
    size = fused(recalled[i], recalled[i], size);
    far = fused(gap, gap, far);
  }
  const float heat = product(betas.sharp < kSharpest ? betas.sharp : kInfinity, size);
  const bool apart = product(far, kCancel) >= product(size, betas.ratio);
  const float most = product(apart ? kWarm : betas.calm, mass);
  const bool calm = product(heat, mass - largest) <= most;
  return !(product(kGrowth, heat) < 1.0f && calm && size < kLongest);
}

// Whether a row as it was given, the centre and the betas are finite. Where they are not the result
// is NaN, and nothing is computed again.
template <int D>
CLAM_HD bool are_finite(const float (&given)[D], const float* centre, float sharp) {
  float zero = product(sharp, 0.0f);
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) zero += product(given[i], 0.0f) + product(centre[i], 0.0f);
  return zero == 0.0f;
}

// Whether the centre had too many digits before those of the result: of squared norms, `centred` is
// that of the result less the centre, `result` that of the result, `given` that of the row before
// the first step.
CLAM_HD bool lost(float centred, float result, float given) {
  return !(centred <= kCentred * fmaxf(result, given));
}

}  // namespace am
}  // namespace clam
