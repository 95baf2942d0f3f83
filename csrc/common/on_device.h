// From a tensor to the device that its op runs on, and the registration of an op for every device that was compiled.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(IMAML_EXT_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <vector>

#include "common/device.h"

namespace imaml_ext {

// Calls work(device, arguments) for the device of `tensor`, on CUDA with that device current, and its current stream.
// What the work allocates is freed at the end; torch reuses it in the order of the stream.
template <typename Arguments, typename Work>
void on_device_of(const at::Tensor& tensor, Arguments& arguments, const Work& work) {
  std::vector<at::Tensor> memory;
  if constexpr (requires { arguments.allocate; }) {
    arguments.allocate = [&](int64_t bytes) {
      memory.push_back(at::empty({bytes}, tensor.options().dtype(at::kByte)));
      return static_cast<char*>(memory.back().mutable_data_ptr());
    };
  }
#if defined(IMAML_EXT_WITH_CUDA)
  if (tensor.is_cuda()) {
    const c10::cuda::CUDAGuard guard(tensor.device());
    work(OnCuda{c10::cuda::getCurrentCUDAStream()}, arguments);
    return;
  }
#endif
  work(OnCpu{}, arguments);
}

}  // namespace imaml_ext

// TORCH_LIBRARY_IMPL for every device: the same functions serve all of them.
#if defined(IMAML_EXT_WITH_CUDA)
#define IMAML_REGISTER(register_ops)                         \
  TORCH_LIBRARY_IMPL(imaml_ext, CPU, m) { register_ops(m); } \
  TORCH_LIBRARY_IMPL(imaml_ext, CUDA, m) { register_ops(m); }
#else
#define IMAML_REGISTER(register_ops) \
  TORCH_LIBRARY_IMPL(imaml_ext, CPU, m) { register_ops(m); }
#endif
