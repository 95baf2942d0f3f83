// What every task has one of, side by side: the first task's address and the distance to the next.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "network/storage.h"

namespace imaml_ext {

template <typename T>
struct PerTask {
  T* first = nullptr;
  int64_t stride = 0;

  PerTask() = default;
  PerTask(T* start, int64_t distance) : first(start), stride(distance) {}
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T>>>
  PerTask(const PerTask<U>& other) : first(other.first), stride(other.stride) {}

  __host__ __device__ T* of(int64_t task) const { return first + task * stride; }
  PerTask operator+(int64_t offset) const { return {first + offset, stride}; }
  bool operator==(const PerTask& other) const { return first == other.first; }
};

// The memory of all tasks, [B, bytes], handed out as an Arena does one task's.
class TaskMemory {
 public:
  template <typename T>
  using Pointer = PerTask<T>;

  TaskMemory(void* base, int64_t bytes) : arena_(base), bytes_(bytes) {}
  template <typename T>
  PerTask<T> take(int64_t count) {
    return {arena_.take<T>(count), bytes_ / static_cast<int64_t>(sizeof(T))};
  }

 private:
  Arena arena_;
  int64_t bytes_;
};

constexpr int kGroup = static_cast<int>(kChannelBlock);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// Division by a number that the host knows: ⌊n / by⌋ = (⌊n m / 2³²⌋ + n) >> s for n < 2³¹ (Granlund and Montgomery,
// 1994).
struct Divisor {
  int by = 1;
  uint32_t multiplier = 1;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t number) : by(static_cast<int>(number)) {
    while ((int64_t{1} << shift) < number) ++shift;
    const uint64_t above = (uint64_t{1} << shift) - static_cast<uint64_t>(number);
    multiplier = static_cast<uint32_t>((above << 32) / static_cast<uint64_t>(number) + 1);
  }
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
  // n becomes ⌊n / by⌋; what remains is returned.
  __device__ __forceinline__ int split(int& n) const {
    const int whole = n;
    n = divide(whole);
    return whole - n * by;
  }
};

// A grid of `tiles` blocks per task, all along x: of block i, i / tiles is the task.
inline unsigned grid_of(int64_t tiles, int64_t tasks) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (tiles > kMost / tasks) {
    throw std::runtime_error("imaml_ext: at most " + std::to_string(kMost / tiles) +
                             " tasks of this network on CUDA, got " + std::to_string(tasks));
  }
  return static_cast<unsigned>(tiles * tasks);
}

// Sixteen bytes, read and written by one instruction each: as an array of numbers they would be four stores.
template <typename T>
struct alignas(16) Quad {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};
template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Quad<T> quad;
  memcpy(&quad, &bits, sizeof(quad));
  return quad;
}
// To global memory; the next launch reads it on other multiprocessors, so it need not stay in this one's cache.
template <typename T>
__device__ __forceinline__ void store_quad(T* to, const Quad<T>& quad) {
  uint4 bits;
  memcpy(&bits, &quad, sizeof(quad));
  __stcg(reinterpret_cast<uint4*>(to), bits);
}

}  // namespace imaml_ext
