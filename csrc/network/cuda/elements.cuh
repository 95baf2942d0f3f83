// What surrounds the layers: reading the input, pooling, the criterion.
#pragma once

#include "common/cuda/launch.cuh"
#include "network/criterion.h"
#include "network/cuda/products.cuh"

namespace imaml_ext {

// Blocks over `size` numbers of every task; a thread calls body(task, k) for one of them.
template <typename Body>
__device__ __forceinline__ void over_elements(int64_t size, int blocks, const Body& body) {
  const int64_t k = static_cast<int64_t>(blockIdx.x % blocks) * kElementThreads + threadIdx.x;
  if (k < size) body(static_cast<int64_t>(blockIdx.x / blocks), k);
}
template <auto kKernel, typename Argument>
void launch_elements(cudaStream_t stream, const Argument& argument, int64_t size, int64_t tasks) {
  const int64_t blocks = ceil_div(size, kElementThreads);
  launch<kKernel>(stream, {grid_of(blocks, tasks), kElementThreads}, argument, size, static_cast<int>(blocks));
}

// x [S, C, H, W] to the rows that the first layer reads: pixels, or 3×3 patches of `stride`.
template <typename T>
struct InputArguments {
  PerTask<const T> x;
  PerTask<T> input;  // [S, pixels, width]
  int channels, height, width, stride;
  int cols, pixels, row_width;
};

template <typename T>
__global__ void __launch_bounds__(kElementThreads) input_kernel(InputArguments<T> a, int64_t size, int blocks) {
  wait_for_launch_ahead();
  over_elements(size, blocks, [&](int64_t task, int64_t k) {
    const int column = static_cast<int>(k % a.row_width);
    const int pixel = static_cast<int>(k / a.row_width % a.pixels);
    const int64_t image = k / a.row_width / a.pixels;
    const int tap = a.stride == 0 ? 0 : column / a.channels;
    const int channel = a.stride == 0 ? column : column % a.channels;
    const int y = a.stride == 0 ? pixel / a.cols : a.stride * (pixel / a.cols) + tap / 3 - 1;
    const int x = a.stride == 0 ? pixel % a.cols : a.stride * (pixel % a.cols) + tap % 3 - 1;
    const bool inside =
        channel < a.channels && tap < (a.stride == 0 ? 1 : 9) && y >= 0 && y < a.height && x >= 0 && x < a.width;
    a.input.of(task)[k] = inside ? a.x.of(task)[((image * a.channels + channel) * a.height + y) * a.width + x] : T(0);
  });
}

template <typename T>
struct PoolArguments {
  Norm norm;
  Activation activation;
  int rows, cols, channels, width;  // of the image before
  PerTask<const T> gamma, beta, gamma_dot, beta_dot;
  PerTask<const T> hat, hat_dot;
  PerTask<uint8_t> winner;
  PerTask<T> act, act_dot;
};

// Where a pooled number's 2×2 pixels begin.
template <typename T>
__device__ __forceinline__ int64_t corner(const PoolArguments<T>& a, int64_t k) {
  const int rows = a.rows / 2, cols = a.cols / 2;
  const int64_t pixel = k / a.width;
  const int64_t image = pixel / (rows * cols);
  const int within = static_cast<int>(pixel % (rows * cols));
  return ((image * a.rows + within / cols * 2) * a.cols + within % cols * 2) * a.width + k % a.width;
}
template <typename T>
__device__ __forceinline__ int64_t of_window(const PoolArguments<T>& a, int64_t first, int k) {
  return first + (static_cast<int64_t>(k / 2) * a.cols + k % 2) * a.width;
}

// a = act(max of z over 2×2 pixels), the first of equal ones winning
template <typename T>
__global__ void __launch_bounds__(kElementThreads) max_pool_kernel(PoolArguments<T> a, int64_t size, int blocks) {
  wait_for_launch_ahead();
  over_elements(size, blocks, [&](int64_t task, int64_t k) {
    const int c = static_cast<int>(k % a.width);
    const bool batch = a.norm == Norm::kBatch && c < a.channels;
    const T gamma = batch ? a.gamma.of(task)[c] : T(0);
    const T beta = batch ? a.beta.of(task)[c] : T(0);
    const T* const hat = a.hat.of(task);
    const int64_t first = corner(a, k);
    const auto z = [&](int pixel) {
      const T value = hat[of_window(a, first, pixel)];
      return a.norm == Norm::kBatch ? gamma * value + beta : value;
    };
    T best = z(0);
    uint8_t winner = 0;
    for (int pixel = 1; pixel < 4; ++pixel) {
      const T other = z(pixel);
      if (other > best || other != other) best = other, winner = static_cast<uint8_t>(pixel);
    }
    a.winner.of(task)[k] = winner;
    a.act.of(task)[k] = a.activation == Activation::kRelu && best < T(0) ? T(0) : best;
  });
}

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    max_pool_tangent_kernel(PoolArguments<T> a, int64_t size, int blocks) {
  wait_for_launch_ahead();
  over_elements(size, blocks, [&](int64_t task, int64_t k) {
    const int c = static_cast<int>(k % a.width);
    const bool batch = a.norm == Norm::kBatch && c < a.channels;
    const int64_t at = of_window(a, corner(a, k), a.winner.of(task)[k]);
    T z_dot = a.hat_dot.of(task)[at];
    if (batch) {
      z_dot = a.gamma.of(task)[c] * z_dot + a.gamma_dot.of(task)[c] * a.hat.of(task)[at] + a.beta_dot.of(task)[c];
    }
    const bool passes = a.activation != Activation::kRelu || a.act.of(task)[k] > T(0);
    a.act_dot.of(task)[k] = passes ? z_dot : T(0);
  });
}

template <typename T>
struct MeanArguments {
  PerTask<const T> in;  // [S, pixels, width]
  PerTask<T> out;       // [S, width]
  int pixels, width;
};

template <typename T>
__global__ void __launch_bounds__(kElementThreads) mean_pool_kernel(MeanArguments<T> a, int64_t size, int blocks) {
  wait_for_launch_ahead();
  over_elements(size, blocks, [&](int64_t task, int64_t k) {
    const T* const in = a.in.of(task) + k / a.width * a.pixels * a.width + k % a.width;
    const T share = T(1) / static_cast<T>(a.pixels);
    T sum = T(0);
    for (int pixel = 0; pixel < a.pixels; ++pixel) sum += share * in[static_cast<int64_t>(pixel) * a.width];
    a.out.of(task)[k] = sum;
  });
}

// --- criteria --------------------------------------------------------------------------------------------------------

constexpr int kCriterionWarps = 8;
constexpr int kCriterionThreads = 32 * kCriterionWarps;

template <typename T>
struct CriterionArguments {
  int images, channels, width;
  PerTask<const int64_t> labels;  // [S]; or
  PerTask<const T> targets;       // [S, channels]
  PerTask<const T> values;        // [S, width]: outputs, or the derivative of the outputs
  PerTask<T> probabilities;       // [S, width]
  PerTask<T> bar;                 // [S, width]
  T* losses = nullptr;            // [B]
  T* outputs = nullptr;           // [B, S, channels], without the padding

