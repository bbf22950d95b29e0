// SPDX-License-Identifier: Apache-2.0
//
// The only registration of the compiled library: plain functions under torch.ops.clam_cuda, key
// CUDA. The public ops are clam::*, which choose between these, Triton and the reference; nothing
// here has a gradient, autocast or broadcasting of its own beyond what its comment says.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace clam {

using torch::stable::Tensor;

Tensor recursion_small(const Tensor& v, const Tensor& rho, const Tensor& scale, const Tensor& bias,
                       int64_t steps, double step, std::optional<Tensor> gain,
                       std::optional<Tensor> centre);

}  // namespace clam

STABLE_TORCH_LIBRARY(clam_cuda, m) {
  // `steps` times
  //
  //   x <- x + step * gain * (softmax_k(bias_k + scale_k * (<rho_k, x> - |x|^2 / 2)) @ rho - x)
  //
  // from x = v - centre, and x + centre of the last; all steps in one launch, any K, D <= 16.
  //
  //   v       [B, N, D]       float32
  //   rho     [B, K, D]       the memories less the centre; 0 where the bias is -inf
  //   scale   [B, 1 or K]     2 beta, finite and >= 0
  //   bias    [B, K]          log w_k - beta_k |rho_k|^2; -inf: the memory takes no part. A problem
  //   in
  //                           which none does returns its v
  //   gain    [B, N, D]       update_mask: float32, or uint8 and bool as 0 / not 0; any strides
  //   centre  [B, D]          the mean of the memories; None: v and rho are centred already
  //
  // B of each operand is 1 or the B of the result. All but gain are contiguous. An entry that does
  // not move is returned bit for bit. A row that is not finite turns to NaN and touches no other.
  // No atomics, no synchronisation: the result repeats bit for bit, and the call can be captured.
  m.def(
      "recursion_small(Tensor v, Tensor rho, Tensor scale, Tensor bias, int steps, float step, "
      "Tensor? gain=None, Tensor? centre=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(clam_cuda, CUDA, m) {
  m.impl("recursion_small", TORCH_BOX(&clam::recursion_small));
}
