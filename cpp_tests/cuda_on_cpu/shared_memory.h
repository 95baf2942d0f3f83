// The shared memory of a block. A __shared__ variable is a thread_local one, so that all of them lie side by side in
// the thread-local storage of the module that holds the kernels, and nothing else may: one block's at a time, the
// others' copied away.
#pragma once

#include <cstddef>
#include <vector>

namespace cuda_on_cpu {

constexpr size_t kMostDynamicShared = 227 * 1024;
constexpr size_t kAlignmentOfDynamicShared = 128;

class SharedMemory {
 public:
  // The calling thread's. `dynamic` bytes of the dynamic part are in use.
  explicit SharedMemory(size_t dynamic);

  // What a block finds: bytes that are NaN as a number of any width, and no valid index.
  static constexpr int kSpoilt = 0xff;
  void spoil();

  std::vector<std::byte> copy() const;
  void restore(const std::vector<std::byte>& copy);

  bool holds(const void* address) const;

  // The same variable, in a copy.
  void* in(std::vector<std::byte>& copy, const void* variable) const;

 private:
  // The static variables before and after the dynamic part, and what is in use of that.
  struct Range {
    std::byte* first;
    size_t size;
  };
  Range ranges_[3];
};

}  // namespace cuda_on_cpu
