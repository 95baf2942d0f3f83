// The products of a layer: implicit matrix products, rows of pixels gathered by the taps of a weight.
//
// A block makes a tile of the output of one task, kRows × kCols, in registers, kRowsEach × kColsEach per thread. The
// sum runs over steps: a term, a tap and 64 bytes of channels each. Copies of the next steps are on their way to shared
// memory (cp.async, kStages buffers in turn) while one is multiplied. Where a task has few rows, kTeams teams of
// threads share the steps of one tile and are added up in the order of the teams, so that a block has threads enough to
// hide its latencies.
//
// What follows on a product is in the same launch where it can be: β and activation of a layer without a batch norm,
// and the norm of a layer of which one block has all rows. So are the two products that the way back has of a layer.
//
// The order of every sum depends on the layer and on the number of images, never on the number of tasks.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "common/cuda/launch.cuh"
#include "network/cuda/norm.cuh"
#include "network/cuda/parameters.cuh"
#include "network/cuda/per_task.cuh"

namespace imaml_ext {

template <typename Number, int kTileRows, int kTileCols, int kEachRow, int kEachCol, int kTeamCount, int kStageCount>
struct Tile {
  using T = Number;
  static constexpr int kRows = kTileRows, kCols = kTileCols;
  static constexpr int kRowsEach = kEachRow, kColsEach = kEachCol;
  static constexpr int kTeams = kTeamCount, kStages = kStageCount;
  static constexpr int kDown = kRows / kRowsEach, kAcross = kCols / kColsEach;  // threads of a team
  static constexpr int kTeamThreads = kDown * kAcross;
  static constexpr int kThreads = kTeams * kTeamThreads;
  static constexpr int kBlocks = 512 / kThreads;  // of a multiprocessor, which leaves 128 registers to a thread
  static constexpr int kQuad = Quad<T>::kSize;
  static constexpr int kDepth = 4 * kQuad;  // of a step
  static constexpr int kPitch = kCols + kQuad;
  static constexpr bool kHoldsNorm = kCols == kGroup;  // a block has channels enough for a NormBlock, and no more

  // A team's operands of one step: rows of the left one as they lie in memory, [kRows][kDepth] (product) or
  // [kDepth][kRows] (outer); of the right one [kDepth][kPitch].
  struct alignas(16) Stage {
    T left[kRows * kDepth];
    T right[kDepth * kPitch];
  };
  union Shared {
    Stage stages[kStages][kTeams];
    T sums[kTeams][kRows * kCols];
  };

  static_assert(kTeamThreads % 32 == 0 && kDown % 8 == 0 && kRowsEach % kQuad == 0 && kColsEach % kQuad == 0);
  static_assert(kRows * 4 % kTeamThreads == 0 && kTeamThreads % kCols == 0 && kTeamThreads % kDepth == 0);
  static_assert(sizeof(Shared) <= 60 * 1024, "beside a NormBlock's, what a block can have on every card since Turing");
};

// Copies that go on while the thread does; zeros in place of what there is not.
template <typename T>
__device__ __forceinline__ void copy_quad(T* to, const T* from, bool some) {
  __pipeline_memcpy_async(to, from, 16, some ? 0 : 16);
}
template <typename T>
__device__ __forceinline__ void copy_number(T* to, const T* from, bool some) {
  __pipeline_memcpy_async(to, from, sizeof(T), some ? 0 : sizeof(T));
}

// Where a thread stands in its block, and which numbers of the tile its registers hold. Those of neighbouring threads
// are interleaved, so that a warp's reads of shared memory meet no bank twice.
template <typename Tile>
struct Place {
  int team, thread, down, across;

  __device__ Place()
      : team(static_cast<int>(threadIdx.x) / Tile::kTeamThreads),
        thread(static_cast<int>(threadIdx.x) % Tile::kTeamThreads),
        down(thread / Tile::kAcross),
        across(thread % Tile::kAcross) {}

