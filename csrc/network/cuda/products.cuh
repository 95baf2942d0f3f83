// The products of a layer: implicit matrix products, rows of pixels gathered by the taps of a weight.
//
// A block makes a tile of the output of one task, kRows × kCols, in registers of kRowsEach × kColsEach a thread. The
// sum runs over steps: a term, a tap and 64 bytes of channels each. Two buffers of shared memory take turns: the next
// step is on its way from memory while this one is multiplied. Where a task has few rows, kTeams teams of threads share
// the steps of one tile and add up in the order of the teams, so that a block has threads enough to hide its latencies.
//
// The order of every sum depends on the layer and on the number of images, never on the number of tasks.
#pragma once

#include "common/cuda/launch.cuh"
#include "network/cuda/per_task.cuh"

namespace imaml_ext {

template <typename Number, int kTileRows, int kTileCols, int kEachRow, int kEachCol, int kTeamCount>
struct Tile {
  using T = Number;
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr int kRowsEach = kEachRow, kColsEach = kEachCol;
  static constexpr int kTeams = kTeamCount;
  static constexpr int kAcross = kCols / kColsEach;                 // threads of a team along a row
  static constexpr int kTeamThreads = kRows / kRowsEach * kAcross;  // of a team
  static constexpr int kThreads = kTeams * kTeamThreads;
  static constexpr int kQuad = Quad<T>::kSize;
  static constexpr int kDepth = 4 * kQuad;  // of a step
  static constexpr int kRowPitch = kRows + kQuad, kColPitch = kCols + kQuad;

  // One step's operands, depth first.
  struct alignas(16) Buffer {
    T left[kTeams][kDepth][kRowPitch];
    T right[kTeams][kDepth][kColPitch];
  };
  union Shared {
    Buffer buffers[2];
    T sums[kTeams > 1 ? kTeams - 1 : 1][kRowsEach * kColsEach][kTeamThreads];
  };

  static_assert(kRowsEach % kQuad == 0 && kColsEach % kQuad == 0 && sizeof(Shared) <= 48 * 1024);
  static_assert(kRows * 4 % kTeamThreads == 0 && kCols * kDepth % kTeamThreads == 0 && kCols * 4 % kTeamThreads == 0);
};

// Where a thread stands in its block.
template <typename Tile>
struct Place {
  int team, thread;  // of the block, of the team
  int row, col;      // first of the tile that its registers hold

  __device__ Place()
      : team(threadIdx.x / Tile::kTeamThreads),
        thread(threadIdx.x % Tile::kTeamThreads),
        row(thread / Tile::kAcross * Tile::kRowsEach),
        col(thread % Tile::kAcross * Tile::kColsEach) {}
};

template <typename Tile>
using Sums = typename Tile::T[Tile::kRowsEach][Tile::kColsEach];

// sums += leftᵀ right of the team's part of a buffer
template <typename Tile>
__device__ __forceinline__ void multiply_step(const typename Tile::Buffer& buffer, const Place<Tile>& at,
                                              Sums<Tile>& sums) {
  using T = typename Tile::T;
  constexpr int kQuad = Tile::kQuad;
#pragma unroll
  for (int k = 0; k < Tile::kDepth; ++k) {
    T left[Tile::kRowsEach], right[Tile::kColsEach];
#pragma unroll
    for (int i = 0; i < Tile::kRowsEach; i += kQuad) {
      const Quad<T> quad = load_quad(&buffer.left[at.team][k][at.row + i]);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) left[i + v] = quad.v[v];
    }
#pragma unroll
    for (int j = 0; j < Tile::kColsEach; j += kQuad) {
      const Quad<T> quad = load_quad(&buffer.right[at.team][k][at.col + j]);
#pragma unroll
      for (int v = 0; v < kQuad; ++v) right[j + v] = quad.v[v];
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowsEach; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColsEach; ++j) sums[i][j] += left[i] * right[j];
  }
}

