// How every kernel is launched. A function rather than <<< >>>, so that a host compiler can read the kernels' sources
// too (cpp_tests/cuda_on_cpu).
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

namespace imaml_ext {

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

// A launch's dynamic shared memory. To the compiler that of every kernel is one array, hence of one type and name.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Launches `kernel` on the current stream of the current device, `cluster` blocks along x a cluster: gridDim.x is a
// multiple of it, and above 1 it needs Hopper or later.
template <typename... Parameters>
void launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                     const std::type_identity_t<Parameters>&... arguments) {
  if (shared_bytes > 0) {  // above 48 KiB, static arrays included, it has to be asked for
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// kernel<<<grid, block, shared_bytes, current stream>>>(arguments...), checked
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const std::type_identity_t<Parameters>&... arguments) {
  launch_clusters(kernel, 1, grid, block, shared_bytes, arguments...);
}

}  // namespace imaml_ext
