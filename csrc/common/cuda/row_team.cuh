// Work on the rows of a batch in phases: each goes through a row and sums, and what the sums decide is known to the
// next.
//
// Who works on a row depends on its length, its type and the card, never on the other rows; and sums are folded in a
// fixed order. So a row's result has the same bits whatever stands beside it.
//
//     unknowns in a row     work on it
//     up to 64              8 threads of a warp           one launch; p and A p are kept in shared memory
//     up to 256             a warp
//     up to 2,048           128 threads
//     up to 14,080          a block of 512 threads        (float64: 7,040)
//     up to 232,000         a cluster of 2, 4 or 8        (float64: 116,000)
//     above                 up to 264 blocks              a launch for each phase; sums meet in global memory
//
// A part of 14,080 float32 unknowns (p and A p of a CG step) takes 110 KiB, so that two blocks share a multiprocessor.
// Where 8 such parts are too few, they grow to what a block can have on Hopper: 232,000 unknowns in a row, 116,000 in
// float64. Up to there a step moves 7 words per unknown; beyond, with nothing kept, 11. A multiprocessor takes in at
// most 64 bytes a cycle. So at 232,000 one row alone takes 7 µs on 8 multiprocessors, or 6 µs and two launches on 15:
// the cluster loses nothing, and many rows gain a third. At 10 million the 264 blocks, two on each of 132
// multiprocessors, are limited by memory alone. (Counted from bytes, not measured.) A card without clusters takes this
// path above 14,080, or where a part no longer fits its shared memory.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/coefficient.h"
#include "common/cuda/launch.cuh"
#include "common/cuda/tile.cuh"
#include "common/device.h"

namespace imaml_ext {

constexpr int kMostThreads = 512;
constexpr int kShortThreads = 128;  // of a block whose rows are at most kShortRow long
constexpr int64_t kShortRow = 2048;
constexpr int kMostWarps = kMostThreads / 32;
constexpr int kMostRows = 16;                // of a block
constexpr int64_t kPartBytes = 110 * 1024;   // of shared memory, for a block's part of a row
constexpr int64_t kHalfShared = 114 * 1024;  // of a multiprocessor on Hopper, for each of two blocks
constexpr int64_t kReserved = 1024;          // of it, which CUDA takes for itself
constexpr int kMostCluster = 8;              // the largest that every card with clusters has
constexpr int64_t kLongPart = 16384;
constexpr int64_t kMostLongParts = 264;

// Whether a coefficient's rows are packed beside such rows of T; those of a view begin a stride apart, not `cols`.
template <typename T, typename C>
bool can_pack(int64_t cols, const Coefficient<C>& coefficient) {
  const bool aligned = coefficient.row_stride * static_cast<int64_t>(sizeof(C)) % 16 == 0;
  return coefficient.col_stride == 0 || (aligned && can_pack<T>(cols, coefficient.data));
}

// How a kernel's blocks are dealt out to rows.
struct RowPlan {
  int64_t rows = 0;
  int64_t cols = 0;
  int part = 0;            // elements of a row that a block has: a multiple of V
  int warps = kMostWarps;  // of a block that work on one row; 1 where less than a warp does
  int blocks = 1;          // that work on one row
  TilePlan tile;
  bool together = true;  // in one launch: one block, or a cluster
  int phase = 0;         // where not together, the one that is launched
  char* sums = nullptr;  // where not together, what one launch leaves for the next
  int decisions = 0;     // where a block's decisions begin in its shared memory: behind the parts of its rows
};

template <int V>
int64_t part_of(int64_t cols, int blocks) {
  const int64_t packs = (cols + V - 1) / V;
  return (packs + blocks - 1) / blocks * V;
}

// The plan for rows of T. `most_shared`: bytes of shared memory that a block can have.
template <typename T>
RowPlan row_plan(int64_t rows, int64_t cols, bool packed, bool clusters, int64_t most_shared) {
  constexpr int V = kPackSize<T>;
  constexpr int64_t kBytes = 2 * sizeof(compute_t<T>);  // of an element that is kept: p and A p
  RowPlan plan;
  plan.rows = rows;
  plan.cols = cols;
  plan.tile.packed = packed;
  if (cols <= kShortRow) plan.warps = cols <= 256 ? 1 : kShortThreads / 32;
  if (cols <= 64) plan.tile.lanes = 8;
  const int64_t most = std::min(kPartBytes, most_shared) / kBytes;
  while (clusters && plan.blocks < kMostCluster && part_of<V>(cols, plan.blocks) > most) plan.blocks *= 2;
  if (part_of<V>(cols, plan.blocks) > (plan.blocks == kMostCluster ? most_shared / kBytes : most)) {
    plan.blocks = static_cast<int>(std::min((cols + kLongPart - 1) / kLongPart, kMostLongParts));
    plan.together = false;
  }
  plan.part = static_cast<int>(part_of<V>(cols, plan.blocks));
  return plan;
}

// The plan for a kernel that sums nothing: as many blocks as there is work for, two tiles for a warp.
template <typename T>
RowPlan elementwise_plan(int64_t rows, int64_t cols, bool packed) {
  constexpr int kPart = 2 * kShortThreads * kPackSize<T>;
  RowPlan plan = row_plan<T>(rows, std::min<int64_t>(cols, kShortRow), packed, false, kPartBytes);
  plan.cols = cols;
  if (cols > kShortRow) {
    plan.blocks = static_cast<int>(std::min<int64_t>((cols + kPart - 1) / kPart, std::numeric_limits<int32_t>::max()));
    plan.part = static_cast<int>(part_of<kPackSize<T>>(cols, plan.blocks));
    plan.together = false;
  }
  return plan;
}

// The sum over the lanes of `mask`, in each of them, by a fixed tree.
__device__ __forceinline__ double sum_of_lanes(double value, int lanes, unsigned mask) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    if (offset < lanes) value += __shfl_xor_sync(mask, value, offset);
  }
  return value;
}

