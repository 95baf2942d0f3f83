// Norm, activation and pooling of a layer, one direction of differentiation each; the equations are those of
// network/cpu/kernels.inl.
//
// A block has kGroup channels of one task, and a slice of its rows. A thread reads all of its numbers, kRows of one
// channel, into registers at once, and writes when it has read. Sums over them are taken in T, sums between threads in
// float64 and by a fixed tree. A task of one slice is done in one launch; with more, a first launch leaves the sums of
// every slice, and a second adds them up in a fixed order and applies them.
#pragma once

#include <utility>

#include "common/cuda/launch.cuh"
#include "network/cuda/parameters.cuh"
#include "network/cuda/per_task.cuh"

namespace imaml_ext {

enum class NormWay { kNone, kForward, kTangent, kBackward, kSecond };
enum class NormPhase { kWhole, kSums, kApply };

constexpr int kNormThreads = 512;
template <typename T>
constexpr int kNormRows = 128 / sizeof(T);  // that a thread has registers for
template <typename T>
constexpr int kSliceRows = kNormRows<T> * kNormThreads / kGroup;

// Fields as in NormArguments (network/cpu/norm_arguments.h), of all tasks. Vectors are [channels] where they are parts
// of a row of parameters, [width] with zeros in padded channels elsewhere.
template <typename T>
struct NormRows {
  Norm norm = Norm::kBias;
  Activation activation = Activation::kIdentity;
  Pool pool = Pool::kNone;
  int total = 0;           // rows of a task
  int rows = 0, cols = 0;  // pixels of an image
  int channels = 0, width = 0;
  int slices = 1;
  bool activates = false;                                 // the kernels write and read `act`
  int pooled = 0;                                         // pixels of a task after pooling
  Divisor by_pixels, by_cols, by_pooled, by_pooled_cols;  // of an image, before and after pooling
  PerTask<const T> gamma, beta;
  PerTask<T> hat, act, out, scale;
  PerTask<uint8_t> winner;
  PerTask<const T> out_bar;  // what unpooling reads: of the layer's output; z_bar or y_bar_dot itself without pooling
  PerTask<T> z_bar, y_bar, gamma_bar, beta_bar;

  PerTask<const T> gamma_dot, beta_dot;
  PerTask<T> hat_dot, act_dot, out_dot, pull;
  PerTask<T> y_bar_dot;

