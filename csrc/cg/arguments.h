// The conjugate-gradient ops on plain pointers, checked before: what a device's code sees.
#pragma once

#include "cg/row.h"
#include "cg/shift.h"
#include "common/device.h"
#include "common/system.h"

namespace imaml_ext {

template <typename T>
struct CgRows : SystemRows<T, RowState> {
  using typename SystemRows<T, RowState>::C;
  const T* z = nullptr;  // [B, N]  M r, where a callable made it
  T* r = nullptr;        // [B, N]
  T* p = nullptr;        // [B, N]
  Coefficient<C> inverse_diagonal;
  bool update_direction = true;  // make the next direction too (no callable preconditioner)
  bool first = false;            // cg_step_: x is 0 and r and p are b, in no memory but that of b yet
  bool last = false;             // cg_step_: nobody reads r and p afterwards

  // Where r and p are read.
  IMAML_HOST_DEVICE const T* r_now() const { return first ? this->b : r; }
  IMAML_HOST_DEVICE const T* p_now() const { return first ? this->b : p; }
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
