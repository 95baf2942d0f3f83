// Norm and activation of a layer, one direction of differentiation a kernel; the equations are those of
// network/cpu/kernels.inl.
//
// A block has kGroup channels of one task, and a slice of its rows. Sums over a slice are taken in T by a thread (it
// has kSliceRows / kLanes rows), in float64 and by a fixed tree between threads. A task of one slice is done in one
// launch; with more, a first launch leaves the sums of every slice, and a second adds them up in their order and
// applies them.
#pragma once

#include "common/cuda/launch.cuh"
#include "network/cuda/per_task.cuh"

namespace imaml_ext {

constexpr int kLanes = 32;  // threads to a channel
constexpr int kNormThreads = kLanes * kGroup;
constexpr int kNormWarps = kNormThreads / 32;
constexpr int kSliceRows = 1024;
static_assert(kGroup == 16, "a warp has two lanes of every channel");

enum class NormPhase { kWhole, kSums, kApply };

// Fields as in NormArguments (network/cpu/norm_arguments.h), of all tasks. Vectors are [channels] where they are parts
// of a row of parameters, [width] with zeros in padded channels elsewhere.
template <typename T>
struct NormRows {
  Norm norm = Norm::kBias;
  Activation activation = Activation::kIdentity;
  Pool pool = Pool::kNone;
  int images = 0, rows = 0, cols = 0;  // pixels of an image
  int channels = 0, width = 0;
  int slices = 1;
  bool activates = false;  // the kernels write and read `act`
  PerTask<const T> gamma, beta;
  PerTask<T> hat, act, scale;
  PerTask<const uint8_t> winner;
  PerTask<const T> out_bar;  // what unpooling reads: of the layer's output; z_bar or y_bar_dot itself without pooling
  PerTask<T> z_bar, y_bar, gamma_bar, beta_bar;

  PerTask<const T> gamma_dot, beta_dot;
  PerTask<T> hat_dot, act_dot, pull;
  PerTask<T> y_bar_dot, gamma_bar_dot, beta_bar_dot;

  PerTask<T> gamma_out, beta_out;  // γ and β of the row of parameters that takes the derivatives
  PerTask<double> partial;         // [width / kGroup, slices, 2, kGroup]
};

// Doubles of the sums of slices, a task.
inline int64_t norm_slices(int64_t rows) { return ceil_div(rows, kSliceRows); }
inline int64_t norm_partial_size(const Layer& layer, int64_t images) {
  const int64_t slices = norm_slices(images * layer.pixels());
  return slices == 1 ? 0 : layer.width() * slices * 2;
}

struct NormShared {
  double warp[2][kNormWarps][kGroup];
  double total[2][kGroup];
};

// What one thread has of a layer: a channel, and every kLanes-th row of a slice.
template <typename T>
struct NormPart {
  const NormRows<T>& n;
  NormShared& shared;
  int64_t task;
  int group, slice, channel, lane;
  int begin, end;  // rows of the slice
  bool real;       // not a padded channel

  __device__ NormPart(const NormRows<T>& rows, NormShared& storage) : n(rows), shared(storage) {
    int block = blockIdx.x;
    slice = block % n.slices;
    block /= n.slices;
    group = block % (n.width / kGroup);
    task = block / (n.width / kGroup);
    channel = group * kGroup + threadIdx.x % kGroup;
    lane = threadIdx.x / kGroup;
    begin = slice * kSliceRows;
    end = smaller(begin + kSliceRows, total_rows());
    real = channel < n.channels;
  }
  __device__ int total_rows() const { return n.images * n.rows * n.cols; }

  // A number of a vector, zero in a padded channel.
  __device__ T of(const PerTask<const T>& vector) const { return real ? vector.of(task)[channel] : T(0); }
  __device__ T kept(const PerTask<T>& vector) const { return vector.of(task)[channel]; }

  template <typename Body>
  __device__ void over_rows(const Body& body) const {
    for (int row = begin + lane; row < end; row += kLanes) body(static_cast<int64_t>(row) * n.width + channel, row);
  }

  // One thread to a channel in the whole task.
  __device__ bool leads() const { return slice == 0 && lane == 0; }

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
      for (int w = 0; w < kNormWarps; ++w) sum += shared.warp[k][w][c];
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

