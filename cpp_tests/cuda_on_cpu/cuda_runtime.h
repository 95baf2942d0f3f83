// What the kernels use of CUDA C++ and its runtime, for a host compiler. Found before the real header of this name.
// CUDA_ON_CPU_ARCH is the architecture to compile for, such as 900.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#include "dimensions.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // see shared_memory.h
#define __align__(n) __attribute__((aligned(n)))

// --- the runtime
// --------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
const char* cudaGetErrorString(cudaError_t error);

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock;
  int ptxVersion;
  int binaryVersion;
  int maxDynamicSharedSizeBytes;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int arch);
cudaError_t allow_dynamic_shared(const void* kernel, int bytes, int arch);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, int arch, const std::function<void()>& thread);
}  // namespace cuda_on_cpu

#if defined(CUDA_ON_CPU_ARCH)

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return cuda_on_cpu::device_attribute(value, attribute, CUDA_ON_CPU_ARCH);
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {0, 1024, CUDA_ON_CPU_ARCH / 10, CUDA_ON_CPU_ARCH / 10, 48 * 1024};
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return cuda_on_cpu::allow_dynamic_shared(kernel, bytes, CUDA_ON_CPU_ARCH);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  return cuda_on_cpu::launch(*config, reinterpret_cast<const void*>(kernel), CUDA_ON_CPU_ARCH,
                             [&] { std::apply(kernel, parameters); });
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

#include "device_functions.h"

#endif
