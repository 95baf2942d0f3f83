// The least-squares ops, for the solver's loop. It calls them through torch's dispatcher, so that profilers and modes
// see them, by the types that they have here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace imaml_ext {

void lsqr_begin_(const at::Tensor& y, const at::Tensor& rtol, const at::Tensor& atol, bool warm, at::Tensor& r,
                 at::Tensor& state, at::Tensor& status, at::Tensor& iterations);

void lsqr_residual_(const at::Tensor& q, const at::Tensor& y, at::Tensor& r, at::Tensor& state, at::Tensor& status);

void lsqr_direction_(const at::Tensor& t, const std::optional<at::Tensor>& shift, at::Tensor& x, at::Tensor& p,
                     at::Tensor& best, at::Tensor& state, at::Tensor& status, at::Tensor& iterations);

}  // namespace imaml_ext
