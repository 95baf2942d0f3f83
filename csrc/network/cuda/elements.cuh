// What surrounds the layers: reading the input, the criterion.
#pragma once

#include "common/cuda/launch.cuh"
#include "network/criterion.h"
#include "network/cuda/norm.cuh"

namespace imaml_ext {

// x [S, C, H, W] to the rows that the first layer reads: pixels, or 3×3 patches of `stride`.
template <typename T>
struct InputArguments {
  PerTask<const T> x;
  PerTask<T> input;  // [S, pixels, width]
  int channels, height, width, stride;
  int size;  // of a task's input
  Divisor by_row_width, by_rows, by_cols, by_channels;
};

template <typename T>
__global__ void __launch_bounds__(kElementThreads) input_kernel(InputArguments<T> a, int blocks) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x / blocks;
  const int k = static_cast<int>(blockIdx.x % blocks) * kElementThreads + static_cast<int>(threadIdx.x);
  if (k >= a.size) return;
  int image = k;
  int channel = a.by_row_width.split(image), tap = 0;
  int x = a.by_cols.split(image);
  int y = a.by_rows.split(image);
  bool inside = channel < a.channels;
  if (a.stride > 0) {
    tap = channel;
    channel = a.by_channels.split(tap);
    y = a.stride * y + tap / 3 - 1, x = a.stride * x + tap % 3 - 1;
    inside = tap < 9 && y >= 0 && y < a.height && x >= 0 && x < a.width;
  }
  a.input.of(task)[k] = inside ? a.x.of(task)[((image * a.channels + channel) * a.height + y) * a.width + x] : T(0);
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
  PerTask<T> outputs;             // [S, channels], without the padding; null: not wanted
  T* losses = nullptr;            // [B]
  ParametersOut<T> beta;          // Σ bar over the images, the derivative in β of a head; null: not wanted

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

// β̄ = Σ bar over the images, or what it is a part of. Every thread of the block must call it.
template <typename T>
__device__ __forceinline__ void put_beta(const CriterionArguments<T>& a, int64_t task) {
  if (a.beta.to.first == nullptr) return;
  __syncthreads();  // the block reads what it has written
  const T* const bar = a.bar.of(task);
  for (int c = threadIdx.x; c < a.channels; c += kCriterionThreads) {
    double sum = 0.0;
    for (int image = 0; image < a.images; ++image) sum += static_cast<double>(bar[image * a.width + c]);
    a.beta.put(task, c, static_cast<T>(sum));
  }
}

// The loss; its derivative in the outputs; the softmax. One block per task, whose warps take the images in turn. A
// label outside [0, channels) makes the loss and every derivative of its task NaN: to raise here would be to wait for
// the device.
template <typename T>
__global__ void __launch_bounds__(kCriterionThreads, 1) criterion_kernel(CriterionArguments<T> a) {
  wait_for_launch_ahead();
  __shared__ double sums[kCriterionWarps];
  const int64_t task = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool classifies = a.labels.first != nullptr;
  double loss = 0.0;
  for (int image = warp; image < a.images; image += kCriterionWarps) {
    const int start = image * a.width;
    const T* const outputs = a.values.of(task) + start;
    T* const bar = a.bar.of(task) + start;
    if (a.outputs.first != nullptr) {
      for (int c = lane; c < a.channels; c += 32) a.outputs.of(task)[image * a.channels + c] = outputs[c];
    }
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
      const T* const targets = a.targets.of(task) + image * a.channels;
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
  put_beta(a, task);
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
    const int start = image * a.width;
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
  put_beta(a, task);
}

// dotᵀ bar = dotᵀ C dot of a task, by a warp
template <typename T>
__global__ void __launch_bounds__(kCriterionThreads) curvature_kernel(CriterionArguments<T> a, double* curvature) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x;
  if (threadIdx.x >= 32) return;
  double sum = 0.0;
  for (int k = threadIdx.x; k < a.images * a.channels; k += 32) {
    const int at = k / a.channels * a.width + k % a.channels;
    sum += static_cast<double>(a.values.of(task)[at]) * static_cast<double>(a.bar.of(task)[at]);
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x == 0) curvature[task] = sum;
}

// [S, width] without the padding
template <typename T>
__global__ void __launch_bounds__(kElementThreads) outputs_kernel(CriterionArguments<T> a, int blocks) {
  wait_for_launch_ahead();
  const int64_t task = blockIdx.x / blocks;
  const int k = static_cast<int>(blockIdx.x % blocks) * kElementThreads + static_cast<int>(threadIdx.x);
  if (k < a.images * a.channels) {
    a.outputs.of(task)[k] = a.values.of(task)[k / a.channels * a.width + k % a.channels];
  }
}

}  // namespace imaml_ext
