// The schemas of the proximal ops.
#pragma once

namespace imaml_ext {

// The proximal objective L(φ) + ½ Σ λ (φ − θ)². theta is [1 or B, N].
inline constexpr const char* kProxSchemas[] = {
    "prox_gradient_(Tensor(a!) grad, Tensor phi, Tensor theta, Tensor lam) -> ()",
    "prox_penalty(Tensor phi, Tensor theta, Tensor lam) -> Tensor",
    "prox_sgd_step_(Tensor(a!) phi, Tensor grad, Tensor theta, Tensor lam, Tensor lr) -> ()",
    "prox_momentum_step_(Tensor(a!) phi, Tensor(b!) velocity, Tensor grad, Tensor theta, Tensor lam, Tensor lr, "
    "float momentum, bool nesterov=False) -> ()",
    "prox_adam_step_(Tensor(a!) phi, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor theta, "
    "Tensor lam, Tensor lr, float beta1, float beta2, float eps, int step) -> ()",
};

}  // namespace imaml_ext
