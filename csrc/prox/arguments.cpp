#include "prox/arguments.h"

#include <c10/util/Exception.h>

#include <cmath>

namespace imaml_ext {

at::ScalarType ProxTensors::check(const char* op) const {
  check_rows(op, "phi", phi);
  if (grad.defined()) check_like(op, "grad", grad, "phi", phi);
  if (first.defined()) check_like(op, first_name, first, "phi", phi);
  if (second.defined()) check_like(op, "exp_avg_sq", second, "phi", phi);
  TORCH_CHECK_VALUE(
      theta.dim() == 2 && (theta.size(0) == 1 || theta.size(0) == phi.size(0)) && theta.size(1) == phi.size(1), op,
      ": theta must have shape [1 or ", phi.size(0), ", ", phi.size(1), "], got ", theta.sizes());
  check_like(op, "theta", theta, "phi", theta.size(0) == phi.size(0) ? phi : phi.narrow(0, 0, theta.size(0)));
  check_coefficient(op, "lam", lam, phi);
  if (lr.defined()) check_coefficient(op, "lr", lr, phi);
  return phi.scalar_type();
}

ProxRule adam_rule(const char* op, double beta1, double beta2, double eps, int64_t step) {
  TORCH_CHECK_VALUE(step >= 1, op, ": step counts from 1, got ", step);
  ProxRule rule;
  rule.beta1 = beta1;
  rule.beta2 = beta2;
  rule.eps = eps;
  rule.correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  rule.correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  return rule;
}

}  // namespace imaml_ext