  // Of the i-th row one by one, or as quads; of the j-th column as quads.
  __device__ __forceinline__ int row(int i) const { return down + i * Tile::kDown; }
  __device__ __forceinline__ int row_of_quads(int i) const {
    constexpr int kQuad = Tile::kQuad;
    return (down + i / kQuad * Tile::kDown) * kQuad + i % kQuad;
  }
  __device__ __forceinline__ int col(int j) const {
    constexpr int kQuad = Tile::kQuad;
    return (across + j / kQuad * Tile::kAcross) * kQuad + j % kQuad;
  }
};

// Rows of 64 bytes, four quads each, which are shuffled so that eight neighbouring rows' quads of one depth lie in
// different banks.
__device__ __forceinline__ int shuffled(int row, int quad) { return quad ^ (row >> 1 & 3); }

template <typename Tile>
using Sums = typename Tile::T[Tile::kRowsEach][Tile::kColsEach];

// sums += left right of a step, left [kRows][kDepth] with its quads shuffled (kByRow), or leftᵀ right, left
// [kDepth][kRows]
template <bool kByRow, typename Tile>
__device__ __forceinline__ void multiply_step(const typename Tile::Stage& stage, const Place<Tile>& at,
                                              Sums<Tile>& sums) {
  using T = typename Tile::T;
  constexpr int kQuad = Tile::kQuad;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    Quad<T> by_row[Tile::kRowsEach];
    if constexpr (kByRow) {
      // kDown is a multiple of eight: the rows of a thread are shuffled alike.
      const T* const from = stage.left + at.down * Tile::kDepth + shuffled(at.down, part) * kQuad;
#pragma unroll
      for (int i = 0; i < Tile::kRowsEach; ++i) by_row[i] = load_quad(from + i * Tile::kDown * Tile::kDepth);
    }
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      const int k = part * kQuad + v;
      T left[Tile::kRowsEach], right[Tile::kColsEach];
#pragma unroll
      for (int i = 0; i < Tile::kRowsEach; i += kQuad) {
        Quad<T> quad;
        if constexpr (!kByRow) quad = load_quad(stage.left + k * Tile::kRows + at.row_of_quads(i));
#pragma unroll
        for (int u = 0; u < kQuad; ++u) left[i + u] = kByRow ? by_row[i + u].v[v] : quad.v[u];
      }
#pragma unroll
      for (int j = 0; j < Tile::kColsEach; j += kQuad) {
        const Quad<T> quad = load_quad(stage.right + k * Tile::kPitch + at.col(j));
#pragma unroll
        for (int u = 0; u < kQuad; ++u) right[j + u] = quad.v[u];
      }
#pragma unroll
      for (int i = 0; i < Tile::kRowsEach; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kColsEach; ++j) sums[i][j] += left[i] * right[j];
    }
  }
}

// All steps of a tile. loader.copy(stage) begins the copies of the team's next step; the teams take the steps in turn.
template <bool kByRow, typename Tile, typename Loader>
__device__ __forceinline__ void multiply_steps(typename Tile::Shared& shared, const Place<Tile>& at, Loader& loader,
                                               int steps, Sums<Tile>& sums) {
  constexpr int kAhead = Tile::kStages - 1;
  const int rounds = (steps + Tile::kTeams - 1) / Tile::kTeams;
  int step = at.team, to_copy = at.team;  // of the next product, and of the next copies
  int stage = 0, stage_to_copy = 0;
  const auto copy = [&] {
    if (to_copy < steps) loader.copy(shared.stages[stage_to_copy][at.team]);
    __pipeline_commit();
    to_copy += Tile::kTeams;
    stage_to_copy = stage_to_copy + 1 == Tile::kStages ? 0 : stage_to_copy + 1;
  };
  for (int ahead = 0; ahead < kAhead; ++ahead) copy();
  for (int round = 0; round < rounds; ++round) {
    __pipeline_wait_prior(kAhead - 1);
    __syncthreads();  // everybody's copies are there, and the stage of the last round has been read
    copy();
    if (step < steps) multiply_step<kByRow, Tile>(shared.stages[stage][at.team], at, sums);
    step += Tile::kTeams;
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
}

// The sums of every team side by side in shared memory. Every thread of the block must call it.
template <bool kByRow, typename Tile>
__device__ __forceinline__ void lay_down(typename Tile::Shared& shared, const Place<Tile>& at, const Sums<Tile>& sums) {
  using T = typename Tile::T;
  constexpr int kQuad = Tile::kQuad;
  __syncthreads();  // the stages have been read
#pragma unroll
  for (int i = 0; i < Tile::kRowsEach; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColsEach; j += kQuad) {
      Quad<T> quad;
#pragma unroll
      for (int u = 0; u < kQuad; ++u) quad.v[u] = sums[i][j + u];
      const int row = kByRow ? at.row(i) : at.row_of_quads(i);
      *reinterpret_cast<Quad<T>*>(&shared.sums[at.team][row * Tile::kCols + at.col(j)]) = quad;
    }
  __syncthreads();
}

constexpr int kFusedRows = 128;  // of a task that the norm after a product in the same launch can have

// --- out[to] = Σ in[from] · weight[tap], and its adjoint in the rows ------------------------------------------------

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
  int classes;  // that a block takes one after another: all of them or, in an adjoint, one
  // Pixels along an axis: those of the largest class, or one less.
  Divisor rows_of_most, rows_of_fewer, cols_of_most, cols_of_fewer;

  // Without a batch norm: β, or β̇, and the activation in a matrix of its own, or its derivative from `act`.
  PerTask<const T> beta, act;
  PerTask<T> activated;
  Activation activation;
};

