// The systems of a solve on plain pointers, checked before: what a device's code sees of every solver.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/coefficient.h"
#include "common/host_device.h"
#include "common/number.h"

namespace imaml_ext {

template <typename T, typename State>
struct SystemRows {
  using Number = T;
  using C = compute_t<T>;  // float for bfloat16, float16, float32; double for float64
  int64_t rows = 0;
  int64_t cols = 0;
  const T* b = nullptr;   // [B, N]
  const T* hp = nullptr;  // [B, N]  H p (before the first step: H x0, or null)
  T* x = nullptr;         // [B, N]
  T* best = nullptr;      // [B, N]  written where a row keeps an iterate, and nowhere read before
  Coefficient<C> shift;
  const double* rtol = nullptr;  // [B] or one for all (stride 0)
  const double* atol = nullptr;
  int64_t rtol_stride = 0;
  int64_t atol_stride = 0;
  State* state = nullptr;         // [B]
  int32_t* status = nullptr;      // [B]
  int32_t* iterations = nullptr;  // [B]

  static constexpr double unit_roundoff() { return 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon()); }
  static constexpr bool wide() { return std::is_same_v<T, double>; }
  static constexpr double largest() { return static_cast<double>(std::numeric_limits<T>::max()); }
};

}  // namespace imaml_ext
