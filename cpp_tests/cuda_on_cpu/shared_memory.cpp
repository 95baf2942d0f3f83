#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace imaml_ext {
// Declared in csrc/common/cuda/launch.cuh.
alignas(cuda_on_cpu::kAlignmentOfDynamicShared) thread_local unsigned char dynamic_shared_memory
    [cuda_on_cpu::kMostDynamicShared];
}  // namespace imaml_ext

namespace cuda_on_cpu {
namespace {

// The calling thread's thread-local storage of the module that this code is in.
struct Storage {
  std::byte* first = nullptr;
  size_t size = 0;
};

int find_storage(dl_phdr_info* module, size_t, void* storage) {
  const auto here = reinterpret_cast<uintptr_t>(&find_storage);
  bool is_ours = false;
  size_t size = 0;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& segment = module->dlpi_phdr[i];
    const uintptr_t first = module->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD && here >= first && here - first < segment.p_memsz) is_ours = true;
    if (segment.p_type == PT_TLS) size = segment.p_memsz;
  }
  if (!is_ours) return 0;
  *static_cast<Storage*>(storage) = {static_cast<std::byte*>(module->dlpi_tls_data), size};
  return 1;
}

}  // namespace

SharedMemory::SharedMemory(size_t dynamic) {
  auto* const dynamic_first = reinterpret_cast<std::byte*>(imaml_ext::dynamic_shared_memory);
  *static_cast<volatile std::byte*>(dynamic_first) = std::byte{0};  // it is allocated when first used
  Storage storage;
  dl_iterate_phdr(find_storage, &storage);
  if (storage.first == nullptr || dynamic_first < storage.first ||
      dynamic_first + kMostDynamicShared > storage.first + storage.size) {
    throw std::logic_error("cuda_on_cpu: shared memory is not where it should be");
  }
  std::byte* const dynamic_last = dynamic_first + kMostDynamicShared;
  ranges_[0] = {storage.first, static_cast<size_t>(dynamic_first - storage.first)};
  ranges_[1] = {dynamic_first, dynamic};
  ranges_[2] = {dynamic_last, static_cast<size_t>(storage.first + storage.size - dynamic_last)};
}

void SharedMemory::spoil() {
  for (const Range& range : ranges_) std::memset(range.first, kSpoilt, range.size);
}

std::vector<std::byte> SharedMemory::copy() const {
  std::vector<std::byte> copy;
  for (const Range& range : ranges_) copy.insert(copy.end(), range.first, range.first + range.size);
  return copy;
}

void SharedMemory::restore(const std::vector<std::byte>& copy) {
  const std::byte* from = copy.data();
  for (const Range& range : ranges_) {
    std::memcpy(range.first, from, range.size);
    from += range.size;
  }
}

bool SharedMemory::holds(const void* address) const {
  const auto* const place = static_cast<const std::byte*>(address);
  return std::ranges::any_of(
      ranges_, [&](const Range& range) { return place >= range.first && place < range.first + range.size; });
}

void* SharedMemory::in(std::vector<std::byte>& copy, const void* variable) const {
  const auto* const place = static_cast<const std::byte*>(variable);
  size_t before = 0;
  for (const Range& range : ranges_) {
    if (place >= range.first && place < range.first + range.size) return copy.data() + before + (place - range.first);
    before += range.size;
  }
  return nullptr;
}

}  // namespace cuda_on_cpu
