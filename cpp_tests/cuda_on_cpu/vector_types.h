// CUDA's vectors of two and four numbers, which are read and written at once and have to be aligned for it.
#pragma once

#include <type_traits>

namespace cuda_on_cpu {
template <typename T>
inline constexpr bool is_vector = false;
}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_VECTORS(Number, name)                                                           \
  struct alignas(2 * sizeof(Number)) name##2 { Number x, y; };                                      \
  struct alignas(4 * sizeof(Number) < 16 ? 4 * sizeof(Number) : 16) name##4 { Number x, y, z, w; }; \
  inline name##2 make_##name##2(Number x, Number y) { return {x, y}; }                              \
  inline name##4 make_##name##4(Number x, Number y, Number z, Number w) { return {x, y, z, w}; }    \
  template <>                                                                                       \
  inline constexpr bool cuda_on_cpu::is_vector<name##2> = true;                                     \
  template <>                                                                                       \
  inline constexpr bool cuda_on_cpu::is_vector<name##4> = sizeof(name##4) <= 16

CUDA_ON_CPU_VECTORS(unsigned char, uchar);
CUDA_ON_CPU_VECTORS(short, short);
CUDA_ON_CPU_VECTORS(unsigned short, ushort);
CUDA_ON_CPU_VECTORS(int, int);
CUDA_ON_CPU_VECTORS(unsigned, uint);
CUDA_ON_CPU_VECTORS(float, float);
CUDA_ON_CPU_VECTORS(double, double);
CUDA_ON_CPU_VECTORS(long long, longlong);

#undef CUDA_ON_CPU_VECTORS

namespace cuda_on_cpu {
// What one instruction loads or stores.
template <typename T>
concept Word = is_vector<T> || (std::is_arithmetic_v<T> && !std::is_same_v<T, bool> && sizeof(T) <= 8);
}  // namespace cuda_on_cpu