  ParametersOut<T> gamma_out, beta_out;
  PerTask<double> partial;  // [width / kGroup, slices, 2, kGroup]
};

template <typename T>
int64_t norm_slices(int64_t rows) {
  return ceil_div(rows, kSliceRows<T>);
}
// Doubles of the sums of slices of one task.
template <typename T>
int64_t norm_partial_size(const Layer& layer, int64_t images) {
  const int64_t slices = norm_slices<T>(images * layer.pixels());
  return slices == 1 ? 0 : layer.width() * slices * 2;
}

template <typename T>
__device__ __forceinline__ T activated(Activation activation, T z) {
  if (activation == Activation::kTanh) return tanh(z);
  return activation == Activation::kRelu && z < T(0) ? T(0) : z;  // a NaN stays one
}
// act′(z) d, from a = act(z). Without branches, which would part the loads around them.
template <typename T>
__device__ __forceinline__ T through(Activation activation, T a, T d) {
  const T straight = activation == Activation::kIdentity || a > T(0) ? d : T(0);
  const T bent = d - a * a * d;
  return activation == Activation::kTanh ? bent : straight;
}

// One number of what leaves the layer, of a pixel after pooling, or its derivative:
// a = act(max of z over 2×2 pixels), the first of equal ones winning; or the mean of a over all pixels
template <bool kTangent, typename T>
__device__ __forceinline__ void pool_pixel(const NormRows<T>& n, int64_t task, int pixel, int channel) {
  const int to = pixel * n.width + channel;
  if (n.pool == Pool::kMean) {
    const int pixels = n.by_pixels.by;
    const T* const in = (kTangent ? n.act_dot : n.act).of(task) + pixel * pixels * n.width + channel;
    const T share = T(1) / static_cast<T>(pixels);
    T sum = T(0);
    for (int k = 0; k < pixels; ++k) sum += share * in[k * n.width];
    (kTangent ? n.out_dot : n.out).of(task)[to] = sum;
    return;
  }
  const bool batch = n.norm == Norm::kBatch, real = channel < n.channels;
  const T gamma = batch && real ? n.gamma.of(task)[channel] : T(0);
  const T beta = batch && real ? n.beta.of(task)[channel] : T(0);
  int image = pixel;
  int y = n.by_pooled.split(image);
  const int x = n.by_pooled_cols.split(y);
  const int first = ((image * n.rows + 2 * y) * n.cols + 2 * x) * n.width + channel;
  const auto of_window = [&](int k) { return first + (k / 2 * n.cols + k % 2) * n.width; };
  const T* const hat = n.hat.of(task);
  if constexpr (kTangent) {
    const int at = of_window(n.winner.of(task)[to]);
    T z_dot = n.hat_dot.of(task)[at];
    if (batch && real) {
      z_dot = gamma * z_dot + n.gamma_dot.of(task)[channel] * hat[at] + n.beta_dot.of(task)[channel];
    }
    n.act_dot.of(task)[to] = through(n.activation, n.act.of(task)[to], z_dot);
  } else {
    const auto z = [&](int k) {
      const T value = hat[of_window(k)];
      return batch ? gamma * value + beta : value;
    };
    T best = z(0);
    uint8_t winner = 0;
    for (int k = 1; k < 4; ++k) {
      const T other = z(k);
      if (other > best || other != other) best = other, winner = static_cast<uint8_t>(k);
    }
    n.winner.of(task)[to] = winner;
    n.act.of(task)[to] = activated(n.activation, best);
  }
}

// What a block has of a layer; a thread has one channel, and every kLanes-th row of the slice.
template <typename T, int kRows, int kThreads>
struct NormBlock {
  static constexpr int kLanes = kThreads / kGroup, kWarps = kThreads / 32;
  static_assert(kGroup == 16 && kRows <= 32, "a warp has two lanes of every channel; a thread has a bit for every row");
  struct Shared {
    double warp[2][kWarps][kGroup];
    double total[2][kGroup];
  };
  using Numbers = T[kRows];

  const NormRows<T>& n;
  const NormPhase phase;
  Shared& shared;
  const int64_t task;
  const int group, slice, channel, lane;
  const int begin, end;  // rows of the slice
  const bool real;       // not a padded channel

  __device__ NormBlock(const NormRows<T>& rows, NormPhase of_launch, Shared& storage, int64_t of_task, int of_group,
                       int of_slice)
      : n(rows),
        phase(of_launch),
        shared(storage),
        task(of_task),
        group(of_group),
        slice(of_slice),
        channel(group * kGroup + static_cast<int>(threadIdx.x) % kGroup),
        lane(static_cast<int>(threadIdx.x) / kGroup),
        begin(slice * kSliceRows<T>),
        end(smaller(begin + kSliceRows<T>, n.total)),
        real(channel < n.channels) {}

  __device__ __forceinline__ void run(NormWay way) const {
    if (way == NormWay::kForward) return forward();
    if (way == NormWay::kTangent) return tangent();
    if (way == NormWay::kBackward || way == NormWay::kSecond) return back(way);
  }

  // With a batch norm   x̂ = s (y − mean y),  s = 1 / √(var y + ε),  z = γ x̂ + β;   a = act(z).   Without one, the
  // product adds β (products.cuh).
  __device__ __forceinline__ void forward() const {
    T* const hats = n.hat.of(task);
    T* const act = n.act.of(task);
    const T gamma = of(n.gamma), beta = of(n.beta);
    Numbers y;
    read(hats, y);
    let_next_launch_begin();
    T mean;
    double squares;
    if (!moments(y, mean, squares)) return;
    const T scale = static_cast<T>(1.0 / sqrt(squares / n.total + kBatchNormEps));
    if (leads()) n.scale.of(task)[channel] = scale;
    over_rows([&](int r, int, int i) {
      const T hat = (y[r] - mean) * scale;
      hats[i] = hat;
      const T z = gamma * hat + beta;
      if (n.activates) act[i] = n.activation == Activation::kRelu && z < T(0) ? T(0) : z;
    });
    pool<false>();
  }