// Number by number: the state of a row as a whole would take up to forty registers at a time.
template <typename State>
__device__ __forceinline__ void copy_state(const State& state, State& copy) {
  const auto* const from = reinterpret_cast<const double*>(&state);
  auto* const to = reinterpret_cast<double*>(&copy);
#pragma unroll 1
  for (size_t k = 0; k < sizeof(State) / sizeof(double); ++k) to[k] = from[k];
}

// A block's part of a row, and this thread's place in it.
template <int V, bool kMayKeep>
struct RowPart {
  const RowPlan& plan;
  int64_t row;
  int64_t begin;  // column
  int count;      // of its columns
  int lane;
  int warp;

  __device__ explicit RowPart(const RowPlan& p) : plan(p) {
    row = static_cast<int64_t>(blockIdx.x) / plan.blocks * blockDim.y + threadIdx.y;
    begin = static_cast<int64_t>(rank()) * plan.part;
    const int64_t left = plan.cols - begin;
    count = left < plan.part ? static_cast<int>(left) : plan.part;  // negative beyond the row's end
    lane = static_cast<int>(threadIdx.x) % plan.tile.lanes;
    warp = static_cast<int>(threadIdx.x) / plan.tile.lanes;
  }

  __device__ int rank() const { return static_cast<int>(blockIdx.x) % plan.blocks; }
  // Where the part begins in vectors [B, N].
  __device__ int64_t start() const { return row * plan.cols + begin; }
  // Whether the whole part has its places in shared memory, not only one tile of each warp.
  __device__ bool keeps() const { return kMayKeep && plan.together; }

  // Waits for the threads of this block that work on this row.
  __device__ void sync() const {
    if (plan.warps == 1) {
      __syncwarp(lanes_mask(plan.tile.lanes));
    } else {
      __syncthreads();
    }
  }

  template <typename Body>
  __device__ __forceinline__ void for_each_tile(const Body& body) const {
    const int whole = plan.tile.lanes * V;
#pragma unroll 1
    for (int first = warp * whole; first < count; first += plan.warps * whole) {
      body(Tile<V>{plan.tile, first, count - first, lane});
    }
  }

