#include "lsqr/solver.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "common/checks.h"
#include "common/solve.h"
#include "lsqr/ops.h"
#include "lsqr/row.h"

namespace imaml_ext {

constexpr const char* kSolver = "lsqr";

LsqrResult lsqr(const RowOperator& matvec, const RowOperator& rmatvec, const at::Tensor& y_in, int64_t unknowns,
                const LsqrOptions& options) {
  TORCH_CHECK_VALUE(static_cast<bool>(matvec), "lsqr: matvec must be callable, got an empty function");
  TORCH_CHECK_VALUE(static_cast<bool>(rmatvec), "lsqr: rmatvec must be callable, got an empty function");
  const at::Tensor y = y_in.detach().contiguous();
  check_rows(kSolver, "y", y);
  const int64_t batch = y.size(0);
  LsqrResult result;
  result.x = at::zeros({batch, unknowns}, y.options());
  LsqrOptions o = options;
  complete_stopping(kSolver, o.max_iterations, o.check_every, o.rtol, o.atol, y);
  if (o.shift.defined()) check_coefficient(kSolver, "shift", o.shift, result.x);
  if (o.x0) {
    check_like(kSolver, "x0", o.x0->contiguous(), "x", result.x);
    result.x.copy_(o.x0->detach());
  }
  result.status = at::empty({batch}, y.options().dtype(at::kInt));
  result.iterations = at::empty_like(result.status);
  at::Tensor state = at::empty({batch, kLsqrStateWidth}, y.options().dtype(at::kDouble));
  at::Tensor r = at::empty_like(y), p = at::zeros_like(result.x), best = at::empty_like(result.x);
  const auto shift = o.shift.defined() ? std::optional(o.shift) : std::nullopt;

  // s = Mᵀr,   p ← s + β p
  const auto direction = [&] {
    const at::Tensor t = checked_product(kSolver, rmatvec, "rmatvec", r, {}, "rmatvec", "x", result.x);
    call<lsqr_direction_>("imaml_ext::lsqr_direction_", t, shift, result.x, p, best, state, result.status,
                          result.iterations);
  };
  call<lsqr_begin_>("imaml_ext::lsqr_begin_", y, o.rtol, o.atol, o.x0.has_value(), r, state, result.status,
                    result.iterations);
  direction();
  const int64_t pairs = o.max_iterations + (o.x0 ? 1 : 0);  // a warm start is measured first
  for (int64_t k = 0; k < pairs; ++k) {
    if (o.check_every > 0 && k % o.check_every == 0 && !any_at_work(result.status)) break;
    const at::Tensor q = checked_product(kSolver, matvec, "matvec", p, {}, "matvec", "y", y);
    call<lsqr_residual_>("imaml_ext::lsqr_residual_", q, y, r, state, result.status);
    direction();
  }

  // A row still at work has spent its iterations.
  result.status.masked_fill_(result.status.ge(kIterating), kMaxIterations);
  const at::Tensor unit = state.select(1, kLsqrUnit);
  result.residual_norm = state.select(1, kLsqrResidual).mul(unit);
  result.gradient_norm = state.select(1, kLsqrGradient).mul(unit);
  return result;
}

}  // namespace imaml_ext
