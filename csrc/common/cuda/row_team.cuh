// The thread blocks that share one row: a cluster on Hopper and later, a single block elsewhere.
//
// How many there are depends on the row's length and on what the kernel was compiled for, never on the other rows, and
// sums are folded in a fixed order: a row's result has the same bits whatever stands beside it.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>

#include "common/coefficient.h"
#include "common/cuda/launch.cuh"

namespace imaml_ext {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxTeam = 8;               // the largest portable cluster
constexpr int64_t kColsPerBlock = 16384;  // a row longer than this is shared by more blocks
constexpr int kMaxSums = 3;

// Shared memory of a block; each reduction of a kernel has a slot of its own, so that none waits for the last.
template <int kSlots>
struct TeamStorage {
  double warp_sums[kSlots][kMaxSums][kWarps];
  double block_sums[kSlots][kMaxSums];
  double team_sums[kSlots][kMaxSums];
};

template <int kSlots>
struct RowTeam {
  TeamStorage<kSlots>& storage;

  __device__ explicit RowTeam(TeamStorage<kSlots>& shared) : storage(shared) {}

  __device__ static int size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
  }
  __device__ static int rank() { return static_cast<int>(blockIdx.x) % size(); }
  __device__ static int64_t row() { return static_cast<int64_t>(blockIdx.x) / size(); }
  __device__ static bool leads() { return rank() == 0 && threadIdx.x == 0; }

  // Waits for every thread of the team.
  __device__ static void sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }

  // Sums over the team, by a fixed tree: lanes, then warps, then blocks in the order of their ranks. Every thread of
  // the team must call it; afterwards storage.team_sums[slot] holds the sums in every block.
  template <int kSums>
  __device__ void sum(int slot, const double (&values)[kSums]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      double value = values[k];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
      if (lane == 0) storage.warp_sums[slot][k][warp] = value;
    }
    __syncthreads();
    if (threadIdx.x < kSums) {
      double total = 0.0;
      for (int w = 0; w < kWarps; ++w) total += storage.warp_sums[slot][threadIdx.x][w];
      storage.block_sums[slot][threadIdx.x] = total;
    }
    sync();
    if (threadIdx.x < kSums) {
      double total = storage.block_sums[slot][threadIdx.x];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      total = 0.0;
      const auto cluster = cooperative_groups::this_cluster();
      for (int other = 0; other < size(); ++other) {
        total += cluster.map_shared_rank(&storage.block_sums[slot][0], other)[threadIdx.x];
      }
#endif
      storage.team_sums[slot][threadIdx.x] = total;
    }
    __syncthreads();
  }
};

// What is asked of the runtime once a device: `ask()` ≥ 0.
class OncePerDevice {
 public:
  template <typename Ask>
  int operator()(const Ask& ask) {
    const int device = c10::cuda::current_device();
    if (device >= kDevices) return ask(device);
    int answer = answers_[device].load(std::memory_order_relaxed) - 1;
    if (answer < 0) {
      answer = ask(device);
      answers_[device].store(answer + 1, std::memory_order_relaxed);
    }
    return answer;
  }

 private:
  static constexpr int kDevices = 64;
  std::array<std::atomic<int>, kDevices> answers_{};  // 1 more than the answer; 0 not asked yet
};

template <typename Kernel>
cudaFuncAttributes attributes_of(Kernel kernel) {
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return attributes;
}

// How many blocks a kernel gives to a row of `cols`.
template <typename Kernel>
int team_size(Kernel kernel, int64_t cols) {
  // What the running code was compiled for decides, not the card: code for an older card has no clusters.
  static OncePerDevice clusters;
  const bool has_clusters = clusters([&](int device) {
    int major = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return attributes_of(kernel).ptxVersion >= 90 && major >= 9 ? 1 : 0;
  });
  int size = 1;
  while (has_clusters && size < kMaxTeam && size * kColsPerBlock < cols) size *= 2;
  return size;
}

// Bytes of dynamic shared memory that a block of the kernel can have beside its static arrays.
template <typename Kernel>
int most_shared_bytes(Kernel kernel) {
  static OncePerDevice most;
  return most([&](int device) {
    int bytes = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return std::max(0, bytes - static_cast<int>(attributes_of(kernel).sharedSizeBytes));
  });
}

// Launches `kernel` with a team for each row and so much dynamic shared memory for each block, on the current stream of
// the current device.
template <typename... Parameters>
void launch_row_teams(void (*kernel)(Parameters...), int64_t rows, int64_t cols, size_t shared_bytes,
                      const std::type_identity_t<Parameters>&... arguments) {
  if (rows == 0) return;
  const int size = team_size(kernel, cols);
  TORCH_CHECK_VALUE(rows <= std::numeric_limits<int32_t>::max() / size, "imaml_ext: at most ",
                    std::numeric_limits<int32_t>::max() / size, " rows on CUDA, got ", rows);
  launch_clusters(kernel, size, dim3(static_cast<unsigned>(rows * size)), dim3(kThreads), shared_bytes, arguments...);
}

template <typename C>
__device__ __forceinline__ C at(const Coefficient<C>& c, int64_t row, int64_t col) {
  return c.data[row * c.row_stride + col * c.col_stride];
}

// V numbers that lie side by side, read and written at once.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <int V, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Whether rows of `cols` starting at these pointers (null: absent) can be read 16 bytes at a time.
template <typename T, typename... Pointers>
bool can_pack(int64_t cols, const Pointers*... pointers) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
  return aligned && cols % static_cast<int64_t>(16 / sizeof(T)) == 0;
}

}  // namespace imaml_ext
