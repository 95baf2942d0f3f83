// The proximal ops: their schemas, their checks and their registration, for every device.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>

#include "common/on_device.h"
#include "prox/tensors.h"

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

namespace {

// Adam's rule at step t = 1, 2, …
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

// Validates, then calls work(device, arguments) in the vectors' type.
template <typename Work>
void run(at::ScalarType dtype, const ProxTensors& tensors, const Work& work) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, "imaml_ext", [&] {
    auto arguments = tensors.arguments<scalar_t>();
    if (arguments.rows == 0) return;
    on_device_of(tensors.phi, arguments, work);
  });
}

void apply(const char* op, ProxUpdate update, const ProxTensors& tensors) {
  run(tensors.check(op), tensors, [&](auto device, const auto& a) { prox_update(device, update, a); });
}

void prox_gradient_(at::Tensor& grad, const at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam;
  apply("prox_gradient_", ProxUpdate::kGradient, t);
}

at::Tensor prox_penalty_op(const at::Tensor& phi, const at::Tensor& theta, const at::Tensor& lam) {
  ProxTensors t;
  t.phi = phi, t.theta = theta, t.lam = lam;
  const auto dtype = t.check("prox_penalty");
  t.penalty = at::empty({phi.size(0)}, phi.options().dtype(compute_type(dtype)));
  run(dtype, t, [](auto device, const auto& a) { prox_penalty(device, a); });
  return t.penalty;
}

void prox_sgd_step_(at::Tensor& phi, const at::Tensor& grad, const at::Tensor& theta, const at::Tensor& lam,
                    const at::Tensor& lr) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr;
  apply("prox_sgd_step_", ProxUpdate::kSgd, t);
}

void prox_momentum_step_(at::Tensor& phi, at::Tensor& velocity, const at::Tensor& grad, const at::Tensor& theta,
                         const at::Tensor& lam, const at::Tensor& lr, double momentum, bool nesterov) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr, t.first = velocity;
  t.rule.momentum = momentum;
  t.rule.nesterov = nesterov;
  apply("prox_momentum_step_", ProxUpdate::kMomentum, t);
}

void prox_adam_step_(at::Tensor& phi, at::Tensor& exp_avg, at::Tensor& exp_avg_sq, const at::Tensor& grad,
                     const at::Tensor& theta, const at::Tensor& lam, const at::Tensor& lr, double beta1, double beta2,
                     double eps, int64_t step) {
  ProxTensors t;
  t.phi = phi, t.grad = grad, t.theta = theta, t.lam = lam, t.lr = lr, t.first = exp_avg, t.second = exp_avg_sq;
  t.first_name = "exp_avg";
  t.rule = adam_rule("prox_adam_step_", beta1, beta2, eps, step);
  apply("prox_adam_step_", ProxUpdate::kAdam, t);
}

void register_ops(torch::Library& m) {
  m.impl("prox_gradient_", &prox_gradient_);
  m.impl("prox_penalty", &prox_penalty_op);
  m.impl("prox_sgd_step_", &prox_sgd_step_);
  m.impl("prox_momentum_step_", &prox_momentum_step_);
  m.impl("prox_adam_step_", &prox_adam_step_);
}

}  // namespace

// The proximal objective L(φ) + ½ Σ λ (φ − θ)². theta is [1 or B, N].
TORCH_LIBRARY_FRAGMENT(imaml_ext, m) {
  m.def("prox_gradient_(Tensor(a!) grad, Tensor phi, Tensor theta, Tensor lam) -> ()");
  m.def("prox_penalty(Tensor phi, Tensor theta, Tensor lam) -> Tensor");
  m.def("prox_sgd_step_(Tensor(a!) phi, Tensor grad, Tensor theta, Tensor lam, Tensor lr) -> ()");
  m.def(
      "prox_momentum_step_(Tensor(a!) phi, Tensor(b!) velocity, Tensor grad, Tensor theta, Tensor lam, Tensor lr, "
      "float momentum, bool nesterov=False) -> ()");
  m.def(
      "prox_adam_step_(Tensor(a!) phi, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor theta, "
      "Tensor lam, Tensor lr, float beta1, float beta2, float eps, int step) -> ()");
}
IMAML_REGISTER(register_ops)

}  // namespace imaml_ext
