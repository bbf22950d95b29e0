// SPDX-License-Identifier: Apache-2.0
//
// For every launcher: torch's stable C ABI, the current stream, checks with plain messages.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>

// libtorch_cuda defines these. They are weak symbols, so that the library also loads beside a torch
// without CUDA, where no call reaches its kernels.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
extern "C" __attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*,
                                                                         const char*, uint32_t,
                                                                         bool, char**);
extern "C" __attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);

namespace clam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace clam

// Raises an error whose text is the message alone: no file, no line, no request to report it.
#define CLAM_CHECK(condition, ...)              \
  do {                                          \
    if (!(condition)) {                         \
      ::clam::fail("clam_cuda::", __VA_ARGS__); \
    }                                           \
  } while (0)