  __device__ CriterionRule<T> rule() const {
    return {static_cast<T>(images), static_cast<T>(static_cast<int64_t>(images) * channels)};
  }
};

__device__ __forceinline__ double sum_of_warp(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return __shfl_sync(0xffffffffu, value, 0);
}
// A NaN among the values stays out; the sum that follows meets it.
__device__ __forceinline__ double largest_of_warp(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmax(value, __shfl_down_sync(0xffffffffu, value, offset));
  return __shfl_sync(0xffffffffu, value, 0);
}

// The loss; its derivative in the outputs; the softmax. A block a task, a warp an image in turn. A label outside
// [0, channels) makes the loss and every derivative of its task NaN: to raise here would be to wait for the device.
template <typename T>
__global__ void __launch_bounds__(kCriterionThreads) criterion_kernel(CriterionArguments<T> a) {
  wait_for_launch_ahead();
  __shared__ double sums[kCriterionWarps];
  const int64_t task = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool classifies = a.labels.first != nullptr;
  double loss = 0.0;
  for (int image = warp; image < a.images; image += kCriterionWarps) {
    const int64_t start = static_cast<int64_t>(image) * a.width;
    const T* const outputs = a.values.of(task) + start;
    T* const bar = a.bar.of(task) + start;
    if (classifies) {
      double largest = -INFINITY, sum = 0.0;
      for (int c = lane; c < a.channels; c += 32) largest = fmax(largest, static_cast<double>(outputs[c]));
      largest = largest_of_warp(largest);
      for (int c = lane; c < a.channels; c += 32) sum += exp(static_cast<double>(outputs[c]) - largest);
      sum = sum_of_warp(sum);
      const int64_t label = a.labels.of(task)[image];
      const bool known = label >= 0 && label < a.channels;
      if (lane == 0) loss += known ? a.rule().cross_entropy(outputs[label], largest, sum) : NAN;
      for (int c = lane; c < a.width; c += 32) {
        const T p = c < a.channels ? a.rule().probability(outputs[c], largest, sum) : T(0);
        a.probabilities.of(task)[start + c] = known ? p : static_cast<T>(NAN);
        bar[c] = c >= a.channels ? T(0) : known ? a.rule().cross_entropy_bar(p, label == c) : static_cast<T>(NAN);
      }
    } else {
      const T* const targets = a.targets.of(task) + static_cast<int64_t>(image) * a.channels;
      double sum = 0.0;
      for (int c = lane; c < a.width; c += 32) {
        if (c < a.channels) sum += a.rule().squared_error(outputs[c], targets[c]);
        bar[c] = c < a.channels ? a.rule().squared_error_bar(outputs[c], targets[c]) : T(0);
      }
      loss += sum_of_warp(sum);
    }
  }
  if (lane == 0) sums[warp] = loss;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = 0.0;
  for (int w = 0; w < kCriterionWarps; ++w) total += sums[w];
  a.losses[task] = static_cast<T>(total / static_cast<double>(classifies ? a.rule().images : a.rule().entries));
}

// bar = C dot
template <typename T>
__global__ void __launch_bounds__(kCriterionThreads) curve_kernel(CriterionArguments<T> a) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool classifies = a.labels.first != nullptr;
  for (int image = warp; image < a.images; image += kCriterionWarps) {
    const int64_t start = static_cast<int64_t>(image) * a.width;
    const T* const dot = a.values.of(task) + start;
    const T* const probabilities = a.probabilities.of(task) + start;
    double along = 0.0;
    if (classifies) {
      for (int c = lane; c < a.channels; c += 32) {
        along += static_cast<double>(probabilities[c]) * static_cast<double>(dot[c]);
      }
      along = sum_of_warp(along);
    }
    for (int c = lane; c < a.width; c += 32) {
      const T curved = !classifies ? a.rule().squared_error_curve(dot[c])
                                   : a.rule().cross_entropy_curve(probabilities[c], dot[c], static_cast<T>(along));
      a.bar.of(task)[start + c] = c < a.channels ? curved : T(0);
    }
  }
}

// dotᵀ bar = dotᵀ C dot of a task, by a warp
template <typename T>
__global__ void __launch_bounds__(kCriterionThreads) curvature_kernel(CriterionArguments<T> a, double* curvature) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x;
  if (threadIdx.x >= 32) return;
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < static_cast<int64_t>(a.images) * a.width; k += 32) {
    if (k % a.width < a.channels) {
      sum += static_cast<double>(a.values.of(task)[k]) * static_cast<double>(a.bar.of(task)[k]);
    }
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) curvature[task] = sum;
}

// [S, width] without the padding
template <typename T>
__global__ void __launch_bounds__(kElementThreads) outputs_kernel(CriterionArguments<T> a, int64_t size, int blocks) {
  wait_for_launch_ahead();
  over_elements(size, blocks, [&](int64_t task, int64_t k) {
    a.outputs[task * size + k] = a.values.of(task)[k / a.channels * a.width + k % a.channels];
  });
}

}  // namespace imaml_ext