// Which pixel of which image a row of a product is.
struct Pixel {
  int image, y, x;

  __device__ __forceinline__ Pixel(int row, const Divisor& rows, const Divisor& cols) : image(row) {
    x = cols.split(image);
    y = rows.split(image);
  }
};

template <typename Tile, bool kTransposed>
struct ProductLoader {
  using T = typename Tile::T;
  static constexpr int kLeft = Tile::kRows * 4 / Tile::kTeamThreads;              // quads of rows per thread
  static constexpr int kRight = Tile::kCols * Tile::kDepth / Tile::kTeamThreads;  // numbers of a weight per thread
  // Neighbouring threads read neighbours in memory: columns of the weight, or of its transpose the depth.
  static constexpr int kFast = kTransposed ? Tile::kDepth : Tile::kCols;
  static constexpr int kSlow = Tile::kTeamThreads / kFast;

  const ProductArguments<T>& a;
  const Axis &down, &across;
  const int64_t task;
  const int first_col, quad, chunks, fast, slow;
  const int left, right;   // first place in a stage
  const T *rows, *weight;  // of the term
  // The next step: channels and tap.
  int chunk = 0, tap_down = 0, tap_across = 0;
  // Of each row that the thread copies: where its taps begin; y is out of reach where there is no such row.
  int y[kLeft], x[kLeft], pixel[kLeft];

  __device__ ProductLoader(const ProductArguments<T>& arguments, const Axis& vertical, const Axis& horizontal,
                           const Divisor& of_rows, const Divisor& of_cols, int64_t of_task, const Place<Tile>& at,
                           int first_row, int column)
      : a(arguments),
        down(vertical),
        across(horizontal),
        task(of_task),
        first_col(column),
        quad(at.thread % 4 * Tile::kQuad),
        chunks((a.depth + Tile::kDepth - 1) / Tile::kDepth),
        fast(at.thread % kFast),
        slow(at.thread / kFast),
        left(at.thread / 4 * Tile::kDepth + shuffled(at.thread / 4, at.thread % 4) * Tile::kQuad),
        right(kTransposed ? fast * Tile::kPitch + slow : slow * Tile::kPitch + fast) {
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const Pixel of_row(first_row + (at.thread + i * Tile::kTeamThreads) / 4, of_rows, of_cols);
      y[i] = down.from + down.from_step * of_row.y;
      x[i] = across.from + across.from_step * of_row.x;
      pixel[i] = (of_row.image * down.size + y[i]) * across.size + x[i];
      if (of_row.image >= a.images) y[i] = -(1 << 30);
    }
    rows = a.rows[0].of(task), weight = a.weight[0].of(task);
    advance(at.team);
  }

  __device__ __forceinline__ void advance(int steps) {
    chunk += steps;
    while (chunk >= chunks) {
      chunk -= chunks;
      if (++tap_across < across.taps) continue;
      tap_across = 0;
      if (++tap_down < down.taps) continue;
      tap_down = 0;
      rows = a.rows[1].of(task), weight = a.weight[1].of(task);
    }
  }

  // Addresses of what is not copied may lie anywhere: they are not read.
  __device__ __forceinline__ void copy(typename Tile::Stage& stage) {
    const int by_y = down.from_tap * tap_down, by_x = across.from_tap * tap_across;
    const int by = by_y * across.size + by_x;
    const int begin = chunk * Tile::kDepth;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const bool inside = static_cast<unsigned>(y[i] + by_y) < static_cast<unsigned>(down.size) &&
                          static_cast<unsigned>(x[i] + by_x) < static_cast<unsigned>(across.size);
      copy_quad(stage.left + left + i * Tile::kTeamThreads / 4 * Tile::kDepth,
                rows + ((pixel[i] + by) * a.from_width + begin + quad), inside);
    }
    const int tap = (down.tap + down.tap_step * tap_down) * a.across.kernel + across.tap + across.tap_step * tap_across;
    const int k = begin + (kTransposed ? fast : slow), col = first_col + (kTransposed ? slow : fast);
    const T* from =
        weight + (kTransposed ? (tap * a.channels + col) * a.depth + k : (tap * a.depth + k) * a.channels + col);
    const bool some = kTransposed ? k < a.depth : col < a.channels;
    const int most = kTransposed ? a.channels - col : a.depth - k;
    const int64_t apart = kSlow * (kTransposed ? a.depth : a.channels);