  // Σ over the task's rows of what term(index, row, sums) adds to `sums`. False once this launch has done its part.
  template <typename Each>
  __device__ bool sum_rows(NormPhase phase, const Each& term, double (&total)[2]) const {
    total[0] = total[1] = 0.0;
    if (phase == NormPhase::kApply) {
      for (int s = 0; s < n.slices; ++s) total[0] += partial(s, 0), total[1] += partial(s, 1);
      return true;
    }
    T sums[2] = {};
    over_rows([&](int64_t i, int row) { term(i, row, sums); });
    total[0] = static_cast<double>(sums[0]), total[1] = static_cast<double>(sums[1]);
    add_lanes(total);
    if (phase == NormPhase::kWhole) return true;
    if (lane == 0) partial(slice, 0) = total[0], partial(slice, 1) = total[1];
    return false;
  }

  // The mean and Σ (y − mean)² over the task's rows, those of the slices joined as in Chan, Golub and LeVeque (1983).
  __device__ bool moments(NormPhase phase, T& mean, double& squares) const {
    if (phase == NormPhase::kApply) {
      double sum = 0.0;
      for (int s = 0; s < n.slices; ++s) sum += partial(s, 0);
      const double whole = sum / total_rows();
      squares = 0.0;
      for (int s = 0; s < n.slices; ++s) {
        const double count = smaller(kSliceRows, total_rows() - s * kSliceRows);
        const double apart = partial(s, 0) / count - whole;
        squares += partial(s, 1) + count * apart * apart;
      }
      mean = static_cast<T>(whole);
      return true;
    }
    const T* const y = n.hat.of(task);
    T of_rows = T(0);
    over_rows([&](int64_t i, int) { of_rows += y[i]; });
    double sum[1] = {static_cast<double>(of_rows)};
    add_lanes(sum);
    const double exact = sum[0] / (end - begin);
    mean = static_cast<T>(exact);
    of_rows = T(0);
    over_rows([&](int64_t i, int) { of_rows += (y[i] - mean) * (y[i] - mean); });
    double around[1] = {static_cast<double>(of_rows)};
    add_lanes(around);
    squares = around[0];
    if (phase == NormPhase::kWhole) return true;
    // Σ (y − m)² for the exact mean from that for the rounded one
    const double rounding = exact - static_cast<double>(mean);
    if (lane == 0) partial(slice, 0) = sum[0], partial(slice, 1) = squares - (end - begin) * rounding * rounding;
    return false;
  }

  __device__ T activate(T z) const {
    switch (n.activation) {
      case Activation::kRelu:
        return z < T(0) ? T(0) : z;  // a NaN stays one
      case Activation::kTanh:
        return tanh(z);
      case Activation::kIdentity:
        break;
    }
    return z;
  }

  // act′(z) d, from a = act(z)
  __device__ T through(T a, T d) const {
    switch (n.activation) {
      case Activation::kRelu:
        return a > T(0) ? d : T(0);
      case Activation::kTanh:
        return d - a * a * d;
      case Activation::kIdentity:
        break;
    }
    return d;
  }
  __device__ bool passes(T a) const { return n.activation != Activation::kRelu || a > T(0); }