// The sums of all teams in those of the first. Every thread of the block must call it.
template <typename Tile>
__device__ __forceinline__ void gather_teams(typename Tile::Shared& shared, const Place<Tile>& at, Sums<Tile>& sums) {
  if constexpr (Tile::kTeams > 1) {
    __syncthreads();  // the buffers have been read
    if (at.team > 0) {
#pragma unroll
      for (int i = 0; i < Tile::kRowsEach; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kColsEach; ++j)
          shared.sums[at.team - 1][i * Tile::kColsEach + j][at.thread] = sums[i][j];
    }
    __syncthreads();
    if (at.team > 0) return;
#pragma unroll
    for (int team = 0; team < Tile::kTeams - 1; ++team)
#pragma unroll
      for (int i = 0; i < Tile::kRowsEach; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kColsEach; ++j) sums[i][j] += shared.sums[team][i * Tile::kColsEach + j][at.thread];
  }
}

// All steps of a tile. A loader has take(), which reads the team's next step from memory into registers (zeros once
// there is none), and put(buffer), which puts it down in shared memory.
template <typename Tile, typename Loader>
__device__ __forceinline__ void multiply_steps(typename Tile::Shared& shared, const Place<Tile>& at, Loader& loader,
                                               int64_t steps, Sums<Tile>& sums) {
  const int64_t rounds = (steps + Tile::kTeams - 1) / Tile::kTeams;
  if (rounds > 0) {
    loader.take();
    loader.put(shared.buffers[0]);
  }
  __syncthreads();
  for (int64_t round = 0; round < rounds; ++round) {
    const bool more = round + 1 < rounds;
    if (more) loader.take();
    multiply_step<Tile>(shared.buffers[round % 2], at, sums);
    if (more) loader.put(shared.buffers[(round + 1) % 2]);
    __syncthreads();
  }
  gather_teams<Tile>(shared, at, sums);
}

// --- out[to] = Σ in[from] · weight[tap], and its adjoint in the rows
// --------------------------------------------------

template <typename T>
struct ProductArguments {
  PerTask<const T> rows[2], weight[2];  // of each term: [S, pixels, from_width]; [taps, depth, channels] of the layer
  PerTask<T> out;                       // [S, pixels, out_width]
  int terms;
  Window down, across;
  int images;
  int from_width, out_width;
  int depth, channels;  // of the product: what a row holds of numbers, and what the result does
  int row_tiles, col_tiles;
};

template <typename Tile, bool kTransposed>
struct ProductLoader {
  using T = typename Tile::T;
  static constexpr int kLeft = Tile::kRows * 4 / Tile::kTeamThreads;              // quads of rows a thread
  static constexpr int kRight = Tile::kCols * Tile::kDepth / Tile::kTeamThreads;  // numbers of a weight a thread

  const ProductArguments<T>& a;
  const Axis &down, &across;
  const int64_t task;
  const Place<Tile>& at;
  const int first_col;
  const int chunks;
  // The next step: channels, tap and term.
  int chunk = 0, tap_down = 0, tap_across = 0, term = 0;
  // Of each row that the thread reads: where its taps begin.
  int image[kLeft], y[kLeft], x[kLeft];
  Quad<T> left[kLeft];
  T right[kRight];

