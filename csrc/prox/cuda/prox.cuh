// What other ops on CUDA take of the proximal ones.
#pragma once

#include <ATen/core/Tensor.h>

namespace imaml_ext {

// φ ← φ − η (g + λ (φ − θ)), arguments checked
void prox_sgd_step_on_cuda(at::Tensor& phi, const at::Tensor& grad, const at::Tensor& theta, const at::Tensor& lam,
                           const at::Tensor& lr);

}  // namespace imaml_ext
