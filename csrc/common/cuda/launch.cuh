// How every kernel is launched. A function rather than <<< >>>, so that a host compiler can read the kernels' sources
// too (cpp_tests/cuda_on_cpu). No header of libtorch: an error is a std::runtime_error, which torch hands on to Python.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>

namespace imaml_ext {

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the runtime would report it once more, at the next launch that torch checks
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

// A launch's dynamic shared memory. To the compiler that of every kernel is one array, hence of one type and name.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// What a kernel can have on a device.
struct KernelFacts {
  bool clusters;    // by what the running code was compiled for too: code for an older card has none on any card
  bool overlaps;    // dependent launches too: before CUDA 12.3 a graph could not capture them
  int most_shared;  // bytes of dynamic shared memory beside its static arrays
};

// The facts of a kernel on the current device. They are asked for once; the kernel is then allowed all the shared
// memory that there is, so that no launch changes what another one was allowed.
template <auto kKernel>
const KernelFacts& kernel_facts() {
  constexpr int kDevices = 64;
  static std::array<std::once_flag, kDevices> asked;
  static std::array<KernelFacts, kDevices> facts;
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  if (device >= kDevices)
    throw std::runtime_error("imaml_ext: at most 64 CUDA devices, got number " + std::to_string(device));
  std::call_once(asked[device], [&] {
    const auto* const kernel = reinterpret_cast<const void*>(kKernel);
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel));
    int driver = 0, major = 0, most = 0;
    check_cuda(cudaDriverGetVersion(&driver));
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    most = std::max(0, most - static_cast<int>(attributes.sharedSizeBytes));
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    const bool hopper = attributes.ptxVersion >= 90 && major >= 9;
    facts[device] = {hopper, hopper && std::min(driver, CUDART_VERSION) >= 12030, most};
  });
  return facts[device];
}

// The first statement of every kernel. A launch may begin while the one ahead of it in the stream is still at work
// (programmatic dependent launch, Hopper and later): nothing in memory may be read or written before this.
__device__ __forceinline__ void wait_for_launch_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Lets the next launch of the stream take multiprocessors as blocks of this one leave them.
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks along x: gridDim.x is a multiple of it; above 1 the card must have clusters
};

// Launches the kernel on a stream of the current device.
template <auto kKernel, typename... Arguments>
void launch(cudaStream_t stream, const LaunchShape& shape, Arguments... arguments) {
  const KernelFacts& facts = kernel_facts<kKernel>();
  std::array<cudaLaunchAttribute, 2> attributes{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = facts.overlaps ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = !facts.clusters ? 0 : shape.cluster > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kKernel, arguments...));
}

}  // namespace imaml_ext
