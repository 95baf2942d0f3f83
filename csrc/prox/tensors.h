// Checks the arguments of an op, and packs them; a tensor that an op does not use stays undefined.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/checks.h"
#include "prox/arguments.h"

namespace imaml_ext {

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

}  // namespace imaml_ext
