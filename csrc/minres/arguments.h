// The MINRES ops on plain pointers, checked before: what a device's code sees.
#pragma once

#include "common/device.h"
#include "common/system.h"
#include "minres/row.h"

namespace imaml_ext {

template <typename T>
struct MinresRows : SystemRows<T, MinresState> {
  static constexpr T* r = nullptr;  // b − A x is in no memory: what needs it computes it again
  const T* v = nullptr;             // [B, N]  the vector of the product (minres_begin_: x0)
  T* v_next = nullptr;              // [B, N]  v₋, then the next v, or x for a row that measures
  const T* q = nullptr;             // [B, N]  q₁
  T* q_next = nullptr;              // [B, N]  q₂, then q
  double* diagonal = nullptr;       // [B, m]  α of the first Krylov space; null: not kept
  double* off_diagonal = nullptr;   // [B, m − 1]  β between them
  int64_t coefficients = 0;         // m
  bool first = false;               // nobody has written to v_next
  bool last = false;                // nobody reads v_next and q_next afterwards

  IMAML_HOST_DEVICE void record(int64_t row, const MinresStep& step) const {
    const auto k = static_cast<int64_t>(this->state[row].coefficients) - 1;
    if (diagonal == nullptr || !step.recorded || k >= coefficients) return;
    diagonal[row * coefficients + k] = step.alpha;
    if (k > 0) off_diagonal[row * (coefficients - 1) + k - 1] = step.beta;
  }
};

template <typename T>
struct MinresArguments : MinresRows<T> {
  Allocate allocate;
};

// A device's part of the ops, for the types of rows.
#define IMAML_MINRES_OPS(Device)                          \
  template <typename T>                                   \
  void minres_begin(Device, const MinresArguments<T>& a); \
  template <typename T>                                   \
  void minres_step(Device, const MinresArguments<T>& a);
IMAML_MINRES_OPS(OnCpu)
IMAML_MINRES_OPS(OnCuda)
#undef IMAML_MINRES_OPS

// For the end of a device's file, with IMAML_FOR_ROW_TYPES.
#define IMAML_INSTANTIATE_MINRES(Device, T)                      \
  template void minres_begin(Device, const MinresArguments<T>&); \
  template void minres_step(Device, const MinresArguments<T>&);

}  // namespace imaml_ext
