#include "cg/arguments.h"

#include <c10/util/Exception.h>

namespace imaml_ext {

std::pair<const char*, at::Tensor> CgTensors::leader() const {
  if (b.defined()) return {"b", b};
  return {"r", r};
}

at::ScalarType CgTensors::check(const char* op) const {
  const auto [leader_name, like] = leader();
  check_rows(op, leader_name, like);
  const std::pair<const char*, const at::Tensor&> vectors[] = {{"hp", hp}, {"z", z}, {"x", x}, {"r", r}, {"p", p}};
  for (const auto& [name, vector] : vectors) {
    if (vector.defined()) check_like(op, name, vector, leader_name, like);
  }
  const bool all = x.defined() && r.defined() && p.defined();
  const bool none = !x.defined() && !r.defined() && !p.defined() && !hp.defined() && !inverse_diagonal.defined();
  TORCH_CHECK_VALUE(all || none, op,
                    ": x, r and p must be given together, or none of them where there is no hx and no "
                    "inverse_diagonal, got ",
                    x.defined() ? "x" : "no x", ", ", r.defined() ? "r" : "no r", ", ", p.defined() ? "p" : "no p");
  if (shift.defined()) check_coefficient(op, "shift", shift, like);
  if (inverse_diagonal.defined()) check_coefficient(op, "inverse_diagonal", inverse_diagonal, like);
  const int64_t rows = like.size(0);
  for (const auto& [name, tolerance] : {std::pair{"rtol", rtol}, std::pair{"atol", atol}}) {
    if (!tolerance.defined()) continue;
    const bool one = tolerance.dim() == 1 && tolerance.size(0) == 1;
    check_table(op, name, tolerance, at::kDouble, {one ? 1 : rows}, like);
  }
  check_table(op, "state", state, at::kDouble, {rows, kRowStateWidth}, like);
  check_table(op, "status", status, at::kInt, {rows}, like);
  if (iterations.defined()) check_table(op, "iterations", iterations, at::kInt, {rows}, like);
  return like.scalar_type();
}

}  // namespace imaml_ext
