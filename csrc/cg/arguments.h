// The conjugate-gradient ops on plain pointers, checked before: what a device's code sees.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cg/row.h"
#include "cg/shift.h"
#include "common/coefficient.h"
#include "common/device.h"
#include "common/host_device.h"
#include "common/number.h"

namespace imaml_ext {

template <typename T>
struct CgRows {
  using C = compute_t<T>;  // float for bfloat16, float16, float32; double for float64
  int64_t rows = 0;
  int64_t cols = 0;
  const T* b = nullptr;   // [B, N]
  const T* hp = nullptr;  // [B, N]  H p (cg_begin_: H x0, or null)
  const T* z = nullptr;   // [B, N]  M r, where a callable made it
  T* x = nullptr;         // [B, N]
  T* r = nullptr;         // [B, N]
  T* p = nullptr;         // [B, N]
  T* best = nullptr;      // [B, N]  written where a row keeps an iterate, and nowhere read before
  Coefficient<C> shift;
  Coefficient<C> inverse_diagonal;
  const double* rtol = nullptr;  // [B] or one for all (stride 0)
  const double* atol = nullptr;
  int64_t rtol_stride = 0;
  int64_t atol_stride = 0;
  RowState* state = nullptr;      // [B]
  int32_t* status = nullptr;      // [B]
  int32_t* iterations = nullptr;  // [B]
  bool update_direction = true;   // make the next direction too (no callable preconditioner)
  bool first = false;             // cg_step_: x is 0 and r and p are b, in no memory but that of b yet
  bool last = false;              // cg_step_: nobody reads r and p afterwards

  // Where r and p are read.
  IMAML_HOST_DEVICE const T* r_now() const { return first ? b : r; }
  IMAML_HOST_DEVICE const T* p_now() const { return first ? b : p; }

  static constexpr double unit_roundoff() { return 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon()); }
  static constexpr bool wide() { return std::is_same_v<T, double>; }
  static constexpr double largest() { return static_cast<double>(std::numeric_limits<T>::max()); }
};

template <typename T>
struct CgArguments : CgRows<T> {
  Allocate allocate;
};

// Shifted systems that follow the rows: J per row.
template <typename T>
struct CgShifts {
  int64_t rows = 0;
  int64_t shifts = 0;
  int64_t cols = 0;
  const T* r = nullptr;               // [B, N], of the rows, after their step
  const RowState* state = nullptr;    // [B]
  const double* sigma = nullptr;      // [B, J]
  T* x = nullptr;                     // [B, J, N]
  T* p = nullptr;                     // [B, J, N]
  ShiftState* shift_state = nullptr;  // [B, J]
  bool last = false;                  // nobody reads p afterwards, and there is no r
};

template <typename T>
struct CgShiftsArguments : CgShifts<T> {
  Allocate allocate;
};

// A device's part of the ops, for the types of rows.
#define IMAML_CG_OPS(Device)                          \
  template <typename T>                               \
  void cg_begin(Device, const CgArguments<T>& a);     \
  template <typename T>                               \
  void cg_direction(Device, const CgArguments<T>& a); \
  template <typename T>                               \
  void cg_step(Device, const CgArguments<T>& a);      \
  template <typename T>                               \
  void cg_shifts_step(Device, const CgShiftsArguments<T>& a);
IMAML_CG_OPS(OnCpu)
IMAML_CG_OPS(OnCuda)
#undef IMAML_CG_OPS

// For the end of a device's file, with IMAML_FOR_ROW_TYPES.
#define IMAML_INSTANTIATE_CG(Device, T)                      \
  template void cg_begin(Device, const CgArguments<T>&);     \
  template void cg_direction(Device, const CgArguments<T>&); \
  template void cg_step(Device, const CgArguments<T>&);
#define IMAML_INSTANTIATE_CG_SHIFTS(Device, T) template void cg_shifts_step(Device, const CgShiftsArguments<T>&);

}  // namespace imaml_ext
