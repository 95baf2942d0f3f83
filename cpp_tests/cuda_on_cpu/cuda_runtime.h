// What the kernels use of CUDA C++ and its runtime, for a host compiler. Found before the real header of this name.
// CUDA_ON_CPU_ARCH is the architecture to compile for, such as 900.
#pragma once

#include <math.h>

#include <algorithm>
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
#define __grid_constant__
#define __shared__ thread_local  // see shared_memory.h
#define __align__(n) __attribute__((aligned(n)))

// --- the runtime
// --------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
const char* cudaGetErrorString(cudaError_t error);

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock;
  int ptxVersion;
  int binaryVersion;
  int maxDynamicSharedSizeBytes;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
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
cudaError_t kernel_attributes(cudaFuncAttributes* attributes, const void* kernel, int arch);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value, int arch);
// As far as threads and shared memory limit it; the host knows of no registers.
cudaError_t blocks_per_multiprocessor(int* blocks, const void* kernel, int threads, size_t dynamic_shared, int arch);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, int arch, const std::function<void()>& thread);
}  // namespace cuda_on_cpu

#if defined(CUDA_ON_CPU_ARCH)

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return cuda_on_cpu::device_attribute(value, attribute, CUDA_ON_CPU_ARCH);
}

#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return cuda_on_cpu::kernel_attributes(attributes, reinterpret_cast<const void*>(kernel), CUDA_ON_CPU_ARCH);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_on_cpu::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value, CUDA_ON_CPU_ARCH);
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads,
                                                          size_t dynamic_shared) {
  return cuda_on_cpu::blocks_per_multiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads, dynamic_shared,
                                                CUDA_ON_CPU_ARCH);
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
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

#include "device_functions.h"

#endif