  // x̂˙ = s (ẏ − mean ẏ − x̂ mean(x̂ ẏ));   ż = γ x̂˙ + γ̇ x̂ + β̇;   ȧ = act′ ż
  __device__ __forceinline__ void tangent() const {
    const T* const hats = n.hat.of(task);
    const T* const act = n.act.of(task);
    T* const hat_dots = n.hat_dot.of(task);
    T* const act_dot = n.act_dot.of(task);
    const T scale = kept(n.scale), gamma = of(n.gamma), gamma_dot = of(n.gamma_dot), beta_dot = of(n.beta_dot);
    Numbers hat, hat_dot;
    uint32_t passing = ~0u;
    double total[2] = {};
    T sums[2] = {};
    if (n.activates && n.activation == Activation::kRelu) {
      read(act, hat);
#pragma unroll
      for (int r = 0; r < kRows; ++r) passing ^= (hat[r] > T(0) ? 0u : 1u) << r;
    }
    read(hats, hat);
    read(hat_dots, hat_dot);
    let_next_launch_begin();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[0] += hat_dot[r];
      sums[1] += hat_dot[r] * hat[r];
    }
    if (!add_rows(sums, total)) return;
    const T mean = static_cast<T>(total[0] / n.total);
    const T pull = static_cast<T>(total[1] / n.total);
    if (leads()) n.pull.of(task)[channel] = pull;
    over_rows([&](int r, int, int i) {
      const T dot = scale * (hat_dot[r] - mean - hat[r] * pull);
      hat_dots[i] = dot;
      if (n.activates) act_dot[i] = passing >> r & 1 ? gamma * dot + gamma_dot * hat[r] + beta_dot : T(0);
    });
    pool<true>();
  }

  // What both derivatives begin with: the way back through the pooling and the activation.
  __device__ __forceinline__ void back(NormWay way) const {
    Numbers bar, act = {};
    unpool(bar);
    if (n.activates) {
      read(n.act.of(task), act);
#pragma unroll
      for (int r = 0; r < kRows; ++r) bar[r] = through(n.activation, act[r], bar[r]);
    }
    way == NormWay::kBackward ? backward(bar) : second(bar, act);
  }