  // A tile's place in the first or the second of the vectors in shared memory that the block has for this row; null
  // where none is needed.
  template <typename C>
  __device__ __forceinline__ C* place(const Tile<V>& tile, int vector = 0) const {
    C* const shared = dynamic_shared<C>();
    if (keeps()) return shared + (static_cast<int>(threadIdx.y) * 2 + vector) * plan.part + tile.first;
    const int of_block = static_cast<int>(threadIdx.y) * plan.warps + warp;
    return plan.tile.packed ? nullptr : shared + of_block * plan.tile.lanes * V;
  }

  // This lane's numbers of a coefficient.
  template <typename C>
  __device__ __forceinline__ Pack<C, V> load(const Tile<V>& tile, const Coefficient<C>& c) const {
    const C* const from = c.data + row * c.row_stride;
    if (c.col_stride != 0) return tile.load(from + begin);
    Pack<C, V> same;
#pragma unroll
    for (int k = 0; k < V; ++k) same.v[k] = *from;
    return same;
  }
};

// The kernel of every Work, which has
//
//     Number, Decision              the type of the rows; what is known of a row, alike in all its threads
//     kPhases, kSums                at least two phases; sums of each but the last
//     kKeeps                        whether its passes keep vectors in shared memory where they can
//     begin(row, decision)          the decision at first
//     pass(phase, part, decision, sums), last_pass(part, decision)
//     decide(phase, row, decision, sums)
//     is_over(decision)             only the last pass is left
//     end(row, decision)            writes down what is kept of it
template <typename Work>
__global__ void __launch_bounds__(kMostThreads, 2)
    row_kernel(const __grid_constant__ Work work, const __grid_constant__ RowPlan plan) {
  wait_for_launch_ahead();
  constexpr int kSums = Work::kSums;
  using Decision = typename Work::Decision;
  __shared__ double warp_sums[kSums][kMostWarps];
  __shared__ double block_sums[Work::kPhases - 1][kMostRows][kSums];
  static_assert(!Work::kKeeps ||
                    kPartBytes + sizeof(warp_sums) + sizeof(block_sums) + sizeof(Decision) <= kHalfShared - kReserved,
                "two blocks must fit a multiprocessor");
  const RowPart<kPackSize<typename Work::Number>, Work::kKeeps> part(plan);
  if (part.row >= plan.rows) return;
  Decision& decision = reinterpret_cast<Decision*>(dynamic_shared<char>() + plan.decisions)[threadIdx.y];
  const int lanes = plan.tile.lanes;
  const unsigned mask = lanes_mask(lanes);

  // What launches leave to one another: of each phase the decision that it began with, and each block's sums.
  auto* const left_decisions = reinterpret_cast<Decision*>(plan.sums);
  auto* const left_sums = reinterpret_cast<double*>(left_decisions + (Work::kPhases - 1) * plan.rows);
  const auto left = [&](int phase, int block) {
    return left_sums + ((phase * plan.rows + part.row) * plan.blocks + block) * kSums;
  };

  const auto sync_team = [&] {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (plan.together && plan.blocks > 1) return cooperative_groups::this_cluster().sync();
#endif
    part.sync();
  };

  // The sums of the blocks of this row, lane by lane and then by the tree, and what follows from them.
  const auto decide = [&](int phase) {
    if (part.warp == 0) {
      double sums[kSums] = {};
      for (int block = part.lane; block < plan.blocks; block += lanes) {
        const double* from = &block_sums[phase][threadIdx.y][0];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (plan.together && plan.blocks > 1) from = cooperative_groups::this_cluster().map_shared_rank(from, block);
#endif
        if (!plan.together) from = left(phase, block);
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] += from[k];
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] = sum_of_lanes(sums[k], lanes, mask);
      if (part.lane == 0) work.decide(phase, part.row, decision, sums);
    }
    part.sync();
  };

  if (threadIdx.x == 0) {
    if (plan.phase == 0) {
      work.begin(part.row, decision);
    } else {
      decision = left_decisions[(plan.phase - 1) * plan.rows + part.row];
    }
  }
  part.sync();
