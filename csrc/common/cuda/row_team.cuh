// The thread blocks that share one row: a cluster on Hopper and later, a single block elsewhere.
//
// How many there are depends on the row's length and on what the kernel was compiled for, never on the other rows, and
// sums are folded in a fixed order: a row's result has the same bits whatever stands beside it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

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

// How many blocks a kernel gives to a row of `cols`.
template <auto kKernel>
int team_size(int64_t cols) {
  int size = 1;
  while (kernel_facts<kKernel>().hopper && size < kMaxTeam && size * kColsPerBlock < cols) size *= 2;
  return size;
}

// Launches the kernel with a team for each row and so much dynamic shared memory for each block.
template <auto kKernel, typename... Arguments>
void launch_row_teams(cudaStream_t stream, int64_t rows, int64_t cols, size_t shared_bytes,
                      const Arguments&... arguments) {
  const int size = team_size<kKernel>(cols);
  const int64_t most = std::numeric_limits<int32_t>::max() / size;
  if (rows > most) {
    throw std::runtime_error("imaml_ext: at most " + std::to_string(most) + " rows on CUDA, got " +
                             std::to_string(rows));
  }
  launch<kKernel>(stream, {static_cast<unsigned>(rows * size), kThreads, shared_bytes, size}, arguments...);
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