  __device__ ProductLoader(const ProductArguments<T>& arguments, const Axis& vertical, const Axis& horizontal,
                           int64_t of_task, const Place<Tile>& place, int first_row, int column)
      : a(arguments),
        down(vertical),
        across(horizontal),
        task(of_task),
        at(place),
        first_col(column),
        chunks((a.depth + Tile::kDepth - 1) / Tile::kDepth) {
    const int pixels = down.count * across.count;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int row = first_row + (at.thread + i * Tile::kTeamThreads) / 4;
      const int pixel = row % pixels;
      image[i] = row / pixels;
      y[i] = down.from + down.from_step * (pixel / across.count);
      x[i] = across.from + across.from_step * (pixel % across.count);
    }
    advance(at.team);
  }

  __device__ void advance(int steps) {
    chunk += steps;
    while (chunk >= chunks) {
      chunk -= chunks;
      if (++tap_across < across.taps) continue;
      tap_across = 0;
      if (++tap_down < down.taps) continue;
      tap_down = 0;
      ++term;
    }
  }

  __device__ void take() {
    const bool some = term < a.terms;
    // No indexing of the arguments by a variable: that would copy them to local memory.
    const T* const rows = term == 0 ? a.rows[0].of(task) : a.rows[1].of(task);
    const T* const weight = term == 0 ? a.weight[0].of(task) : a.weight[1].of(task);
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int from_y = y[i] + down.from_tap * tap_down, from_x = x[i] + across.from_tap * tap_across;
      const bool inside =
          some && image[i] < a.images && from_y >= 0 && from_y < down.size && from_x >= 0 && from_x < across.size;
      left[i] = Quad<T>{};
      if (inside) {
        const int64_t pixel = (static_cast<int64_t>(image[i]) * down.size + from_y) * across.size + from_x;
        left[i] = load_quad(rows + pixel * a.from_width + chunk * Tile::kDepth + at.thread % 4 * Tile::kQuad);
      }
    }
    const int tap = (down.tap + down.tap_step * tap_down) * a.across.kernel + across.tap + across.tap_step * tap_across;
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      const int k = chunk * Tile::kDepth + depth_of(i), col = first_col + col_of(i);
      right[i] = T(0);
      if (some && k < a.depth && col < a.channels) {
        const int64_t row = static_cast<int64_t>(tap) * (kTransposed ? a.channels : a.depth) + (kTransposed ? col : k);
        right[i] = weight[row * (kTransposed ? a.depth : a.channels) + (kTransposed ? k : col)];
      }
    }
    advance(Tile::kTeams);
  }

  __device__ void put(typename Tile::Buffer& buffer) const {
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int row = (at.thread + i * Tile::kTeamThreads) / 4;
#pragma unroll
      for (int v = 0; v < Tile::kQuad; ++v) buffer.left[at.team][at.thread % 4 * Tile::kQuad + v][row] = left[i].v[v];
    }
#pragma unroll
    for (int i = 0; i < kRight; ++i) buffer.right[at.team][depth_of(i)][col_of(i)] = right[i];
  }

  // Neighbouring threads read neighbours in memory: columns of the weight, or of its transpose the depth.
  __device__ int depth_of(int i) const {
    const int k = at.thread + i * Tile::kTeamThreads;
    return kTransposed ? k % Tile::kDepth : k / Tile::kCols;
  }
  __device__ int col_of(int i) const {
    const int k = at.thread + i * Tile::kTeamThreads;
    return kTransposed ? k / Tile::kDepth : k % Tile::kCols;
  }
};

