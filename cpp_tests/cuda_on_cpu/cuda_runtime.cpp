#include "cuda_runtime.h"

#include <map>
#include <mutex>

#include "machine.h"
#include "shared_memory.h"

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

namespace cuda_on_cpu {
namespace {

constexpr int kUnasked = 48 * 1024;  // bytes of shared memory that a kernel may use without asking
int most_dynamic_shared(int arch) { return arch >= 900 ? static_cast<int>(kMostDynamicShared) : 163 * 1024; }

std::mutex mutex;
std::map<const void*, int> allowed;  // bytes of dynamic shared memory, by kernel

}  // namespace

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int arch) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = arch >= 900 ? 132 : 108;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = arch / 100;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = arch / 10 % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_dynamic_shared(arch);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t allow_dynamic_shared(const void* kernel, int bytes, int arch) {
  if (bytes < 0 || bytes > most_dynamic_shared(arch)) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(mutex);
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, int arch,
                   const std::function<void()>& thread) {
  Launch launch{kernel, config.gridDim, config.blockDim, 1, config.dynamicSmemBytes};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (arch < 900 || size.y != 1 || size.z != 1) return cudaErrorInvalidValue;
    launch.cluster = size.x;
  }
  const auto& [x, y, z] = launch.grid;
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (x < 1 || x > 0x7fffffffu || y < 1 || y > 65535 || z < 1 || z > 65535) return cudaErrorInvalidConfiguration;
  if (threads < 1 || threads > 1024 || launch.block.z > 64) return cudaErrorInvalidConfiguration;
  if (launch.cluster < 1 || launch.cluster > 8 || x % launch.cluster != 0) return cudaErrorInvalidConfiguration;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = allowed.find(kernel);
    const int most = found == allowed.end() ? kUnasked : std::max(kUnasked, found->second);
    if (launch.dynamic_shared > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  }
  run(launch, thread);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu
