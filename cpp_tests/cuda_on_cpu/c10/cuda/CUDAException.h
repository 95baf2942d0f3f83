#pragma once

#include <c10/util/Exception.h>

#include "../../cuda_runtime.h"

#define C10_CUDA_CHECK(call)                                                        \
  do {                                                                              \
    const cudaError_t c10_cuda_error = (call);                                      \
    TORCH_CHECK(c10_cuda_error == cudaSuccess, cudaGetErrorString(c10_cuda_error)); \
  } while (false)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() C10_CUDA_CHECK(cudaGetLastError())