template <typename Tile, bool kTransposed>
__global__ void __launch_bounds__(Tile::kThreads) product_kernel(ProductArguments<typename Tile::T> a) {
  wait_for_launch_ahead();
  using T = typename Tile::T;
  __shared__ typename Tile::Shared shared;
  const Place<Tile> at;
  int tile = blockIdx.x;
  const int col_tile = tile % a.col_tiles;
  tile /= a.col_tiles;
  const int row_tile = tile % a.row_tiles;
  tile /= a.row_tiles;
  Axis down, across;
  if constexpr (kTransposed) {
    across = a.across.backward(tile % a.across.stride);
    tile /= a.across.stride;
    down = a.down.backward(tile % a.down.stride);
    tile /= a.down.stride;
  } else {
    across = a.across.forward();
    down = a.down.forward();
  }
  const int64_t task = tile;
  const int pixels = down.count * across.count;
  const int rows = a.images * pixels;
  const int first_row = row_tile * Tile::kRows, first_col = col_tile * Tile::kCols;
  if (first_row >= rows) return;  // a class of pixels with fewer of them

  Sums<Tile> sums = {};
  ProductLoader<Tile, kTransposed> loader(a, down, across, task, at, first_row, first_col);
  const int64_t steps = static_cast<int64_t>(a.terms) * down.taps * across.taps * loader.chunks;
  multiply_steps<Tile>(shared, at, loader, steps, sums);
  if (at.team > 0) return;

  T* const out = a.out.of(task);
  const int to_width = kTransposed ? a.across.size : a.across.count;
  const int to_height = kTransposed ? a.down.size : a.down.count;
#pragma unroll
  for (int i = 0; i < Tile::kRowsEach; ++i) {
    const int row = first_row + at.row + i;
    if (row >= rows) break;
    const int pixel = row % pixels;
    const int64_t y = down.to + down.to_step * (pixel / across.count);
    const int64_t x = across.to + across.to_step * (pixel % across.count);
    T* const to = out + ((row / pixels * to_height + y) * to_width + x) * a.out_width + first_col + at.col;
#pragma unroll
    for (int j = 0; j < Tile::kColsEach; j += Tile::kQuad) {
      if (first_col + at.col + j >= a.out_width) break;
      Quad<T> quad;
#pragma unroll
      for (int v = 0; v < Tile::kQuad; ++v) quad.v[v] = sums[i][j + v];
      store_quad(to + j, quad);
    }
  }
}

// --- weight_bar[tap] = Σ in[from]ᵀ out_bar[to]
// -------------------------------------------------------------------------

template <typename T>
struct OuterArguments {
  PerTask<const T> in[2], out_bar[2];  // of each pair: [S, pixels_in, depth_width], [S, pixels, width]
  PerTask<T> weight_bar;               // [slices, taps, depth, channels]
  int pairs;
  Window down, across;
  int images;
  int depth, channels, depth_width, width;
  int rows_a_slice;  // of the images' pixels; a multiple of every step
  int row_tiles, col_tiles, slices;
};

template <typename Tile>
struct OuterLoader {
  using T = typename Tile::T;
  static constexpr int kLeftQuads = Tile::kRows / Tile::kQuad, kRightQuads = Tile::kCols / Tile::kQuad;
  static constexpr int kLeft = kLeftQuads * Tile::kDepth / Tile::kTeamThreads;
  static constexpr int kRight = kRightQuads * Tile::kDepth / Tile::kTeamThreads;

  const OuterArguments<T>& a;
  const int64_t task;
  const Place<Tile>& at;
  const int first_row, first_col;
  const int begin, end;  // pixels of the slice
  const int chunks;
  int chunk, pair = 0;
  Quad<T> left[kLeft], right[kRight];

  __device__ OuterLoader(const OuterArguments<T>& arguments, int64_t of_task, const Place<Tile>& place, int row,
                         int column, int slice)
      : a(arguments),
        task(of_task),
        at(place),
        first_row(row),
        first_col(column),
        begin(slice * a.rows_a_slice),
        end(smaller(begin + a.rows_a_slice, a.images * a.down.count * a.across.count)),
        chunks((end - begin + Tile::kDepth - 1) / Tile::kDepth),
        chunk(at.team) {}

  __device__ void take() {
    while (chunk >= chunks) chunk -= chunks, ++pair;
    const bool some = pair < a.pairs;
    const T* const in = pair == 0 ? a.in[0].of(task) : a.in[1].of(task);
    const T* const out_bar = pair == 0 ? a.out_bar[0].of(task) : a.out_bar[1].of(task);
    const int start = begin + chunk * Tile::kDepth;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int k = at.thread + i * Tile::kTeamThreads;
      const int column = first_row + k % kLeftQuads * Tile::kQuad;  // of [taps, depth_width]
      const int tap = column / a.depth_width;
      const int row = start + k / kLeftQuads;
      const int pixels = a.down.count * a.across.count;
      const int pixel = row % pixels;
      const int y = a.down.stride * (pixel / a.across.count) + tap / a.across.kernel - a.down.padding;
      const int x = a.across.stride * (pixel % a.across.count) + tap % a.across.kernel - a.across.padding;
      left[i] = Quad<T>{};
      if (some && row < end && tap < a.down.kernel * a.across.kernel && y >= 0 && y < a.down.size && x >= 0 &&
          x < a.across.size) {
        const int64_t from = (static_cast<int64_t>(row / pixels) * a.down.size + y) * a.across.size + x;
        left[i] = load_quad(in + from * a.depth_width + column % a.depth_width);
      }
    }
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      const int k = at.thread + i * Tile::kTeamThreads;
      const int column = first_col + k % kRightQuads * Tile::kQuad;
      const int row = start + k / kRightQuads;
      right[i] = Quad<T>{};
      if (some && row < end && column < a.width) {
        right[i] = load_quad(out_bar + static_cast<int64_t>(row) * a.width + column);
      }
    }
    chunk += Tile::kTeams;
  }

  __device__ void put(typename Tile::Buffer& buffer) const {
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int k = at.thread + i * Tile::kTeamThreads;
      store_quad(&buffer.left[at.team][k / kLeftQuads][k % kLeftQuads * Tile::kQuad], left[i]);
    }
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      const int k = at.thread + i * Tile::kTeamThreads;
      store_quad(&buffer.right[at.team][k / kRightQuads][k % kRightQuads * Tile::kQuad], right[i]);
    }
  }
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) outer_kernel(OuterArguments<typename Tile::T> a) {
  wait_for_launch_ahead();
  using T = typename Tile::T;
  __shared__ typename Tile::Shared shared;
  const Place<Tile> at;
  int tile = blockIdx.x;
  const int first_col = tile % a.col_tiles * Tile::kCols;
  tile /= a.col_tiles;
  const int first_row = tile % a.row_tiles * Tile::kRows;
  tile /= a.row_tiles;
  const int slice = tile % a.slices;
  const int64_t task = tile / a.slices;

  Sums<Tile> sums = {};
  OuterLoader<Tile> loader(a, task, at, first_row, first_col, slice);
  multiply_steps<Tile>(shared, at, loader, static_cast<int64_t>(a.pairs) * loader.chunks, sums);
  if (at.team > 0) return;

  const int taps = a.down.kernel * a.across.kernel;
  T* const out = a.weight_bar.of(task) + static_cast<int64_t>(slice) * taps * a.depth * a.channels;
#pragma unroll
  for (int i = 0; i < Tile::kRowsEach; ++i) {
    const int row = first_row + at.row + i;
    const int tap = row / a.depth_width, depth = row % a.depth_width;
    if (tap >= taps || depth >= a.depth) continue;
#pragma unroll
    for (int j = 0; j < Tile::kColsEach; ++j) {
      const int col = first_col + at.col + j;
      if (col < a.channels) out[(static_cast<int64_t>(tap) * a.depth + depth) * a.channels + col] = sums[i][j];
    }
  }
}

constexpr int kElementThreads = 256;

// weight_bar = Σ_slices, in their order
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    add_slices_kernel(PerTask<const T> slices, int count, PerTask<T> weight_bar, int64_t size, int blocks) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x / blocks;
  const int64_t k = static_cast<int64_t>(blockIdx.x % blocks) * kElementThreads + threadIdx.x;
  if (k >= size) return;
  T sum = slices.of(task)[k];
  for (int slice = 1; slice < count; ++slice) sum += slices.of(task)[slice * size + k];
  weight_bar.of(task)[k] = sum;
}

// --- launches --------------------------------------------------------------------------------------------------------

// Large tiles where a task has the rows to fill them; teams where it has not.
template <typename T>
struct Tiles {
  static constexpr bool kWide = sizeof(T) > 4;  // float64: half the rows fit in the registers
  using Large = Tile<T, kWide ? 64 : 128, 64, kWide ? 4 : 8, 4, 1>;
  using Tall = Tile<T, kWide ? 64 : 128, 32, kWide ? 4 : 8, 4, 2>;
  using Small = Tile<T, 32, 32, 4, 4, 4>;
  using Square = Tile<T, 64, 64, 4, 4, 1>;  // of weights
};
constexpr int64_t kManyRows = 512;

