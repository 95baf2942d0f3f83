// The conjugate-gradient ops, for the solver's loop. It calls them through torch's dispatcher, so that profilers and
// modes see them, by the types that they have here.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace imaml_ext {

void cg_begin_(const at::Tensor& b, const std::optional<at::Tensor>& hx, const at::Tensor& shift,
               const std::optional<at::Tensor>& inverse_diagonal, const at::Tensor& rtol, const at::Tensor& atol,
               const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& r,
               const std::optional<at::Tensor>& p, at::Tensor& state, at::Tensor& status, at::Tensor& iterations,
               bool update_direction);

void cg_direction_(const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& inverse_diagonal,
                   const at::Tensor& x, const at::Tensor& r, at::Tensor& p, at::Tensor& state, at::Tensor& status);

void cg_step_(const at::Tensor& hp, const at::Tensor& b, const at::Tensor& shift,
              const std::optional<at::Tensor>& inverse_diagonal, at::Tensor& x, at::Tensor& r, at::Tensor& p,
              at::Tensor& best, at::Tensor& state, at::Tensor& status, at::Tensor& iterations, bool update_direction,
              bool first, bool last);

void cg_shifts_step_(const std::optional<at::Tensor>& r, const at::Tensor& state, const at::Tensor& sigma,
                     at::Tensor& x, at::Tensor& p, at::Tensor& shift_state, bool last);

}  // namespace imaml_ext