  // The adjoint of the pooling, of max-pooling with the activation behind it: the bar of a pixel from those of the
  // output. Without pooling they are the same.
  __device__ T unpooled(int64_t index, int row) const {
    const T* const out_bar = n.out_bar.of(task);
    if (n.pool == Pool::kNone) return out_bar[index];
    const int pixels = n.rows * n.cols;
    const int image = row / pixels, pixel = row % pixels;
    if (n.pool == Pool::kMean) {
      return T(1) / static_cast<T>(pixels) * out_bar[static_cast<int64_t>(image) * n.width + channel];
    }
    const int y = pixel / n.cols, x = pixel % n.cols;
    const int rows = n.rows / 2, cols = n.cols / 2;
    if (y / 2 >= rows || x / 2 >= cols) return T(0);  // an odd image's last row or column
    const int64_t at = ((static_cast<int64_t>(image) * rows + y / 2) * cols + x / 2) * n.width + channel;
    return n.winner.of(task)[at] == y % 2 * 2 + x % 2 && passes(n.act.of(task)[at]) ? out_bar[at] : T(0);
  }
};

// With a batch norm   x̂ = s (y − mean y),  s = 1 / √(var y + ε),  z = γ x̂ + β;   else   z = y + β;   a = act(z)
template <typename T>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(NormRows<T> n, NormPhase phase) {
  wait_for_launch_ahead();
  __shared__ NormShared shared;
  const NormPart<T> part(n, shared);
  T* const hat = n.hat.of(part.task);
  T* const act = n.act.of(part.task);
  const T beta = part.of(n.beta);
  if (n.norm == Norm::kBias) {
    part.over_rows([&](int64_t i, int) {
      const T z = hat[i] + beta;
      hat[i] = z;
      if (n.activates) act[i] = part.activate(z);
    });
    return;
  }
  T mean;
  double squares;
  if (!part.moments(phase, mean, squares)) return;
  const T scale = static_cast<T>(1.0 / sqrt(squares / part.total_rows() + kBatchNormEps));
  if (part.leads()) n.scale.of(part.task)[part.channel] = scale;
  const T gamma = part.of(n.gamma);
  part.over_rows([&](int64_t i, int) {
    const T x_hat = (hat[i] - mean) * scale;
    hat[i] = x_hat;
    if (n.activates) act[i] = part.activate(gamma * x_hat + beta);
  });
}

// z̄ = act′ ā;   β̄ = Σ z̄,  γ̄ = Σ z̄ x̂;   ȳ = s γ (z̄ − mean z̄ − x̂ mean(z̄ x̂))
template <typename T>
__global__ void __launch_bounds__(kNormThreads) norm_backward_kernel(NormRows<T> n, NormPhase phase) {
  wait_for_launch_ahead();
  __shared__ NormShared shared;
  const NormPart<T> part(n, shared);
  const bool batch = n.norm == Norm::kBatch;
  const T* const hat = n.hat.of(part.task);
  const T* const act = n.act.of(part.task);
  T* const z_bars = n.z_bar.of(part.task);
  T* const y_bars = n.y_bar.of(part.task);
  double total[2];
  const auto term = [&](int64_t i, int row, T(&sums)[2]) {
    T z_bar = part.unpooled(i, row);
    if (n.activates) z_bar = part.through(act[i], z_bar);
    z_bars[i] = z_bar;
    sums[0] += z_bar;
    if (batch) sums[1] += z_bar * hat[i];
  };
  if (!part.sum_rows(phase, term, total)) return;
  if (part.leads()) {
    n.beta_bar.of(part.task)[part.channel] = static_cast<T>(total[0]);
    if (part.real) n.beta_out.of(part.task)[part.channel] = static_cast<T>(total[0]);
    if (batch) n.gamma_bar.of(part.task)[part.channel] = static_cast<T>(total[1]);
    if (batch && part.real) n.gamma_out.of(part.task)[part.channel] = static_cast<T>(total[1]);
  }
  if (!batch) return;  // ȳ is z̄
  const T mean = static_cast<T>(total[0] / part.total_rows());
  const T along = static_cast<T>(total[1] / part.total_rows());
  const T scale = part.kept(n.scale) * part.of(n.gamma);
  part.over_rows([&](int64_t i, int) { y_bars[i] = scale * (z_bars[i] - mean - hat[i] * along); });
}

// x̂˙ = s (ẏ − mean ẏ − x̂ mean(x̂ ẏ));   ż = γ x̂˙ + γ̇ x̂ + β̇;   ȧ = act′ ż
template <typename T>
__global__ void __launch_bounds__(kNormThreads) norm_tangent_kernel(NormRows<T> n, NormPhase phase) {
  wait_for_launch_ahead();
  __shared__ NormShared shared;
  const NormPart<T> part(n, shared);
  const T* const hats = n.hat.of(part.task);
  const T* const act = n.act.of(part.task);
  T* const hat_dots = n.hat_dot.of(part.task);
  T* const act_dot = n.act_dot.of(part.task);
  const T beta_dot = part.of(n.beta_dot);
  if (n.norm == Norm::kBias) {
    part.over_rows([&](int64_t i, int) {
      const T z_dot = hat_dots[i] + beta_dot;
      hat_dots[i] = z_dot;
      if (n.activates) act_dot[i] = part.through(act[i], z_dot);
    });
    return;
  }
  double total[2];
  const auto term = [&](int64_t i, int, T(&sums)[2]) {
    sums[0] += hat_dots[i];
    sums[1] += hat_dots[i] * hats[i];
  };
  if (!part.sum_rows(phase, term, total)) return;
  const T mean = static_cast<T>(total[0] / part.total_rows());
  const T pull = static_cast<T>(total[1] / part.total_rows());
  if (part.leads()) n.pull.of(part.task)[part.channel] = pull;
  const T scale = part.kept(n.scale), gamma = part.of(n.gamma), gamma_dot = part.of(n.gamma_dot);
  part.over_rows([&](int64_t i, int) {
    const T hat = hats[i];
    const T hat_dot = scale * (hat_dots[i] - mean - hat * pull);
    hat_dots[i] = hat_dot;
    if (n.activates) act_dot[i] = part.through(act[i], gamma * hat_dot + gamma_dot * hat + beta_dot);
  });
}

// The derivative of norm_backward, act″ included. With u = z̄ − mean z̄ − x̂ mean(z̄ x̂),
//   ȳ˙ = (s γ)˙ u + s γ (z̄˙ − mean z̄˙ − x̂˙ mean(z̄ x̂) − x̂ mean((z̄ x̂)˙)),   s˙ = −s² mean(x̂ ẏ)
template <typename T>
__global__ void __launch_bounds__(kNormThreads) norm_second_kernel(NormRows<T> n, NormPhase phase) {
  wait_for_launch_ahead();
  __shared__ NormShared shared;
  const NormPart<T> part(n, shared);
  const bool batch = n.norm == Norm::kBatch;
  const T* const hats = n.hat.of(part.task);
  const T* const act = n.act.of(part.task);
  const T* const hat_dots = n.hat_dot.of(part.task);
  const T* const z_bars = n.z_bar.of(part.task);
  T* const bar_dots = n.y_bar_dot.of(part.task);
  double total[2];
  const auto term = [&](int64_t i, int row, T(&sums)[2]) {
    T z_bar_dot = part.unpooled(i, row);
    if (n.activates) {
      const T a = act[i];
      z_bar_dot = part.through(a, z_bar_dot);
      // tanh″ ż ā = −2 tanh ż z̄, and with a norm ż is not at hand: kTanh comes with kBias alone.
      if (n.activation == Activation::kTanh) z_bar_dot -= T(2) * a * hat_dots[i] * z_bars[i];
    }
    bar_dots[i] = z_bar_dot;
    sums[0] += z_bar_dot;
    if (batch) sums[1] += z_bar_dot * hats[i] + z_bars[i] * hat_dots[i];
  };
  if (!part.sum_rows(phase, term, total)) return;
  if (part.leads()) {
    if (part.real) n.beta_out.of(part.task)[part.channel] = static_cast<T>(total[0]);
    if (batch && part.real) n.gamma_out.of(part.task)[part.channel] = static_cast<T>(total[1]);
  }
  if (!batch) return;
  const T inverse = T(1) / static_cast<T>(part.total_rows());
  const T mean = part.kept(n.beta_bar) * inverse, along = part.kept(n.gamma_bar) * inverse;
  const T mean_dot = static_cast<T>(total[0] / part.total_rows());
  const T along_dot = static_cast<T>(total[1] / part.total_rows());
  const T s = part.kept(n.scale), gamma = part.of(n.gamma);
  const T factor_dot = s * (part.of(n.gamma_dot) - s * part.kept(n.pull) * gamma);
  const T factor = s * gamma;
  part.over_rows([&](int64_t i, int) {
    const T hat = hats[i];
    const T u = z_bars[i] - mean - hat * along;
    const T u_dot = bar_dots[i] - mean_dot - hat_dots[i] * along - hat * along_dot;
    bar_dots[i] = factor_dot * u + factor * u_dot;
  });
}

// `sums`: whether rows meet in a sum, which takes a second launch where there is more than one slice.
template <auto kKernel, typename T>
void launch_norm(cudaStream_t stream, const NormRows<T>& n, bool sums, int64_t tasks) {
  const unsigned grid = grid_of(static_cast<int64_t>(n.width / kGroup) * n.slices, tasks);
  if (!sums || n.slices == 1) {
    launch<kKernel>(stream, {grid, kNormThreads}, n, NormPhase::kWhole);
  } else {
    launch<kKernel>(stream, {grid, kNormThreads}, n, NormPhase::kSums);
    launch<kKernel>(stream, {grid, kNormThreads}, n, NormPhase::kApply);
  }
}

}  // namespace imaml_ext