#pragma unroll
    for (int i = 0; i < kRight; ++i, from += apart) {
      copy_number(stage.right + right + i * kSlow * (kTransposed ? 1 : Tile::kPitch), from, some && i * kSlow < most);
    }
    advance(Tile::kTeams);
  }
};

// One tile of a product, by `block` of those that the launch has for it, and the norm that follows it.
template <bool kTransposed, typename Tile>
__device__ __forceinline__ void product_block(const ProductArguments<typename Tile::T>& a, int block,
                                              typename Tile::Shared& shared, const NormRows<typename Tile::T>& n,
                                              NormWay way) {
  using T = typename Tile::T;
  constexpr int kQuad = Tile::kQuad;
  const Place<Tile> at;
  const int col_tile = block % a.col_tiles;
  block /= a.col_tiles;
  const int row_tile = block % a.row_tiles;
  block /= a.row_tiles;
  int first_class = 0;
  if constexpr (kTransposed) {
    const int groups = a.down.stride * a.across.stride / a.classes;
    first_class = block % groups * a.classes;
    block /= groups;
  }
  const int64_t task = block;
  const int first_row = row_tile * Tile::kRows, first_col = col_tile * Tile::kCols;

  for (int c = first_class; c < first_class + a.classes; ++c) {
    Axis down, across;
    if constexpr (kTransposed) {
      across = a.across.backward(c % a.across.stride);
      down = a.down.backward(c / a.across.stride);
    } else {
      across = a.across.forward();
      down = a.down.forward();
    }
    const int rows = a.images * down.count * across.count;
    if (first_row >= rows) continue;  // a class of pixels with fewer of them
    const Divisor of_rows = down.count == a.rows_of_most.by ? a.rows_of_most : a.rows_of_fewer;
    const Divisor of_cols = across.count == a.cols_of_most.by ? a.cols_of_most : a.cols_of_fewer;
    if (c > first_class) __syncthreads();  // the last sums have been read
    {
      Sums<Tile> sums = {};
      ProductLoader<Tile, kTransposed> loader(a, down, across, of_rows, of_cols, task, at, first_row, first_col);
      multiply_steps<true>(shared, at, loader, a.terms * down.taps * across.taps * loader.chunks, sums);
      lay_down<true>(shared, at, sums);
    }
    if (way == NormWay::kNone) let_next_launch_begin();

    const int to_width = kTransposed ? a.across.size : a.across.count;
    const int to_height = kTransposed ? a.down.size : a.down.count;
    constexpr int kQuads = Tile::kCols / kQuad;
#pragma unroll 1
    for (int q = threadIdx.x; q < Tile::kRows * kQuads; q += Tile::kThreads) {
      const int row = first_row + q / kQuads, col = first_col + q % kQuads * kQuad;
      if (row >= rows || col >= a.out_width) continue;
      Quad<T> sum = load_quad(&shared.sums[0][q * kQuad]);
#pragma unroll
      for (int team = 1; team < Tile::kTeams; ++team) {
        const Quad<T> more = load_quad(&shared.sums[team][q * kQuad]);
#pragma unroll
        for (int u = 0; u < kQuad; ++u) sum.v[u] += more.v[u];
      }
      const Pixel of_row(row, of_rows, of_cols);
      const int y = down.to + down.to_step * of_row.y, x = across.to + across.to_step * of_row.x;
      const int to = ((of_row.image * to_height + y) * to_width + x) * a.out_width + col;
      if constexpr (!kTransposed) {
        if (a.beta.first != nullptr) {
#pragma unroll
          for (int u = 0; u < kQuad; ++u)
            if (col + u < a.channels) sum.v[u] += a.beta.of(task)[col + u];
        }
      }
      store_quad(a.out.of(task) + to, sum);
      if constexpr (!kTransposed) {
        if (a.activated.first != nullptr) {
#pragma unroll
          for (int u = 0; u < kQuad; ++u) {
            sum.v[u] = a.act.first == nullptr ? activated(a.activation, sum.v[u])
                                              : through(a.activation, a.act.of(task)[to + u], sum.v[u]);
          }
          store_quad(a.activated.of(task) + to, sum);
        }
      }
    }
  }

  if constexpr (Tile::kHoldsNorm) {
    if (way == NormWay::kNone) return;
    __syncthreads();  // the block reads what it has written
    using Norm = NormBlock<T, kFusedRows * kGroup / Tile::kThreads, Tile::kThreads>;
    __shared__ typename Norm::Shared of_norm;
    const Norm norm(n, NormPhase::kWhole, of_norm, task, col_tile, 0);
    if constexpr (kTransposed) {
      norm.back(way);
    } else {
      way == NormWay::kForward ? norm.forward() : norm.tangent();
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    product_kernel(ProductArguments<typename Tile::T> a, NormRows<typename Tile::T> n, NormWay way) {
  wait_for_launch_ahead();
  product_block<false, Tile>(a, blockIdx.x, *dynamic_shared<typename Tile::Shared>(), n, way);
}

// --- weight_bar[tap] = Σ in[from]ᵀ out_bar[to]
// ------------------------------------------------------------------------

template <typename T>
struct OuterArguments {
  PerTask<const T> in[2], out_bar[2];  // of each pair: [S, pixels_in, depth_width], [S, pixels, width]
  ParametersOut<T> weight_bar;         // [slices, taps, depth, channels]
  int pairs;
  Window down, across;
  int taps, total;  // of the weight; rows: the images' pixels
  int depth, channels, width;
  Divisor by_depth_width, by_kernel, by_rows, by_cols;
  int rows_per_slice;  // a multiple of every step
  int row_tiles, col_tiles, slices;
};

template <typename Tile>
struct OuterLoader {
  using T = typename Tile::T;
  // Eight or sixteen neighbouring threads read a row together, where it has as many quads.
  template <int kNumbers>
  struct Part {
    static constexpr int kQuads = kNumbers / Tile::kQuad;
    static constexpr int kFast = std::max(std::min(kQuads, 8), Tile::kTeamThreads / Tile::kDepth);
    static constexpr int kSlow = Tile::kTeamThreads / kFast;
    static constexpr int kCols = kQuads / kFast, kRows = Tile::kDepth / kSlow;
    static_assert(kQuads % kFast == 0 && Tile::kDepth % kSlow == 0);
  };
  using Left = Part<Tile::kRows>;
  using Right = Part<Tile::kCols>;

  const OuterArguments<T>& a;
  const int64_t task;
  const int thread, first_col;
  const int begin, end;  // rows of the slice
  const int chunks;
  const T *in, *out_bar;  // of the pair
  int chunk;
  // Of each column of [taps, depth_width] that the thread copies: how far its tap reaches; the channel, negative where
  // there is no such tap.
  int by_y[Left::kCols], by_x[Left::kCols], channel[Left::kCols];

  __device__ OuterLoader(const OuterArguments<T>& arguments, int64_t of_task, const Place<Tile>& at, int first_row,
                         int column, int slice)
      : a(arguments),
        task(of_task),
        thread(at.thread),
        first_col(column),
        begin(slice * a.rows_per_slice),
        end(smaller(begin + a.rows_per_slice, a.total)),
        chunks((end - begin + Tile::kDepth - 1) / Tile::kDepth),
        in(a.in[0].of(task)),
        out_bar(a.out_bar[0].of(task)),
        chunk(at.team) {
#pragma unroll
    for (int j = 0; j < Left::kCols; ++j) {
      int tap = first_row + (thread % Left::kFast + j * Left::kFast) * Tile::kQuad;
      channel[j] = a.by_depth_width.split(tap);
      if (tap >= a.taps) channel[j] = -Tile::kQuad;
      by_x[j] = a.by_kernel.split(tap) - a.across.padding;
      by_y[j] = tap - a.down.padding;
    }
  }

  __device__ __forceinline__ void copy(typename Tile::Stage& stage) {
    for (; chunk >= chunks; chunk -= chunks) in = a.in[1].of(task), out_bar = a.out_bar[1].of(task);
    const int start = begin + chunk * Tile::kDepth;
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const int k = thread / Left::kFast + i * Left::kSlow;
      const int row = start + k;
      const Pixel to(row, a.by_rows, a.by_cols);
      const int y = a.down.stride * to.y, x = a.across.stride * to.x;
#pragma unroll
      for (int j = 0; j < Left::kCols; ++j) {
        const int from_y = y + by_y[j], from_x = x + by_x[j];
        const bool inside = row < end && channel[j] >= 0 &&
                            static_cast<unsigned>(from_y) < static_cast<unsigned>(a.down.size) &&
                            static_cast<unsigned>(from_x) < static_cast<unsigned>(a.across.size);
        const int from =
            ((to.image * a.down.size + from_y) * a.across.size + from_x) * a.by_depth_width.by + channel[j];
        const int column = (thread % Left::kFast + j * Left::kFast) * Tile::kQuad;
        copy_quad(stage.left + k * Tile::kRows + column, in + from, inside);
      }
    }
#pragma unroll
    for (int i = 0; i < Right::kRows; ++i) {
      const int k = thread / Right::kFast + i * Right::kSlow;
      const int row = start + k;
#pragma unroll
      for (int j = 0; j < Right::kCols; ++j) {
        const int column = (thread % Right::kFast + j * Right::kFast) * Tile::kQuad;
        const bool inside = row < end && first_col + column < a.width;
        copy_quad(stage.right + k * Tile::kPitch + column, out_bar + (row * a.width + first_col + column), inside);
      }
    }
    chunk += Tile::kTeams;
  }
};

template <typename Tile>
__device__ __forceinline__ void outer_block(const OuterArguments<typename Tile::T>& a, int block,
                                            typename Tile::Shared& shared) {
  using T = typename Tile::T;
  const Place<Tile> at;
  const int first_col = block % a.col_tiles * Tile::kCols;
  block /= a.col_tiles;
  const int first_row = block % a.row_tiles * Tile::kRows;
  block /= a.row_tiles;
  const int slice = block % a.slices;
  const int64_t task = block / a.slices;
  {
    Sums<Tile> sums = {};
    OuterLoader<Tile> loader(a, task, at, first_row, first_col, slice);
    multiply_steps<false>(shared, at, loader, a.pairs * loader.chunks, sums);
    lay_down<false>(shared, at, sums);
  }
  let_next_launch_begin();

  const int64_t of_slice = static_cast<int64_t>(slice) * a.taps * a.depth * a.channels;
#pragma unroll 4
  for (int k = threadIdx.x; k < Tile::kRows * Tile::kCols; k += Tile::kThreads) {
    int tap = first_row + k / Tile::kCols;
    const int depth = a.by_depth_width.split(tap), col = first_col + k % Tile::kCols;
    if (tap >= a.taps || depth >= a.depth || col >= a.channels) continue;
    T sum = shared.sums[0][k];
#pragma unroll
    for (int team = 1; team < Tile::kTeams; ++team) sum += shared.sums[team][k];
    a.weight_bar.put(task, of_slice + (tap * a.depth + depth) * a.channels + col, sum);
  }
}

// What the way back has of a layer: blocks of the product with the transposed weight, and of the norm below it, come
// first, as more depends on them; then those of the outer product. They read the same bars.
template <typename ProductTile, typename OuterTile>
__global__ void __launch_bounds__(ProductTile::kThreads, ProductTile::kBlocks)
    back_kernel(ProductArguments<typename ProductTile::T> product, int product_blocks,
                NormRows<typename ProductTile::T> n, NormWay way, OuterArguments<typename ProductTile::T> outer) {
  wait_for_launch_ahead();
  static_assert(ProductTile::kThreads == OuterTile::kThreads);
  const int block = blockIdx.x;
  if (block < product_blocks) {
    product_block<true, ProductTile>(product, block, *dynamic_shared<typename ProductTile::Shared>(), n, way);
  } else {
    outer_block<OuterTile>(outer, block - product_blocks, *dynamic_shared<typename OuterTile::Shared>());
  }
}

// weight_bar = Σ_slices, in their order
template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    add_slices_kernel(PerTask<const T> slices, int count, ParametersOut<T> weight_bar, int size, int blocks) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x / blocks;
  const int k = static_cast<int>(blockIdx.x % blocks) * kElementThreads + static_cast<int>(threadIdx.x);
  if (k >= size) return;
  const T* const from = slices.of(task) + k;
  T sum = from[0];
  for (int slice = 1; slice < count; ++slice) sum += from[static_cast<int64_t>(slice) * size];
  weight_bar.put(task, k, sum);
}

// --- launches --------------------------------------------------------------------------------------------------------

// By the rows that a task has: Small, Column (one block has all rows of its channels), Square (teams, so that a batch
// of tasks is about one wave of blocks), Many (one team: there are blocks enough). float64, which has half the
// registers and a fraction of the speed, makes do with two of them.
template <typename T>
struct Tiles {
  static constexpr bool kWide = sizeof(T) > 4;  // float64: half the numbers fit in the registers
  using Small = Tile<T, 32, 16, 4, 4, 8, 2>;
  using Column = Tile<T, 128, 16, 4, 4, 2, 3>;
  using Square = std::conditional_t<kWide, Tile<T, 64, 32, 4, 4, 2, 3>, Tile<T, 64, 64, 8, 4, 2, 3>>;
  using Many = Tile<T, 128, 32, 8, 4, 1, 3>;
  using ManyOuter = Tile<T, 64, 64, 8, 4, 1, 3>;
};
constexpr int64_t kSmallRows = 32, kColumnRows = 128, kManyRows = 512;
// Rows of a product after which a norm can follow in the same launch.
template <typename T>
constexpr int64_t kRowsOfOneBlock = Tiles<T>::kWide ? kSmallRows : kColumnRows;

// Calls with(std::type_identity<Tile>) for the tile that a product has which makes so many rows.
template <typename T, typename With>
void choose_tile(int64_t rows, const With& with) {
  if (rows <= kSmallRows) {
    with(std::type_identity<typename Tiles<T>::Small>{});
  } else if constexpr (Tiles<T>::kWide) {
    with(std::type_identity<typename Tiles<T>::Square>{});
  } else if (rows <= kColumnRows) {
    with(std::type_identity<typename Tiles<T>::Column>{});
  } else if (rows < kManyRows) {
    with(std::type_identity<typename Tiles<T>::Square>{});
  } else {
    with(std::type_identity<typename Tiles<T>::Many>{});
  }
}

// Tiles of a product whose largest class of pixels has `rows`; how many blocks it takes per task.
template <typename Tile, typename T>
int64_t cut(ProductArguments<T>& a, int64_t rows, int64_t classes) {
  a.row_tiles = static_cast<int>(ceil_div(rows, Tile::kRows));
  a.col_tiles = static_cast<int>(ceil_div(a.out_width, Tile::kCols));
  return classes / a.classes * a.row_tiles * a.col_tiles;
}

// The way that out[to] = Σ in[from] · weight[tap] goes, and the norm after it.
template <typename T>
void launch_product(cudaStream_t stream, ProductArguments<T> a, const NormRows<T>& n, NormWay way, int64_t tasks) {
  a.classes = 1;
  a.rows_of_most = Divisor(a.down.count), a.cols_of_most = Divisor(a.across.count);
  const int64_t rows = static_cast<int64_t>(a.images) * a.down.count * a.across.count;
  choose_tile<T>(rows, [&]<typename Tile>(std::type_identity<Tile>) {
    const unsigned grid = grid_of(cut<Tile>(a, rows, 1), tasks);
    launch<product_kernel<Tile>>(stream, {grid, Tile::kThreads, sizeof(typename Tile::Shared)}, a, n, way);
  });
}

// The rows of a task that one block of an outer product sums over: fewer where the weight makes few tiles.
inline bool is_narrow(int64_t weight_rows, int64_t width) { return weight_rows <= 64 || width <= kGroup; }
inline int64_t rows_per_slice(const Layer& layer) {
  constexpr int64_t kManyWeights = 16384;
  if (is_narrow(layer.taps * layer.depth_width(), layer.width())) return 1024;
  return layer.taps * layer.depth * layer.channels < kManyWeights ? 256 : 2048;
}
inline int64_t slices_of(const Layer& layer, int64_t images) {
  return ceil_div(images * layer.pixels(), rows_per_slice(layer));
}
// Numbers that the sums of slices of one task take.
inline int64_t slices_size(const Layer& layer, int64_t images) {
  const int64_t slices = slices_of(layer, images);
  return slices == 1 ? 0 : slices * layer.taps * layer.depth * layer.channels;
}

// Rows of a product with the transposed weight: of the class of most pixels.
template <typename T>
int64_t rows_of_back(const ProductArguments<T>& a) {
  return static_cast<int64_t>(a.images) * a.down.backward(0).count * a.across.backward(0).count;
}

// Both products of the way back in one launch; without terms the outer product alone. `partial` has room for
// slices_size.
template <typename T>
void launch_back(cudaStream_t stream, ProductArguments<T> a, const NormRows<T>& n, NormWay way, OuterArguments<T> outer,
                 const ParametersOut<T>& weight_bar, PerTask<T> partial, int64_t tasks) {
  const Axis down = a.down.backward(0), across = a.across.backward(0);  // of the class of most pixels
  const int64_t classes = static_cast<int64_t>(a.down.stride) * a.across.stride;
  const int64_t rows = rows_of_back(a);
  a.classes = way == NormWay::kNone ? 1 : static_cast<int>(classes);
  a.rows_of_most = Divisor(down.count), a.cols_of_most = Divisor(across.count);
  a.rows_of_fewer = Divisor(std::max(1, down.count - 1)), a.cols_of_fewer = Divisor(std::max(1, across.count - 1));
  outer.weight_bar = outer.slices == 1 ? weight_bar : ParametersOut<T>(partial);
  const int64_t weight_rows = static_cast<int64_t>(outer.taps) * outer.by_depth_width.by;
  const auto with = [&]<typename ProductTile, typename OuterTile>(std::type_identity<ProductTile>,
                                                                  std::type_identity<OuterTile>) {
    const unsigned product_blocks = a.terms == 0 ? 0 : grid_of(cut<ProductTile>(a, rows, classes), tasks);
    outer.row_tiles = static_cast<int>(ceil_div(weight_rows, OuterTile::kRows));
    outer.col_tiles = static_cast<int>(ceil_div(outer.width, OuterTile::kCols));
    const int64_t outer_tiles = static_cast<int64_t>(outer.row_tiles) * outer.col_tiles * outer.slices;
    const unsigned grid = grid_of(product_blocks + outer_tiles * tasks, 1);
    constexpr size_t kBytes = std::max(sizeof(typename ProductTile::Shared), sizeof(typename OuterTile::Shared));
    launch<back_kernel<ProductTile, OuterTile>>(stream, {grid, ProductTile::kThreads, kBytes}, a,
                                                static_cast<int>(product_blocks), n, way, outer);
  };
  using Of = Tiles<T>;
  const int64_t size = a.terms == 0 ? 0 : rows;
  if (is_narrow(weight_rows, outer.width) && size <= kSmallRows) {
    with(std::type_identity<typename Of::Small>{}, std::type_identity<typename Of::Small>{});
  } else {
    choose_tile<T>(size, [&]<typename Tile>(std::type_identity<Tile> tile) {
      using Outer =
          std::conditional_t<std::is_same_v<Tile, typename Of::Many>, typename Of::ManyOuter, typename Of::Square>;
      with(tile, std::type_identity<Outer>{});
    });
  }
  if (outer.slices == 1) return;
  const int64_t weights = static_cast<int64_t>(outer.taps) * outer.depth * outer.channels;
  const int64_t blocks = ceil_div(weights, kElementThreads);
  launch<add_slices_kernel<T>>(stream, {grid_of(blocks, tasks), kElementThreads}, PerTask<const T>(partial),
                               outer.slices, weight_bar, static_cast<int>(weights), static_cast<int>(blocks));
}

}  // namespace imaml_ext