#pragma unroll 1
  for (int phase = plan.phase;; ++phase) {
    if (phase > 0) decide(phase - 1);
    if (phase == Work::kPhases - 1 || (plan.together && work.is_over(decision))) break;
    double sums[kSums] = {};
    work.pass(phase, part, decision, sums);
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = sum_of_lanes(sums[k], lanes, mask);
    if (plan.warps > 1) {
      if (part.lane == 0) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) warp_sums[k][part.warp] = sums[k];
      }
      __syncthreads();
      if (part.warp == 0) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
          sums[k] = sum_of_lanes(part.lane < plan.warps ? warp_sums[k][part.lane] : 0.0, 32, mask);
        }
      }
    }
    if (threadIdx.x == 0) {
      double* const to = plan.together ? &block_sums[phase][threadIdx.y][0] : left(phase, part.rank());
#pragma unroll
      for (int k = 0; k < kSums; ++k) to[k] = sums[k];
    }
    if (!plan.together) {
      if (part.rank() == 0 && threadIdx.x == 0) left_decisions[phase * plan.rows + part.row] = decision;
      return;
    }
    sync_team();
  }
  // The next launch may take its place now: it touches no memory before this one is at its end.
  let_next_launch_begin();
  work.last_pass(part, decision);
  if (plan.together) sync_team();  // every block has read the row's state and the sums of the others
  if (part.rank() == 0 && threadIdx.x == 0) work.end(part.row, decision);
}

// The launch of a plan, with so many bytes of shared memory for each row of a block.
inline LaunchShape shape_of(const RowPlan& plan, int64_t shared_bytes) {
  const int threads = plan.warps * plan.tile.lanes;  // for one row
  const int rows_of_block = threads < kShortThreads ? kShortThreads / threads : 1;
  const int64_t groups = (plan.rows + rows_of_block - 1) / rows_of_block;
  const int64_t most = std::numeric_limits<int32_t>::max() / plan.blocks;
  if (groups > most) {
    throw std::runtime_error("imaml_ext: at most " + std::to_string(most * rows_of_block) + " rows on CUDA, got " +
                             std::to_string(plan.rows));
  }
  return {static_cast<unsigned>(groups * plan.blocks), dim3(threads, rows_of_block),
          static_cast<size_t>(rows_of_block * shared_bytes), plan.together ? plan.blocks : 1};
}

// Launches the work by a plan. allocate(bytes) → memory of the device for as long as the op runs.
template <typename Work, typename Allocate>
void launch_rows(cudaStream_t stream, const Work& work, RowPlan plan, const Allocate& allocate) {
  using T = typename Work::Number;
  int64_t places = plan.tile.packed ? 0 : plan.warps * plan.tile.lanes * kPackSize<T>;
  if (plan.together && Work::kKeeps) places = 2 * int64_t{plan.part};
  LaunchShape shape = shape_of(plan, places * static_cast<int64_t>(sizeof(compute_t<T>)));
  constexpr size_t kAlign = alignof(typename Work::Decision);
  plan.decisions = static_cast<int>((shape.shared_bytes + kAlign - 1) / kAlign * kAlign);
  shape.shared_bytes = plan.decisions + shape.block.y * sizeof(typename Work::Decision);
  if (plan.together) return launch<row_kernel<Work>>(stream, shape, work, plan);
  const auto of_row = sizeof(typename Work::Decision) + plan.blocks * Work::kSums * sizeof(double);
  plan.sums = allocate((Work::kPhases - 1) * plan.rows * static_cast<int64_t>(of_row));
  for (plan.phase = 0; plan.phase < Work::kPhases; ++plan.phase) launch<row_kernel<Work>>(stream, shape, work, plan);
}

// Launches the work on the rows of its arguments `a`, which are packed or not.
template <typename Work, typename Arguments>
void launch_rows(OnCuda device, Work work, const Arguments& a, bool packed) {
  work.a = a;
  const KernelFacts& facts = kernel_facts<row_kernel<Work>>();
  const int64_t most_shared = facts.most_shared - static_cast<int64_t>(sizeof(typename Work::Decision));
  const RowPlan plan = row_plan<typename Work::Number>(a.rows, a.cols, packed, facts.clusters, most_shared);
  launch_rows(device.stream, work, plan, a.allocate);
}

}  // namespace imaml_ext
