// The least-squares ops on plain pointers, checked before: what a device's code sees.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/coefficient.h"
#include "common/device.h"
#include "common/host_device.h"
#include "common/number.h"
#include "lsqr/row.h"

namespace imaml_ext {

// An op goes over rows of one length: `cols` is M of y, q and r (lsqr_begin_, lsqr_residual_), or N of the others.
template <typename T>
struct LsqrRows {
  using Number = T;
  using C = compute_t<T>;  // float for bfloat16, float16, float32; double for float64
  int64_t rows = 0;
  int64_t cols = 0;
  const T* y = nullptr;          // [B, M]
  const T* q = nullptr;          // [B, M]  M p̂, or M x of a row that verifies
  T* r = nullptr;                // [B, M]  r̂
  const T* t = nullptr;          // [B, N]  Mᵀr̂
  T* x = nullptr;                // [B, N]
  T* p = nullptr;                // [B, N]  p̂, or x of a row that verifies
  T* best = nullptr;             // [B, N]  written where a row keeps an iterate, and nowhere read before
  Coefficient<C> shift;          // absent: 0
  const double* rtol = nullptr;  // [B] or one for all (stride 0)
  const double* atol = nullptr;
  int64_t rtol_stride = 0;
  int64_t atol_stride = 0;
  bool warm = false;              // lsqr_begin_: x is a warm start
  LsqrState* state = nullptr;     // [B]
  int32_t* status = nullptr;      // [B]
  int32_t* iterations = nullptr;  // [B]

  static constexpr bool wide() { return std::is_same_v<T, double>; }
  IMAML_HOST_DEVICE bool damped() const { return shift.data != nullptr; }
  static constexpr LsqrNumbers numbers() {
    return {0.5 * static_cast<double>(std::numeric_limits<T>::epsilon()),
            0.5 * static_cast<double>(std::numeric_limits<C>::epsilon()),
            static_cast<double>(std::numeric_limits<T>::max()), static_cast<double>(std::numeric_limits<C>::max()),
            wide() ? 1000 : 100};
  }
};

template <typename T>
struct LsqrArguments : LsqrRows<T> {
  Allocate allocate;
};

// A device's part of the ops, for the types of rows.
#define IMAML_LSQR_OPS(Device)                           \
  template <typename T>                                  \
  void lsqr_begin(Device, const LsqrArguments<T>& a);    \
  template <typename T>                                  \
  void lsqr_residual(Device, const LsqrArguments<T>& a); \
  template <typename T>                                  \
  void lsqr_direction(Device, const LsqrArguments<T>& a);
IMAML_LSQR_OPS(OnCpu)
IMAML_LSQR_OPS(OnCuda)
#undef IMAML_LSQR_OPS

// For the end of a device's file, with IMAML_FOR_ROW_TYPES.
#define IMAML_INSTANTIATE_LSQR(Device, T)                       \
  template void lsqr_begin(Device, const LsqrArguments<T>&);    \
  template void lsqr_residual(Device, const LsqrArguments<T>&); \
  template void lsqr_direction(Device, const LsqrArguments<T>&);

}  // namespace imaml_ext
