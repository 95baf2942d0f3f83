// The proximal ops on plain pointers, checked before: what a device's code sees.
#pragma once

#include <cstdint>

#include "common/coefficient.h"
#include "common/device.h"
#include "common/number.h"

namespace imaml_ext {

enum class ProxUpdate { kGradient, kSgd, kMomentum, kAdam };  // the first changes the gradient, the others φ

// What the update rules need beside the tensors, in float64.
struct ProxRule {
  double momentum = 0.0;
  bool nesterov = false;
  double beta1 = 0.0;
  double beta2 = 0.0;
  double eps = 0.0;
  double correction1 = 1.0;  // 1 − β1^t
  double correction2 = 1.0;  // 1 − β2^t
};

template <typename T>
struct ProxRows {
  using C = compute_t<T>;
  int64_t rows = 0;
  int64_t cols = 0;
  T* phi = nullptr;          // [B, N]
  T* grad = nullptr;         // [B, N]; written by prox_gradient_ only
  const T* theta = nullptr;  // [1 or B, N]
  int64_t theta_row_stride = 0;
  T* first = nullptr;   // [B, N]  velocity, or Adam's first moment
  T* second = nullptr;  // [B, N]  Adam's second moment
  Coefficient<C> lam;
  Coefficient<C> lr;
  C* penalty = nullptr;  // [B]
  ProxRule rule;
};

template <typename T>
struct ProxArguments : ProxRows<T> {
  Allocate allocate;  // prox_penalty alone uses it
};

// A device's part of the ops, for the types of rows.
#define IMAML_PROX_OPS(Device)                                            \
  template <typename T>                                                   \
  void prox_update(Device, ProxUpdate update, const ProxArguments<T>& a); \
  template <typename T>                                                   \
  void prox_penalty(Device, const ProxArguments<T>& a);
IMAML_PROX_OPS(OnCpu)
IMAML_PROX_OPS(OnCuda)
#undef IMAML_PROX_OPS

// For the end of a device's file, with IMAML_FOR_ROW_TYPES.
#define IMAML_INSTANTIATE_PROX(Device, T)                                 \
  template void prox_update(Device, ProxUpdate, const ProxArguments<T>&); \
  template void prox_penalty(Device, const ProxArguments<T>&);

}  // namespace imaml_ext