  // From z̄ = act′ ā:   β̄ = Σ z̄,  γ̄ = Σ z̄ x̂;   ȳ = s γ (z̄ − mean z̄ − x̂ mean(z̄ x̂))
  __device__ __forceinline__ void backward(const Numbers& z_bar) const {
    const bool batch = n.norm == Norm::kBatch;
    const T* const hats = n.hat.of(task);
    T* const z_bars = n.z_bar.of(task);
    T* const y_bars = n.y_bar.of(task);
    const T scale = batch ? kept(n.scale) * of(n.gamma) : T(0);
    Numbers hat = {};
    double total[2] = {};
    T sums[2] = {};
    if (batch) read(hats, hat);
    let_next_launch_begin();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[0] += z_bar[r];
      sums[1] += z_bar[r] * hat[r];
    }
    if (!add_rows(sums, total)) return;
    if (leads()) {
      n.beta_bar.of(task)[channel] = static_cast<T>(total[0]);
      if (real) n.beta_out.put(task, channel, static_cast<T>(total[0]));
      if (batch) n.gamma_bar.of(task)[channel] = static_cast<T>(total[1]);
      if (batch && real) n.gamma_out.put(task, channel, static_cast<T>(total[1]));
    }
    const T mean = static_cast<T>(total[0] / n.total);
    const T along = static_cast<T>(total[1] / n.total);
    over_rows([&](int r, int, int i) {
      if (!batch || z_bars != y_bars) z_bars[i] = z_bar[r];
      if (batch) y_bars[i] = scale * (z_bar[r] - mean - hat[r] * along);
    });
  }

  // The derivative of `backward`, from act′ ā˙ in bar_dot, to which act″ is yet to come; it ends as ȳ˙. With u = z̄ −
  // mean z̄ − x̂ mean(z̄ x̂),
  //   ȳ˙ = (s γ)˙ u + s γ (z̄˙ − mean z̄˙ − x̂˙ mean(z̄ x̂) − x̂ mean((z̄ x̂)˙)),   s˙ = −s² mean(x̂ ẏ)
  __device__ __forceinline__ void second(Numbers& bar_dot, const Numbers& act) const {
    const bool batch = n.norm == Norm::kBatch;
    const T* const hats = n.hat.of(task);
    const T* const hat_dots = n.hat_dot.of(task);
    const T* const z_bars = n.z_bar.of(task);
    T* const bar_dots = n.y_bar_dot.of(task);
    const T inverse = T(1) / static_cast<T>(n.total);
    T mean = T(0), along = T(0), factor = T(0), factor_dot = T(0);
    if (batch) {
      const T s = kept(n.scale), gamma = of(n.gamma);
      mean = kept(n.beta_bar) * inverse, along = kept(n.gamma_bar) * inverse;
      factor = s * gamma;
      factor_dot = s * (of(n.gamma_dot) - s * kept(n.pull) * gamma);
    }
    Numbers hat = {};
    double total[2] = {};
    T sums[2] = {};
    // tanh″ ż ā = −2 tanh ż z̄, and with a norm ż is not at hand: kTanh comes with kBias alone.
    if (n.activates && n.activation == Activation::kTanh) {
      over_rows([&](int r, int, int i) { bar_dot[r] -= T(2) * act[r] * hat_dots[i] * z_bars[i]; });
    }
    if (batch) {
      read(hats, hat);
      constexpr int kPart = 2;
      in_parts<kPart>([&](auto part) {
        if (begin + part.value * kLanes >= end) return;  // no rows; and a branch that later parts' loads stay behind
        T z_bar[kPart], hat_dot[kPart];
        read(z_bars, z_bar, part.value);
        read(hat_dots, hat_dot, part.value);
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          const int r = part.value + k;
          const T z_bar_dot = bar_dot[r];
          sums[0] += z_bar_dot;
          sums[1] += z_bar_dot * hat[r] + z_bar[k] * hat_dot[k];
          bar_dot[r] = factor_dot * (z_bar[k] - mean - hat[r] * along) + factor * (z_bar_dot - hat_dot[k] * along);
        }
      });
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[0] += bar_dot[r];
    }
    let_next_launch_begin();
    if (!add_rows(sums, total)) return;
    if (leads()) {
      if (real) n.beta_out.put(task, channel, static_cast<T>(total[0]));
      if (batch && real) n.gamma_out.put(task, channel, static_cast<T>(total[1]));
    }
    const T mean_dot = static_cast<T>(total[0] / n.total);
    const T along_dot = static_cast<T>(total[1] / n.total);
    over_rows([&](int r, int, int i) {
      bar_dots[i] = batch ? bar_dot[r] - factor * (mean_dot + hat[r] * along_dot) : bar_dot[r];
    });
  }

 private:
  // A number of a vector, zero in a padded channel.
  __device__ T of(const PerTask<const T>& vector) const { return real ? vector.of(task)[channel] : T(0); }
  __device__ T kept(const PerTask<T>& vector) const { return vector.of(task)[channel]; }

  // One thread to a channel in the whole task.
  __device__ bool leads() const { return slice == 0 && lane == 0; }

  template <typename Body>
  __device__ __forceinline__ void over_rows(const Body& body) const {
    const int first = begin + lane, left = end - first;
    const int start = first * n.width + channel, apart = kLanes * n.width;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r * kLanes < left) body(r, first + r * kLanes, start + r * apart);
  }

  // The thread's numbers of a matrix, all loads before any use of one; zeros where there is no row. Of the rows from
  // `first` on, where they are fewer.
  template <int kCount>
  __device__ __forceinline__ void read(const T* from, T (&to)[kCount], int first = 0) const {
    const int row = begin + lane, left = end - row;
    const int start = row * n.width + channel, apart = kLanes * n.width;
#pragma unroll
    for (int r = 0; r < kCount; ++r) to[r] = (first + r) * kLanes < left ? from[start + (first + r) * apart] : T(0);
  }

  // Calls body(std::integral_constant of the first row) for kPart rows at a time: the registers would not hold more.
  template <int kPart, typename Body, int... kParts>
  __device__ __forceinline__ static void in_parts(const Body& body, std::integer_sequence<int, kParts...>) {
    (body(std::integral_constant<int, kParts * kPart>{}), ...);
  }
  template <int kPart, typename Body>
  __device__ __forceinline__ static void in_parts(const Body& body) {
    in_parts<kPart>(body, std::make_integer_sequence<int, kRows / kPart>{});
  }

  // Sums over the lanes of each channel, in every thread. Every thread of the block must call it.
  template <int kSums>
  __device__ void add_lanes(double (&values)[kSums]) const {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      values[k] += __shfl_down_sync(0xffffffffu, values[k], kGroup);
      if (threadIdx.x % 32 < kGroup) shared.warp[k][warp][threadIdx.x % kGroup] = values[k];
    }
    __syncthreads();
    if (threadIdx.x < kSums * kGroup) {
      const int k = threadIdx.x / kGroup, c = threadIdx.x % kGroup;
      double sum = 0.0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared.warp[k][w][c];
      shared.total[k][c] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSums; ++k) values[k] = shared.total[k][threadIdx.x % kGroup];
  }

  __device__ double& partial(int of_slice, int k) const {
    return n.partial.of(
        task)[((static_cast<int64_t>(group) * n.slices + of_slice) * 2 + k) * kGroup + channel % kGroup];
  }

  // Σ over the task's rows of what the thread has summed over its own. False once this launch has done its part.
  __device__ bool add_rows(const T (&sums)[2], double (&total)[2]) const {
    if (phase == NormPhase::kApply) {
      for (int s = lane; s < n.slices; s += kLanes) total[0] += partial(s, 0), total[1] += partial(s, 1);
    } else {
      total[0] = static_cast<double>(sums[0]), total[1] = static_cast<double>(sums[1]);
    }
    add_lanes(total);
    if (phase == NormPhase::kSums && lane == 0) partial(slice, 0) = total[0], partial(slice, 1) = total[1];
    return phase != NormPhase::kSums;
  }

  // The mean and Σ (y − mean)² over the task's rows, those of the slices joined as in Chan, Golub and LeVeque (1983).
  __device__ bool moments(const Numbers& y, T& mean, double& squares) const {
    double sum[1] = {}, around[1] = {};
    if (phase == NormPhase::kApply) {
      for (int s = lane; s < n.slices; s += kLanes) sum[0] += partial(s, 0);
      add_lanes(sum);
      const double whole = sum[0] / n.total;
      for (int s = lane; s < n.slices; s += kLanes) {
        const double count = smaller(kSliceRows<T>, n.total - s * kSliceRows<T>);
        const double apart = partial(s, 0) / count - whole;
        around[0] += partial(s, 1) + count * apart * apart;
      }
      add_lanes(around);
      mean = static_cast<T>(whole), squares = around[0];
      return true;
    }
    T of_rows = T(0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) of_rows += y[r];
    sum[0] = static_cast<double>(of_rows);
    add_lanes(sum);
    const double exact = sum[0] / (end - begin);
    mean = static_cast<T>(exact);
    of_rows = T(0);
    over_rows([&](int r, int, int) { of_rows += (y[r] - mean) * (y[r] - mean); });
    around[0] = static_cast<double>(of_rows);
    add_lanes(around);
    squares = around[0];
    if (phase == NormPhase::kWhole) return true;
    // Σ (y − m)² for the exact mean from that for the rounded one
    const double rounding = exact - static_cast<double>(mean);
    if (lane == 0) partial(slice, 0) = sum[0], partial(slice, 1) = squares - (end - begin) * rounding * rounding;
    return false;
  }

  // The adjoint of the pooling, of max-pooling with the activation behind it: bars of pixels from those of the output.
  // Without pooling they are the same.
  __device__ __forceinline__ void unpool(Numbers& bar) const {
    const T* const out_bar = n.out_bar.of(task);
    if (n.pool == Pool::kNone) {
      read(out_bar, bar);
    } else if (n.pool == Pool::kMean) {
      const T share = T(1) / static_cast<T>(n.by_pixels.by);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = begin + lane + r * kLanes;
        bar[r] = row < end ? share * out_bar[n.by_pixels.divide(row) * n.width + channel] : T(0);
      }
    } else {
      const T* const act = n.act.of(task);
      const uint8_t* const winner = n.winner.of(task);
      constexpr int kPart = 8;
      in_parts<kPart>([&](auto part) {
        T a[kPart], of_output[kPart];
        int won[kPart], within[kPart];
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          const int row = begin + lane + (part.value + k) * kLanes;
          int image = row;
          int y = n.by_pixels.split(image);
          const int x = n.by_cols.split(y);
          // Not an odd image's last row or column.
          const bool some = row < end && y / 2 < n.rows / 2 && x / 2 < n.cols / 2;
          const int at = (image * n.by_pooled.by + y / 2 * n.by_pooled_cols.by + x / 2) * n.width + channel;
          within[k] = y % 2 * 2 + x % 2;
          won[k] = some ? winner[at] : -1;
          a[k] = some ? act[at] : T(0);
          of_output[k] = some ? out_bar[at] : T(0);
        }
#pragma unroll
        for (int k = 0; k < kPart; ++k) {
          bar[part.value + k] = won[k] == within[k] ? through(n.activation, a[k], of_output[k]) : T(0);
        }
      });
    }
  }

  // Pooling where the block has all rows of its channels.
  template <bool kTangent>
  __device__ __forceinline__ void pool() const {
    if (n.pool == Pool::kNone || phase != NormPhase::kWhole) return;
    __syncthreads();
    for (int pixel = lane; pixel < n.pooled; pixel += kLanes) pool_pixel<kTangent>(n, task, pixel, channel);
  }
};

