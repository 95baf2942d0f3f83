#include "cuda_runtime.h"

#include <cstdlib>
#include <map>
#include <mutex>

#include "kernel_facts.h"
#include "machine.h"
#include "report.h"
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

// What a multiprocessor has.
struct Card {
  int multiprocessors;
  int shared;
  int reserved = 1024;  // of `shared`, for every block
  int threads = 2048;
  int blocks = 32;
  int most_shared() const { return shared - reserved; }  // that a block may have, static arrays included
};
// CUDA_ON_CPU_SHARED makes it one with less shared memory, for the path of rows too long for what there is.
Card card(int arch) {
  Card card = arch >= 900 ? Card{132, 228 * 1024} : Card{108, 164 * 1024};
  if (const char* const bytes = std::getenv("CUDA_ON_CPU_SHARED"))
    card.shared = std::min(card.shared, std::atoi(bytes));
  return card;
}

std::mutex mutex;
std::map<const void*, int> allowed;  // bytes of dynamic shared memory, by kernel

int static_shared(const void* kernel) { return static_cast<int>(facts_of(kernel).static_shared); }

int most_dynamic_shared(const void* kernel) {
  const int unasked = kUnasked - static_shared(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = allowed.find(kernel);
  return found == allowed.end() ? unasked : std::max(unasked, found->second);
}

int blocks_that_fit(const Card& card, const void* kernel, size_t threads, size_t dynamic_shared) {
  const int shared = (static_shared(kernel) + static_cast<int>(dynamic_shared) + card.reserved + 127) / 128 * 128;
  return std::min({card.blocks, card.threads / (static_cast<int>(threads + 31) / 32 * 32), card.shared / shared});
}

}  // namespace

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int arch) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kUnasked;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = card(arch).multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = card(arch).threads;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = arch / 100;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = arch / 10 % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = card(arch).shared;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = card(arch).most_shared();
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = card(arch).blocks;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = card(arch).reserved;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t kernel_attributes(cudaFuncAttributes* attributes, const void* kernel, int arch) {
  *attributes = {facts_of(kernel).static_shared, 1024, arch / 10, arch / 10, most_dynamic_shared(kernel)};
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value, int arch) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize: {
      if (value < 0 || static_shared(kernel) + value > card(arch).most_shared()) return cudaErrorInvalidValue;
      const std::lock_guard<std::mutex> lock(mutex);
      allowed[kernel] = value;
      return cudaSuccess;
    }
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return value < -1 || value > 100 ? cudaErrorInvalidValue : cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t blocks_per_multiprocessor(int* blocks, const void* kernel, int threads, size_t dynamic_shared, int arch) {
  if (threads < 1 || threads > 1024) return cudaErrorInvalidValue;
  *blocks = blocks_that_fit(card(arch), kernel, static_cast<size_t>(threads), dynamic_shared);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, int arch,
                   const std::function<void()>& thread) {
  Launch launch{kernel, config.gridDim, config.blockDim, 1, config.dynamicSmemBytes};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& [id, val] = config.attrs[i];
    if (arch < 900) return cudaErrorInvalidValue;
    if (id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      launch.dependent = val.programmaticStreamSerializationAllowed != 0;
    } else {
      if (val.clusterDim.y != 1 || val.clusterDim.z != 1) return cudaErrorInvalidValue;
      launch.cluster = val.clusterDim.x;
    }
  }
  const auto& [x, y, z] = launch.grid;
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  if (x < 1 || x > 0x7fffffffu || y < 1 || y > 65535 || z < 1 || z > 65535) return cudaErrorInvalidConfiguration;
  if (threads < 1 || threads > 1024 || launch.block.z > 64) return cudaErrorInvalidConfiguration;
  if (launch.cluster < 1 || launch.cluster > 8 || x % launch.cluster != 0) return cudaErrorInvalidConfiguration;
  if (static_shared(kernel) > kUnasked) return cudaErrorInvalidValue;  // ptxas does not even compile it
  if (launch.dynamic_shared > static_cast<size_t>(most_dynamic_shared(kernel))) return cudaErrorInvalidValue;
  report(launch, facts_of(kernel).static_shared, blocks_that_fit(card(arch), kernel, threads, launch.dynamic_shared));
  run(launch, thread);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu
