// SPDX-License-Identifier: Apache-2.0
//
// The only registration of the compiled library: plain functions under torch.ops.clam_cuda, key
// CUDA. The public ops are clam::*, which choose between these, Triton and the reference. The
// functions here have no autograd, no autocast, and no broadcasting beyond what the comments say.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace clam {

using torch::stable::Tensor;

Tensor recursion_small(const Tensor& v, const Tensor& rho, std::optional<Tensor> beta,
                       double beta_value, std::optional<Tensor> log_weights,
                       std::optional<Tensor> update_mask, int64_t steps, double step,
                       const Tensor& flag);

std::tuple<Tensor, Tensor, Tensor> recursion_small_backward(
    const Tensor& grad, const Tensor& v, const Tensor& rho, std::optional<Tensor> beta,
    double beta_value, std::optional<Tensor> log_weights, std::optional<Tensor> update_mask,
    int64_t steps, double step, bool wide, bool memory_side, bool mask_side, const Tensor& flag);

}  // namespace clam

STABLE_TORCH_LIBRARY(clam_cuda, m) {
  // `steps` times
  //
  //   v <- v + step * update_mask * (softmax_k(log w_k - beta_k |v - rho_k|^2) @ rho - v)
  //
  // in one launch, computed in float32; any K, D <= 16.
  //
  //   v            [O, I, N, D]       float32, bfloat16 or float16
  //   rho          [O, I, K, D]       the dtype of v
  //   beta         [O, I, 1 or K]     float32, finite and >= 0; None: `beta_value`
  //   log_weights  [O, I, 1 or K]     float32; -inf: the memory is masked and may be NaN. A problem
  //                                   whose memories are all masked returns its v
  //   update_mask  [O, I, N, D]       float32, or uint8 and bool as 0 / not 0
  //   flag         [O, I, N]          uint8, contiguous, written: 1 for a row in doubt (doubt.h),
  //                                   which the caller computes again, else 0
  //
  // All have the same O and I and any strides, 0 along dims that share an operand. The result [O,
  // I, N, D] is contiguous and of v's dtype. An entry that does not change keeps its bits. The
  // result of a row that is not finite is NaN, and other rows do not depend on it; NaN in an active
  // memory makes every row NaN. No atomics, no synchronisation: the result repeats bit for bit, and
  // a CUDA graph can capture the call.
  m.def(
      "recursion_small(Tensor v, Tensor rho, Tensor? beta, float beta_value, Tensor? log_weights, "
      "Tensor? update_mask, int steps, float step, Tensor(a!) flag) -> Tensor");
  // The gradients of recursion_small, for steps >= 1 and as many memories as shared memory allows
  // (am::backward_warps): (grad_v, partials, grad_mask).
  //
  //   grad       [O, I, N, D]                 the dtype of v, any strides
  //   grad_v     [O, I, N, D]                 the dtype of v, float32 if `wide`
  //   partials   [O, I, slices, K, D + 2]     float32, to be summed over slices: the gradients of
  //                                           rho (D), log w and beta (the last; of one beta for
  //                                           all the sum over K). Empty unless `memory_side`
  //   grad_mask  [O, I, N, D]                 float32. Empty unless `mask_side`
  //
  // A row whose flag is set adds 0 to `partials`, and its rows of grad_v and grad_mask are 0.
  //
  // Scratch: 2^26 floats, or those of 64 blocks where they need more: 128 (steps - 1) (2 D + 2)
  // each. The number of slices and the order of every sum depend on the shapes alone.
  m.def(
      "recursion_small_backward(Tensor grad, Tensor v, Tensor rho, Tensor? beta, float beta_value, "
      "Tensor? log_weights, Tensor? update_mask, int steps, float step, bool wide, "
      "bool memory_side, bool mask_side, Tensor(a!) flag) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(clam_cuda, CUDA, m) {
  m.impl("recursion_small", TORCH_BOX(&clam::recursion_small));
  m.impl("recursion_small_backward", TORCH_BOX(&clam::recursion_small_backward));
}