template <typename T, NormWay kWay, int kRows>
__global__ void __launch_bounds__(kNormThreads, 1) norm_kernel(NormRows<T> n, NormPhase phase) {
  wait_for_launch_ahead();
  using Block = NormBlock<T, kRows, kNormThreads>;
  __shared__ typename Block::Shared shared;
  int block = blockIdx.x;
  const int slice = block % n.slices;
  block /= n.slices;
  const int groups = n.width / kGroup;
  Block(n, phase, shared, block / groups, block % groups, slice).run(kWay);
}

constexpr int kElementThreads = 256;

// Pooling where no block of another kernel has all rows of a channel.
template <typename T, bool kTangent>
__global__ void __launch_bounds__(kElementThreads) pool_kernel(NormRows<T> n, int blocks) {
  wait_for_launch_ahead();
  const int k = static_cast<int>(blockIdx.x % blocks) * kElementThreads + static_cast<int>(threadIdx.x);
  if (k < n.pooled * n.width) {
    pool_pixel<kTangent>(n, static_cast<int64_t>(blockIdx.x / blocks), k / n.width, k % n.width);
  }
}

template <bool kTangent, typename T>
void launch_pool(cudaStream_t stream, const NormRows<T>& n, int64_t tasks) {
  if (n.pool == Pool::kNone) return;
  const int64_t blocks = ceil_div(static_cast<int64_t>(n.pooled) * n.width, kElementThreads);
  launch<pool_kernel<T, kTangent>>(stream, {grid_of(blocks, tasks), kElementThreads}, n, static_cast<int>(blocks));
}

// The norm of a layer, in a second launch where a task has more than one slice.
template <NormWay kWay, typename T>
void launch_norm(cudaStream_t stream, const NormRows<T>& n, int64_t tasks) {
  constexpr int kFew = 8;
  const unsigned grid = grid_of(static_cast<int64_t>(n.width / kGroup) * n.slices, tasks);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (n.total <= kFew * kNormThreads / kGroup) {
      launch<norm_kernel<T, kWay, kFew>>(stream, {grid, kNormThreads}, n, NormPhase::kWhole);
      return;
    }
  }
  constexpr auto kKernel = norm_kernel<T, kWay, kNormRows<T>>;
  if (n.slices == 1) {
    launch<kKernel>(stream, {grid, kNormThreads}, n, NormPhase::kWhole);
    return;
  }
  launch<kKernel>(stream, {grid, kNormThreads}, n, NormPhase::kSums);
  launch<kKernel>(stream, {grid, kNormThreads}, n, NormPhase::kApply);
  if (kWay == NormWay::kForward) launch_pool<false>(stream, n, tasks);
  if (kWay == NormWay::kTangent) launch_pool<true>(stream, n, tasks);
}

}  // namespace imaml_ext
