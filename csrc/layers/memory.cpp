#include "layers/memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <bit>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace imaml_ext {
namespace {

constexpr int64_t kLarge = int64_t{1} << 20;  // bytes
constexpr int64_t kMost = int64_t{1} << 30;

struct Kept {
  std::mutex mutex;
  std::map<int64_t, std::vector<at::DataPtr>> free;  // by size
  int64_t bytes = 0;
};

// Never destroyed, as tensors may outlive what is static.
Kept& kept() {
  static Kept* const all = new Kept;
  return *all;
}

// The next of eight sizes from one power of two to the next, so that sizes which are alike share memory.
int64_t rounded(int64_t bytes) {
  const int64_t step = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(bytes))) / 8;
  return (bytes + step - 1) / step * step;
}

void give_back(int64_t size, at::DataPtr memory) {
  Kept& all = kept();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.bytes + size > kMost) return;
  all.free[size].push_back(std::move(memory));
  all.bytes += size;
}

at::DataPtr take(int64_t size) {
  Kept& all = kept();
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.free.find(size);
    if (found != all.free.end() && !found->second.empty()) {
      at::DataPtr memory = std::move(found->second.back());
      found->second.pop_back();
      all.bytes -= size;
      return memory;
    }
  }
  return c10::GetCPUAllocator()->allocate(size);
}

}  // namespace

at::Tensor empty_kept(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < kLarge) return at::empty(sizes, options);
  const int64_t size = rounded(bytes);
  auto* const memory = new at::DataPtr(take(size));
  return at::from_blob(
      memory->get(), sizes,
      [memory, size](void*) {
        give_back(size, std::move(*memory));
        delete memory;
      },
      options);
}

}  // namespace imaml_ext
