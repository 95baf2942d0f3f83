// Built-in functions of device code. The place of a call is part of every message about it.
#pragma once

#include <bit>
#include <type_traits>

#include "machine.h"
#include "vector_types.h"

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::wait_for_block({file, line}); }

inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::wait_for_block({file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return __syncthreads_count(predicate != 0, file, line) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return __syncthreads_count(predicate == 0, file, line) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::exchange({"__syncwarp", mask, cuda_on_cpu::lane(), 0}, {file, line});
}

namespace cuda_on_cpu {

template <typename T>
T shuffle(const char* op, unsigned mask, T value, int from, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return std::bit_cast<T>(static_cast<Bits>(exchange({op, mask, from, std::bit_cast<Bits>(value)}, site)));
}

// The lanes of a warp fall into segments of `width`, and none reads beyond its own.
inline int first_of_segment(int width) { return lane() & -width; }
inline int inside_segment(int from, int width) {
  return from >= first_of_segment(width) && from < first_of_segment(width) + width ? from : lane();
}

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::first_of_segment(width) + (from & (width - 1));
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, lane, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::inside_segment(cuda_on_cpu::lane() - static_cast<int>(delta), width);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, lane, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::inside_segment(cuda_on_cpu::lane() + static_cast<int>(delta), width);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, lane, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_SITE) {
  const int from = cuda_on_cpu::lane() ^ lanes;
  const int lane = from < cuda_on_cpu::first_of_segment(width) + width ? from : cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, lane, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  const uint64_t vote = predicate != 0 ? 1 : 0;
  return static_cast<unsigned>(
      cuda_on_cpu::exchange({"__ballot_sync", mask, cuda_on_cpu::kFromAll, vote}, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return __ballot_sync(mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return __ballot_sync(mask, predicate == 0, file, line) == 0;
}

// One thread runs at a time.
template <typename T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  const T before = *to;
  *to = before + value;
  return before;
}

// Nothing is out of order, between two places where threads wait.
inline void __threadfence_block() {}
inline void __threadfence() {}

inline void cudaGridDependencySynchronize() { cuda_on_cpu::wait_for_launch(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// Loads and stores that say how they use the caches.
#define CUDA_ON_CPU_LOAD(name)                                          \
  template <cuda_on_cpu::Word T>                                        \
  T name(const T* from, CUDA_ON_CPU_SITE) {                             \
    cuda_on_cpu::require_aligned(from, sizeof(T), #name, {file, line}); \
    return *from;                                                       \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
#undef CUDA_ON_CPU_LOAD

#define CUDA_ON_CPU_STORE(name)                                       \
  template <cuda_on_cpu::Word T>                                      \
  void name(T* to, std::type_identity_t<T> value, CUDA_ON_CPU_SITE) { \
    cuda_on_cpu::require_aligned(to, sizeof(T), #name, {file, line}); \
    *to = value;                                                      \
  }
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_STORE

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