// The way that out[to] = Σ in[from] · weight[tap] goes, or its adjoint.
template <bool kTransposed, typename T>
void launch_product(cudaStream_t stream, ProductArguments<T> a, int64_t tasks) {
  const auto with = [&]<typename Tile>(std::type_identity<Tile>) {
    const int64_t classes = kTransposed ? static_cast<int64_t>(a.down.stride) * a.across.stride : 1;
    const Axis down = kTransposed ? a.down.backward(0) : a.down.forward();  // the class of most pixels
    const Axis across = kTransposed ? a.across.backward(0) : a.across.forward();
    a.row_tiles = static_cast<int>(ceil_div(static_cast<int64_t>(a.images) * down.count * across.count, Tile::kRows));
    a.col_tiles = static_cast<int>(ceil_div(a.out_width, Tile::kCols));
    launch<product_kernel<Tile, kTransposed>>(stream,
                                              {grid_of(classes * a.row_tiles * a.col_tiles, tasks), Tile::kThreads}, a);
  };
  const Axis down = kTransposed ? a.down.backward(0) : a.down.forward();
  const Axis across = kTransposed ? a.across.backward(0) : a.across.forward();
  if (static_cast<int64_t>(a.images) * down.count * across.count < kManyRows) {
    with(std::type_identity<typename Tiles<T>::Small>{});
  } else if (a.out_width <= 32) {
    with(std::type_identity<typename Tiles<T>::Tall>{});
  } else {
    with(std::type_identity<typename Tiles<T>::Large>{});
  }
}

// The rows of a task that one block of an outer product sums over: fewer where the weight makes few tiles.
inline int64_t rows_a_slice(const Layer& layer) {
  constexpr int64_t kManyWeights = 16384;
  const int64_t weights = layer.taps * layer.depth * layer.channels;
  return weights < kManyWeights ? 256 : 2048;
}
inline int64_t slices_of(const Layer& layer, int64_t images) {
  return ceil_div(images * layer.pixels(), rows_a_slice(layer));
}
// Numbers that the sums of slices take, a task.
inline int64_t slices_size(const Layer& layer, int64_t images) {
  const int64_t slices = slices_of(layer, images);
  return slices == 1 ? 0 : slices * layer.taps * layer.depth * layer.channels;
}

// `partial` has room for slices_size.
template <typename T>
void launch_outer(cudaStream_t stream, OuterArguments<T> a, PerTask<T> weight_bar, PerTask<T> partial, int64_t tasks) {
  a.weight_bar = a.slices == 1 ? weight_bar : partial;
  const int64_t taps = static_cast<int64_t>(a.down.kernel) * a.across.kernel;
  const auto with = [&]<typename Tile>(std::type_identity<Tile>) {
    a.row_tiles = static_cast<int>(ceil_div(taps * a.depth_width, Tile::kRows));
    a.col_tiles = static_cast<int>(ceil_div(a.width, Tile::kCols));
    const int64_t tiles = static_cast<int64_t>(a.row_tiles) * a.col_tiles * a.slices;
    launch<outer_kernel<Tile>>(stream, {grid_of(tiles, tasks), Tile::kThreads}, a);
  };
  if (a.width <= 32 || taps * a.depth_width < 256) {
    with(std::type_identity<typename Tiles<T>::Small>{});
  } else {
    with(std::type_identity<typename Tiles<T>::Square>{});
  }
  if (a.slices == 1) return;
  const int64_t size = taps * a.depth * a.channels;
  const int64_t blocks = ceil_div(size, kElementThreads);
  launch<add_slices_kernel<T>>(stream, {grid_of(blocks, tasks), kElementThreads}, PerTask<const T>(partial), a.slices,
                               weight_bar, size, static_cast<int>(blocks));
}

}  // namespace imaml_ext
