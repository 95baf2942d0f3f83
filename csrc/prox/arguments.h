// Validated arguments of the proximal ops, as plain pointers: what a kernel sees.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include "common/checks.h"
#include "common/coefficient.h"

namespace imaml_ext {

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
struct ProxArguments {
  using C = at::opmath_type<T>;
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

struct ProxTensors {
  at::Tensor phi, grad, theta, first, second, lam, lr, penalty;
  const char* first_name = "velocity";
  ProxRule rule{};

  // The only place that validates. Each failure names the op and the argument. Returns the vectors' dtype.
  at::ScalarType check(const char* op) const;

  template <typename T>
  ProxArguments<T> arguments() const;
};

template <typename T>
ProxArguments<T> ProxTensors::arguments() const {
  using C = typename ProxArguments<T>::C;
  ProxArguments<T> a;
  a.rows = phi.size(0);
  a.cols = phi.size(1);
  a.phi = const_cast<T*>(phi.const_data_ptr<T>());
  if (grad.defined()) a.grad = const_cast<T*>(grad.const_data_ptr<T>());
  a.theta = theta.const_data_ptr<T>();
  a.theta_row_stride = theta.size(0) == 1 ? 0 : a.cols;
  if (first.defined()) a.first = first.mutable_data_ptr<T>();
  if (second.defined()) a.second = second.mutable_data_ptr<T>();
  a.lam = as_coefficient<C>(lam);
  if (lr.defined()) a.lr = as_coefficient<C>(lr);
  if (penalty.defined()) a.penalty = penalty.mutable_data_ptr<C>();
  a.rule = rule;
  return a;
}

// Adam's rule at step t = 1, 2, …; throws ValueError for a step below 1.
ProxRule adam_rule(const char* op, double beta1, double beta2, double eps, int64_t step);

}  // namespace imaml_ext
