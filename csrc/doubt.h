// SPDX-License-Identifier: Apache-2.0
//
// Which rows the kernels here may get wrong. They expand distances of rows and memories minus a
// centre, |x|^2 + |rho|^2 - 2 <x, rho>, and the expansion loses digits where a row and its recall
// lie far from the centre and near each other. A kernel writes a flag for such a row, and
// kernels/am/exact.py computes the row again from differences in float64. kernels/am/doubt.py has
// the same rule and explains it; a test compares their constants.

#pragma once

#include "portable.h"

namespace clam {
namespace am {

constexpr float kNearFactor = 16.0f;
constexpr float kNearLimit = 32.0f, kNearLimitOfMany = 4.0f, kFarLimit = 1024.0f;
constexpr float kLogitError = 8.0f / (1 << 24);
constexpr float kLongest = 0x1p76f;
constexpr float kSharpest = 0x1p90f;
// A row loses too many digits to the centre where its norm is 2^4 times that of the result. The
// limit is lower than in doubt.py: one far memory moves the mean here, and not the centre there.
constexpr float kCentred = 0x1p8f;
// The largest number in a table. It replaces infinity, because 0 * infinity is NaN.
constexpr float kMost = 3.0e38f;

// x between -kMost and kMost; NaN stays NaN.
CLAM_HD float clamped(float x) { return x > kMost ? kMost : x < -kMost ? -kMost : x; }

// Numbers of all active memories for the rule: the largest beta, not finite where a beta or a
// log-weight is not; its quotient by the least beta; kNearLimit, or with a beta for each memory
// kNearLimitOfMany.
struct Betas {
  float sharp, ratio, near_limit;
};

// Whether one step of a row may be wrong: `recalled` is the recall of x, `mass` the sum of its
// weights and `largest` the largest of them. With size = |x|^2 + |recalled|^2 and logit_size =
// sharp * size, a row is right if logit_size (mass - largest) <= limit * mass, with the limit
// kFarLimit if kNearFactor |recalled - x|^2 >= ratio * size and near_limit if not, kLogitError
// logit_size < 1 and size < kLongest. Comparisons with NaN are false: such a row is in doubt. Every
// product is rounded, so that all kernels decide alike.
template <int D>
CLAM_HD bool is_in_doubt(const float (&x)[D], const float (&recalled)[D], float mass, float largest,
                         const Betas& betas) {
  float size = 0.0f, far = 0.0f;
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) {
    const float gap = recalled[i] - x[i];
    size = fused(x[i], x[i], size);
    size = fused(recalled[i], recalled[i], size);
    far = fused(gap, gap, far);
  }
  const float logit_size = product(betas.sharp < kSharpest ? betas.sharp : kInfinity, size);
  const bool apart = product(far, kNearFactor) >= product(size, betas.ratio);
  const float limit = product(apart ? kFarLimit : betas.near_limit, mass);
  const bool right = product(logit_size, mass - largest) <= limit;
  return !(product(kLogitError, logit_size) < 1.0f && right && size < kLongest);
}

// Whether the caller's row, the centre and the betas are finite. Where they are not the result is
// NaN, and the row is not computed again.
template <int D>
CLAM_HD bool are_finite(const float (&raw)[D], const float* centre, float sharp) {
  float zero = product(sharp, 0.0f);
  CLAM_UNROLL
  for (int i = 0; i < D; ++i) zero += product(raw[i], 0.0f) + product(centre[i], 0.0f);
  return zero == 0.0f;
}

// Whether a row lost too many digits to the centre: the squared norm of the result minus the centre
// exceeds kCentred times those of the result and of the caller's row.
CLAM_HD bool loses_digits(float centred, float result, float raw) {
  return !(centred <= kCentred * fmaxf(result, raw));
}

}  // namespace am
}  // namespace clam
