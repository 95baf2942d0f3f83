// The MINRES ops, for the solver's loop. It calls them through torch's dispatcher, so that profilers and modes see
// them, by the types that they have here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace imaml_ext {

void minres_begin_(const at::Tensor& b, const std::optional<at::Tensor>& hx, const at::Tensor& shift,
                   const at::Tensor& rtol, const at::Tensor& atol, at::Tensor& x, at::Tensor& v, at::Tensor& best,
                   at::Tensor& state, at::Tensor& status, at::Tensor& iterations);

void minres_step_(const at::Tensor& hv, const at::Tensor& b, const at::Tensor& shift, at::Tensor& x,
                  const at::Tensor& v, at::Tensor& v_next, const at::Tensor& q, at::Tensor& q_next, at::Tensor& best,
                  at::Tensor& state, at::Tensor& status, at::Tensor& iterations,
                  const std::optional<at::Tensor>& diagonal, const std::optional<at::Tensor>& off_diagonal, bool first,
                  bool last);

}  // namespace imaml_ext
