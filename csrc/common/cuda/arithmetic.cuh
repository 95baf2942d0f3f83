// Arithmetic on the elements of rows.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda/tile.cuh"

namespace imaml_ext {

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// Σ a b, a lane's part
template <typename C, int V>
__device__ __forceinline__ void add_products(double& sum, const Pack<C, V>& a, const Pack<C, V>& b) {
#pragma unroll
  for (int k = 0; k < V; ++k) sum = fma(static_cast<double>(a.v[k]), static_cast<double>(b.v[k]), sum);
}

// What is squared or multiplied in a sum: of float64 numbers, whose squares may leave their range, `scale` times them.
template <typename C, int V>
__device__ __forceinline__ Pack<C, V> scaled(Pack<C, V> numbers, double scale) {
  if constexpr (std::is_same_v<C, double>) {
#pragma unroll
    for (int k = 0; k < V; ++k) numbers.v[k] *= scale;
  }
  return numbers;
}

}  // namespace imaml_ext
